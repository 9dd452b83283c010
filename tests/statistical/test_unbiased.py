"""The plain likelihood ratio is the derivative of the same objective, and would not be if a term were dropped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.gradients.vanilla import Scores
from snntorch_lr.noisy_neuron import NoisyNeuron

from ..helpers import RESETS
from .enumeration import exact_derivative
from .networks import HIDDEN, STEPS, TwoLayers, data, groups
from .objective import Measured, along, directions, estimates, finite_difference, mutate

pytestmark = pytest.mark.statistical
LIMIT = 4.0  # standard errors
NEURONS = ["Leaky", "Lapicque", "Synaptic", "Alpha", "RLeaky", "RSynaptic, one to one"]
# Each class with one mechanism; escape noise has the other two, with a reference that costs less.
MEMBRANE = [(neuron, RESETS[i % 3]) for i, neuron in enumerate(NEURONS)]
ESCAPE = [(neuron, reset) for neuron in NEURONS for reset in RESETS if (neuron, reset) not in MEMBRANE]


@functools.cache
def reference(neuron: str, reset: str, kind: str) -> Measured:
    """Finite difference of the expected loss of a network with membrane noise, for one group of parameters."""
    net = TwoLayers(neuron, reset)
    return finite_difference(net, net.loss, *data(), directions(net, groups(net))[kind])


def exact(net: TwoLayers, x: Tensor, y: Tensor, direction: dict[str, Tensor]) -> Measured:
    """Derivative of the expected loss of a network with escape noise."""
    return Measured(exact_derivative(net, net.loss, x, y, x.shape[1] * 2 * HIDDEN, direction), 0.0)


def estimate(net: Any, x: Tensor, y: Tensor, **options: Any) -> list[dict[str, Tensor]]:
    """As many calls as show each of the mistakes below."""
    return estimates(slr.Vanilla(net, **{"copies": 5000, **options}), net.loss, x, y, repeats=12)


def assert_unbiased(
    net: Any, x: Tensor, y: Tensor, expected: Callable[[str, dict[str, Tensor]], Measured] | None = None, **options: Any
) -> None:
    """Reference and estimate agree for each group of parameters; without a reference, with finite differences."""
    calls = estimate(net, x, y, **options)
    for kind, vector in directions(net, groups(net)).items():
        found = along(calls, vector)
        wanted = expected(kind, vector) if expected else finite_difference(net, net.loss, x, y, vector)
        assert found.distance(wanted) < LIMIT, f"{kind}: reference {wanted}, estimator {found}"
        # A comparison that is too noisy to tell anything from zero would pass whatever the estimator does.
        assert found.error < max(0.1, abs(wanted.mean) / 20), kind


@pytest.mark.parametrize(("neuron", "reset"), MEMBRANE)
def test_is_unbiased(neuron: str, reset: str) -> None:
    assert_unbiased(TwoLayers(neuron, reset), *data(), lambda kind, _: reference(neuron, reset, kind))


def escaping(neuron: str, reset: str, distribution: str = "gaussian") -> tuple[TwoLayers, Tensor, Tensor]:
    """A network with escape noise, and data of three time steps: few enough for all their spike trains."""
    net = TwoLayers(neuron, reset)
    net.lif1.noise = slr.EscapeNoise(0.6, distribution=distribution).double()
    net.lif2.noise = slr.EscapeNoise(torch.tensor([0.5, 0.7]), distribution=distribution).double()
    x, y = data()
    return net, x[:, :3], y


@pytest.mark.parametrize(("neuron", "reset"), ESCAPE)
def test_is_unbiased_with_escape_noise(neuron: str, reset: str) -> None:
    net, x, y = escaping(neuron, reset, "logistic" if reset == "zero" else "gaussian")
    assert_unbiased(net, x, y, lambda _, vector: exact(net, x, y, vector), copies=4000)


@pytest.mark.parametrize("baseline", ["batch-mean", "none"])
def test_is_unbiased_with_every_baseline(baseline: str) -> None:
    net = TwoLayers("Leaky", "subtract")
    assert_unbiased(net, *data(), lambda kind, _: reference("Leaky", "subtract", kind), baseline=baseline)


@pytest.mark.parametrize("distribution", ["laplace", "logistic"])
def test_is_unbiased_with_every_distribution_graded_spikes_and_an_immediate_reset(distribution: str) -> None:
    net = TwoLayers("Leaky, reset at once" if distribution == "laplace" else "Leaky", "subtract")
    for lif in (net.lif1, net.lif2):
        lif.noise = slr.MembraneNoise(0.5, distribution=distribution).double()
        # Membrane noise refuses to learn a threshold that one sample meets twice.
        lif.threshold.requires_grad_(lif.reset_delay)
        del lif.graded_spikes_factor
        lif.graded_spikes_factor = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    assert_unbiased(net, *data())


class Convolutional(nn.Module):
    """Conv2d, BatchNorm in evaluation mode, MaxPool, and LSTM cells, whose synaptic state carries a graph on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        options: dict[str, Any] = {"threshold": 0.1, "learn_threshold": True, "init_hidden": True}
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3).eval()
        self.first = slr.SConv2dLSTM(3, 3, 3, noise=slr.MembraneNoise(torch.full((3, 1, 1), 0.3)), **options)
        self.pool = nn.MaxPool2d(2)
        self.second = slr.SLSTM(3, 3, noise=slr.MembraneNoise(0.3), **options)
        self.readout = nn.Linear(3, 2)
        self.double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for step in x.unbind(1):
            spikes = self.first(self.norm(self.conv(step)))
            out = out + self.readout(self.second(self.pool(spikes).flatten(1)))
        return (out - y).square().sum(1)


