from __future__ import annotations

import math
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.network import spike_derivatives
from snntorch_lr.robustness import SURROGATES, AttackableView
from snntorch_lr.robustness.surrogates import (
    AdaptiveSharpness,
    OfMargin,
    RateGradient,
    gaussian,
    make_surrogate,
    rga,
)

from ..helpers import CLASSES, build, has_option, inputs_for, run
from .networks import SmallNet, images


def derivative(name: str, margin: list[float], neuron: Any = None) -> list[float]:
    surrogate: Any = make_surrogate(name)
    values: list[float] = surrogate.of(neuron or snn.Leaky(beta=0.9))(
        torch.tensor(margin, dtype=torch.float64)
    ).tolist()
    return values


def test_shapes_are_their_formulas() -> None:
    assert derivative("atan", [0.0, 1.0]) == pytest.approx([1.0, 1 / (1 + math.pi**2)])
    assert derivative("atan:4", [0.0, 0.5]) == pytest.approx([2.0, 2 / (1 + math.pi**2)])
    assert derivative("gaussian:2", [0.0, 2.0]) == pytest.approx([0.199471, 0.120985], rel=1e-5)


@pytest.mark.parametrize(("kind", "distribution", "deviation"), [
    ("membrane", "gaussian", 0.3), ("membrane", "laplace", 0.3 * math.sqrt(2)),
    ("escape", "logistic", 0.3 * math.pi / math.sqrt(3)),
])  # fmt: skip
def test_gaussian_is_as_wide_as_the_noise(kind: str, distribution: str, deviation: float) -> None:
    net = slr.add_noise(SmallNet(), sigma=0.3, kind=kind, distribution=distribution)
    height = gaussian().of(net.lif)(torch.zeros(1)).item()
    assert height == pytest.approx(1 / (deviation * math.sqrt(2 * math.pi)))
    assert derivative("gaussian", [0.0]) == pytest.approx([1 / (0.5 * math.sqrt(2 * math.pi))])


