"""Max-pooling of spikes, whose derivative by one spike depends on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
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
        heights: for each call in its order, the height of the spikes whose rates are pooled, and 0 for currents: rates
            cannot be told from currents. None to look for spikes.

    Attributes:
        calls: the height of the spikes of each call, and 0 for currents.

    Raises:
        ValueError: for a kind of max-pooling whose windows are not known here, if it pools spikes.
    """

    def __init__(self, heights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.calls: list[float] = []
        self._known: Iterator[float] | None = None if heights is None else iter(heights)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _POOLS and func not in _REFUSED:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        height = _height(x) if self._known is None else next(self._known, 0.0)
        self.calls.append(height)
        if not (height and x.requires_grad):
            return func(*args, **kwargs)
        if func in _REFUSED or kwargs.get("return_indices"):
            raise ValueError(
                "max-pooling of spikes that is adaptive, or with return_indices=True, has no derivative here that "
                "tells what one spike does: use torch.nn.MaxPool2d or AvgPool2d, or pool the currents before the neuron"
            )
        options = {"stride": None, "padding": 0, "dilation": 1} | dict(zip(_NAMES, args, strict=False)) | kwargs
        value = func(*args, **kwargs)
        product = _product(x, value.shape, height, _POOLS[func], options)
        return product if self._known is not None else value.detach() + (product - product.detach())


def _height(x: Tensor) -> float:
    """Of spikes: the one number besides zero that there is; 0 for anything else."""
    top = x.detach().amax() if x.numel() else torch.zeros(())
    return float(top) if bool((top > 0) & ((x == 0) | (x == top)).all()) else 0.0


def _product(x: Tensor, shape: torch.Size, height: float, dims: int, options: dict[str, Any]) -> Tensor:
    """1 − Π(1 − s) over the windows of a ``max_pool``, times the height of a spike."""

    def each(name: str) -> list[int]:
        given = options[name]
        return [given] * dims if isinstance(given, int) else list(given)

    kernel, padding, dilation = each("kernel_size"), each("padding"), each("dilation")
    stride = each("stride") if options["stride"] else kernel
    silent = torch.log1p(x.reshape(-1, 1, *x.shape[-dims:]) * (-_NEARLY_ONE / height))
    # Padded by hand, because ceil_mode looks beyond the border.
    pads: list[int] = []
    for size, out, k, s, p, d in zip(x.shape[-dims:], shape[-dims:], kernel, stride, padding, dilation, strict=True):
        pads = [p, (out - 1) * s + d * (k - 1) + 1 - size - p, *pads]
    window = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    summed = _CONVOLUTIONS[dims](F.pad(silent, pads), window, stride=stride, dilation=dilation)
    return (-height * torch.expm1(summed)).view(shape)
