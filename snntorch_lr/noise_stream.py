"""Reproducible noise: a function of seed, draw and copy, the same however the copies are split."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import noise_stream as uniform

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


Quantile = Callable[[Tensor], Tensor]

# Fewer numbers than this are not worth a generator of their own, nor a thread.
_BLOCK = 1 << 17


class NoiseStream:
    """Noise of K copies, reproducible from a seed and the index of the draw.

    Copies are grouped into blocks, each with a seed of its own, so that any range of copies can be drawn without the
    others: in chunks, on another rank, or once more in the backward pass instead of being kept.

    Args:
        seed: of the whole stream.
        copies: K, the number of copies in all.
        first: first copy that is drawn here.
        last: end of the range of copies that are drawn here.
        antithetic: copy k + K/2 gets the negated noise of copy k.
    """

    def __init__(self, seed: int, copies: int, first: int, last: int, antithetic: bool = False) -> None:
        self.seed = seed
        self.copies = copies
        self.first = first
        self.last = last
        self.antithetic = antithetic
        self._generators: dict[torch.device, torch.Generator] = {}

    def draw(self, index: int, like: Tensor, quantile: Quantile) -> Tensor:
        """Noise with the shape, dtype and device of ``like``, whose rows are the copies of this range, copy-first.

        Args:
            index: which draw of the forward pass it is.
            like: ``[(last - first) * batch, ...]``.
            quantile: makes noise of uniform numbers in (-1, 1), in place; odd, so that antithetic noise is negated.
        """
        rows = len(like) // (self.last - self.first)
        row = like[:1].numel()
        half = self.copies // 2 if self.antithetic else self.copies
        block = max(1, min(half, _BLOCK // max(1, rows * row)))
        out = torch.empty_like(
            like, dtype=uniform.resolved(like.dtype), requires_grad=False, memory_format=torch.contiguous_format
        )
        parts, copied, negated = [], [], []
        copy = self.first
        while copy < self.last:
            second = copy >= half
            source = copy - half if second else copy
            start = source - source % block
            end = min(start + block, half)
            taken = min(end - source, self.last - copy, (half if not second else self.copies) - copy)
            into = out[(copy - self.first) * rows : (copy - self.first + taken) * rows]
            whole = into
            if source != start or taken != end - start:
                whole = out.new_empty(((end - start) * rows, *like.shape[1:]))
                copied.append((into, whole[(source - start) * rows : (source - start + taken) * rows]))
            parts.append((whole, (self.seed, index, start)))
            if second:
                negated.append(into)
            copy += taken
        self._fill(parts)
        for into, numbers in copied:
            into.copy_(numbers)
        for into in negated:
            into.neg_()
        return quantile(out).to(like.dtype)

    def _fill(self, parts: list[tuple[Tensor, tuple[int, int, int]]]) -> None:
        device = parts[0][0].device
        if device.type == "cpu":
            uniform.from_seeds(parts)
            return
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        for tensor, seed in parts:
            uniform.from_generator(tensor, self._generators[device].manual_seed(mix(*seed)))


def mix(*values: int) -> int:
    """A seed from several numbers (the finaliser of SplitMix64, Steele et al. 2014, applied to each in turn)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
