"""Fused time steps and noise on a CPU, by Numba, in torch's own threads."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from array import array
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
from ..graph import outside_of_graphs
from . import numba_steps
from .kinds import NONE, SUBTRACT

DTYPES = (torch.float32, torch.float64)
# Fewer numbers than this are computed sooner than another thread takes its part.
_WORTH_A_THREAD = 1 << 15
# So that a thread that is held up leaves rows to others.
_CLAIMS_OF_A_THREAD = 4

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


CODES = {torch.float32: torch.int16, torch.float64: torch.int64}
"""Of what the backward pass keeps, by the dtype of the membrane potential."""


def noise(out: Tensor, key: int, kind: int) -> None:
    """Fills ``[rows, numbers]`` with noise; see ``snntorch_lr.philox.draw``."""
    (_noise_apart if torch.compiler.is_compiling() else _noise)(out, key, kind)


def _noise(out: Tensor, key: int, kind: int) -> None:
    assert out.is_contiguous()
    rows, numbers = out.shape
    threads, claim = _share(rows, numbers)
    record = (0, rows, claim, out.data_ptr(), numbers, key)
    _run(_compiled(numba_steps.noise, _NUMPY[out.dtype], kind), record, threads)


_noise_apart = outside_of_graphs(_noise)


class TimeSteps:
    """Time steps of a neuron, forward and backward; ``numba_steps`` says what its arguments are.

    Args:
        kind: of the noise.
        mechanism: of the reset.
        constants: leak, share, alpha or None, threshold and noise level, ``[neurons]``, contiguous.
    """

    def __init__(self, kind: int, mechanism: int, *constants: Tensor | None) -> None:
        leak = constants[0]
        assert leak is not None
        # They must not go away.
        self._kept = constants
        self._neurons = leak.numel()
        places = [0 if constant is None else constant.data_ptr() for constant in constants]
        self._constants = (self._neurons, mechanism, *places)
        plain = mechanism in (SUBTRACT, NONE) and constants[2] is None
        self._kernel = (_NUMPY[leak.dtype], kind, plain)
        self._dtype = leak.dtype

    def forward(
        self, rows: int, sets: int, steps: int, currents: int, seen: int, keys: Tensor, current: Tensor,
        mem: Tensor | None, shadow: Tensor | None, syn: Tensor | None, fired: Tensor | None, before: Tensor | None,
        new_shadow: Tensor | None, spikes: Tensor, seen_mem: Tensor, seen_syn: Tensor | None, code: Tensor | None,
        noise_code: Tensor | None,
    ) -> None:  # fmt: skip
        """See ``numba_steps.FORWARD``; tensors are contiguous, and read or filled."""
        threads, claim = _share(rows, self._neurons * sets * steps)
        tensors = (
            keys, current, mem, shadow, syn, fired, before, new_shadow, spikes, seen_mem, seen_syn, code, noise_code,
        )  # fmt: skip
        places = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        record = (0, rows, claim, *self._constants, sets, steps, currents, seen, *places)
        _run(_compiled(numba_steps.forward, *self._kernel), record, threads)

    def backward(
        self, rows: int, sets: int, steps: int, currents: int, a: Tensor | None, b: Tensor | None, b_syn: Tensor | None,
        code: Tensor, noise_code: Tensor | None, fired: Tensor | None, before: Tensor | None, settings: Tensor | None,
        togo: Tensor, parted: Tensor | None, fit_rows: int, trace: Tensor | None, traces: int, syn_trace: Tensor | None,
        to_current: Tensor | None, adds: bool, sums: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """See ``numba_steps.BACKWARD``; ``sums`` are from ``sums_of``."""
        to_sigma, fit = sums
        threads, claim = _share(rows, self._neurons * sets * steps)
        # No more chunks than there were when the sums began.
        claim = max(claim, -(-rows // len(fit)))
        tensors = (
            a, b, b_syn, code, noise_code, fired, before, settings, togo, parted, trace, syn_trace, to_current,
            to_sigma, fit,
        )  # fmt: skip
        places = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        record = (0, rows, claim, *self._constants, steps, currents, fit_rows, traces, adds, *places)
        _run(_compiled(numba_steps.backward, *self._kernel, sets == 2), record, threads)

    def sums_of(self, rows: int) -> tuple[Tensor, Tensor]:
        """Zeros that backward passes add to: the gradient of σ, times σ, ``[parts, neurons]``; ΣC₀C₁, ΣC₁²."""
        parts = -(-rows // max(1, rows // (torch.get_num_threads() * _CLAIMS_OF_A_THREAD)))
        return torch.zeros(parts, self._neurons, dtype=self._dtype), torch.zeros(parts, 2, dtype=self._dtype)


def _share(rows: int, size: int) -> tuple[int, int]:
    """Among how many threads rows of so many numbers are shared, and how many rows each of them claims at once."""
    threads = max(1, min(torch.get_num_threads(), rows * size // _WORTH_A_THREAD))
    return threads, rows if threads == 1 else max(1, rows // (threads * _CLAIMS_OF_A_THREAD))


def _run(function: Any, record: tuple[int, ...], threads: int) -> None:
    """Has threads claim the rows of a record; of torch, if their library can be asked.

    Two sets of threads would get into each other's way: OpenMP's go on for a while, looking for work.
    """
    numbers = array("q", record)
    address, _ = numbers.buffer_info()
    if threads == 1:
        function.ctypes(address)
        return
    team = _openmp()
    if team is not None and _process == os.getpid():
        team(function.address, address, threads, 0)
        return
    others = [_executor(os.getpid(), threads - 1).submit(function.ctypes, address) for _ in range(threads - 1)]
    function.ctypes(address)
    for other in others:
        other.result()


@cache
def _compiled(make: Callable[..., Any], *options: Any) -> Any:
    try:
        with _tell_about_compiling():
            return make(*options)
    except NumbaError as error:
        raise RuntimeError(
            f"a fused time step does not compile: {first_line(error)}; torch computes the same in the context "
            "snntorch_lr.kernels.off()"
        ) from error


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
