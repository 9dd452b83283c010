"""The estimator agrees with finite differences of the same objective, and would not if a term were dropped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.gradients import vanilla
from snntorch_lr.noisy_neuron import NoisyNeuron

from .enumeration import exact_derivative
from .networks import HIDDEN, NEURONS, RESETS, STEPS, TwoLayers, data, groups
from .objective import Measured, along, directions, estimates, finite_difference

pytestmark = pytest.mark.statistical
LIMIT = 4.0  # standard errors
FEW = 12  # calls that show a mistake, and fewer than what shows that there is none


Compared = dict[str, tuple[Measured, Measured]]
Loss = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def reference(neuron: str, reset: str, kind: str) -> Measured:
    """Finite difference of the expected loss of a network with membrane noise, for one group of parameters."""
    net = TwoLayers(neuron, reset)
    return finite_difference(net, net.loss, *data(), directions(net, groups(net))[kind])


def exact(net: TwoLayers, x: Tensor, y: Tensor, direction: dict[str, Tensor]) -> Measured:
    """Derivative of the expected loss of a network with escape noise."""
    return Measured(exact_derivative(net, net.loss, x, y, x.shape[1] * 2 * HIDDEN, direction), 0.0)


def estimate(
    net: nn.Module, loss: Loss, x: Tensor, y: Tensor, repeats: int = 24, **options: Any
) -> list[dict[str, Tensor]]:
    return estimates(slr.Vanilla(net, **{"copies": 5000, **options}), loss, x, y, repeats)


def compare(net: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Compared:
    """Finite difference and estimate for each group of parameters."""
    gradients = estimate(net, loss, x, y)
    return {
        kind: (finite_difference(net, loss, x, y, v), along(gradients, v))
        for kind, v in directions(net, groups(net)).items()
    }


def compare_two_layers(neuron: str, reset: str, **options: Any) -> Compared:
    """As ``compare``, for a network whose references several tests share."""
    net = TwoLayers(neuron, reset)
    gradients = estimate(net, net.loss, *data(), **options)
    return {
        kind: (reference(neuron, reset, kind), along(gradients, v)) for kind, v in directions(net, groups(net)).items()
    }


def assert_unbiased(results: Compared) -> None:
    for kind, (expected, found) in results.items():
        assert found.distance(expected) < LIMIT, f"{kind}: reference {expected}, estimator {found}"
        # A comparison that is too noisy to tell anything from zero would pass whatever the estimator does.
        assert found.error < max(0.1, abs(expected.mean) / 20), kind


# Every class with two mechanisms; escape noise has all of them, with a reference that costs less.
@pytest.mark.parametrize(
    ("neuron", "reset"),
    [(n, r) for i, n in enumerate(NEURONS) for j, r in enumerate(RESETS) if (i + j) % 3],
)
def test_is_unbiased(neuron: str, reset: str) -> None:
    assert_unbiased(compare_two_layers(neuron, reset))


@pytest.mark.parametrize(
    ("reset", "distribution"), [("subtract", "gaussian"), ("zero", "logistic"), ("none", "gaussian")]
)
@pytest.mark.parametrize("neuron", NEURONS)
def test_is_unbiased_with_escape_noise(neuron: str, reset: str, distribution: str) -> None:
    net, x, y = escaping(neuron, reset, distribution)
    gradients = estimate(net, net.loss, x, y, copies=4000)
    along_groups = directions(net, groups(net))
    assert_unbiased({kind: (exact(net, x, y, v), along(gradients, v)) for kind, v in along_groups.items()})


def escaping(neuron: str, reset: str, distribution: str) -> tuple[TwoLayers, Tensor, Tensor]:
    """A network with escape noise, and data of three time steps: few enough for all their spike trains."""
    net = TwoLayers(neuron, reset)
    net.lif1.noise = slr.EscapeNoise(0.6, distribution=distribution).double()
    net.lif2.noise = slr.EscapeNoise(torch.tensor([0.5, 0.7]), distribution=distribution).double()
    x, y = data()
    return net, x[:, :3], y


@pytest.mark.parametrize("baseline", ["batch-mean", "none"])
def test_is_unbiased_with_every_baseline(baseline: str) -> None:
    assert_unbiased(compare_two_layers("Leaky", "subtract", baseline=baseline))


@pytest.mark.parametrize("distribution", ["laplace", "logistic"])
def test_is_unbiased_with_every_distribution(distribution: str) -> None:
    net = TwoLayers("Leaky", "subtract")
    for lif in (net.lif1, net.lif2):
        lif.noise = slr.MembraneNoise(0.5, distribution=distribution).double()
    assert_unbiased(compare(net, net.loss, *data()))


def test_is_unbiased_with_immediate_reset_and_graded_spikes() -> None:
    net = TwoLayers("Leaky", "subtract")
    for lif in (net.lif1, net.lif2):
        lif.reset_delay = False
        lif.threshold.requires_grad_(False)
        del lif.graded_spikes_factor
        lif.graded_spikes_factor = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    results = compare(net, net.loss, *data())
    del results["threshold"]
    assert_unbiased(results)


class ConvNet(nn.Module):
    """Conv2d, BatchNorm in evaluation mode, neuron, MaxPool, Linear, neuron, Linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2).eval()
        self.lif1 = slr.Leaky(beta=0.7, noise=slr.MembraneNoise(torch.full((2, 1, 1), 0.5)), init_hidden=True)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(2, 3)
        self.lif2 = slr.Leaky(beta=0.7, threshold=0.5, noise=slr.MembraneNoise(0.6), init_hidden=True)
        self.readout = nn.Linear(3, 2)
        self.double()
        with torch.no_grad():
            self.conv.bias.add_(0.5)
            self.fc.weight.mul_(1.5)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for t in range(STEPS):
            spikes = self.lif1(self.norm(self.conv(x[:, t])))
            out = out + self.readout(self.lif2(self.fc(self.pool(spikes).flatten(1))))
        return (out - y).square().sum(1)


