"""Uniform random numbers in (−1, 1): never an end point, and as many −u as u, whatever the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Fewer numbers than this are filled sooner than another thread wakes up.
_WORTH_A_THREAD = 1 << 18

_pool: tuple[int, int, ThreadPoolExecutor] | None = None


def from_generator(out: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fills a tensor in place from a torch generator on its device, or from the global one if it is None."""
    # torch draws from [-1, 1).
    return out.uniform_(-1, 1, generator=generator).clamp_(min=torch.finfo(out.dtype).eps / 2 - 1)


def from_seeds(parts: Sequence[tuple[Tensor, Sequence[int]]]) -> None:
    """Fills tensors on a CPU in place, each from a seed of its own, side by side where that pays.

    NumPy's bit generators need a third of the time of torch's, and run in threads: random numbers are most of the work
    of a likelihood-ratio gradient.

    Args:
        parts: contiguous float32 or float64 tensors, and the integers that their numbers are a function of.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2 or sum(tensor.numel() for tensor, _ in parts) < _WORTH_A_THREAD:
        _fill_all(parts)
        return
    # One task for each thread, this one included: handing over costs as much as a hundred thousand numbers.
    others = [_threads(threads - 1).submit(_fill_all, parts[index::threads]) for index in range(1, threads)]
    _fill_all(parts[::threads])
    for other in others:
        other.result()


def _fill_all(parts: Sequence[tuple[Tensor, Sequence[int]]]) -> None:
    for tensor, seed in parts:
        out = tensor.numpy().reshape(-1)
        size = out.size if out.itemsize == 8 else -(-out.size // 2)
        to_unit_interval(np.random.SFC64(seed).random_raw(size), out)


def to_unit_interval(bits: NDArray[np.uint64], out: NDArray[np.floating[Any]]) -> None:
    """Writes (k + ½) / 2ⁿ for every signed integer k of n + 1 bits: exact, symmetric, and neither 0 nor ±1.

    Args:
        bits: random words; overwritten.
        out: float32 of at most twice as many numbers, or float64 of as many.
    """
    words, digits = (bits.view(np.int64), 52) if out.itemsize == 8 else (bits.view(np.int32), 23)
    words = words[: out.size]
    np.right_shift(words, 8 * out.itemsize - 1 - digits, out=words)
    np.copyto(out, words, casting="unsafe")
    out *= 2.0**-digits
    out += 2.0 ** -(digits + 1)


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool of this process; one that was inherited through a fork has no threads."""
    global _pool
    if _pool is None or _pool[:2] != (os.getpid(), count):
        _pool = (os.getpid(), count, ThreadPoolExecutor(count, "snntorch_lr-random"))
    return _pool[2]


def resolved(dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw in for noise of a dtype: half precision has too few digits for the tails of a distribution."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
