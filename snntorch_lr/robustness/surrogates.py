"""Derivatives that stand in for that of the spike, and contexts in which every neuron of a network has another one.

A spiking network looks robust when the gradient that attacks it is bad, and the surrogate derivative decides how bad it
is. An evaluation therefore attacks through several and keeps the worst case. The forward pass stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..network import spiking_neurons
from .rate_gradient import RateGradient, bptr, rga

Derivative = Callable[[Tensor], Tensor]
"""Derivative of the spike at the margin (membrane potential − threshold), element by element."""

UNMATCHED_WIDTH = 0.5
_STANDARD_DEVIATIONS = {"gaussian": 1.0, "laplace": math.sqrt(2), "logistic": math.pi / math.sqrt(3)}


class Surrogate(Protocol):
    """A way to differentiate through the spikes of a network."""

    def applied_to(self, net: nn.Module) -> AbstractContextManager[None]:
        """Context for one forward pass of the network that is to be differentiated in this way."""


class Training:
    """The surrogate that the network was built with."""

    def applied_to(self, net: nn.Module) -> AbstractContextManager[None]:
        """Context that changes nothing."""
        return nullcontext()


class Shape:
    """The same derivative of the margin at every time step.

    Args:
        of: from a neuron to its derivative.
    """

    def __init__(self, of: Callable[[nn.Module], Derivative]) -> None:
        self.of = of

    @contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Context in which every snnTorch neuron has its derivative."""
        with ExitStack() as stack:
            for _, neuron in spiking_neurons(net):
                stack.enter_context(differentiated(neuron, self.of(neuron)))
            yield


