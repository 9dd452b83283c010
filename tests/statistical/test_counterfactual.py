"""Counterfactual credit agrees with the expectation over all spike trains, and would not if a term were dropped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr import node, noisy_neuron
from snntorch_lr.noisy_neuron import NoisyNeuron
from snntorch_lr.robustness.surrogates import SpikePooling

from ..helpers import RESETS
from .enumeration import exact_gradient
from .networks import ALL_TO_ALL, NEURONS
from .objective import along, directions, estimates, finite_difference, mutate

pytestmark = pytest.mark.statistical
LIMIT = 4.0  # standard errors
OF_MANY = 5.0  # standard errors of 50 calls, of the farthest of all components
STEPS = 3
Loss = Callable[["Tiny", Tensor, Tensor], Tensor]


class Tiny(nn.Module):
    """Two neurons, or two layers of them, over three time steps with an input that changes; all learned, in float64."""

    def __init__(self, make: Callable[..., Any], reset: str, noise: Any, loss: Loss, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        options = {"reset_mechanism": reset, "learn_threshold": True, "init_hidden": True, "output": True}
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))
        self.neurons = nn.ModuleList(make(threshold=0.8, noise=noise(), **options) for _ in range(layers))
        self.readout = nn.Linear(2, 2)
        self.loss_of = loss
        self.double()
        with torch.no_grad():
            for block in self.blocks:
                block.bias.add_(0.4)

    def steps(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """What the last layer returns in each time step: spikes, states, membrane potential."""
        slr.reset(self)
        found = []
        for step in range(STEPS):
            value = x[:, step]
            for block, neuron in zip(self.blocks, self.neurons, strict=True):
                output = neuron(block(value))
                value = output[0]
            found.append(output)
        return found

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_of(self, x, y)


def of_spikes(net: Tiny, x: Tensor, y: Tensor) -> Tensor:
    """Affine in the spikes, with another weight in each time step."""
    return sum(((step + 1) * net.readout(out[0]) * y).sum(1) for step, out in enumerate(net.steps(x)))


def of_states(net: Tiny, x: Tensor, y: Tensor) -> Tensor:
    """Affine in spikes and states, the membrane potential among them, with other weights in each time step."""
    return sum(
        (((step + 1) * net.readout(out[0]) + (STEPS - step) * sum(out[1:])) * y).sum(1)
        for step, out in enumerate(net.steps(x))
    )


def of_counts(net: Tiny, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of a readout of spike counts."""
    return F.cross_entropy(net.readout(sum(out[0] for out in net.steps(x))), y.softmax(1), reduction="none")


def escape(distribution: str = "logistic") -> Callable[[], slr.EscapeNoise]:
    return lambda: slr.EscapeNoise(0.6, distribution=distribution)


