"""Noise as a function of seed, draw and copy: the same however the copies are split, and drawn again at will."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import uniform

Shape = Callable[[Tensor], Tensor]

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

    def draw(self, index: int, like: Tensor, shape: Shape) -> Tensor:
        """Noise with the shape, dtype and device of ``like``, whose rows are the copies of this range, copy-first.

        Args:
            index: which draw of the forward pass it is.
            like: ``[(last - first) * batch, ...]``.
            shape: makes noise of uniform numbers in (-1, 1), in place; odd, so that antithetic noise is negated.
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
        return shape(out).to(like.dtype)

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
