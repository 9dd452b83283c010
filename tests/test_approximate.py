"""Sums over time in place of trains: exact where the input is constant, and refused where they do not say enough."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.node import Score

from .helpers import RESETS, assert_filled, assert_same, estimate, gradients, nothing_changes
from .statistical.networks import NEURONS, STEPS, TwoLayers, data

KINDS = ["membrane", "gaussian", "logistic"]
CLOSE = {"rtol": 1e-5, "atol": 1e-9}
X, Y = data()


def with_noise(net: TwoLayers, kind: str) -> TwoLayers:
    if kind != "membrane":
        for lif in (net.lif1, net.lif2):
            lif.noise = slr.EscapeNoise(0.5, distribution=kind).double()
    return net


def estimated(net: Any, estimator: str, copies: int = 8) -> dict[str, Tensor]:
    return estimate(estimator, net, arguments=(X, Y), copies=copies)


class OneLayer(TwoLayers):
    """One noisy layer, driven by a constant current."""

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        current, out = self.fc1(x[:, 0]), torch.zeros(())
        for _ in range(STEPS):
            out = out + self.readout(self.lif1(current))
        return out


@pytest.mark.filterwarnings("ignore:lif2.*not called")
@pytest.mark.parametrize(
    ("neuron", "kind", "reset"),
    [(neuron, kind, RESETS[(i + j) % 3]) for i, neuron in enumerate(NEURONS) for j, kind in enumerate(KINDS)],
)
def test_equals_vanilla_where_the_input_is_constant(neuron: str, kind: str, reset: str) -> None:
    net = with_noise(OneLayer(neuron, reset), kind)
    # Membrane noise refuses to learn a threshold that one sample meets twice.
    net.lif1.threshold.requires_grad_("at once" not in neuron or kind != "membrane" or reset != "subtract")
    net.lif2.requires_grad_(False)
    assert_same(estimated(net, "approximate"), estimated(net, "vanilla"), **CLOSE)


def by_hand(net: TwoLayers) -> dict[str, Tensor]:
    """The definition: scores summed over time against the block at the mean rate, from the draws of vanilla."""
    samples: dict[int, list[Tensor]] = {}
    spikes: list[Tensor] = []
    handle = net.lif1.register_forward_hook(lambda *args: spikes.append(args[2].detach()))
    original = Score.forward

    def keep(ctx: Any, sample: Any, *rest: Any) -> Tensor:
        score = sample.noise.location_score(sample.epsilon) / sample.sigma.detach()
        samples.setdefault(id(sample.noise), []).append(score)
        return original(ctx, sample, *rest)

    losses: list[Tensor] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses.append(net.loss(x, y))
        return losses[-1]

    # Kernels have no node of this kind.
    with pytest.MonkeyPatch.context() as patch, kernels.off():
        patch.setattr(Score, "forward", staticmethod(keep))
        slr.Vanilla(net, 8, seed=0).backward(loss_fn, X, Y)
    handle.remove()
    first, second = (sum(samples[id(lif.noise)][-STEPS:]) for lif in (net.lif1, net.lif2))
    table = losses[-1].detach().view(8, -1)
    weights = (slr.baselines.leave_one_out(table) / table.numel()).reshape(-1, 1)
    net.zero_grad()
    # The first call looks at other passes before.
    rate = torch.stack(spikes[-STEPS:]).mean(0)
    (net.fc2(rate) * weights * second).sum().backward()
    current = torch.stack([net.fc1(X[:, t]) for t in range(STEPS)]).mean(0).repeat(8, 1)
    (current * weights * first).sum().backward()
    return gradients(net)


def test_is_the_definition_in_two_layers_with_an_input_that_changes() -> None:
    net = TwoLayers("Leaky", "subtract").requires_grad_(False)
    for block in (net.fc1, net.fc2):
        block.requires_grad_(True)
    expected = by_hand(net)
    found = estimated(net, "approximate")
    assert_same({name: found[name] for name in expected}, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_element_wise_gradients_are_exact_in_two_layers(kind: str) -> None:
    net = with_noise(TwoLayers("Synaptic", "zero"), kind)
    expected, found = estimated(net, "vanilla"), estimated(net, "approximate")
    exact = {name for name in expected if "lif" in name or "readout" in name}
    assert_same({name: found[name] for name in exact}, {name: expected[name] for name in exact}, **CLOSE)
    assert not torch.allclose(found["fc2.weight"], expected["fc2.weight"])


class Branches(nn.Module):
    """Convolution, normalisation, pooling, a residual branch, and one-to-one recurrence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"beta": 0.8, "init_hidden": True, "noise": True}
        self.conv1, self.lif1 = nn.Conv2d(1, 4, 3, padding=1), slr.Leaky(**options)
        self.conv2, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval()
        self.lif2 = slr.Leaky(**options)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 6)
        self.lif3 = slr.RLeaky(V=0.3, all_to_all=False, learn_beta=True, **options)
        self.calls = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for _ in range(STEPS):
            self.calls += 1
            first = self.lif1(self.conv1(x))
            second = self.lif2(self.norm(self.conv2(first)) + first)
            out = out + self.lif3(self.fc(self.pool(second).flatten(1)))
        return (out - y).square().sum(1)


