from __future__ import annotations

from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.estimators.storing import StoringStep

from .statistical.networks import NEURONS, RESETS, STEPS, TwoLayers, data
from .test_memory import assert_same, gradients, with_noise

CAN_RESET_AT_ONCE = ["Leaky", "Synaptic", "RLeaky"]


class OneLayer(TwoLayers):
    """One noisy layer, driven by a constant current."""

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        current, out = self.fc1(x[:, 0]), torch.zeros(())
        for _ in range(STEPS):
            out = out + self.readout(self.lif1(current))
        return out


def without_recurrent_block(found: dict[str, Tensor]) -> dict[str, Tensor]:
    # All-to-all recurrence is a block whose input does change over time.
    return {name: value for name, value in found.items() if "recurrent.weight" not in name}


@pytest.mark.parametrize(
    ("neuron", "delay"), [*((neuron, True) for neuron in NEURONS), *((neuron, False) for neuron in CAN_RESET_AT_ONCE)]
)
@pytest.mark.parametrize("kind", ["membrane", "gaussian", "logistic"])
@pytest.mark.parametrize("reset", RESETS)
def test_equals_vanilla_where_the_input_is_constant(neuron: str, reset: str, kind: str, delay: bool) -> None:
    net = with_noise(OneLayer(neuron, reset, **({} if delay else {"reset_delay": False})), kind)
    for lif in (net.lif1, net.lif2):
        lif.threshold.requires_grad_(not lif.meets_threshold_twice)
    expected = gradients(net, slr.Vanilla(net, 8, seed=1), *data())
    got = gradients(net, slr.Approximate(net, 8, seed=1), *data())
    assert_same(without_recurrent_block(got), without_recurrent_block(expected))


def by_hand(net: TwoLayers, x: Tensor, y: Tensor, kind: str) -> dict[str, Tensor]:
    """The definition: scores summed over time against the block at the mean rate, from the draws themselves."""
    draws: dict[str, list[Any]] = {"lif1": [], "lif2": []}
    spikes: list[Tensor] = []
    names = {net.lif1.noise: "lif1", net.lif2.noise: "lif2"}
    original = StoringStep.file_membrane

    def keep(self: Any, noise: Any, mean: Tensor, epsilon: Tensor, index: int) -> None:
        draws[names[noise]].append(noise.location_score(epsilon) / noise.sigma.detach())
        original(self, noise, mean, epsilon, index)

    StoringStep.file_membrane = keep  # type: ignore[method-assign]
    handle = net.lif1.register_forward_hook(lambda *a: spikes.append(a[2].detach()))
    losses: list[Tensor] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses.append(net.loss(x, y))
        return losses[-1]

    torch.manual_seed(3)
    # A fused step has no such method to look at.
    with kernels.off():
        slr.Vanilla(net, 8, seed=1).backward(loss_fn, x, y)
    StoringStep.file_membrane = original  # type: ignore[method-assign]
    handle.remove()
    loss = losses[-1].detach().view(8, -1)
    weights = (slr.baselines.leave_one_out(loss) / loss.numel()).reshape(-1, 1)
    net.zero_grad()
    # The first call looks at other passes before.
    rate = torch.stack(spikes[-STEPS:]).mean(0)
    (net.fc2(rate) * weights * sum(draws["lif2"])).sum().backward()
    current = torch.stack([net.fc1(x[:, t]) for t in range(STEPS)]).mean(0).repeat(8, 1)
    (current * weights * sum(draws["lif1"])).sum().backward()
    return {f"{block}.{kind}": getattr(getattr(net, block), kind).grad.clone() for block in ("fc1", "fc2")}


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_is_the_definition_in_two_layers_with_an_input_that_changes(kind: str) -> None:
    net = TwoLayers("Leaky", "subtract").requires_grad_(False)
    for block in (net.fc1, net.fc2):
        block.requires_grad_(True)
    expected = by_hand(net, *data(), kind)
    got = gradients(net, slr.Approximate(net, 8, seed=1), *data())
    assert_same({name: got[name] for name in expected}, expected)


