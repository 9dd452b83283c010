"""Surrogate gradients for attacks: derivatives of a spike, gradients through firing rates, max-pooling of spikes.

A spiking network looks robust when the gradient that attacks it is bad, and the surrogate decides how bad it is. An
evaluation therefore attacks through several and keeps the worst case. The forward pass stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._messages import warn
from ..network import Derivative, spike_derivatives, spiking_neurons, with_derivative
from ..philox import resolved

UNMATCHED_WIDTH = 0.5
_STANDARD_DEVIATIONS = {"gaussian": 1.0, "laplace": math.sqrt(2), "logistic": math.pi / math.sqrt(3)}


class Surrogate(Protocol):
    """A way to differentiate through the spikes of a network."""

    def applied_to(self, net: nn.Module) -> AbstractContextManager[None]:
        """Context for one forward pass of the network that is to be differentiated in this way."""


class OfMargin:
    """Surrogate that is a derivative of the margin, the same at every time step, by neuron; None for the network's."""

    def __init__(self, of: Callable[[nn.Module], Derivative] | None = None) -> None:
        self.of = of

    def applied_to(self, net: nn.Module) -> AbstractContextManager[None]:
        """Context in which every snnTorch neuron has its derivative."""
        return nullcontext() if self.of is None else spike_derivatives(net, self.of)


def arctangent(alpha: float = 2.0) -> OfMargin:
    """Derivative (α/2) / (1 + (παu/2)²), the default of snnTorch and SpikingJelly at α = 2; more is steeper."""
    return OfMargin(lambda neuron: lambda margin: _arctangent(torch.as_tensor(alpha), margin))


