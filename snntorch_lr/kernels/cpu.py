"""Fused time steps and noise on a CPU, by Numba, and their threads."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numba.core.errors import NumbaError
from torch import Tensor

from .._messages import first_line
from . import memory, numba_steps

DTYPES = (torch.float32, torch.float64)
# Fewer numbers than this are computed sooner than another thread wakes up.
_WORTH_A_THREAD = 1 << 16

_compiled: set[tuple[Callable[..., None], Any]] = set()
_executor: tuple[int, int, ThreadPoolExecutor] | None = None


def noise(out: Tensor, key: int, *arguments: int) -> None:
    """Fills ``[rows, numbers]`` with noise; see ``numba_steps.noise``."""
    _run(numba_steps.noise, out.numpy(), np.uint64(key), *arguments)


def pack(values: Tensor) -> Tensor:
    """Numbers as bits, eight to a byte: whether they are zero."""
    flat = values.numpy().reshape(-1)
    packed = memory.slab.empty(-(-flat.size // 8))
    _run(numba_steps.pack, packed.numpy(), flat)
    return packed


def unpack(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of ``pack``: zeros and ones."""
    values = memory.pool.empty(shape, dtype)
    # Bytes are shared among threads, and each of them is eight numbers.
    _run(numba_steps.unpack, packed.numpy(), values.numpy().reshape(-1))
    return values


def step(new: Tensor, spikes: Tensor, keys: Tensor, *arguments: Any) -> None:
    """One time step of a neuron; see ``numba_steps.step``.

    Args:
        new: ``[rows, ...]``, filled, as the spikes.
        spikes: zeros and ones.
        keys: of the noise, one for each set of rows, as int64.
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

    outputs = (each.numpy().reshape(len(new), neurons) for each in (new, spikes))
    _run(numba_steps.step, *outputs, keys.numpy().view(np.uint64), *map(array, arguments))


def _run(kernel: Callable[..., None], out: Any, *arguments: Any) -> None:
    """Shares the rows of an output among as many threads as torch has."""
    rows = len(out)
    threads = max(1, min(torch.get_num_threads(), out.size // _WORTH_A_THREAD, rows))
    if (kernel, out.dtype) not in _compiled:
        try:
            with _tell_about_compiling():
                kernel(0, rows, out, *arguments)
        except NumbaError as error:
            raise RuntimeError(
                f"a fused time step does not compile: {first_line(error)}; torch computes the same in the context "
                "snntorch_lr.kernels.off()"
            ) from error
        _compiled.add((kernel, out.dtype))
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
    """Says what takes so long, if it does: only the first call on a machine compiles, later ones load."""
    message = "snntorch_lr compiles its time steps, once on this machine ..."
    timer = threading.Timer(3.0, print, [message], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
