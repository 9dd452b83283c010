"""Memory for what each time step writes and what remains of it; on other devices than a CPU, torch's."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int16: np.int16, torch.int64: np.int64}
# Smaller blocks come back from the C library as they were.
_WORTH_KEEPING = 1 << 16
# Of torch's own tensors, and of a line of the cache.
_ALIGNMENT = 64


class _Loan(weakref.ref):  # type: ignore[type-arg]
    """A block that is in use; where it goes afterwards."""

    __slots__ = ("block", "free")
    block: NDArray[np.uint8]
    free: list[NDArray[np.uint8]]

    # As an object: arrays have no hash.
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Pool:
    """Memory for tensors of each time step: what nobody holds any more is given out again.

    The C library hands large blocks back to the system, and gets them again page by page, which takes longer than to
    compute what is written there. A block is free when the storage of its tensor is: also views and saved tensors hold
    that. Sizes that were not asked for during some presentations are let go.
    """

    patience = 256

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._used: dict[int, int] = {}
        self._presentations = 0
        self._loans: set[_Loan] = set()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, with any numbers in it."""
        size = math.prod(shape) * dtype.itemsize
        self._used[size] = self._presentations
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(size + _ALIGNMENT, np.uint8)
            block = block[-block.ctypes.data % _ALIGNMENT :][:size]
        # Shaped by NumPy: of a tensor that is a view snnTorch could not detach states in place.
        lent = block.view(_NUMPY[dtype]).reshape(tuple(shape))
        loan = _Loan(lent, self._take_back)
        loan.block, loan.free = block, free
        self._loans.add(loan)
        return torch.from_numpy(lent)

    def _take_back(self, loan: Any) -> None:
        self._loans.discard(loan)
        loan.free.append(loan.block)

    def count_presentation(self) -> None:
        """Lets go of sizes that were not asked for during the last presentations."""
        self._presentations += 1
        if self._presentations % self.patience:
            return
        for size, last in list(self._used.items()):
            if self._presentations - last > self.patience:
                del self._free[size], self._used[size]


pool = Pool()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor with any numbers in it."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < _WORTH_KEEPING:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return pool.empty(shape, dtype)
