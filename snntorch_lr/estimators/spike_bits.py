"""Spikes that a graph saves for its backward pass, kept as one bit each."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import version


def pack(spikes: Tensor) -> Tensor:
    """Zeros and ones as bits, eight to a byte.

    Args:
        spikes: zeros and ones, any shape and dtype.

    Returns:
        uint8 tensor on the same device, one dimension.
    """
    bits = spikes.detach().reshape(-1) != 0
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy()))
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits * _POWERS.to(bits.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros and ones from bits; the inverse of ``pack``."""
    count = math.prod(shape)
    if packed.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=count))
    else:
        bits = ((packed.unsqueeze(1) & _POWERS.to(packed.device)) != 0).reshape(-1)[:count]
    return bits.to(dtype).view(shape)


_POWERS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


class PackedSpikes(torch.autograd.graph.saved_tensors_hooks):
    """Context in which a graph saves spikes as bits, and everything else as it is.

    Spikes are recognised by identity: only tensors that were announced are packed, so that no value is looked at.
    What was changed in place before it is saved is no longer spikes. What is changed after that, unless it was packed,
    is an error in the backward pass: autograd leaves it to these hooks to look.
    """

    def __init__(self) -> None:
        known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        packed: dict[int, Tensor] = {}

        def save(saved: Tensor) -> Any:
            key = saved.data_ptr()
            reference, count = known.get(key, (None, 0))
            spikes = reference() if reference is not None else None
            changed = spikes is not None and version(spikes) != count
            if spikes is None or changed or saved.numel() != spikes.numel() or not saved.is_contiguous():
                # Not the tensor itself: an operation that saves its own output would keep itself alive.
                return saved.detach(), version(saved)
            if key not in packed:
                packed[key] = pack(spikes)
            return packed[key], saved.shape, saved.dtype

        # Functions and not methods: a graph that held this object would be part of a cycle.
        super().__init__(save, _restore)
        self._known, self._packed = known, packed

    def announce(self, spikes: Tensor) -> None:
        """Says that a tensor holds zeros and ones only, as it is now."""
        key = spikes.data_ptr()
        known, packed = self._known, self._packed

        def forget(_: object) -> None:
            known.pop(key, None)
            packed.pop(key, None)

        packed.pop(key, None)
        known[key] = weakref.ref(spikes, forget), version(spikes)


def _restore(saved: Any) -> Tensor:
    if len(saved) == 3:
        return unpack(*saved)
    tensor: Tensor = saved[0]
    if version(tensor) != saved[1]:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the gradient needs was changed in place after it had been "
            "used: change a copy, or leave out inplace=True"
        )
    return tensor