def test_the_default_of_snntorch_is_atan() -> None:
    x = images().requires_grad_()
    training, atan, steeper = (
        torch.autograd.grad(AttackableView(SmallNet(), surrogate=name)(x).square().sum(), x)[0]
        for name in ("training", "atan", "atan:4")
    )
    torch.testing.assert_close(atan, training)
    assert not torch.allclose(steeper, training)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("noise", [None, "membrane", "escape"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_reaches_every_neuron_and_leaves_the_forward_pass(name: str, noise: str | None, surrogate: str) -> None:
    neuron = build(slr, name, init_hidden=True, noise=noise or False, spike_grad=cut)
    x = inputs_for(name).requires_grad_()

    def spikes(which: str) -> Tensor:
        slr.reset(neuron)
        generator = torch.Generator().manual_seed(0)
        with slr.noise_on(neuron, generator), make_surrogate(which).applied_to(neuron):
            return torch.stack([step[0] for step in run(neuron, x)])

    plain = spikes("training")
    swapped = spikes(surrogate)
    torch.testing.assert_close(swapped, plain, rtol=0, atol=0)
    if surrogate != "training" and (surrogate != "rga" or not name.endswith("LSTM")):
        assert torch.autograd.grad(swapped.sum(), x)[0].any()


def cut(margin: Tensor) -> Tensor:
    """A spike without a derivative."""
    return (margin > 0).to(margin.dtype)


@pytest.mark.parametrize("name", [name for name in CLASSES if has_option(name, "inhibition") and "LSTM" not in name])
def test_reaches_inhibited_neurons(name: str) -> None:
    with pytest.warns(UserWarning, match="Inhibition"):
        neuron = build(snn, name, init_hidden=True, inhibition=True, spike_grad=cut)
    x = inputs_for(name).requires_grad_()
    with make_surrogate("atan").applied_to(neuron):
        spikes = torch.stack([step[0] for step in run(neuron, x)])
    assert torch.autograd.grad(spikes.sum(), x)[0].any()


class OfTheClass(snn.Leaky):  # type: ignore[misc]
    """A neuron whose spike is a method, as users write them."""

    def __init__(self) -> None:
        super().__init__(beta=0.9, init_hidden=True)
        del self.spike_grad

    def spike_grad(self, margin: Tensor) -> Tensor:
        return cut(margin)


class AsModule(nn.Module):
    def forward(self, margin: Tensor) -> Tensor:
        return cut(margin)


UNUSUAL = {
    "class": OfTheClass,
    "module": lambda: snn.Leaky(beta=0.9, init_hidden=True, spike_grad=AsModule()),
    "disabled": lambda: snn.Leaky(beta=0.9, init_hidden=True, surrogate_disable=True),
    "parallel": lambda: snn.LeakyParallel(3, 3, beta=0.9),
}


def attributes(neuron: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(neuron).items() if name not in ("mem", "reset")}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_reaches_unusual_spikes_and_restores_them_after_an_error(kind: str) -> None:
    torch.manual_seed(0)
    neuron = UNUSUAL[kind]()
    x = 3 * torch.rand(4, 2, 3, requires_grad=True)
    neuron(x.detach())
    before, modules = attributes(neuron), dict(neuron.named_modules())

    def fail() -> None:
        with make_surrogate("atan").applied_to(neuron):
            assert torch.autograd.grad(neuron(x).sum(), x)[0].any()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert attributes(neuron) == before
    assert dict(neuron.named_modules()) == modules


@pytest.mark.parametrize("kind", [None, "membrane", "escape"])
@pytest.mark.parametrize("delay", [True, False])
def test_derivative_is_asked_once_a_step(kind: str | None, delay: bool) -> None:
    neuron = slr.Leaky(beta=0.9, init_hidden=True, noise=kind or False, reset_delay=delay)
    asked = []

    def ones(margin: Tensor) -> Tensor:
        asked.append(margin)
        return torch.ones_like(margin)

    x = torch.rand(4, 2, 3, requires_grad=True)
    with slr.noise_on(neuron), spike_derivatives(neuron, lambda neuron: ones):
        for step in x:
            neuron(step)
    assert len(asked) == 4


def test_assg_by_hand() -> None:
    """Margins 0.5 then −1 at the only step of two iterations, ω = 1/4, so a = 2/π."""
    surrogate, slopes = AdaptiveSharpness(omega=0.25), []
    neuron = snn.Leaky(beta=1.0, init_hidden=True, threshold=1.0)
    for current in (1.5, 0.0):
        slr.reset(neuron)
        x = torch.tensor([[current]], dtype=torch.float64, requires_grad=True)
        with surrogate.applied_to(neuron):
            slopes.append(torch.autograd.grad(neuron(x).sum(), x)[0].item())
        with torch.no_grad(), surrogate.applied_to(neuron):
            neuron(x)  # looking at the network is no iteration
    # M = .9 + .05 = .95, D = .1 |.5 - .95| = .045, α = (2/π) / (.95 + .0675 + .0001)
    alpha = 2 / math.pi / 1.0176
    assert slopes[0] == pytest.approx(alpha / 2 / (1 + (math.pi * alpha * 0.5 / 2) ** 2))
    # M = .855 + .1 = .955, D = .0405 + .1 |1 - .955| = .045, α = (2/π) / (.955 + .0675 + .0001)
    alpha = 2 / math.pi / 1.0226
    assert slopes[1] == pytest.approx(alpha / 2 / (1 + (math.pi * alpha / 2) ** 2))


def test_assg_keeps_time_steps_apart_and_starts_again_with_another_batch() -> None:
    net, x = SmallNet(), images().requires_grad_()
    surrogate = AdaptiveSharpness()
    view = AttackableView(net, surrogate=surrogate)
    first = torch.autograd.grad(view(x).sum(), x)[0]
    assert not torch.equal(torch.autograd.grad(view(x).sum(), x)[0], first)
    steps = [step for _, step in surrogate._averages]
    assert steps == [0, 1, 2, 3, 4]
    half = torch.autograd.grad(view(x[:3]).sum(), x)[0]
    torch.testing.assert_close(half[:3], first[:3])


def test_view_uses_a_surrogate_of_ones_own() -> None:
    x = images().requires_grad_()
    blind = OfMargin(lambda neuron: torch.zeros_like)
    assert not torch.autograd.grad(AttackableView(SmallNet(), surrogate=blind)(x).sum(), x)[0].any()


@pytest.mark.parametrize("wrong", ["sigmoid", "training:2", "atan:x", "assg:0.6"])
def test_refuses_unknown_surrogates(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"surrogate|omega|float"):
        make_surrogate(wrong)


@pytest.mark.parametrize(("threshold", "slopes"), [(1.0, [0.0, 0.2, 0.96 / 1.8, 0.96 / 1.8, 0.0]),
                                                    (2.0, [0.0, 0.1, 0.1, 0.48 / 1.8, 0.48 / 1.8])])  # fmt: skip
def test_rga_by_hand(threshold: float, slopes: list[float]) -> None:
    """τ = 0.8, γ = 0.2: γ below 1 − τ = 0.2, (1 − .2 + .16) / 1.8 up to 2, in units of the threshold."""
    neuron = snn.Leaky(beta=0.8, threshold=threshold)
    current = torch.tensor([-0.1, 0.1, 0.3, 1.9, 2.1], dtype=torch.float64)
    torch.testing.assert_close(rga(neuron, current), torch.tensor(slopes, dtype=torch.float64))


def test_rga_integrates_to_one() -> None:
    current = torch.linspace(-1, 3, 400001, dtype=torch.float64)
    for beta in (0.5, 0.9, 1.0):
        slope = rga(snn.Leaky(beta=beta), current)
        assert torch.trapezoid(slope, current).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("hidden", [True, False])
def test_gradient_of_spikes_goes_to_the_input_of_the_same_step(hidden: bool) -> None:
    neuron = snn.Leaky(beta=0.9, init_hidden=hidden)
    # Means .08 (never fires), 1, 3 over two steps.
    x = torch.tensor([[0.04, 0.0, 3.5], [0.12, 2.0, 2.5]], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mem, total = neuron.reset_mem(), torch.zeros(())
    with RateGradient().applied_to(neuron):
        for current, weight in zip(x, weights, strict=True):
            if hidden:
                spikes = neuron(current)
            else:
                spikes, mem = neuron(current, mem)
            total = total + (weight * spikes).sum()
    (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(gradient, weights * torch.tensor([0.2, (1 - 0.2 + 0.18) / 1.9, 0.0]))


def test_a_membrane_that_is_read_keeps_its_gradient() -> None:
    neuron = snn.Leaky(beta=0.5, init_hidden=True, output=True, reset_mechanism="none")
    x = torch.ones(2, 1, requires_grad=True)
    with RateGradient().applied_to(neuron):
        for current in x:
            _, mem = neuron(current)
    assert torch.autograd.grad(mem.sum(), x)[0].flatten().tolist() == [0.5, 1.0]
    slr.reset(neuron)
    assert not neuron._forward_hooks