def test_is_unbiased_through_convolution_pooling_and_lstm_cells() -> None:
    x = torch.rand(2, STEPS, 1, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    assert_unbiased(Convolutional(), x, data()[1])


def _margin_of_the_mean(original: Any, neuron: Any, mean: Tensor) -> Tensor:
    mem = original(neuron, mean)
    if neuron._inside is not None:
        neuron._inside.margin = mean - neuron.threshold.detach()
    return mem if neuron._inside is None else mem.detach()


def _without_graph(original: Any, neuron: Any, mean: Tensor) -> Tensor:
    mem = original(neuron, mean)
    return mem if neuron._inside is None else mem.detach()


def _with_the_graph_of_the_mean(original: Any, neuron: Any, mean: Tensor) -> Tensor:
    mem = original(neuron, mean)
    return mem if neuron._inside is None else mem + (mean - mean.detach())


def _detached_current(original: Any, neuron: Any, current: Tensor) -> Any:
    neuron.syn = neuron.syn.detach()
    return original(neuron, current)


def _without_recurrence(original: Any, layer: Any, x: Tensor) -> Tensor:
    out = original(layer, x)
    return out.detach() if getattr(layer, "is_recurrent", False) and torch.is_grad_enabled() else out


def _without_first_step(original: Any, scores: Any, *rest: Tensor) -> None:
    for first in [*scores.tokens][:2]:  # two layers
        del scores.tokens[first]
    original(scores, *rest)


def _without_pathwise(original: Any, scores: Any, losses: Tensor, *rest: Tensor) -> None:
    original(scores, losses.detach(), *rest)


def _detached_states(original: Any, neuron: Any, current: Tensor, states: dict[str, Tensor], *rest: Any) -> Any:
    return original(neuron, current, {name: state.detach() for name, state in states.items()}, *rest)


def _likely_spikes_only(original: Any, noise: Any, z: Tensor, *rest: Any) -> Tensor:
    return original(noise, z, *rest) * (z.abs() < 1)


# By what is dropped: a network, the parameters that notice; where, and what is called in place of a function.
MUTANTS: dict[str, tuple[str, str, str, Any, str, Callable[..., Any]]] = {
    "-1 of sigma's score": ("Leaky", "subtract", "log_sigma", slr.MembraneNoise, "scale_score", lambda *a: a[2] * a[2]),
    "half the score": ("Leaky", "subtract", "bias", slr.MembraneNoise, "location_score", lambda *a: a[2] / 2),
    "first time step": ("Leaky", "subtract", "bias", Scores, "backward", _without_first_step),
    "margin": ("Leaky", "subtract", "threshold", NoisyNeuron, "_add_noise", _margin_of_the_mean),
    "threshold carried on": ("Leaky", "none", "threshold", NoisyNeuron, "_add_noise", _without_graph),
    "pathwise gradient": ("Leaky", "none", "readout", Scores, "backward", _without_pathwise),
    "detached samples": ("Leaky", "subtract", "bias", NoisyNeuron, "_add_noise", _with_the_graph_of_the_mean),
    "current through time": ("Synaptic", "none", "bias", snn.Synaptic, "_base_state_function", _detached_current),
    "recurrent weights": ("RLeaky", "subtract", "recurrent", nn.Linear, "forward", _without_recurrence),
}
ESCAPE_MUTANTS: dict[str, tuple[str, str, Any, str, Callable[..., Any]]] = {
    "membrane potential through time": ("none", "bias", NoisyNeuron, "sample", _detached_states),
    "reset by the spike that was sampled": ("subtract", "bias", NoisyNeuron, "train_resets", lambda *_: None),
    "score of unlikely spikes": ("subtract", "log_sigma", slr.EscapeNoise, "location_score", _likely_spikes_only),
}


def assert_noticed(net: TwoLayers, x: Tensor, y: Tensor, kind: str, expected: Measured, **options: Any) -> None:
    found = along(estimate(net, x, y, **options), directions(net, groups(net))[kind])
    print(f"{found.distance(expected):.1f} standard errors")
    assert found.distance(expected) > LIMIT


@pytest.mark.parametrize("term", MUTANTS)
def test_notices_a_dropped_term(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    neuron, reset, kind, *mutation = MUTANTS[term]
    net, expected = TwoLayers(neuron, reset), reference(neuron, reset, kind)
    if neuron == "RLeaky":
        net.lif1.recurrent.is_recurrent = net.lif2.recurrent.is_recurrent = True
    mutate(monkeypatch, *mutation)
    # Without a baseline the mean of a score counts.
    assert_noticed(net, *data(), kind, expected, **({"baseline": "none"} if kind == "log_sigma" else {}))


@pytest.mark.parametrize("term", ESCAPE_MUTANTS)
def test_notices_a_dropped_term_of_escape_noise(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reset, kind, *mutation = ESCAPE_MUTANTS[term]
    net, x, y = escaping("Leaky", reset)
    expected = exact(net, x, y, directions(net, groups(net))[kind])
    mutate(monkeypatch, *mutation)
    assert_noticed(net, x, y, kind, expected, copies=4000)