def test_any_block_and_neuron_gets_a_gradient_from_one_evaluation_each() -> None:
    net = Branches()
    x, y = torch.rand(3, 1, 4, 4) * 3, torch.rand(3, 6)
    backwards: list[str] = []

    def count_backward(output: Tensor, name: str) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: backwards.append(name))

    for name in ("conv1", "conv2", "fc"):
        getattr(net, name).register_forward_hook(lambda *a, name=name: count_backward(a[2], name))
    estimator = slr.Approximate(net, 8, seed=0)
    estimator.backward(net.loss, x, y)
    assert_filled(net)
    net.calls = 0
    backwards.clear()
    estimator.backward(net.loss, x, y)
    # A second pass of two time steps, or what remains of it.
    assert net.calls <= STEPS + 2
    assert sorted(backwards) == ["conv1"] * STEPS + ["conv2", "fc"]


def lif(**options: Any) -> Any:
    return slr.Leaky(beta=0.8, threshold=0.5, noise="escape", **options)


class Memory(nn.Module):
    """Spikes that wait on the way to the next layer, or come back; or membrane potentials that are read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(3, 4), lif(), nn.Linear(4, 4), lif()
        self.dropout = nn.Dropout(0.5)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        last, total, trace = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for t in range(4):
            current = self.fc1(x[:, t])
            spikes, mem1 = self.lif1(slr.per_copy(current) + last if self.kind == "feedback" else current, mem1)
            trace = 0.5 * trace + spikes
            enters = {"delay": last if t else torch.zeros_like(spikes), "trace": trace, "dropout": self.dropout(spikes)}
            out, mem2 = self.lif2(self.fc2(enters.get(self.kind, spikes)), mem2)
            last = out if self.kind == "feedback" else spikes
            total = total + (mem2 if self.kind == "membrane" else out)
        return (total.sum(1) - 1).square()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("delay", r"what enters lif2 \(Leaky\) changes.*memory between layers \(a delay.*counterfactual"),
        ("trace", r"what enters lif2 \(Leaky\) changes.*memory between layers"),
        ("feedback", r"what enters lif1 \(Leaky\).*spikes that come back"),
        ("dropout", r"what enters lif2 \(Leaky\) changes.*dropout"),
        ("membrane", r"the loss reads the membrane potential of a noisy neuron.*reset_mechanism='none'"),
    ],
)
def test_what_sums_over_time_do_not_know_is_refused(kind: str, said: str) -> None:
    net = Memory(kind)
    x, y = torch.rand(5, 4, 3), torch.zeros(5)
    estimator = slr.Approximate(net, 4)
    for _ in range(2):
        with nothing_changes(net), pytest.raises(ValueError, match=said):
            estimator.backward(net.loss, x, y)
    slr.Vanilla(net, 4).backward(net.loss, x, y)
    net.kind = "none"
    estimator.backward(net.loss, x, y)


@pytest.mark.parametrize(("estimator", "module"), [("approximate", "approximate"), ("vanilla", "fused")])
def test_spikes_that_a_readout_keeps_as_bits_give_the_same_gradient(estimator: str, module: str) -> None:
    def found(bits: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        lif = slr.Leaky(beta=0.8, threshold=0.5, noise="escape", init_hidden=True)
        net = nn.Sequential(nn.Linear(4, 9), lif, nn.Linear(9, 3)).double()

        def losses(x: Tensor, y: Tensor) -> Tensor:
            slr.reset(net)
            return sum(net(x).square() for _ in range(4)).sub(y).square().mean(1)  # type: ignore[union-attr]

        with pytest.MonkeyPatch.context() as patch:
            for place in ("blocks", f"gradients.{module}"):
                patch.setattr(import_module(f"snntorch_lr.{place}"), "WORTH_KEEPING_AS_BITS", bits)
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            slr.attach(optimizer, net, estimator, copies=4, seed=1)
            optimizer.step(slr.closure(losses, torch.rand(5, 4).double(), torch.rand(5, 3).double()))
        return gradients(net)

    assert_same(found(0), found(1e9), rtol=1e-9, atol=1e-12)
