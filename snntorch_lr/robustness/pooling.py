"""Max-pooling of spikes, differentiated as what a flip of one spike does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._messages import warn
from ..philox import resolved

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
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _POOLS and func not in _UNKNOWN:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        height = _height(x)
        if not height:
            return func(*args, **kwargs)
        if func in _UNKNOWN or kwargs.get("return_indices"):
            warn(
                "max-pooling of spikes that is adaptive, or with return_indices=True, has no derivative here that "
                "tells what one spike does; that of torch hides the gradient from attacks: use torch.nn.MaxPool2d or "
                "AvgPool2d, or pool the currents before the neuron"
            )
            return func(*args, **kwargs)
        with torch.no_grad():
            value = func(*args, **kwargs)
        windows = _Windows.of(_POOLS[func], dict(zip(_NAMES, args, strict=False)) | kwargs)
        return _Maximum.apply(x, (value,), height, windows)


def _height(x: Tensor) -> float:
    """Height of the spikes in a tensor; 0 where it has none, or other numbers too, or no gradient."""
    if not (x.requires_grad and x.numel()):
        return 0.0
    x = x.detach()
    top = x.amax()
    return float(top) if bool((top > 0) & ((x == 0) | (x == top)).all()) else 0.0


class _Windows(NamedTuple):
    """The windows of a max-pooling, one number for each dimension."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @classmethod
    def of(cls, dims: int, arguments: Mapping[str, Any]) -> _Windows:
        """The windows of so many dimensions, from the arguments of ``max_pool``."""
        defaults = {"stride": arguments["kernel_size"], "padding": 0, "dilation": 1}
        values = (arguments.get(name) or defaults[name] for name in ("stride", "padding", "dilation"))
        sizes = (arguments["kernel_size"], *values)
        return cls(*([size] * dims if isinstance(size, int) else list(size) for size in sizes))


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
