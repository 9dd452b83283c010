"""Random numbers from a counter: the same on every device and in any number of threads, and drawn twice if asked."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .kernels import kinds


class Drawn(Protocol):
    """Noise that ``draw`` can make.

    Attributes:
        kind: which quantile function of ``snntorch_lr.kernels.kinds`` it has; None if it has another one.
    """

    @property
    def kind(self) -> int | None:
        """See above."""

    def quantile(self, u: Tensor) -> Tensor:
        """Noise of uniform numbers u in (−1, 1), in place."""


def resolved(dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw in for noise of a dtype: half precision has too few digits for the tails of a distribution."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def new_keys(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Keys of 63 bits from a torch generator, ``[count]``; from the global one of the CPU if it is None.

    One key makes all noise of a neuron in one time step. So ``torch.manual_seed``, checkpointing that keeps the random
    state, and copies of that state all repeat the noise, whatever device it is drawn on. Processes of
    ``torch.distributed`` have noise of their own, although their global generators be the same. While a CUDA graph is
    captured keys come from the generator of that device, so that each replay draws new ones.

    Args:
        count: number of keys.
        generator: see above.
        device: that the noise will be on.

    Raises:
        RuntimeError: while a CUDA graph is captured, with a generator of another device.
    """
    source = torch.device("cpu") if generator is None else generator.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if generator is not None and source.type != "cuda":
            raise RuntimeError(
                "noise from a generator of the CPU (seed=) cannot be drawn while a CUDA graph is captured: each replay "
                "would repeat it; leave out seed="
            )
        source = device
    keys = torch.empty(count, dtype=torch.int64, device=source).random_(generator=generator)
    if generator is None and dist.is_available() and dist.is_initialized() and dist.get_rank():
        # Ranks that were seeded alike would give their first samples the same noise.
        keys ^= mix(dist.get_rank())
    return keys


def new_key(generator: torch.Generator | None = None) -> int:
    """A key as ``new_keys`` makes it, known to the host.

    Raises:
        RuntimeError: while a CUDA graph is captured, which would repeat this very key in each replay.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the noise of this neuron cannot be drawn while a CUDA graph is captured, for each replay would repeat it: "
            "its time steps are not fused"
        )
    return int(new_keys(1, generator, torch.device("cpu")))


def draw(noise: Drawn, shape: torch.Size, dtype: torch.dtype, device: torch.device, key: int) -> Tensor:
    """Noise of a distribution, a function of key, row and place in the row.

    Number i of row b is word i mod 4 of Philox 4x32-10 (Salmon et al. 2011) for the counter (⌊i / 4⌋, b, 0, 0). So more
    rows leave the first ones as they are. Escape noise compares a probability with a uniform number, for which half a
    word is enough: number i is half i mod 8 of the counter (⌊i / 8⌋, b, 0, 0), the lower half of a word first. So its
    probability of a spike is rounded to a multiple of 2⁻¹⁶.

    Args:
        noise: what to draw.
        shape: ``[rows, ...]``.
        dtype: of the result; half precision is drawn in float32.
        device: of the result.
        key: as ``new_key`` returns it.
    """
    out = torch.empty(shape, dtype=resolved(dtype), device=device)
    if not out.numel():
        return out.to(dtype)
    rows = out.view(len(out), -1)
    module, kind = kernels.noise_on(out.device, out.dtype), kinds.UNIFORM if noise.kind is None else noise.kind
    if module is None:
        _fill(rows, key, kinds.numbers_of_counter(kind))
    else:
        module.noise(rows, key, kind)
    if module is None or noise.kind is None:
        out = noise.quantile(out)
    return out.to(dtype)


def _fill(rows: Tensor, key: int, per_counter: int) -> None:
    """Fills rows with uniform numbers in (−1, 1), four or eight of a counter, by what torch has on every device."""
    numbers, bits = rows.shape[1], 128 // per_counter
    counters = -(-numbers // per_counter)
    digits = min(bits - 1, 31 if rows.dtype == torch.float64 else 23)
    # On a CPU, few enough that what lies in between stays in the cache.
    block = len(rows) if rows.device.type != "cpu" else max(1, _BLOCK // counters)
    for start in range(0, len(rows), block):
        row = torch.arange(start, min(start + block, len(rows)), device=rows.device).unsqueeze(1)
        counter = (torch.arange(counters, device=rows.device), row, 0, 0)
        words = torch.stack(philox(counter, key, (len(row), counters)), 2)
        if bits == 16:
            words = torch.stack((words & 0xFFFF, words >> 16), 3)
        sign = 1 << (bits - 1)
        signed = (words.flatten(1)[:, :numbers] ^ sign) - sign
        rows[start : start + len(row)] = (signed >> (bits - 1 - digits)).to(rows.dtype).add_(0.5).mul_(2.0**-digits)


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
