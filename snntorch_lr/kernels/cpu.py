"""Fused time steps and noise on a CPU, where Numba is installed: their threads and their memory."""

from __future__ import annotations

import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._messages import first_line, warn

# Fewer numbers than this are computed sooner than another thread wakes up.
_WORTH_A_THREAD = 1 << 16

_compiled: set[tuple[Callable[..., None], Any]] = set()
_executor: tuple[int, int, ThreadPoolExecutor] | None = None
_enabled = True


@contextmanager
def off() -> Iterator[None]:
    """Context without fused time steps: torch computes the same, with the same noise, in more passes over memory."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


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

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        return self.empty(shape, dtype).zero_()

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


pool = Pool()
slab = Slab()
_WORTH_KEEPING = 1 << 16


def fits(x: Tensor) -> bool:
    """There is a fused time step for the device and the dtype of a tensor."""
    return _enabled and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and _module() is not None


def fill(out: Tensor, *arguments: Any) -> bool:
    """Fills ``[rows, numbers]`` with noise, and says whether it did; see ``numba_steps.noise``."""
    module = _module() if out.device.type == "cpu" else None
    if module is None:
        return False
    _run(module.noise, out.numpy(), *arguments)
    return True


def clone(x: Tensor) -> Tensor:
    """A copy without a graph, in memory of the pool if it is on a CPU."""
    x = x.detach()
    return pool.empty(x.shape, x.dtype).copy_(x) if x.device.type == "cpu" else x.clone()


def pack(spikes: Tensor) -> Tensor | None:
    """Numbers on a CPU as bits, eight to a byte: whether they are zero; None if Numba is not there."""
    if not (fits(spikes) and spikes.is_contiguous()):
        return None
    flat = spikes.numpy().reshape(-1)
    packed = slab.empty(-(-flat.size // 8))
    _run(_module().pack, packed.numpy(), flat)
    return packed


def unpack(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """The inverse of ``pack``: zeros and ones."""
    if packed.device.type != "cpu" or dtype not in (torch.float32, torch.float64) or not _enabled or _module() is None:
        return None
    spikes = pool.empty(shape, dtype)
    # Bytes are shared among threads, and each of them is eight numbers.
    _run(_module().unpack, packed.numpy(), spikes.numpy().reshape(-1))
    return spikes


def step(new: Tensor, *arguments: Any) -> None:
    """One time step of a neuron; see ``numba_steps.step``.

    Args:
        new: ``[rows, ...]``, filled.
        arguments: the others in their order, as tensors ``[rows, ...]``, ``[neurons]`` or numbers; None for a sum that
            is not wanted, or a gain of one.
    """
    neurons = new[0].numel()
    empty = np.empty((0, neurons), new.numpy().dtype)

    def array(value: Any) -> Any:
        if value is None:
            return empty
        if isinstance(value, float):
            return empty.dtype.type(value)
        if not isinstance(value, Tensor):
            return value
        return value.numpy() if value.dim() == 1 else value.reshape(len(value), neurons).contiguous().numpy()

    _run(_module().step, new.numpy().reshape(len(new), neurons), *map(array, arguments))


def _run(kernel: Callable[..., None], out: Any, *arguments: Any) -> None:
    """Shares the rows of an output among as many threads as torch has."""
    rows = len(out)
    threads = max(1, min(torch.get_num_threads(), out.size // _WORTH_A_THREAD, rows))
    if (kernel, out.dtype) not in _compiled:
        _compiled.add((kernel, out.dtype))
        with _tell_about_compiling():
            kernel(0, rows, out, *arguments)
        return
    if threads == 1:
        kernel(0, rows, out, *arguments)
        return
    edges = [rows * index // threads for index in range(threads + 1)]
    others = [
        _threads(threads - 1).submit(kernel, edges[index], edges[index + 1], out, *arguments)
        for index in range(1, threads)
    ]
    kernel(edges[0], edges[1], out, *arguments)
    for other in others:
        other.result()


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool of this process; one that was inherited through a fork has no threads."""
    global _executor
    if _executor is None or _executor[:2] != (os.getpid(), count):
        _executor = (os.getpid(), count, ThreadPoolExecutor(count, "snntorch_lr"))
    return _executor[2]


@contextmanager
def _tell_about_compiling() -> Iterator[None]:
    """Says what takes so long, if it does: only the first call on a machine compiles."""
    message = "snntorch_lr compiles its time steps, once on this machine ..."
    timer = threading.Timer(1.0, print, [message], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@cache
def _module() -> Any:
    """The kernels for a CPU; None without Numba, which takes half a second to import and so comes last."""
    try:
        from . import numba_steps
    except ImportError:
        return None
    except RuntimeError as error:
        warn(f"time steps are not fused: {first_line(error)}; point NUMBA_CACHE_DIR to a folder that can be written")
        return None
    return numba_steps