@pytest.mark.parametrize("noise", ["membrane", "escape"])
def test_element_wise_gradients_are_exact_in_two_layers(noise: str) -> None:
    net = with_noise(TwoLayers("Leaky", "zero"), "membrane" if noise == "membrane" else "logistic")
    expected = gradients(net, slr.Vanilla(net, 8, seed=1), *data())
    got = gradients(net, slr.Approximate(net, 8, seed=1), *data())
    exact = {name for name in expected if "lif" in name or "readout" in name} | {"loss", "random state afterwards"}
    assert_same({name: got[name] for name in exact}, {name: expected[name] for name in exact})
    assert not torch.allclose(got["fc2.weight"], expected["fc2.weight"])


class Branches(nn.Module):
    """Convolution, normalisation, pooling, a residual branch, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"beta": 0.8, "init_hidden": True, "noise": True}
        self.conv1, self.lif1 = nn.Conv2d(1, 4, 3, padding=1), slr.Leaky(**options)
        self.conv2, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval()
        self.lif2 = slr.Leaky(**options)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 6)
        self.lif3 = slr.RLeaky(linear_features=6, learn_beta=True, **options)
        self.lif4 = slr.SLSTM(6, 6, init_hidden=True, threshold=0.1, noise=slr.MembraneNoise(0.2))
        self.calls = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for _ in range(STEPS):
            self.calls += 1
            first = self.lif1(self.conv1(x))
            second = self.lif2(self.norm(self.conv2(first)) + first)
            out = out + self.lif4(self.lif3(self.fc(self.pool(second).flatten(1))))
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
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    net.calls = 0
    backwards.clear()
    estimator.backward(net.loss, x, y)
    assert net.calls == STEPS + 1
    assert sorted(backwards) == ["conv1"] * STEPS + ["conv2", "fc"]


def test_points_where_vanilla_points() -> None:
    torch.manual_seed(0)
    net = TwoLayers("Leaky", "subtract")
    x, y = data()
    mean = []
    for cls in (slr.Vanilla, slr.Approximate):
        net.zero_grad()
        cls(net, 20_000, seed=2).backward(net.loss, x, y)
        mean.append(torch.cat([p.grad.flatten() for p in (net.fc1.weight, net.fc2.weight)]))
    assert torch.cosine_similarity(*mean, dim=0) > 0.8


def test_a_neuron_in_two_layers_is_refused() -> None:
    lif, other = slr.Leaky(beta=0.9, noise=True), slr.Leaky(beta=0.9, noise=True)
    net = nn.ModuleList([lif, other, nn.Linear(3, 3)])

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        first, _ = lif(x[:, 0], torch.zeros(2, 3))
        second, _ = lif(net[2](first), torch.zeros_like(first))
        return other(net[2](second), torch.zeros_like(second))[0].sum(1)

    with pytest.raises(ValueError, match=r"did not go on from the state.*a neuron for each layer"):
        slr.Approximate(net, 4).backward(loss_fn, data()[0].float(), torch.zeros(2))


def test_a_loss_on_an_escape_neurons_membrane_is_refused() -> None:
    net = nn.ModuleList([nn.Linear(3, 3), slr.Leaky(beta=0.9, noise="escape")])

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return net[1](net[0](x[:, 0]), torch.zeros(2, 3))[1].sum(1)

    with pytest.raises(ValueError, match="membrane potential of 1"):
        slr.Approximate(net, 4).backward(loss_fn, data()[0].float(), torch.zeros(2))
    assert net[0].weight.grad is None
    slr.Vanilla(net, 4).backward(loss_fn, data()[0].float(), torch.zeros(2))
    assert net[0].weight.grad.any()


def test_hook_takes_it_by_name() -> None:
    net = slr.add_noise(nn.Sequential(nn.Linear(3, 4), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert isinstance(slr.attach(optimizer, net, "approximate", copies=4).estimator, slr.Approximate)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        return sum(net(x[:, t].float()) for t in range(STEPS)).sub(y).square().sum(1)

    before = net[0].weight.clone()
    optimizer.step(slr.closure(loss_fn, *(v.float() for v in data())))
    assert not torch.equal(net[0].weight, before)
