"""Memory for what each time step writes and what remains of it; on other devices than a CPU, torch's."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Pool:
    """Memory for tensors of each time step: what nobody holds any more is given out again.

    The C library hands large blocks back to the system, and gets them again page by page, which takes longer than to
    compute what is written there. A block is free when the storage of its tensor is: also views and saved tensors hold
    that.
    """

    patience = 64
    most = 8

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._calls = 0
        self._used: dict[int, int] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, with any numbers in it."""
        size = math.prod(shape) * dtype.itemsize
        if size < _WORTH_KEEPING:
            return torch.empty(tuple(shape), dtype=dtype)
        self._used[size] = self._calls
        free = self._free.setdefault(size, [])
        block = free.pop() if free else np.empty(size, np.uint8)
        given = block[:]
        weakref.finalize(given, _put_back, free, block).atexit = False
        return torch.from_numpy(given).view(dtype).view(tuple(shape))

    def trim(self) -> None:
        """Counts a call of an estimator, and lets go of sizes that none of the last ones has asked for."""
        self._calls += 1
        for size, last in list(self._used.items()):
            if self._calls - last > self.patience:
                del self._free[size], self._used[size]


def _put_back(free: list[NDArray[np.uint8]], block: NDArray[np.uint8]) -> None:
    if len(free) < Pool.most:
        free.append(block)


class Slab:
    """Memory for what is small and kept for long, taken from large blocks one piece after the other.

    Between the large tensors of time steps that come and go, each small one that stays would leave a gap in the memory
    of the C library that is just too small for the next, which then grows with every time step.
    """

    size = 1 << 20

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)
        self._next = 0

    def empty(self, size: int) -> Tensor:
        """Bytes with any numbers in them."""
        if self._next + size > len(self._block):
            self._block, self._next = np.empty(max(size, self.size), np.uint8), 0
        given = self._block[self._next : self._next + size]
        self._next += size
        return torch.from_numpy(given)


@cache
def _malloc_trim() -> Any:
    """The C library's function that gives free memory back to the system; None where it has none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return None


_has_tidied = False


def tidy() -> None:
    """Gives back what is free between small pieces that stay, such as the nodes of a graph.

    A large tensor of each time step leaves a gap there that the next one does not fit in.
    """
    global _has_tidied
    _has_tidied = True
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def end_call(first: bool) -> None:
    """Lets go of what calls of an estimator no longer ask for.

    After a long presentation, and after the first call, which runs several times, gives back all that is free.
    """
    global _has_tidied
    pool.trim()
    if _has_tidied or first:
        tidy()
        _has_tidied = False


pool = Pool()
slab = Slab()
_WORTH_KEEPING = 1 << 16


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor with any numbers in it, from the pool if it is on a CPU."""
    return pool.empty(x.shape, x.dtype) if x.device.type == "cpu" else x.new_empty(x.shape)


def zeros_like(x: Tensor) -> Tensor:
    """As ``empty_like``, of zeros."""
    return empty_like(x).zero_()


def clone(x: Tensor) -> Tensor:
    """As ``empty_like``, a copy without a graph."""
    return empty_like(x).copy_(x.detach())