def data(batch: int = 2) -> tuple[Tensor, Tensor]:
    x = 1.5 * torch.rand(batch, STEPS, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, torch.tensor([[1.0, -2.0], [-0.5, 1.5]], dtype=torch.float64)[:batch]


class Estimate:
    """Mean of an estimator's gradient over many calls, with its standard error, beside a reference; all parameters."""

    def __init__(self, net: nn.Module, loss: Any, x: Tensor, y: Tensor, repeats: int = 50, **options: Any) -> None:
        options = {"copies": 1000, "discount": 1.0, **options}
        calls = estimates(slr.Counterfactual(net, **options), loss, x, y, repeats)
        self.mean, self.error = {}, {}
        for name, parameter in net.named_parameters():
            values = torch.stack([call.get(name, torch.zeros_like(parameter)) for call in calls])
            self.mean[name], self.error[name] = values.mean(0), values.std(0) / repeats**0.5

    def distance(self, expected: dict[str, Tensor]) -> float:
        """Largest difference of all components, in standard errors."""
        # A sum that is the same in each call has an error of rounding only.
        rounding = 1e-5 * (0.5 + max(float(value.abs().max()) for value in expected.values()))
        return max(
            float(((self.mean[name] - expected[name]).abs() / (self.error[name] + rounding)).max())
            for name in self.mean
        )

    def bias(self, expected: dict[str, Tensor], *names: str) -> tuple[float, float]:
        """Length of the difference over that of the reference, and what noise alone would show; of all parameters."""
        chosen = names or tuple(self.mean)
        scale = sum(float(expected[name].square().sum()) for name in chosen)
        square = sum(float((self.mean[name] - expected[name]).square().sum()) for name in chosen)
        noise = sum(float(self.error[name].square().sum()) for name in chosen)
        return (square / scale) ** 0.5, (noise / scale) ** 0.5


def estimate(net: Tiny, **options: Any) -> Estimate:
    return Estimate(net, net.losses, *data(), **options)


def exact(net: Tiny) -> dict[str, Tensor]:
    return exact_gradient(net, net.losses, *data(), STEPS * 2 * len(net.blocks))


# Each pair of a class, a mechanism and a λ; spikes alone are heard in fewer cases.
CONTROLS = None, 0.0, 1.0
EXACT = [(n, r, CONTROLS[(i + j) % 3], of_states) for i, n in enumerate(NEURONS) for j, r in enumerate(RESETS)]
EXACT += [("Leaky", reset, control, of_spikes) for reset, control in zip(RESETS, (0.5, 1.0, None), strict=True)]


@pytest.mark.parametrize(("neuron", "reset", "control", "loss"), EXACT)
def test_is_exact_where_the_loss_is_affine_in_the_spikes_and_states_of_a_neuron(
    neuron: str, reset: str, control: float | None, loss: Loss
) -> None:
    net = Tiny(NEURONS[neuron], reset, escape("gaussian" if control == 0 else "logistic"), loss)
    found, expected = estimate(net, control=control), exact(net)
    assert found.distance(expected) < OF_MANY
    assert found.bias(expected)[1] < 0.02, "too noisy to tell"


@pytest.mark.parametrize("neuron", ["Leaky", "Alpha", "RSynaptic, one to one"])
def test_bias_is_small_on_toys_where_the_loss_is_not_affine(neuron: str) -> None:
    net = Tiny(NEURONS[neuron], "subtract", escape(), of_counts, layers=2)
    expected = exact(net)
    # λ adds an error of second order where two neurons decide everything.
    for control, limit in ((0.0, 0.06), (None, 0.15)):
        bias, floor = estimate(net, repeats=12, copies=6000, control=control).bias(expected)
        print(f"{neuron}, two layers of two, λ {control}: bias {bias:.3f}, noise {floor:.3f}")
        assert bias < limit


@pytest.mark.parametrize(("neuron", "reset"), [("RLeaky", "subtract"), ("RLeaky", "none"), ("RSynaptic", "zero")])
def test_bias_of_all_to_all_recurrence_is_small_on_toys(neuron: str, reset: str) -> None:
    """A neuron's own train comes back to it through others: first order only."""
    net = Tiny(ALL_TO_ALL[neuron], reset, escape(), of_spikes)
    bias, floor = estimate(net).bias(exact(net))
    print(f"{neuron}, {reset}: bias {bias:.3f}, noise {floor:.3f}")
    assert bias < 0.03


class Branches(nn.Module):
    """A convolution, spikes that are pooled, a residual branch around the second layer, and a noisy spiking readout.

    Args:
        exact_pooling: the derivative of the maximum is what one spike does, in place of torch's.
    """

    def __init__(self, exact_pooling: bool) -> None:
        super().__init__()
        self.exact_pooling = exact_pooling
        torch.manual_seed(3)
        options = {"threshold": 0.6, "init_hidden": True, "learn_threshold": True}
        self.conv = nn.Conv1d(1, 1, 2)
        self.first = slr.Leaky(beta=0.7, noise=escape()(), **options)
        self.pool = nn.MaxPool1d(2)
        self.fc = nn.Linear(2, 2)
        self.second = slr.Leaky(beta=0.6, noise=escape("gaussian")(), **options)
        self.double()
        with torch.no_grad():
            self.conv.bias.add_(0.4)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        total = torch.zeros((), dtype=x.dtype)
        for step in range(2):
            spikes = self.first(self.conv(x[:, step]))
            with SpikePooling() if self.exact_pooling else nullcontext():
                pooled = self.pool(spikes).flatten(1)
            total = total + ((self.second(self.fc(pooled)) + 0.5 * pooled) * y).sum(1)
        return total


@pytest.mark.parametrize("exact_pooling", [True, False])
def test_convolution_pooled_spikes_and_a_residual_branch_in_front_of_a_spiking_readout(exact_pooling: bool) -> None:
    net, y = Branches(exact_pooling), data(1)[1]
    x = torch.rand(1, 2, 1, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = exact_gradient(net, net.losses, x, y, count=12)
    bias, floor = Estimate(net, net.losses, x, y, copies=4000, control=0.0).bias(expected)
    print(f"pooling with {'what one spike does' if exact_pooling else 'the derivative of torch'}: bias {bias:.3f}")
    assert floor < 0.01
    # Torch's derivative goes to the first of several equal spikes.
    assert bias < (0.02 if exact_pooling else 0.2)
    assert exact_pooling or bias > 0.03


@pytest.mark.parametrize(
    ("neuron", "reset", "distribution"),
    [
        ("Leaky", "subtract", "gaussian"),
        ("Leaky", "zero", "laplace"),
        ("Synaptic", "subtract", "logistic"),
        ("RSynaptic, one to one", "zero", "gaussian"),
    ],
)
def test_agrees_with_finite_differences_for_membrane_noise(neuron: str, reset: str, distribution: str) -> None:
    net = Tiny(NEURONS[neuron], reset, lambda: slr.MembraneNoise(0.5, distribution=distribution), of_states)
    assert_agrees(net, slr.Counterfactual(net, 4000, discount=1.0), error=0.08)


def assert_agrees(net: Tiny, estimator: slr.Counterfactual | slr.Vanilla, error: float) -> None:
    """An estimator agrees with finite differences along a direction in each parameter."""
    names = [name for name, _ in net.named_parameters() if "readout" not in name]
    gradients = estimates(estimator, net.losses, *data(), repeats=16)
    for name, direction in directions(net, {name: [name] for name in names}).items():
        expected, found = finite_difference(net, net.losses, *data(), direction), along(gradients, direction)
        assert found.distance(expected) < LIMIT, name
        assert found.error < max(error, abs(expected.mean) / 20), name


class Ordinary(nn.Module):
    """30 neurons a layer, a constant or a changing input, and a leaky readout of membrane potentials."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        noise = slr.MembraneNoise(0.5) if kind == "membrane" else slr.EscapeNoise(0.4, distribution="logistic")
        self.fc1, self.fc2, self.fc3 = nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 5)
        recurrent = {"linear_features": 30} if kind == "recurrent" else {}
        make = slr.RLeaky if recurrent else slr.Leaky
        self.lif1 = make(beta=0.8, noise=noise, init_hidden=True, threshold=0.5, **recurrent)
        self.lif2 = slr.Leaky(beta=0.8, noise=noise, init_hidden=True, threshold=0.5)
        self.readout = slr.Leaky(beta=0.9, reset_mechanism="none", init_hidden=True, output=True)
        self.double()

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        current, total = self.fc1(x), torch.zeros(())
        for _ in range(6):
            _, mem = self.readout(self.fc3(self.lif2(self.fc2(self.lif1(current)))))
            total = total + mem
        return F.cross_entropy(total / 6, y, reduction="none")


@pytest.mark.parametrize("kind", ["escape", "membrane", "recurrent"])
def test_length_is_right_by_three_percent_on_layers_of_ordinary_size(kind: str) -> None:
    net = Ordinary(kind)
    generator = torch.Generator().manual_seed(1)
    x, y = 2 * torch.rand(16, 20, generator=generator).double(), torch.randint(5, (16,), generator=generator)
    weights = ("fc1.weight", "fc2.weight")
    calls = estimates(slr.Vanilla(net, copies=600), net.losses, x, y, repeats=12)
    reference = torch.stack([torch.cat([call[name].flatten() for name in weights]) for call in calls])
    noise = float((reference.var(0) / len(calls)).sum())
    square = float(reference.mean(0).square().sum()) - noise
    allowed = (square / (square + noise)) ** 0.5
    for discount in (1.0, 0.7):
        found = Estimate(net, net.losses, x, y, repeats=24, copies=32, discount=discount)
        mean = torch.cat([found.mean[name].flatten() for name in weights])
        cosine = float(reference.mean(0) @ mean) / (square * float(mean.square().sum())) ** 0.5
        # A finite difference along the estimate has less noise.
        direction = {name: found.mean[name] / mean.norm() for name in weights}
        expected = finite_difference(net, net.losses, x, y, direction, draws=3000, step=0.05)
        length, resolved = float(mean.norm()) / expected.mean, expected.error / expected.mean
        print(f"{kind}, γ {discount}: length {length:.3f} ± {resolved:.3f}, cosine {cosine:.3f}, allowed {allowed:.3f}")
        assert resolved < 0.015
        assert abs(length - 1) < (0.03 if discount == 1 else 0.25) + 2 * resolved
        assert cosine > 0.98


def _no_score_of_the_shadow(original: Any, *arguments: Tensor) -> Tensor:
    scores = original(*arguments)
    return torch.stack([scores[0], torch.zeros_like(scores[1])])


def _currents_of_another_copy(original: Any, neuron: Any, input_: Tensor, *rest: Any, **more: Any) -> Any:
    own = input_[1]
    # What comes back is still taken for what the own currents did. Copies come first, each of two samples.
    return original(neuron, torch.stack([input_[0], own + (own.roll(2, 0) - own).detach()]), *rest, **more)


def _no_trace(original: Any, neuron: Any, input_: Tensor, states: dict[str, Tensor], *rest: Any, **more: Any) -> Any:
    return original(neuron, input_, {name: state.detach() for name, state in states.items()}, *rest, **more)


def _no_density(original: Any, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    p, density = original(*arguments)
    return p, torch.zeros_like(density)


# By what is dropped: where, and what is called in place of a function, with that first.
MUTANTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "score of the shadow": (slr.EscapeNoise, "location_score", _no_score_of_the_shadow),
    "noise of the shadow": (
        noisy_neuron, "_draw", lambda original, noise, like, sets: original(noise, like, sets)[:1].expand_as(like)
    ),
    "trace through the leak": (NoisyNeuron, "sample", _no_trace),
    "last term": (slr.EscapeNoise, "cdf_and_pdf", _no_density),
    "half": (node, "_add", lambda original, togo, index, value: original(togo, index, 2 * value)),
    "link": (
        NoisyNeuron, "carry", lambda original, neuron, fired, **more: original(neuron, fired, **more | {"link": None})
    ),
    "own currents of the shadow": (NoisyNeuron, "sample", _currents_of_another_copy),
}  # fmt: skip


@pytest.mark.parametrize("term", MUTANTS)
def test_notices_a_dropped_term(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Copies have the same currents in a first layer.
    layers = 2 if term == "own currents of the shadow" else 1
    net = Tiny(NEURONS["Leaky"], "subtract", escape(), of_spikes, layers)
    with torch.no_grad():
        net.blocks[-1].weight.mul_(5 if layers == 2 else 1)
    name = f"blocks.{layers - 1}.weight"
    expected, options = exact(net), {"control": 0.0 if layers == 2 else 0.5, "copies": 2000, "repeats": 24}
    assert estimate(net, **options).bias(expected, name)[0] < 0.025
    mutate(monkeypatch, *MUTANTS[term])
    found = estimate(net, **options)
    print(f"bias {found.bias(expected, name)[0]:.3f}, {found.distance(expected):.1f} standard errors")
    assert found.distance(expected) > OF_MANY
    assert found.bias(expected, name)[0] > 0.05
