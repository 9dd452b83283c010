"""Max-pooling of spikes, differentiated as what a flip of one spike does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._messages import warn
from ..graph import ancestors
from ..noise_stream import resolved
from ..validate import Checks

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SUMS: dict[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_POOLS = {getattr(place, f"max_pool{dims}d"): dims for dims in _CONVOLUTIONS for place in (torch, F)}
_REFUSED = {
    getattr(F, f"{name}{dims}d{ending}")
    for dims in _CONVOLUTIONS
    for name in ("max_pool", "adaptive_max_pool")
    for ending in ("", "_with_indices")
} - set(_POOLS)
_NAMES = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
# One minus a spike, so that its logarithm is finite; the derivative is off by as much.
_NEARLY_ONE = 1 - 1e-6


class SpikePooling(TorchFunctionMode):
    """Context in which max-pooling of spikes is differentiated as what a flip of one spike does.

    The maximum of spikes is 1 − Π(1 − s_j). Its derivative by s_i is Π_{j≠i}(1 − s_j): one if no other spike is in the
    window. That of ``max_pool`` goes to the first of several equal spikes instead. Currents are pooled as ever.

    Args:
        heights: the height of the spikes that each call pools, in their order, and 0 for currents; None where nothing
            but zeros has been pooled yet. What is not known is looked for, and added.
        checks: where it is filed that the others still hold.
        knows: tells a tensor of zeros and ones by where it comes from, so that its numbers need not be looked at.
        rates: rates are pooled in place of spikes, which nobody can tell from currents: nothing is looked for.
        strict: kinds of pooling whose windows are not known here are refused; otherwise they keep torch's derivative,
            with a warning.

    Attributes:
        calls: how many there were.

    Raises:
        ValueError: for a kind of max-pooling whose windows are not known here, if it pools spikes and that is strict.
    """

    def __init__(
        self,
        heights: list[float | None] | None = None,
        checks: Checks | None = None,
        knows: Callable[[Tensor], bool] = lambda x: False,
        rates: bool = False,
        strict: bool = True,
    ) -> None:
        super().__init__()
        self.heights = [] if heights is None else heights
        self.calls = 0
        self._checks = Checks() if checks is None else checks
        self._knows = knows
        self._rates = rates
        self._strict = strict

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _POOLS and func not in _REFUSED:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        height = self._height(x)
        if not height:
            return func(*args, **kwargs)
        if func in _REFUSED or kwargs.get("return_indices"):
            if self._strict:
                raise ValueError(f"{_UNKNOWN}: {_KNOWN}")
            warn(f"{_UNKNOWN}; that of torch hides the gradient from attacks: {_KNOWN}")
            return func(*args, **kwargs)
        windows = _Windows.of(_POOLS[func], dict(zip(_NAMES, args, strict=False)) | kwargs)
        with torch.no_grad():
            value = windows.maximum(x)
            value = func(*args, **kwargs) if value is None else value
        if self._rates:
            return _product(_between(x, height), value.shape, height, windows)
        return _Maximum.apply(x, (value,), height, windows)

    def _height(self, x: Tensor) -> float | None:
        """Height of the spikes that are pooled in this call; 0 or None where that makes no difference."""
        index, self.calls = self.calls, self.calls + 1
        if self._rates and index >= len(self.heights):
            raise ValueError(_CHANGED.format("something"))
        self.heights += [None] * (self.calls - len(self.heights))
        known = self.heights[index]
        if self._rates or not (x.requires_grad and x.numel()):
            return known if x.requires_grad else None
        if known in (None, 1.0) and self._knows(x):
            self.heights[index] = 1.0
            return 1.0
        x = x.detach()
        top = x.amax()
        if known is None:
            spikes = bool((top > 0) & _are_spikes(x, top))
            known = self.heights[index] = float(top) if spikes else 0.0 if bool(x.any()) else None
        elif known:
            self._checks.file(_are_spikes(x, known), lambda: _CHANGED.format("something other than spikes"))
        else:
            self._checks.file((top <= 0) | ~_are_spikes(x, top), lambda: _CHANGED.format("spikes"))
        return known

    def of_one_step(self, steps: int) -> list[float | None]:
        """Heights of the calls of one time step; of those in which no neuron had fired, from later time steps."""
        calls = self.calls // steps if self.calls % steps == 0 else self.calls
        return [
            next((height for height in self.heights[index : self.calls : calls] if height is not None), None)
            for index in range(self.calls)
        ]


def check_nothing_is_pooled(losses: Tensor) -> None:
    """Refuses losses that pool something, where nothing was pooled before.

    Raises:
        ValueError: if they do.
    """
    if any("MaxPool" in node.name() for node in ancestors([losses])):
        raise ValueError(_CHANGED.format("something"))


_UNKNOWN = (
    "max-pooling of spikes that is adaptive, or with return_indices=True, has no derivative here that tells what one "
    "spike does"
)
_KNOWN = "use torch.nn.MaxPool2d or AvgPool2d, or pool the currents before the neuron"
_CHANGED = "max-pooling pools {} now, which it did not in the first call: make a new estimator after such a change"


def _are_spikes(x: Tensor, height: Tensor | float) -> Tensor:
    """There are no numbers but zero and one other."""
    return ((x == 0) | (x == height)).all()


@dataclass(frozen=True)
class _Windows:
    """The windows of a max-pooling, one number for each dimension.

    Attributes:
        kernel: size.
        stride: from one to the next.
        padding: how far they begin in front of the border.
        dilation: from one element to the next.
        beyond: whether some begin in front of the border, or may end behind it.
    """

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    beyond: bool

    @classmethod
    def of(cls, dims: int, given: Mapping[str, Any]) -> _Windows:
        """The windows of so many dimensions, from the arguments of ``max_pool``."""

        def each(value: Any) -> list[int]:
            return [value] * dims if isinstance(value, int) else list(value)

        kernel, padding = each(given["kernel_size"]), each(given.get("padding", 0))
        stride = each(given["stride"]) if given.get("stride") else kernel
        beyond = any(padding) or bool(given.get("ceil_mode"))
        return cls(kernel, stride, padding, each(given.get("dilation", 1)), beyond)

    def maximum(self, x: Tensor) -> Tensor | None:
        """The maximum in each window, on a CPU sooner than ``max_pool`` has it; None where that is to do it."""
        given = list(zip(x.shape[-len(self.kernel) :], self.kernel, self.stride, self.dilation, strict=True))
        spare = [size - 1 - d * (k - 1) for size, k, _, d in given]
        if self.beyond or min(spare) < 0 or x.device.type != "cpu":
            return None
        ends = [room // s * s + 1 for room, s in zip(spare, self.stride, strict=True)]
        found: Tensor | None = None
        for offsets in itertools.product(*(range(0, d * k, d) for _, k, _, d in given)):
            here: Any = [slice(first, first + end, s) for first, end, s in zip(offsets, ends, self.stride, strict=True)]
            part = x[(..., *here)]
            found = part.clone() if found is None else torch.maximum(found, part, out=found)
        return found


class _Maximum(torch.autograd.Function):
    """The maximum of spikes in each window as it is, in a tuple; backwards, 1 − Π(1 − s)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: tuple[Tensor], height: float, windows: _Windows) -> Tensor:
        ctx.save_for_backward(x)
        ctx.given = value[0].shape, height, windows
        return value[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(_product(x, *ctx.given), x, gradient)
        return found, None, None, None


def _between(rates: Tensor, height: float) -> Tensor:
    """Rates no further than those of neurons that never fire, or always; the derivative is that of all rates.

    Weighted by a profile of both signs, rates may lie beyond.
    """
    return rates.detach().clamp(0, height) + (rates - rates.detach())


def _product(x: Tensor, shape: torch.Size, height: float, windows: _Windows) -> Tensor:
    """1 − Π(1 − s) over the windows of a ``max_pool``, times the height of a spike."""
    kernel, stride, dims = windows.kernel, windows.stride, len(windows.kernel)
    # In half precision nearly one is one.
    chances = x.to(resolved(x.dtype)).reshape(-1, 1, *x.shape[-dims:])
    silent = torch.log1p(chances * (-_NEARLY_ONE / height))
    # Padded by hand, because ceil_mode looks beyond the border.
    pads: list[int] = []
    sizes = zip(x.shape[-dims:], shape[-dims:], kernel, stride, windows.padding, windows.dilation, strict=True)
    for size, out, k, s, p, d in sizes:
        pads = [p, (out - 1) * s + d * (k - 1) + 1 - size - p, *pads]
    silent = F.pad(silent, pads)
    if set(windows.dilation) == {1}:
        # Several times as fast; there is none of one dimension that sums.
        if dims == 1:
            silent, kernel, stride = silent.unsqueeze(2), [1, *kernel], [1, *stride]
        summed = _SUMS[len(kernel)](silent, kernel, stride, divisor_override=1)
    else:
        window = torch.ones(1, 1, *kernel, dtype=silent.dtype, device=x.device)
        summed = _CONVOLUTIONS[dims](silent, window, stride=stride, dilation=windows.dilation)
    return (-height * torch.expm1(summed)).view(shape).to(x.dtype)