class AdaptiveSharpness:
    """Adaptive-sharpness surrogate gradient (ASSG): an arctangent as wide as the margin is, neuron by neuron.

    For the margin u of each sample, neuron and time step, over the iterations of an attack:
    M ← 0.9 M + 0.1 |u|, D ← 0.9 D + 0.1 ||u| − M|, α = a / (M + 1.5 D + 1e-4) with a = (2/π) tan(πω), and the
    derivative is (α/2) / (1 + (παu/2)²). It starts from M = 1 and D = 0, and again from there when the batch changes
    its shape, so use an object for one attack on one batch.

    Args:
        omega: probability mass of the derivative within 0 < u < M + 1.5 D, in (0, 0.5); more is sharper.

    Raises:
        ValueError: if omega is out of range.

    Source: arXiv 2512.22522, "Towards Reliable Evaluation of Adversarial Robustness for Spiking Neural Networks".
    """

    def __init__(self, omega: float = 0.45) -> None:
        if not 0 < omega < 0.5:
            raise ValueError(f"omega must be in (0, 0.5), got {omega}")
        self.sharpness = 2 / math.pi * math.tan(math.pi * omega)
        self._averages: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Context for one iteration of an attack."""
        with ExitStack() as stack:
            for _, neuron in spiking_neurons(net):
                stack.enter_context(differentiated(neuron, self._derivative(neuron)))
            yield

    def _derivative(self, neuron: nn.Module) -> Derivative:
        step = -1

        def derivative(margin: Tensor) -> Tensor:
            nonlocal step
            step += 1
            size = margin.abs()
            mean, deviation = self._averages.get((neuron, step), (torch.ones_like(size), torch.zeros_like(size)))
            if mean.shape != size.shape:
                mean, deviation = torch.ones_like(size), torch.zeros_like(size)
            mean = 0.9 * mean + 0.1 * size
            deviation = 0.9 * deviation + 0.1 * (size - mean).abs()
            self._averages[neuron, step] = mean, deviation
            return _arctangent(self.sharpness / (mean + 1.5 * deviation + 1e-4), margin)

        return derivative


@contextmanager
def differentiated(neuron: nn.Module, derivative: Derivative) -> Iterator[None]:
    """Context in which the spikes of a neuron have another derivative, and the same values.

    The derivative is asked once for each spike that is emitted: snnTorch calls ``spike_grad`` for the reset too, but
    detaches that.
    """
    spike_grad: Callable[[Tensor], Tensor] = getattr(neuron, "spike_grad")  # noqa: B009
    mem_reset: Callable[[Tensor], Tensor] | None = getattr(neuron, "mem_reset", None)
    resetting = False

    def swapped(margin: Tensor) -> Tensor:
        with torch.no_grad():
            spikes = spike_grad(margin)
        if resetting or not (torch.is_grad_enabled() and margin.requires_grad):
            return spikes
        return spike(margin, spikes, derivative(margin.detach()))

    def reset(mem: Tensor) -> Tensor:
        nonlocal resetting
        assert mem_reset is not None
        resetting = True
        try:
            return mem_reset(mem)
        finally:
            resetting = False

    replaced: dict[str, Any] = {"spike_grad": swapped} | ({"mem_reset": reset} if mem_reset is not None else {})
    held = {name: vars(neuron)[name] for name in replaced if name in vars(neuron)}
    # Found before a method of the class, and before a module that is registered under this name.
    vars(neuron).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(neuron)[name]
        vars(neuron).update(held)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, margin: Tensor, spikes: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        return spikes.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return grads[0].to(derivative.dtype) * derivative, None, None


def spike(margin: Tensor, spikes: Tensor, derivative: Tensor) -> Tensor:
    """The spikes, differentiated with respect to the margin by the given derivative; all of the same shape."""
    result: Tensor = _Spike.apply(margin, spikes, derivative)
    return result


def arctangent(alpha: float = 2.0) -> Shape:
    """Derivative (α/2) / (1 + (παu/2)²), the default of snnTorch and SpikingJelly at α = 2; more is steeper."""
    return Shape(lambda neuron: lambda margin: _arctangent(torch.as_tensor(alpha), margin))


def straight_through() -> Shape:
    """Derivative 1 everywhere: nothing vanishes, and nothing knows how far a neuron is from its threshold."""
    return Shape(lambda neuron: torch.ones_like)


def gaussian(width: float | None = None) -> Shape:
    """Derivative of Φ(u/w): that of the probability to fire, if w is the standard deviation of a neuron's noise.

    Args:
        width: w; by default that of the noise of each neuron, on or off, and 0.5 for a neuron that has none.
    """

    def of(neuron: nn.Module) -> Derivative:
        w = _noise_level(neuron) if width is None else torch.as_tensor(width)

        def derivative(margin: Tensor) -> Tensor:
            scale = w.to(margin)
            return torch.exp(-((margin / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))

        return derivative

    return Shape(of)


def _arctangent(alpha: Tensor, margin: Tensor) -> Tensor:
    return alpha / 2 / (1 + (math.pi / 2 * alpha * margin) ** 2)


def _noise_level(neuron: nn.Module) -> Tensor:
    noise = getattr(neuron, "noise", None)
    if noise is None:
        return torch.tensor(UNMATCHED_WIDTH)
    level: Tensor = noise.sigma.detach() * _STANDARD_DEVIATIONS[noise.distribution]
    return level


SURROGATES: dict[str, Callable[..., Surrogate]] = {
    "training": Training,
    "gaussian": gaussian,
    "atan": arctangent,
    "ste": straight_through,
    "rga": lambda gamma=0.2: RateGradient(partial(rga, gamma=gamma)),
    "bptr": lambda: RateGradient(bptr),
    "assg": AdaptiveSharpness,
}
"""Surrogates by name; each call makes a fresh one."""


def make_surrogate(which: str | Surrogate) -> Surrogate:
    """A surrogate by name, or the one that is given.

    Args:
        which: a name of ``SURROGATES``, or a name and its parameter as in ``"atan:4"`` (α), ``"gaussian:0.3"`` (width),
            ``"assg:0.42"`` (ω) or ``"rga:0.1"`` (γ); or an object.

    Raises:
        ValueError: if there is no surrogate of this name, or it has no such parameter.
    """
    if not isinstance(which, str):
        return which
    name, _, parameter = which.partition(":")
    if name not in SURROGATES:
        raise ValueError(f"unknown surrogate {which!r}; choose one of {', '.join(SURROGATES)}, or give an object")
    try:
        return SURROGATES[name](float(parameter)) if parameter else SURROGATES[name]()
    except TypeError as error:
        raise ValueError(f"surrogate {name!r} has no parameter, so {which!r} is not one") from error
