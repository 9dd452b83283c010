"""Spikes as one bit each, and the graphs that save them so."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import version
from ..kernels import fused_on, memory


def pack(spikes: Tensor) -> Tensor:
    """Zeros and ones as bits, eight to a byte.

    Args:
        spikes: zeros and ones, any shape and dtype.

    Returns:
        uint8 tensor on the same device, one dimension; bit b of byte j is number b · (number of bytes) + j.
    """
    kernels = fused_on(spikes.device, spikes.dtype)
    if kernels is not None and spikes.is_contiguous():
        packed: Tensor = kernels.pack(spikes.detach())
        return packed
    bits = spikes.detach().reshape(-1) != 0
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(8, -1)
    if bits.device.type == "cpu":
        return memory.slab.empty(bits.shape[1]).copy_(torch.from_numpy(np.packbits(bits.numpy(), 0, "little")[0]))
    return (bits * _powers(bits.device)).sum(0, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros and ones from bits; the inverse of ``pack``."""
    kernels = fused_on(packed.device, dtype)
    if kernels is not None:
        spikes: Tensor = kernels.unpack(packed, shape, dtype)
        return spikes
    bits = (packed & _powers(packed.device)) != 0
    return bits.reshape(-1)[: math.prod(shape)].to(dtype).view(shape)


def _powers(device: torch.device) -> Tensor:
    # Made there: a copy from the host would wait for the device.
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device).unsqueeze(1)


class PackedSpikes(torch.autograd.graph.saved_tensors_hooks):
    """Context in which a graph saves spikes as bits, and everything else as it is.

    Spikes are recognised by identity: only tensors that were announced are packed, so that no value is looked at.
    What was changed in place before it is saved is no longer spikes. What is changed after that, unless it was packed,
    is an error in the backward pass: autograd leaves it to these hooks to look. As long as they take little memory,
    spikes are left as they are, too: to pack them takes time, and much of what is saved is let go before it is used.

    Args:
        most_bytes: of spikes that are left as they are.
    """

    def __init__(self, most_bytes: int = 4_000_000) -> None:
        known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        packed: dict[int, Tensor] = {}
        whole = _Whole()

        def save(saved: Tensor) -> Any:
            spikes = _known_spikes(known, saved)
            size = saved.numel() * saved.element_size()
            if spikes is not None and whole.bytes + size > most_bytes:
                key = saved.data_ptr()
                if key not in packed:
                    packed[key] = pack(spikes)
                return packed[key], saved.shape, saved.dtype
            # Not the tensor itself: an operation that saves its own output would keep itself alive.
            return saved.detach(), version(saved) if spikes is None else _Share(whole, size, version(saved))

        # Functions and not methods: a graph that held this object would be part of a cycle.
        super().__init__(save, _restore)
        self._known, self._packed = known, packed

    def knows(self, x: Tensor) -> bool:
        """The tensor holds spikes that were announced, and nothing else."""
        return _known_spikes(self._known, x) is not None

    def announce(self, spikes: Tensor) -> None:
        """Says that a tensor holds zeros and ones only, as it is now."""
        key = spikes.data_ptr()
        known, packed = self._known, self._packed

        def forget(_: object) -> None:
            known.pop(key, None)
            packed.pop(key, None)

        packed.pop(key, None)
        known[key] = weakref.ref(spikes, forget), version(spikes)


class _Whole:
    """How many bytes of spikes a graph holds that were left as they are."""

    bytes = 0


class _Share:
    """A part of these; it is given back when the graph lets go of it."""

    def __init__(self, whole: _Whole, size: int, version: int) -> None:
        self.whole, self.size, self.version = whole, size, version
        whole.bytes += size

    def __del__(self) -> None:
        self.whole.bytes -= self.size


def _known_spikes(known: Mapping[int, tuple[weakref.ref[Tensor], int]], x: Tensor) -> Tensor | None:
    """The announced spikes that a tensor shares all of its memory with, if they have not been changed since."""
    reference, count = known.get(x.data_ptr(), (None, 0))
    spikes = reference() if reference is not None else None
    if spikes is None or version(spikes) != count or x.numel() != spikes.numel() or not x.is_contiguous():
        return None
    return spikes


def _restore(saved: Any) -> Tensor:
    if len(saved) == 3:
        return unpack(*saved)
    tensor: Tensor = saved[0]
    count = saved[1]
    if version(tensor) != (count.version if isinstance(count, _Share) else count):
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the gradient needs was changed in place after it had been "
            "used: change a copy, or leave out inplace=True"
        )
    return tensor
