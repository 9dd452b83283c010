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
from snntorch_lr.gradients import CounterfactualCredit
from snntorch_lr.noisy_neuron import NoisyNeuron
from snntorch_lr.robustness.surrogates import SpikePooling

from .enumeration import exact_gradient
from .objective import along, directions, estimates, finite_difference

pytestmark = pytest.mark.statistical
LIMIT = 4.0  # standard errors
STEPS = 3
RESETS = ["subtract", "zero", "none"]
# Every class whose trains are independent given its currents, with everything learned that can be.
NEURONS: dict[str, Callable[..., Any]] = {
    "Leaky": lambda **k: slr.Leaky(beta=0.7, learn_beta=True, **k),
    "Leaky, reset at once": lambda **k: slr.Leaky(beta=0.7, learn_beta=True, reset_delay=False, **k),
    "Lapicque": lambda **k: slr.Lapicque(R=1.0, C=2.0, time_step=1, **k),
    "Synaptic": lambda **k: slr.Synaptic(alpha=0.5, beta=0.7, learn_alpha=True, learn_beta=True, **k),
    "Alpha": lambda **k: slr.Alpha(alpha=0.8, beta=0.6, learn_beta=True, **k),
    "RLeaky, one to one": lambda **k: slr.RLeaky(beta=0.7, learn_beta=True, all_to_all=False, V=0.4, **k),
    "RSynaptic, one to one": lambda **k: slr.RSynaptic(
        alpha=0.5, beta=0.7, learn_alpha=True, learn_beta=True, all_to_all=False, V=0.4, **k
    ),
}
RECURRENT: dict[str, Callable[..., Any]] = {
    "RLeaky": lambda **k: slr.RLeaky(beta=0.7, learn_beta=True, linear_features=2, **k),
    "RSynaptic": lambda **k: slr.RSynaptic(
        alpha=0.5, beta=0.7, learn_alpha=True, learn_beta=True, linear_features=2, **k
    ),
}
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
    """Affine in spikes and states, the membrane potential among them."""
    return sum(((net.readout(out[0]) + (step + 1) * sum(out[1:])) * y).sum(1) for step, out in enumerate(net.steps(x)))


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

    def __init__(self, net: nn.Module, loss: Any, x: Tensor, y: Tensor, repeats: int = 30, **options: Any) -> None:
        options = {"copies": 1000, "discount": 1.0, **options}
        calls = estimates(slr.Counterfactual(net, **options), loss, x, y, repeats)
        self.mean, self.error = {}, {}
        for name, parameter in net.named_parameters():
            values = torch.stack([call.get(name, torch.zeros_like(parameter)) for call in calls])
            self.mean[name], self.error[name] = values.mean(0), values.std(0) / repeats**0.5

    def distance(self, expected: dict[str, Tensor]) -> float:
        """Largest difference of all components, in standard errors."""
        # A sum that is the same in each call has an error of rounding only.
        return max(
            float(((self.mean[name] - expected[name]).abs() / (self.error[name] + 5e-6)).max()) for name in self.mean
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


@pytest.mark.parametrize(
    ("neuron", "reset", "control"),
    # Each pair of a class, a mechanism and a λ.
    [(n, r, (None, 0.0, 1.0)[(i + j) % 3]) for i, n in enumerate(NEURONS) for j, r in enumerate(RESETS)],
)
def test_is_exact_where_the_loss_is_affine_in_a_train(neuron: str, reset: str, control: float | None) -> None:
    net = Tiny(NEURONS[neuron], reset, escape("gaussian" if control == 0 else "logistic"), of_spikes)
    found, expected = estimate(net, control=control), exact(net)
    assert found.distance(expected) < LIMIT
    assert found.bias(expected)[1] < 0.02, "too noisy to tell"


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("neuron", NEURONS)
def test_is_exact_where_the_loss_reads_states_of_a_neuron_that_resets(neuron: str, reset: str) -> None:
    net = Tiny(NEURONS[neuron], reset, escape(), of_states)
    found, expected = estimate(net), exact(net)
    assert found.distance(expected) < LIMIT
    assert found.bias(expected)[1] < 0.02


@pytest.mark.parametrize("neuron", NEURONS)
def test_bias_is_small_on_toys_where_the_loss_is_not_affine(neuron: str) -> None:
    net = Tiny(NEURONS[neuron], "subtract", escape(), of_counts, layers=2)
    expected = exact(net)
    # λ adds an error of second order where two neurons decide everything.
    for control, limit in ((0.0, 0.06), (None, 0.15)):
        bias, floor = estimate(net, repeats=12, copies=6000, control=control).bias(expected)
        print(f"{neuron}, two layers of two, λ {control}: bias {bias:.3f}, noise {floor:.3f}")
        assert bias < limit


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("neuron", RECURRENT)
def test_bias_of_all_to_all_recurrence_is_small_on_toys(neuron: str, reset: str) -> None:
    """A neuron's own train comes back to it through others: first order only."""
    net = Tiny(RECURRENT[neuron], reset, escape(), of_spikes)
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


@pytest.mark.parametrize("loss", [of_spikes, of_states])
@pytest.mark.parametrize(
    ("neuron", "reset", "distribution"),
    [
        ("Leaky", "subtract", "gaussian"),
        ("Leaky", "zero", "laplace"),
        ("Synaptic", "subtract", "logistic"),
        ("RSynaptic, one to one", "zero", "gaussian"),
    ],
)
def test_agrees_with_finite_differences_for_membrane_noise(
    neuron: str, reset: str, distribution: str, loss: Loss
) -> None:
    noise = lambda: slr.MembraneNoise(0.5, distribution=distribution)  # noqa: E731
    net = Tiny(NEURONS[neuron], reset, noise, loss)
    names = [name for name, _ in net.named_parameters() if "readout" not in name]
    kinds = {name: [name] for name in names}
    x, y = data()
    gradients = estimates(slr.Counterfactual(net, 4000, discount=1.0), net.losses, x, y, repeats=16)
    for name, direction in directions(net, kinds).items():
        expected, found = finite_difference(net, net.losses, x, y, direction), along(gradients, direction)
        assert found.distance(expected) < LIMIT, name
        assert found.error < 0.08, name


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


def _no_score_of_the_shadow(patch: pytest.MonkeyPatch) -> None:
    original = slr.EscapeNoise.location_score

    def location_score(self: slr.EscapeNoise, *given: Tensor) -> Tensor:
        scores = original(self, *given)
        return torch.stack([scores[0], torch.zeros_like(scores[1])])

    patch.setattr(slr.EscapeNoise, "location_score", location_score)


def _shadow_with_the_same_noise(patch: pytest.MonkeyPatch) -> None:
    original = noisy_neuron._draw

    def drawn(noise: Any, like: Tensor, sets: int) -> Tensor:
        return original(noise, like, sets)[:1].expand_as(like)

    patch.setattr(noisy_neuron, "_draw", drawn)


def _shadow_from_the_currents_of_another_copy(patch: pytest.MonkeyPatch) -> None:
    original = NoisyNeuron.sample

    def sample(self: NoisyNeuron, input_: Tensor, *rest: Any, **more: Any) -> Any:
        own = input_[1]
        # What comes back is still taken for what the own currents did. Copies come first, each of two samples.
        return original(self, torch.stack([input_[0], own + (own.roll(2, 0) - own).detach()]), *rest, **more)

    patch.setattr(NoisyNeuron, "sample", sample)


def _no_trace_through_the_leak(patch: pytest.MonkeyPatch) -> None:
    original = NoisyNeuron.sample

    def sample(self: NoisyNeuron, input_: Tensor, given: dict[str, Tensor], *rest: Any, **more: Any) -> Any:
        return original(self, input_, {name: state.detach() for name, state in given.items()}, *rest, **more)

    patch.setattr(NoisyNeuron, "sample", sample)


def _a_link_that_is_cut(patch: pytest.MonkeyPatch) -> None:
    original = NoisyNeuron.carry
    patch.setattr(NoisyNeuron, "carry", lambda self, fired, **more: original(self, fired, **more | {"link": None}))


def _no_last_term(patch: pytest.MonkeyPatch) -> None:
    original = slr.EscapeNoise.cdf_and_pdf

    def cdf_and_pdf(self: slr.EscapeNoise, z: Tensor) -> tuple[Tensor, Tensor]:
        p, density = original(self, z)
        return p, torch.zeros_like(density)

    patch.setattr(slr.EscapeNoise, "cdf_and_pdf", cdf_and_pdf)


def _pairs_without_their_half(patch: pytest.MonkeyPatch) -> None:
    original = node._add
    patch.setattr(node, "_add", lambda togo, index, value: original(togo, index, 2 * value))


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(_no_score_of_the_shadow, id="score of the shadow"),
        pytest.param(_shadow_with_the_same_noise, id="noise of the shadow"),
        pytest.param(_no_trace_through_the_leak, id="trace through the leak"),
        pytest.param(_no_last_term, id="last term"),
        pytest.param(_pairs_without_their_half, id="half"),
        pytest.param(_a_link_that_is_cut, id="link"),
    ],
)
def test_notices_a_dropped_term(mutate: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    net = Tiny(NEURONS["Leaky"], "subtract", escape(), of_spikes)
    mutate(monkeypatch)
    found, expected = estimate(net, control=0.5), exact(net)
    print(f"bias {found.bias(expected)[0]:.3f}, {found.distance(expected):.1f} standard errors")
    assert found.distance(expected) > LIMIT
    assert found.bias(expected)[0] > 0.04


@pytest.mark.parametrize("fitted", ["before", "on the same noise"])
def test_control_is_fitted_before_it_is_used(fitted: str) -> None:
    """λ that depends on the noise that it is used with biases the gradient; shown with few rows, where it does most."""
    net = Tiny(NEURONS["Leaky"], "subtract", escape(), of_spikes)
    expected, (x, y), calls, neuron = exact(net)["blocks.0.bias"], data(), [], net.neurons[0]

    def gradient(seed: int, control: float) -> Tensor:
        neuron.sampler = CounterfactualCredit(discount=1.0, control=control)
        net.zero_grad()
        torch.manual_seed(seed)
        net.losses(x, y).mean().backward()
        return net.blocks[0].bias.grad.clone()

    for seed in range(800):
        control = 0.4
        if fitted == "on the same noise":
            gradient(seed, 0.0)
            product, square = neuron.control.pending
            control = float((-product / square).clamp(0, 1))
        calls.append(gradient(seed, control))
        neuron.control.pending = None
    values = torch.stack(calls)
    distance = float(((values.mean(0) - expected) / values.std(0) * len(calls) ** 0.5).abs().max())
    print(f"λ fitted {fitted}: {distance:.1f} standard errors")
    assert (distance < LIMIT) == (fitted == "before")


def test_its_network_has_no_bias_with_all_terms() -> None:
    net = Tiny(NEURONS["Leaky"], "subtract", escape(), of_spikes)
    assert estimate(net, control=0.5).bias(exact(net))[0] < 0.02


def test_notices_shadows_from_the_currents_of_another_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Tiny(NEURONS["Leaky"], "subtract", escape(), of_spikes, layers=2)
    with torch.no_grad():
        net.blocks[1].weight.mul_(3)
    expected, name = exact(net), "blocks.1.weight"
    assert estimate(net, control=0.0, copies=3000).bias(expected, name)[0] < 0.02
    _shadow_from_the_currents_of_another_copy(monkeypatch)
    assert estimate(net, control=0.0, copies=3000).bias(expected, name)[0] > 0.035
