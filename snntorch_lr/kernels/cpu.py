"""Fused time steps and noise on a CPU, by Numba, in torch's own threads."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numba.core.errors import NumbaError
from torch import Tensor

from .._messages import first_line
from . import memory, numba_steps

DTYPES = (torch.float32, torch.float64)
# Fewer numbers than this are computed sooner than another thread takes its part.
_WORTH_A_THREAD = 1 << 15
# So that a thread that is held up leaves rows to others.
_CLAIMS_OF_A_THREAD = 4

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class _Step(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in numba_steps.STEP]


_TENSORS = numba_steps.STEP[numba_steps.STEP.index("mechanism") + 1 : numba_steps.STEP.index("steps")]


class _Noise(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in numba_steps.NOISE]


class _Pack(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in numba_steps.PACK]


def noise(out: Tensor, key: int, batch: int, first: int, half: int, draw: int, kind: int) -> None:
    """Fills ``[rows, numbers]`` with noise; see ``snntorch_lr.noise_stream.NoiseStream``."""
    rows, numbers = out.shape
    given = (_address(out), numbers, key, batch, first, half, draw, kind)
    _run(numba_steps.noise, out.dtype, _Noise, rows, numbers, given)


def pack(values: Tensor) -> Tensor:
    """Numbers as bits, eight to a byte: whether they are zero."""
    count = values.numel()
    packed = memory.slab.empty(-(-count // 8))
    given = (packed.data_ptr(), _address(values), count)
    _run(numba_steps.pack, values.dtype, _Pack, len(packed), 8, given)
    return packed


def unpack(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of ``pack``: zeros and ones."""
    values = memory.pool.empty(shape, dtype)
    given = (packed.data_ptr(), values.data_ptr(), values.numel())
    _run(numba_steps.unpack, dtype, _Pack, len(packed), 8, given)
    return values


def step(
    new: Tensor, spikes: Tensor, keys: Tensor, batch: int, copies: int, first: int, half: int, draw: int, stride: int,
    kind: int, mechanism: int, **tensors: Tensor | None,
) -> None:  # fmt: skip
    """Time steps of a neuron with the same current; see ``numba_steps._step``.

    Args:
        new: ``[rows, ...]``, filled, as the spikes.
        spikes: zeros and ones.
        keys: of the noise, one for each set of rows, as int64.
        batch: number of samples.
        copies: number of copies.
        first: the first of these.
        half: copies from here on get negated noise.
        draw: index of the first draw.
        stride: from one step to the next.
        kind: of the noise.
        mechanism: of the reset.
        tensors: the others by name; None, or left out, for what is not wanted, or a gain of one.
    """
    rows, dtype = len(new), new.dtype
    # Held until the end: what was copied to lie in one piece has no other owner.
    held = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    assert new.is_contiguous()
    assert spikes.is_contiguous()
    assert all(tensor.dtype == dtype for tensor in (new, spikes, *held.values()))
    addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
    steps, *lengths = (len(held[name]) if name in held else 0 for name in ("weights", "current", "gain", "pull"))
    neurons = new.numel() // rows
    given = (
        neurons, new.data_ptr(), spikes.data_ptr(), keys.data_ptr(), batch, copies, first, half, draw,
        stride, kind, mechanism, *(addresses.get(name, 0) for name in _TENSORS), steps, *lengths,
        held["seen_mem"].shape[1] if "seen_mem" in held else 0,
    )  # fmt: skip
    _run(numba_steps.step, dtype, _Step, rows, neurons * steps, given)


def _address(x: Tensor) -> int:
    assert x.is_contiguous()
    return x.data_ptr()


def _run(
    kernel: Callable[[Any], Any], dtype: torch.dtype, block_type: Any, rows: int, size: int, given: Sequence[Any]
) -> None:
    """Shares rows of so many numbers among as many threads as torch has, at most."""
    threads = max(1, min(torch.get_num_threads(), rows * size // _WORTH_A_THREAD))
    claim = rows if threads == 1 else max(1, rows // (threads * _CLAIMS_OF_A_THREAD))
    block = block_type(0, rows, claim, *given)
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
