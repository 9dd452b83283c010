"""Reproducible noise: a function of seed, draw, copy, sample and neuron, on any device and however copies are split."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import kernels
from .kernels import kinds


def from_generator(out: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fills a tensor in place from a torch generator on its device, or from the global one if it is None."""
    # torch draws from [-1, 1).
    return out.uniform_(-1, 1, generator=generator).clamp_(min=torch.finfo(out.dtype).eps / 2 - 1)


def resolved(dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw in for noise of a dtype: half precision has too few digits for the tails of a distribution."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class Drawn(Protocol):
    """Noise that a stream can draw.

    Attributes:
        kind: which quantile function of ``snntorch_lr.kernels.kinds`` it has; None if it has another one.
    """

    @property
    def kind(self) -> int | None:
        """See above."""

    def quantile(self, u: Tensor) -> Tensor:
        """Noise of uniform numbers in (−1, 1), in place; odd, so that antithetic noise is negated."""


class NoiseStream:
    """Noise of K copies from a counter: any part of it can be drawn without the others, and once more.

    Number i of draw d for sample b in copy k is word ⌊i / q⌋ of Philox 4x32-10 (Salmon et al. 2011) for the counter
    (i mod q, b, k, d) and the key ``seed``, where q is a quarter of the numbers of a row, rounded up. So copies can be
    drawn in chunks, on other ranks, on another device, or again in the backward pass instead of being kept.

    Args:
        seed: of the whole stream; its lower 64 bits.
        copies: K, the number of copies in all.
        first: first copy that is drawn here.
        last: end of the range of copies that are drawn here.
        antithetic: copy k + K/2 gets the negated noise of copy k.
    """

    def __init__(self, seed: int, copies: int, first: int, last: int, antithetic: bool = False) -> None:
        self.key = seed & 0xFFFFFFFFFFFFFFFF
        self.seed = seed
        self.copies = copies
        self.first = first
        self.last = last
        self.half = copies // 2 if antithetic else copies

    def draw(self, index: int, like: Tensor, noise: Drawn) -> Tensor:
        """Noise with the shape, dtype and device of ``like``, whose rows are the copies of this range, copy-first.

        Args:
            index: which draw of the forward pass it is.
            like: ``[(last - first) * batch, ...]``.
            noise: what to draw.
        """
        out = torch.empty_like(
            like, dtype=resolved(like.dtype), requires_grad=False, memory_format=torch.contiguous_format
        )
        if not out.numel():
            return out.to(like.dtype)
        batch = len(like) // (self.last - self.first)
        kind = kinds.LOGISTIC_ESCAPE if noise.kind is None else noise.kind
        module = kernels.noise_on(out.device, out.dtype)
        if module is None:
            self._fill(out, batch, index)
        else:
            module.noise(out.view(len(like), -1), self.key, batch, self.first, self.half, index, kind)
        if module is None or noise.kind is None:
            out = noise.quantile(out)
        return out.to(like.dtype)

    def _fill(self, out: Tensor, batch: int, index: int) -> None:
        """Fills a tensor with uniform numbers, by operations that torch has on every device."""
        rows = out.view(len(out), -1)
        numbers = rows.shape[1]
        quarter = -(-numbers // 4)
        # On a CPU, few enough that what lies in between stays in the cache.
        block = len(rows) if out.device.type != "cpu" else max(1, _BLOCK // quarter)
        for start in range(0, len(rows), block):
            row = torch.arange(start, min(start + block, len(rows)), device=out.device).unsqueeze(1)
            copy = self.first + torch.div(row, batch, rounding_mode="floor")
            second = copy >= self.half
            counter = (torch.arange(quarter, device=out.device), row % batch, copy - self.half * second, index)
            words = torch.cat(philox(counter, self.key, (len(row), quarter)), 1)[:, :numbers]
            # As signed integers of 32 bits, or of the upper 24.
            words = (words ^ 0x80000000) - 0x80000000
            digits = 31 if out.dtype == torch.float64 else 23
            uniform = (words >> (31 - digits)).to(out.dtype).add_(0.5).mul_(2.0**-digits)
            rows[start : start + len(row)] = torch.where(second, -uniform, uniform)


# Counters that are worth a call, and fit into the cache.
_BLOCK = 1 << 16
_WORD = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: int, shape: tuple[int, ...]
) -> list[Tensor]:
    """Philox 4x32-10, random words from counters.

    Args:
        counter: four words, each an integer or a tensor of int64 that broadcasts against the shape.
        key: of 64 bits.
        shape: of the result.

    Returns:
        Four words, as int64 in [0, 2³²).

    Source: Salmon, Moraes, Dror & Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3".
    """
    device = next((word.device for word in counter if isinstance(word, Tensor)), torch.device("cpu"))
    c0, c1, c2, c3 = (torch.as_tensor(word, device=device).expand(shape).clone() for word in counter)
    low, high = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key & _WORD, key >> 32
    for _ in range(10):
        # The products may overflow: their 64 bits are right all the same.
        torch.mul(c0, 0xD2511F53, out=low)
        torch.mul(c2, 0xCD9E8D57, out=high)
        torch.bitwise_right_shift(high, 32, out=c0).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(low, 32, out=c2).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        torch.bitwise_and(high, _WORD, out=c1)
        torch.bitwise_and(low, _WORD, out=c3)
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def mix(*values: int) -> int:
    """A seed from several numbers (the finaliser of SplitMix64, Steele et al. 2014, applied to each in turn)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
