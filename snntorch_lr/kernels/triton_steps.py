"""Noise and time steps of neurons, fused for CUDA by Triton, in single precision: one launch for each.

A program computes some counters of one row, a row being one copy of one sample, and the four numbers of each counter.
Random words are those of a CPU, bit by bit. What is made of them is rounded as the device rounds, which may contract a
product and a sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .._messages import first_line
from . import kinds

DTYPES = (torch.float32,)
_TENSORS = (
    "current", "reset", "mem", "syn", "new_syn", "leak", "share", "alpha", "threshold", "sigma", "weights", "gain",
    "score", "scale", "fired", "expected", "pull", "pull_scale", "seen_spikes", "seen_mem",
)  # fmt: skip
# Counters, or bytes, of a program at most.
_BLOCK = 256

_LOGISTIC_ESCAPE, _GAUSSIAN_ESCAPE = tl.constexpr(kinds.LOGISTIC_ESCAPE), tl.constexpr(kinds.GAUSSIAN_ESCAPE)
_GAUSSIAN, _LAPLACE, _LOGISTIC = tl.constexpr(kinds.GAUSSIAN), tl.constexpr(kinds.LAPLACE), tl.constexpr(kinds.LOGISTIC)
_SUBTRACT, _ZERO, _ERASE = tl.constexpr(kinds.SUBTRACT), tl.constexpr(kinds.ZERO), tl.constexpr(kinds.ERASE)
# Triton's interpreter has no length of a tuple.
_NORMAL, _NORMAL_COUNT = tl.constexpr(kinds.NORMAL), tl.constexpr(len(kinds.NORMAL))
_NORMAL_TAIL, _NORMAL_TAIL_COUNT = tl.constexpr(kinds.NORMAL_TAIL), tl.constexpr(len(kinds.NORMAL_TAIL))
_MILLS, _MILLS_COUNT = tl.constexpr(kinds.MILLS), tl.constexpr(len(kinds.MILLS))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _polynomial(x, coefficients: tl.constexpr, count: tl.constexpr):
    total = x * 0 + coefficients[count - 1]
    for index in tl.static_range(1, count):
        total = total * x + coefficients[count - 1 - index]
    return total


@triton.jit
def _words(key, column, sample, copy, half, draw):
    """Four random words of each counter, and the sign of what is made of them, which antithetic copies negate."""
    second = copy >= half
    copy = tl.where(second, copy - half, copy)
    words = tl.philox(
        key, column.to(tl.uint32), tl.cast(sample, tl.uint32), tl.cast(copy, tl.uint32), tl.cast(draw, tl.uint32)
    )
    return words, tl.where(second, -1.0, 1.0)


@triton.jit
def _uniform(word, sign):
    return ((word.to(tl.int32, bitcast=True) >> 8).to(tl.float32) + 0.5) * (sign * 2.0**-23)


@triton.jit
def _to_noise(u, KIND: tl.constexpr):
    """Standard membrane noise of uniform numbers; these themselves for escape noise."""
    if KIND == _GAUSSIAN:
        w = -tl.log((1 - u) * (1 + u))
        near = _polynomial(w - 2.5, _NORMAL, _NORMAL_COUNT)
        far = _polynomial(tl.sqrt(w) - 3.5, _NORMAL_TAIL, _NORMAL_TAIL_COUNT)
        return u * tl.where(w < 5, near, far)
    elif KIND == _LAPLACE:
        size = -tl.log(1 - tl.abs(u))
        return tl.where(u > 0, size, -size)
    elif KIND == _LOGISTIC:
        return tl.log(1 + u) - tl.log(1 - u)
    else:
        return u


@triton.jit
def _normal(z):
    """φ(z), the tail 1 − Φ(|z|), and the Mills ratio at |z|."""
    x = tl.abs(z)
    density = tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    t = 1 / (1 + x * 0.25)
    mills = t * _polynomial(t - 0.5, _MILLS, _MILLS_COUNT)
    return density, density * mills, mills


@triton.jit
def _chances(z, KIND: tl.constexpr):
    """Probability of a spike at a distance z to the threshold, and its derivative."""
    if KIND == _LOGISTIC or KIND == _LOGISTIC_ESCAPE:
        p = 1 / (1 + tl.exp(-z))
        density = p * (1 - p)
    elif KIND == _LAPLACE:
        density = 0.5 * tl.exp(-tl.abs(z))
        p = tl.where(z > 0, 1 - density, density)
    else:
        density, tail, _ = _normal(z)
        p = tl.where(z > 0, 1 - tail, tail)
    return p, density


@triton.jit
def _escape(z, u, KIND: tl.constexpr):
    """Spikes of escape noise, and the scores of z."""
    p, _ = _chances(z, KIND)
    fires = u > 1 - 2 * p
    spike = tl.where(fires, 1.0, 0.0)
    if KIND == _LOGISTIC_ESCAPE:
        score = spike - p
    else:
        # φ over the probability of what happened, which neither cancels nor underflows this way.
        density, tail, mills = _normal(z)
        size = tl.where(fires == (z > 0), density / (1 - tail), 1 / mills)
        score = tl.where(fires, size, -size)
    return spike, score


@triton.jit
def _membrane_score(epsilon, u, KIND: tl.constexpr):
    """Score of the mean, times σ, from standard noise and the uniform number that it was made of."""
    if KIND == _GAUSSIAN:
        return epsilon
    elif KIND == _LAPLACE:
        return tl.where(u > 0, 1.0, -1.0)
    else:
        return u


@triton.jit
def _advance(mem, drive, reset, leak, share, threshold, MECHANISM: tl.constexpr):
    """The membrane potential of the next step, without noise."""
    if MECHANISM == _SUBTRACT:
        return mem * leak + drive * share - reset * threshold
    elif MECHANISM == _ZERO:
        return mem * leak * (1 - reset) + drive * share
    elif MECHANISM == _ERASE:
        return (mem * leak + drive * share) * (1 - reset)
    else:
        return mem * leak + drive * share


@triton.jit
def _add(total, place, value, inside):
    tl.store(total + place, tl.load(total + place, inside) + value, inside)


@triton.jit(do_not_specialize=["key", "batch", "first", "half", "draw"])
def _noise(out, key, batch, first, half, draw, neurons, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    quarter = (neurons + 3) // 4
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words, sign = _words(key, column, row % batch, first + row // batch, half, draw)
    for part in tl.static_range(4):
        neuron = part * quarter + column
        inside = (column < quarter) & (neuron < neurons)
        tl.store(out + row.to(tl.int64) * neurons + neuron, _to_noise(_uniform(words[part], sign), KIND), inside)


@triton.jit(
    do_not_specialize=[
        "batch",
        "copies",
        "first",
        "half",
        "draw",
        "stride",
        "currents",
        "gains",
        "pulled",
        "seen",
        "steps",
    ]
)
def _step(
    new, spikes, keys, batch, copies, first, half, draw, stride, current, reset, mem, syn, new_syn, leak, share, alpha,
    threshold, sigma, weights, gain, score, scale, fired, expected, pull, pull_scale, seen_spikes, seen_mem, neurons,
    steps, currents, gains, pulled, seen,
    KIND: tl.constexpr, MECHANISM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``numba_steps._step``, with None for what is empty there, and numbers of rows of what may have fewer."""
    escapes: tl.constexpr = KIND == _LOGISTIC_ESCAPE or KIND == _GAUSSIAN_ESCAPE
    row = tl.program_id(0)
    quarter = (neurons + 3) // 4
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + row // (batch * copies))
    start = row.to(tl.int64) * neurons
    for step in range(steps):
        words, sign = _words(key, column, row % batch, first + row // batch % copies, half, draw + step * stride)
        weight = tl.load(weights + step)
        for part in tl.static_range(4):
            neuron = part * quarter + column
            inside = (column < quarter) & (neuron < neurons)
            place = start + neuron
            level, limit = tl.load(sigma + neuron, inside, 1.0), tl.load(threshold + neuron, inside)
            drive = tl.load(current + (row % currents).to(tl.int64) * neurons + neuron, inside)
            if syn is not None:
                drive += tl.load(syn + place, inside) * tl.load(alpha + neuron, inside)
                tl.store(new_syn + place, drive, inside)
            # Of the step before, which is the same program's.
            before = tl.load(mem + place, inside & (step == 0), 0.0) + tl.load(new + place, inside & (step > 0), 0.0)
            spiked = tl.load(reset + place, inside & (step == 0), 0.0) + tl.load(
                spikes + place, inside & (step > 0), 0.0
            )
            mean = _advance(
                before, drive, spiked, tl.load(leak + neuron, inside), tl.load(share + neuron, inside), limit, MECHANISM
            )
            u = _uniform(words[part], sign)
            z = (mean - limit) / level
            if escapes:
                spike, one = _escape(z, u, KIND)
                scale_score = -one * z
            else:
                epsilon = _to_noise(u, KIND)
                mean += level * epsilon
                spike = tl.where(mean > limit, 1.0, 0.0)
                one = _membrane_score(epsilon, u, KIND)
                scale_score = one * epsilon - 1
            tl.store(new + place, mean, inside)
            tl.store(spikes + place, spike, inside)
            factor = 1.0
            if gain is not None:
                gain_row = tl.where(steps > 1, step, row % gains)
                factor = tl.load(gain + gain_row.to(tl.int64) * neurons + neuron, inside)
            if score is not None:
                _add(score, place, one * factor, inside)
            if scale is not None:
                _add(scale, place, scale_score, inside)
            if fired is not None:
                _add(fired, place, spike * weight, inside)
            if expected is not None:
                p, density = _chances(z, KIND)
                _add(expected, place, p * weight, inside)
                if pull is not None:
                    _add(pull, place, density * weight * factor, inside & (row < pulled))
                if pull_scale is not None:
                    _add(pull_scale, place, -density * weight * z, inside & (row < pulled))
            if seen_mem is not None:
                visible = (step * seen + row).to(tl.int64) * neurons + neuron
                tl.store(seen_spikes + visible, spike, inside & (row < seen))
                tl.store(seen_mem + visible, mean, inside & (row < seen))
        # The threads of a program may load what another one of them has stored.
        tl.debug_barrier()


@triton.jit
def _pack(packed, values, size, count, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(8):
        place = bit * size + byte
        fires = tl.load(values + place, (byte < size) & (place < count), 0.0) != 0
        bits |= fires.to(tl.int32) << bit
    tl.store(packed + byte, bits.to(tl.uint8), byte < size)


@triton.jit
def _unpack(packed, values, size, count, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(packed + byte, byte < size, 0).to(tl.int32)
    for bit in tl.static_range(8):
        place = bit * size + byte
        tl.store(values + place, ((bits >> bit) & 1).to(tl.float32), (byte < size) & (place < count))


def noise(out: Tensor, key: int, batch: int, first: int, half: int, draw: int, kind: int) -> None:
    """Fills ``[rows, numbers]`` with noise; see ``snntorch_lr.noise_stream.NoiseStream``."""
    grid, block = _grid(out)
    _launch(_noise, grid, out, key, batch, first, half, draw, out.shape[1], KIND=kind, BLOCK=block)


def pack(values: Tensor) -> Tensor:
    """Numbers as bits, eight to a byte: whether they are zero."""
    count = values.numel()
    packed = values.new_empty(-(-count // 8), dtype=torch.uint8)
    _launch(_pack, (-(-len(packed) // _BLOCK),), packed, values, len(packed), count, BLOCK=_BLOCK)
    return packed


def unpack(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of ``pack``: zeros and ones."""
    values = packed.new_empty(shape, dtype=dtype)
    _launch(_unpack, (-(-len(packed) // _BLOCK),), packed, values, len(packed), values.numel(), BLOCK=_BLOCK)
    return values


def step(
    new: Tensor, spikes: Tensor, keys: Tensor, batch: int, copies: int, first: int, half: int, draw: int, stride: int,
    kind: int, mechanism: int, **tensors: Tensor | None,
) -> None:  # fmt: skip
    """Time steps of a neuron with the same current; see ``cpu.step``."""
    grid, block = _grid(new)
    given = [tensors.get(name) for name in _TENSORS]
    held = dict(zip(_TENSORS, (None if each is None else each.contiguous() for each in given), strict=True))
    rows = (1 if (each := held[name]) is None else len(each) for name in ("weights", "current", "gain", "pull"))
    seen = held["seen_mem"]
    _launch(
        _step, grid, new, spikes, keys, batch, copies, first, half, draw, stride, *held.values(), new[0].numel(), *rows,
        0 if seen is None else seen.shape[1], KIND=kind, MECHANISM=mechanism, BLOCK=block,
    )  # fmt: skip


def _grid(rows: Tensor) -> tuple[tuple[int, int], int]:
    """Programs for all counters of ``[rows, ...]``, and how many counters each has."""
    quarter = -(-rows[0].numel() // 4)
    block = min(_BLOCK, triton.next_power_of_2(quarter))
    return (len(rows), -(-quarter // block)), block


def _launch(kernel: Any, grid: tuple[int, ...], out: Tensor, *arguments: Any, **constants: int) -> None:
    """Runs a kernel on the device of its output, in the stream that torch uses there now."""
    if not grid[0]:
        return
    try:
        with torch.cuda.device_of(out):
            kernel[grid](out, *arguments, **constants)
    except TritonError as error:
        raise RuntimeError(
            f"a fused time step does not compile: {first_line(error)}; torch computes the same in the context "
            "snntorch_lr.kernels.off()"
        ) from error
