"""Fused time steps and noise on a CPU, by Numba, in torch's own threads."""

from __future__ import annotations

import ctypes
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
from numba.core.errors import NumbaError
from torch import Tensor

from .._messages import first_line
from . import numba_steps

DTYPES = (torch.float32, torch.float64)
# Fewer numbers than this are computed sooner than another thread takes its part.
_WORTH_A_THREAD = 1 << 15
# So that a thread that is held up leaves rows to others.
_CLAIMS_OF_A_THREAD = 4

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class _Noise(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in numba_steps.NOISE]


class _Forward(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in numba_steps.FORWARD]


class _Backward(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in numba_steps.BACKWARD]


CODES = {torch.float32: torch.int16, torch.float64: torch.int64}
"""Of what the backward pass keeps, by the dtype of the membrane potential."""


def noise(out: Tensor, key: int, kind: int) -> None:
    """Fills ``[rows, numbers]`` with noise; see ``snntorch_lr.philox.draw``."""
    rows, numbers = out.shape
    block = _Noise(0, rows, 0, _address(out), numbers, key, kind)
    _run(numba_steps.noise, out.dtype, block, numbers)


def forward(rows: int, dtype: torch.dtype, **given: Tensor | int | None) -> None:
    """Time steps of a train and its shadow; see ``numba_steps._forward`` for the arguments.

    Args:
        rows: of the batch.
        dtype: of the membrane potential.
        **given: integers; and contiguous tensors, which are read or filled, or None.
    """
    block = _Forward(rows=rows, **_words(given))
    _run(numba_steps.forward, dtype, block, block.neurons * block.sets * block.steps)


def backward(
    rows: int, dtype: torch.dtype, learns_sigma: bool, **given: Tensor | int | None
) -> tuple[Tensor | None, Tensor]:
    """Counterfactual credit in these; see ``numba_steps._backward`` for the arguments.

    Args:
        rows: of the batch.
        dtype: of the membrane potential.
        learns_sigma: a gradient of σ is wanted.
        **given: as for ``forward``.

    Returns:
        Gradient of σ, times σ, ``[neurons]``, or None; Σ C₀C₁ and Σ C₁².
    """
    block = _Backward(rows=rows, **_words(given))
    _, claim = _share(rows, block.neurons * 2 * block.steps)
    chunks = -(-rows // claim)
    to_sigma = torch.zeros(chunks, block.neurons, dtype=dtype) if learns_sigma else None
    sums = torch.zeros(chunks, 2, dtype=dtype)
    block.to_sigma, block.sums = 0 if to_sigma is None else to_sigma.data_ptr(), sums.data_ptr()
    _run(numba_steps.backward, dtype, block, block.neurons * 2 * block.steps)
    return None if to_sigma is None else to_sigma.sum(0), sums.sum(0)


def _words(given: dict[str, Tensor | int | None]) -> dict[str, int]:
    return {
        name: value if type(value) is int else 0 if value is None else value.data_ptr()  # type: ignore[union-attr]
        for name, value in given.items()
    }


def _address(x: Tensor) -> int:
    assert x.is_contiguous()
    return x.data_ptr()


def _share(rows: int, size: int) -> tuple[int, int]:
    """Among how many threads rows of so many numbers are shared, and how many rows each of them claims at once."""
    threads = max(1, min(torch.get_num_threads(), rows * size // _WORTH_A_THREAD))
    return threads, rows if threads == 1 else max(1, rows // (threads * _CLAIMS_OF_A_THREAD))


def _run(kernel: Callable[[Any], Any], dtype: torch.dtype, block: Any, size: int) -> None:
    """Shares rows of so many numbers among as many threads as torch has, at most."""
    threads, block.claim = _share(block.rows, size)
    function, address = _compiled(kernel, dtype), ctypes.addressof(block)
    if threads == 1:
        function.ctypes(address)
    else:
        _in_threads(function, address, threads)


@cache
def _compiled(kernel: Callable[[Any], Any], dtype: torch.dtype) -> Any:
    try:
        with _tell_about_compiling():
            return kernel(_NUMPY[dtype])
    except NumbaError as error:
        raise RuntimeError(
            f"a fused time step does not compile: {first_line(error)}; torch computes the same in the context "
            "snntorch_lr.kernels.off()"
        ) from error


def _in_threads(function: Any, address: int, threads: int) -> None:
    """Runs a function in several threads at once: in those of torch, if their library can be asked.

    Two sets of threads would get into each other's way: OpenMP's go on for a while, looking for work.
    """
    team = _openmp()
    if team is not None and _process == os.getpid():
        team(function.address, address, threads, 0)
        return
    others = [_executor(os.getpid(), threads - 1).submit(function.ctypes, address) for _ in range(threads - 1)]
    function.ctypes(address)
    for other in others:
        other.result()


# OpenMP's threads do not come along when a process forks.
_process = os.getpid()


@cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the library that torch has loaded; None where it has another one."""
    try:
        team = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    team.argtypes, team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return team


@cache
def _executor(process: int, count: int) -> ThreadPoolExecutor:
    """Threads of this process; those of one that it was forked from did not come along."""
    return ThreadPoolExecutor(count, "snntorch_lr")


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