def gaussian(width: float | None = None) -> OfMargin:
    """Derivative of Φ(u/w): that of the probability to fire, if w is the standard deviation of a neuron's noise.

    By default w is that of each neuron, whether its noise is on or off, and 0.5 for a neuron that has none.
    """

    def of(neuron: nn.Module) -> Derivative:
        noise = getattr(neuron, "noise", None)
        w = torch.as_tensor(UNMATCHED_WIDTH if width is None else width)
        if width is None and noise is not None:
            w = noise.sigma.detach() * _STANDARD_DEVIATIONS[noise.distribution]

        def derivative(margin: Tensor) -> Tensor:
            scale = w.to(margin)
            return torch.exp(-((margin / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))

        return derivative

    return OfMargin(of)


def _arctangent(alpha: Tensor, margin: Tensor) -> Tensor:
    return alpha / 2 / (1 + (math.pi / 2 * alpha * margin) ** 2)


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

    def applied_to(self, net: nn.Module) -> AbstractContextManager[None]:
        """Context for one iteration of an attack."""
        return spike_derivatives(net, self._derivative)

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


def rga(neuron: nn.Module, current: Tensor, gamma: float = 0.2) -> Tensor:
    """Slope of the rate gradient approximation, from a neuron and its mean input over time; element by element.

    With τ the leak and the current x̄ in units of the threshold: γ on [0, 1 − τ), where a constant current never fires;
    (1 − γ + γτ) / (1 + τ) on [1 − τ, 2], so that the integral is 1; 0 elsewhere.
    """
    threshold, beta = (torch.as_tensor(getattr(neuron, name)).detach() for name in ("threshold", "beta"))
    tau = beta.clamp(0, 1)
    drive = current / threshold
    slope = torch.where(drive < 1 - tau, torch.as_tensor(gamma).to(drive), (1 - gamma + gamma * tau) / (1 + tau))
    return slope * ((drive >= 0) & (drive <= 2)) / threshold


class RateGradient:
    """Rate gradient approximation (RGA): the gradient of spikes at a time step goes to the input at that step.

    It is multiplied by the slope of the rate at the mean input. Applies to neurons with a leak ``beta`` whose spikes
    have the shape of their input; others (LSTM cells, pooling inside the neuron) keep their own gradient, and so does
    a membrane potential that the network reads.

    Source: Bu, Ding, Hao & Yu (2023), "Rate Gradient Approximation Attack Threats Deep Spiking Neural Networks", CVPR.
    """

    def __init__(self, gamma: float = 0.2) -> None:
        self.gamma = gamma

    @contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Context for one forward pass."""
        with ExitStack() as stack:
            for _, neuron in spiking_neurons(net):
                if isinstance(getattr(neuron, "beta", None), Tensor):
                    stack.callback(neuron.register_forward_hook(self._hook(neuron), with_kwargs=True).remove)
            yield

    def _hook(self, neuron: nn.Module) -> Callable[..., Any]:
        """Forward hook of one neuron in one forward pass, with its mean input for the backward pass."""
        steps, total = 0, torch.zeros(())

        @cache
        def slope() -> Tensor:
            return rga(neuron, total / steps, self.gamma)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            nonlocal steps, total
            current = args[0] if args else kwargs["input_"]
            spikes = output[0] if isinstance(output, tuple) else output
            if current.shape != spikes.shape or not torch.is_grad_enabled():
                return output
            steps, total = steps + 1, total.to(current) + current.detach()
            rated = with_derivative(current, spikes.detach(), slope)
            return (rated, *output[1:]) if isinstance(output, tuple) else rated

        return hook


SURROGATES: dict[str, Callable[..., Surrogate]] = {
    "training": OfMargin,
    "gaussian": gaussian,
    "atan": arctangent,
    "rga": RateGradient,
    "assg": AdaptiveSharpness,
}
"""Surrogates by name; each call makes a fresh one."""


def make_surrogate(which: str | Surrogate) -> Surrogate:
    """A surrogate by name, or the one that is given.

    A name of ``SURROGATES`` may have a parameter behind it, as in ``"atan:4"`` (α), ``"gaussian:0.3"`` (width),
    ``"assg:0.42"`` (ω) or ``"rga:0.1"`` (γ).

    Raises:
        ValueError: if there is no surrogate of this name, or it has no such parameter.
    """
    if not isinstance(which, str):
        return which
    name, _, parameter = which.partition(":")
    if name not in SURROGATES or (name == "training" and parameter):
        raise ValueError(f"unknown surrogate {which!r}; choose one of {', '.join(SURROGATES)}, or give an object")
    return SURROGATES[name](float(parameter)) if parameter else SURROGATES[name]()


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SUMS: dict[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_POOLS = {getattr(place, f"max_pool{dims}d"): dims for dims in _CONVOLUTIONS for place in (torch, F)}
_UNKNOWN = {
    getattr(F, f"{name}{dims}d{ending}")
    for dims in _CONVOLUTIONS
    for name in ("max_pool", "adaptive_max_pool")
    for ending in ("", "_with_indices")
} - set(_POOLS)
_NAMES = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
# One minus a spike, so that its logarithm is finite; the derivative is off by as much.
_NEARLY_ONE = 1 - 1e-6


class SpikePooling(TorchFunctionMode):
    """Context in which max-pooling of spikes is differentiated as what a flip of one spike does; for attacks.

    The maximum of spikes is 1 − Π(1 − s_j). Its derivative by s_i is Π_{j≠i}(1 − s_j): one if no other spike is in the
    window. That of ``max_pool`` goes to the first of several equal spikes instead, and hides the gradient from attacks.
    Spikes are tensors of zeros and one other, positive number; currents are pooled as ever. Kinds of pooling whose
    windows are not known here keep torch's derivative, with a warning.

    ``met_spikes`` is True once spikes were pooled, or zeros only, as of neurons that were silent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met_spikes = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _POOLS and func not in _UNKNOWN:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        height = _height(x)
        self.met_spikes |= height is not None
        if not height:
            return func(*args, **kwargs)
        if func in _UNKNOWN or kwargs.get("return_indices"):
            warn(
                "max-pooling of spikes that is adaptive, or with return_indices=True, has no derivative here that "
                "tells what one spike does; that of torch hides the gradient from attacks: use torch.nn.MaxPool2d or "
                "AvgPool2d, or pool the currents before the neuron"
            )
            return func(*args, **kwargs)
        named = dict(zip(_NAMES, args, strict=False)) | kwargs
        shape = func(**named | {"input": torch.empty_like(x, device="meta")}).shape
        return _any_spike(x, shape, height, _windows(_POOLS[func], named))


def _height(x: Tensor) -> float | None:
    """Height of the spikes in a tensor, 0 if it is silent; None if it has other numbers, or no gradient."""
    if not (x.requires_grad and x.numel()):
        return None
    x = x.detach()
    top = x.amax()
    return float(top) if bool((top >= 0) & ((x == 0) | (x == top)).all()) else None


Windows = list[list[int]]
"""Kernel, stride, padding and dilation of a max-pooling, one number for each dimension."""


def _windows(dims: int, arguments: Mapping[str, Any]) -> Windows:
    kernel = arguments["kernel_size"]
    sizes = kernel, arguments.get("stride") or kernel, arguments.get("padding", 0), arguments.get("dilation", 1)
    return [[size] * dims if isinstance(size, int) else list(size) for size in sizes]


def _any_spike(x: Tensor, shape: torch.Size, height: float, windows: Windows) -> Tensor:
    """The maximum over the windows of a ``max_pool``, with the derivative of 1 − Π(1 − s); spikes have a height."""
    kernel, stride, _, dilation = windows
    dims = len(kernel)
    # In half precision nearly one is one.
    chances = x.to(resolved(x.dtype)).reshape(-1, 1, *x.shape[-dims:])
    silent = torch.log1p(chances * (-_NEARLY_ONE / height))
    # Padded by hand, because ceil_mode looks beyond the border.
    pads: list[int] = []
    for size, out, k, s, p, d in zip(x.shape[-dims:], shape[-dims:], *windows, strict=True):
        pads = [p, (out - 1) * s + d * (k - 1) + 1 - size - p, *pads]
    silent = F.pad(silent, pads)
    if set(dilation) == {1}:
        # Several times as fast; there is none of one dimension that sums.
        if dims == 1:
            silent, kernel, stride = silent.unsqueeze(2), [1, *kernel], [1, *stride]
        summed = _SUMS[len(kernel)](silent, kernel, stride, divisor_override=1)
    else:
        window = torch.ones(1, 1, *kernel, dtype=silent.dtype, device=x.device)
        summed = _CONVOLUTIONS[dims](silent, window, stride=stride, dilation=dilation)
    soft = (-height * torch.expm1(summed)).view(shape).to(x.dtype)
    # The logarithm of one spike is about -14.
    maximum = (summed.detach() < -1).view(shape).to(x.dtype) * height
    return maximum + (soft - soft.detach())
