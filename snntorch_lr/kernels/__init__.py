"""Fused time steps and noise where Numba is installed, and the threads that they run in."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._messages import first_line, warn

LOGISTIC_ESCAPE, GAUSSIAN_ESCAPE, GAUSSIAN, LAPLACE, LOGISTIC = range(5)
"""Kinds of noise; those of escape noise need uniform numbers only."""
SUBTRACT, ZERO, NONE = range(3)
"""Mechanisms of reset, by snnTorch's numbers."""

# Fewer numbers than this are computed sooner than another thread wakes up.
_WORTH_A_THREAD = 1 << 15

_pool: tuple[int, int, ThreadPoolExecutor] | None = None
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


def step(new: Tensor, *arguments: Any) -> None:
    """One time step of a leaky neuron; see ``numba_steps.step``.

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
    # Whichever thread compiled it first would hold the others back, and say so once each.
    if threads == 1 or not kernel.signatures:  # type: ignore[attr-defined]
        with _tell_about_compiling():
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
    global _pool
    if _pool is None or _pool[:2] != (os.getpid(), count):
        _pool = (os.getpid(), count, ThreadPoolExecutor(count, "snntorch_lr"))
    return _pool[2]


@contextmanager
def _tell_about_compiling() -> Iterator[None]:
    """Says what takes so long, if it does: only the first call on a machine compiles."""
    timer = threading.Timer(1.0, print, ["snntorch_lr compiles its time steps, once on this machine ..."], {"file": sys.stderr})
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