def test_is_unbiased_through_convolution_and_pooling() -> None:
    net = ConvNet()
    x = torch.rand(2, STEPS, 1, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    assert_unbiased(compare(net, net.loss, x, data()[1]))


class LstmNet(nn.Module):
    """An SLSTM and an SConv2dLSTM, whose synaptic state carries a graph through time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        options: dict[str, Any] = {"threshold": 0.1, "learn_threshold": True, "init_hidden": True}
        options["noise"] = slr.MembraneNoise(0.3)
        self.convolutional = kind == "SConv2dLSTM"
        self.cell = slr.SConv2dLSTM(1, 1, 3, **options) if self.convolutional else slr.SLSTM(3, 3, **options)
        self.readout = nn.Linear(4 if self.convolutional else 3, 2)
        self.double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for t in range(STEPS):
            step = x[:, t, :1, None, None].expand(-1, 1, 2, 2) if self.convolutional else x[:, t]
            out = out + self.readout(self.cell(step).flatten(1))
        return (out - y).square().sum(1)


@pytest.mark.parametrize("kind", ["SLSTM", "SConv2dLSTM"])
def test_is_unbiased_for_lstm_cells(kind: str) -> None:
    net = LstmNet(kind)
    assert_unbiased(compare(net, net.loss, *data()))


def _drop_sigma_score(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slr.MembraneNoise, "scale_score", lambda self, epsilon, location: torch.zeros_like(epsilon))


def _halve_location_score(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slr.MembraneNoise, "location_score", lambda self, epsilon: epsilon / 2)


def _sample_again(patch: pytest.MonkeyPatch, change: Callable[[NoisyNeuron, Tensor, Tensor], Tensor]) -> None:
    """Changes what is sampled, given the mean and the membrane potential that would be."""
    original = NoisyNeuron._add_noise

    def add_noise(self: NoisyNeuron, mean: Tensor) -> Tensor:
        mem = original(self, mean)
        return mem if self._inside is None else change(self, mean, mem)

    patch.setattr(NoisyNeuron, "_add_noise", add_noise)


def _sample_membrane_instead_of_margin(patch: pytest.MonkeyPatch) -> None:
    def change(neuron: NoisyNeuron, mean: Tensor, mem: Tensor) -> Tensor:
        neuron._inside.margin = mean - neuron.threshold.detach()
        return mem.detach()

    _sample_again(patch, change)


def _forget_threshold_in_carried_membrane(patch: pytest.MonkeyPatch) -> None:
    _sample_again(patch, lambda neuron, mean, mem: mem.detach())


def _detach_before(cls: type, states: tuple[str, ...]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = cls._base_state_function  # type: ignore[attr-defined]

        def detached(self: Any, input_: Tensor) -> Any:
            for state in states:
                setattr(self, state, getattr(self, state).detach())
            return original(self, input_)

        patch.setattr(cls, "_base_state_function", detached)

    return apply


def _drop_recurrence(patch: pytest.MonkeyPatch) -> None:
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        out = original(self, x)
        recurrent = self.in_features == HIDDEN and self.out_features == HIDDEN and getattr(self, "is_recurrent", False)
        return out.detach() if recurrent and torch.is_grad_enabled() else out

    patch.setattr(nn.Linear, "forward", forward)


def _drop_pathwise(patch: pytest.MonkeyPatch) -> None:
    original = vanilla.Scores.backward
    patch.setattr(vanilla.Scores, "backward", lambda self, losses, *rest: original(self, losses.detach(), *rest))


def _keep_graph_of_samples(patch: pytest.MonkeyPatch) -> None:
    _sample_again(patch, lambda neuron, mean, mem: mem + (mean - mean.detach()))


def _drop_minus_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slr.MembraneNoise, "scale_score", lambda self, epsilon, location: epsilon * epsilon)


def _drop_first_step(patch: pytest.MonkeyPatch) -> None:
    original = vanilla.Scores.backward

    def backward(self: vanilla.Scores, *given: Tensor) -> None:
        for first in [*self.tokens][:2]:  # two layers
            del self.tokens[first]
        original(self, *given)

    patch.setattr(vanilla.Scores, "backward", backward)


MUTANTS = [
    pytest.param("Leaky", "subtract", "log_sigma", _drop_sigma_score, {}, id="score of sigma"),
    pytest.param("Leaky", "subtract", "log_sigma", _drop_minus_one, {"baseline": "none"}, id="-1 of sigma's score"),
    pytest.param("Leaky", "subtract", "bias", _halve_location_score, {}, id="half the score of the mean"),
    pytest.param("Leaky", "subtract", "bias", _drop_first_step, {}, id="first time step"),
    pytest.param("Leaky", "subtract", "threshold", _sample_membrane_instead_of_margin, {}, id="margin"),
    pytest.param("Leaky", "none", "threshold", _forget_threshold_in_carried_membrane, {}, id="threshold carried on"),
    pytest.param("Leaky", "none", "readout", _drop_pathwise, {}, id="pathwise gradient of the readout"),
    pytest.param("Leaky", "subtract", "bias", _keep_graph_of_samples, {}, id="samples that are not detached"),
    pytest.param(
        "Synaptic",
        "none",
        "bias",
        _detach_before(snntorch.Synaptic, ("syn",)),
        {},
        id="synaptic current through time",
    ),
    pytest.param("RLeaky", "subtract", "recurrent", _drop_recurrence, {}, id="recurrent weights"),
    pytest.param(
        "Alpha",
        "none",
        "bias",
        _detach_before(snntorch.Alpha, ("syn_exc", "syn_inh")),
        {},
        id="alpha currents through time",
    ),
]


@pytest.mark.parametrize(("neuron", "reset", "kind", "mutate", "options"), MUTANTS)
def test_notices_a_dropped_term(
    neuron: str,
    reset: str,
    kind: str,
    mutate: Callable[..., None],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = TwoLayers(neuron, reset)
    for lif in (net.lif1, net.lif2):
        if hasattr(lif, "recurrent"):
            lif.recurrent.is_recurrent = True
    x, y = data()
    expected = reference(neuron, reset, kind)
    mutate(monkeypatch)
    found = along(estimate(net, net.loss, x, y, FEW, **options), directions(net, groups(net))[kind])
    print(f"{found.distance(expected):.1f} standard errors")
    assert found.distance(expected) > LIMIT


def _detach_membrane(patch: pytest.MonkeyPatch) -> None:
    original = NoisyNeuron.sample

    def sample(self: NoisyNeuron, input_: Tensor, given: dict[str, Tensor], *rest: Any) -> Any:
        return original(self, input_, {name: state.detach() for name, state in given.items()}, *rest)

    patch.setattr(NoisyNeuron, "sample", sample)


def _rethreshold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NoisyNeuron, "train_resets", lambda self, mem: None)


def _drop_scale_of_escape(patch: pytest.MonkeyPatch) -> None:
    original = slr.EscapeNoise.location_score
    patch.setattr(slr.EscapeNoise, "location_score", lambda self, z, *rest: original(self, z, *rest) * (z.abs() < 1))


@pytest.mark.parametrize(
    ("reset", "kind", "mutate"),
    [
        pytest.param("none", "bias", _detach_membrane, id="membrane potential through time"),
        pytest.param("subtract", "bias", _rethreshold, id="reset by the spike that was sampled"),
        pytest.param("subtract", "log_sigma", _drop_scale_of_escape, id="score of unlikely spikes"),
    ],
)
def test_notices_a_dropped_term_of_escape_noise(
    reset: str, kind: str, mutate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = escaping("Leaky", reset, "gaussian")
    direction = directions(net, groups(net))[kind]
    expected = exact(net, x, y, direction)
    mutate(monkeypatch)
    found = along(estimate(net, net.loss, x, y, FEW, copies=4000), direction)
    print(f"{found.distance(expected):.1f} standard errors")
    assert found.distance(expected) > LIMIT
