"""Noise and time steps of neurons, fused for a CPU by Numba: one pass over memory for all of it.

A row is one copy of one sample. All intermediate numbers of a row stay in the cache, and each loop is over the neurons
of a row, or of a few rows if they are short, so that LLVM turns it into vector instructions.

``noise``, ``pack``, ``unpack`` and ``step`` make functions for a dtype that C code can call. Such a function takes the
address of a block, ``next``, ``rows``, ``claim`` and its arguments, in which arrays are addresses, and zero where they
are not wanted. Any number of threads may run it on one block at once: each claims the next rows until none is left.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from . import kinds, numba_numbers
from .kinds import ERASE, GAUSSIAN, GAUSSIAN_ESCAPE, LAPLACE, LOGISTIC, LOGISTIC_ESCAPE, SUBTRACT, ZERO
from .numba_numbers import OPTIONS, SINGLES, assign, counters, exp, half_tanh, normal, to_noise, uniform

_0, _HALF, _1, _2 = SINGLES
# Numba looks at the age of this file alone when it takes compiled code from its cache, and at what a function closes
# over: the content of the other files is there.
_SOURCES = zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in (kinds, numba_numbers)))

_INTRINSIC: Any = intrinsic
_WORD = types.CPointer(types.int64)  # type: ignore[no-untyped-call]

# Bytes of spikes at a time, so that they stay in the cache for eight passes.
_CHUNK = 2048
# Neurons of short rows that are computed together.
_BLOCK = 1024

_CLAIMS = ("next", "rows", "claim")
NOISE = (*_CLAIMS, "out", "numbers", "key", "batch", "first", "half", "draw", "kind")
"""What a block of ``noise`` holds, integers of 64 bits all of them; rows of a block of ``pack`` are its bytes."""
PACK = (*_CLAIMS, "packed", "values", "count")
STEP = (
    *_CLAIMS, "neurons", "new", "spikes", "keys", "batch", "copies", "first", "half", "draw", "stride", "kind",
    "mechanism", "current", "reset", "mem", "syn", "new_syn", "leak", "share", "alpha", "threshold", "sigma", "weights",
    "gain", "score", "scale", "fired", "expected", "pull", "pull_scale", "seen_spikes", "seen_mem", "steps", "currents",
    "gains", "pulled", "seen",
)  # fmt: skip
_NOISE, _PACK, _STEP = (np.dtype([(name, np.int64) for name in names]) for names in (NOISE, PACK, STEP))


@njit(**OPTIONS)
def _rows_together(row: int, stop: int, batch: int, most: int) -> int:
    """How many rows of one copy, from a row on, are computed together."""
    return min(stop - row, most, batch - row % batch)


@njit(**OPTIONS)
def _noise(
    start: int, stop: int, out: Any, neurons: int, key: Any, batch: int, first: int, half: int, draw: int, kind: int
) -> None:
    """Fills rows from ``start`` to ``stop`` with noise; see ``snntorch_lr.noise_stream.NoiseStream``."""
    most = max(1, _BLOCK // neurons)
    words, columns, samples = counters(most, neurons)
    memory = np.empty(most * neurons, out.dtype)
    row = start
    while row < stop:
        count = _rows_together(row, stop, batch, most)
        own = out[row * neurons : (row + count) * neurons]
        # Apart: LLVM does not vectorise what overlaps.
        u = memory[: len(own)]
        uniform(u, words, columns, samples, neurons, key, row % batch, first + row // batch, half, draw)
        to_noise(own, u, kind)
        row += count


@njit(**OPTIONS)
def _pack(start: int, stop: int, packed: Any, values: Any) -> None:
    """Bytes from ``start`` to ``stop``: bit b of byte j says whether value b · bytes + j is not zero."""
    for left in range(start, stop, _CHUNK):
        own = packed[left : min(left + _CHUNK, stop)]
        own[:] = 0
        for bit in range(8):
            first = bit * len(packed) + left
            chunk = values[first : first + len(own)]
            for place in range(len(chunk)):
                own[place] |= np.uint8(np.uint8(chunk[place] != _0) << np.uint8(bit))


@njit(**OPTIONS)
def _unpack(start: int, stop: int, packed: Any, values: Any) -> None:
    """Zeros and ones from bytes; the inverse of ``_pack``."""
    for left in range(start, stop, _CHUNK):
        own = packed[left : min(left + _CHUNK, stop)]
        for bit in range(8):
            first = bit * len(packed) + left
            chunk = values[first : first + len(own)]
            for place in range(len(chunk)):
                chunk[place] = np.float32(np.int32(own[place] >> np.uint8(bit)) & np.int32(1))


@njit(**OPTIONS)
def _filter(new: Any, syn: Any, current: Any, alpha: Any) -> None:
    """The synaptic current of the next step."""
    for i in range(len(new)):
        new[i] = syn[i] * alpha[i] + current[i]


@njit(**OPTIONS)
def _advance(
    new: Any, mem: Any, current: Any, reset: Any, leak: Any, share: Any, threshold: Any, mechanism: int
) -> None:
    """The membrane potential of the next step, without noise."""
    if mechanism == SUBTRACT:
        for i in range(len(new)):
            new[i] = mem[i] * leak[i] + current[i] * share[i] - reset[i] * threshold[i]
    elif mechanism == ZERO:
        for i in range(len(new)):
            new[i] = mem[i] * leak[i] * (_1 - reset[i]) + current[i] * share[i]
    elif mechanism == ERASE:
        for i in range(len(new)):
            new[i] = (mem[i] * leak[i] + current[i] * share[i]) * (_1 - reset[i])
    else:
        for i in range(len(new)):
            new[i] = mem[i] * leak[i] + current[i] * share[i]


@njit(**OPTIONS)
def _probabilities(p: Any, density: Any, z: Any, kind: int) -> None:
    """Probability of a spike at a distance z to the threshold, and its derivative, for membrane noise."""
    if kind == LOGISTIC:
        for i in range(len(z)):
            p[i] = _HALF + _HALF * half_tanh(z[i])
            density[i] = p[i] * (_1 - p[i])
    elif kind == LAPLACE:
        for i in range(len(z)):
            tail = _HALF * exp(-abs(z[i]))
            p[i] = _1 - tail if z[i] > _0 else tail
            density[i] = tail
    else:
        for i in range(len(z)):
            density[i], tail, _ = normal(z[i])
            p[i] = _1 - tail if z[i] > _0 else tail


@njit(**OPTIONS)
def _escape(spikes: Any, score: Any, p: Any, density: Any, z: Any, u: Any, kind: int) -> None:
    """Spikes of escape noise, the scores of z, and the probabilities of spikes with their derivatives."""
    if kind == LOGISTIC_ESCAPE:
        for i in range(len(z)):
            middle = half_tanh(z[i])
            spike = _1 if u[i] > -middle else _0
            p[i] = _HALF + _HALF * middle
            spikes[i] = spike
            score[i] = spike - p[i]
        for i in range(len(z)):
            density[i] = p[i] * (_1 - p[i])
    else:
        for i in range(len(z)):
            slope, tail, mills = normal(z[i])
            chance = _1 - tail if z[i] > _0 else tail
            # φ over the probability of what happened, which neither cancels nor underflows this way.
            likely, unlikely = slope / (_1 - tail), _1 / mills
            spike = u[i] > _1 - _2 * chance
            size = likely if spike == (z[i] > _0) else unlikely
            p[i], density[i] = chance, slope
            spikes[i] = _1 if spike else _0
            score[i] = size if spike else -size


@njit(**OPTIONS)
def _membrane_scores(score: Any, epsilon: Any, u: Any, kind: int) -> None:
    """Scores of the mean, times σ, from standard noise and the uniform numbers that it was made of."""
    if kind == GAUSSIAN:
        score[:] = epsilon
    elif kind == LAPLACE:
        for i in range(len(score)):
            score[i] = _1 if u[i] > _0 else -_1
    else:
        # tanh(ε / 2), of which ε is the inverse function.
        score[:] = u


@njit(**OPTIONS)
def _distances(z: Any, mem: Any, threshold: Any, inverse: Any) -> None:
    for i in range(len(z)):
        z[i] = (mem[i] - threshold[i]) * inverse[i]


@njit(**OPTIONS)
def _sample(mem: Any, spikes: Any, epsilon: Any, sigma: Any, threshold: Any) -> None:
    for i in range(len(mem)):
        mem[i] += sigma[i] * epsilon[i]
        spikes[i] = _1 if mem[i] > threshold[i] else _0


@njit(**OPTIONS)
def _add_product(total: Any, value: Any, factor: Any, times: bool) -> None:
    if times:
        for i in range(len(total)):
            total[i] += value[i] * factor[i]
    else:
        for i in range(len(total)):
            total[i] += value[i]


@njit(**OPTIONS)
def _add_weighted(total: Any, value: Any, weight: Any) -> None:
    for i in range(len(total)):
        total[i] += value[i] * weight


@njit(**OPTIONS)
def _add_scale_scores(total: Any, score: Any, value: Any, escapes: bool) -> None:
    if escapes:
        for i in range(len(total)):
            total[i] -= score[i] * value[i]
    else:
        for i in range(len(total)):
            total[i] += score[i] * value[i] - _1


@njit(**OPTIONS)
def _step(
    start: int, stop: int, neurons: int, new: Any, spikes: Any, keys: Any, batch: int, copies: int, first: int,
    half: int, draw: int, stride: int, kind: int, mechanism: int, current: Any, reset: Any, mem: Any, syn: Any,
    new_syn: Any, leak: Any, share: Any, alpha: Any, threshold: Any, sigma: Any, weights: Any, gain: Any, score: Any,
    scale: Any, fired: Any, expected: Any, pull: Any, pull_scale: Any, seen_spikes: Any, seen_mem: Any,
) -> None:  # fmt: skip
    """Time steps of a neuron with the same current in rows from ``start`` to ``stop``, with its sums over time.

    Arrays are flat, ``[rows, neurons]`` in one dimension unless said otherwise. An empty output is not wanted.

    Args:
        start: first row.
        stop: end of the rows.
        neurons: of a row.
        new: membrane potential after the last step.
        spikes: of the last step, zeros and ones.
        keys: of the noise, one for each set: the train that goes on, and its shadows.
        batch: number of samples; row r is copy ``first + r // batch % copies`` of sample ``r % batch``.
        copies: number of copies here.
        first: the first of these.
        half: copies from here on get negated noise.
        draw: index of the first draw.
        stride: from one step to the next.
        kind: of the noise.
        mechanism: of the reset.
        current: input, of the samples, or of the train that goes on; the other rows get the same.
        reset: spikes of the step before.
        mem: membrane potential before.
        syn: synaptic current before a single step; empty where the input adds to the membrane potential at once.
        new_syn: synaptic current after it.
        leak: what remains of the membrane potential, ``[neurons]``.
        share: what the input, or the synaptic current, adds to it, ``[neurons]``.
        alpha: what remains of the synaptic current, ``[neurons]``.
        threshold: threshold, ``[neurons]``.
        sigma: noise level, ``[neurons]``.
        weights: of the steps in sums of spikes, ``[steps]``.
        gain: derivative of what is sampled by a constant current, ``[steps, neurons]``, or in all rows of a single
            step; empty if it is one.
        score: Σ scores of the current, times σ.
        scale: Σ scores of log σ.
        fired: Σ weight · spikes.
        expected: Σ weight · probabilities of spikes.
        pull: Σ weight · derivatives of these by the current, times σ, in the rows of the train that goes on; needs
            ``expected``.
        pull_scale: the same by log σ; needs ``pull``.
        seen_spikes: spikes of each step in the first rows, ``[steps, rows, neurons]``.
        seen_mem: membrane potentials after each step, alike.
    """
    steps, most = len(weights), max(1, _BLOCK // neurons)
    words, columns, samples = counters(most, neurons)
    leak, share, alpha = _repeat(leak, most), _repeat(share, most), _repeat(alpha, most)
    threshold, sigma = _repeat(threshold, most), _repeat(sigma, most)
    inverse = _1 / sigma
    memory = np.empty((9, most * neurons), new.dtype)
    escapes = kind in (LOGISTIC_ESCAPE, GAUSSIAN_ESCAPE)
    row = start
    while row < stop:
        rows = _rows_together(row, stop, batch, most)
        size, left = rows * neurons, row * neurons
        u, z, one, epsilon = memory[0, :size], memory[1, :size], memory[2, :size], memory[3, :size]
        p, density, factor = memory[4, :size], memory[5, :size], memory[6, :size]
        here, fire = new[left : left + size], spikes[left : left + size]
        before, fired_before = mem[left : left + size], reset[left : left + size]
        own = left % len(current)
        drive = current[own : own + size]
        if len(syn):
            _filter(new_syn[left : left + size], syn[left : left + size], drive, alpha)
            drive = new_syn[left : left + size]
        for step in range(steps):
            weight, copy = weights[step], first + row // batch % copies
            uniform(
                u, words, columns, samples, neurons, keys[row // (batch * copies)], row % batch, copy, half,
                draw + step * stride,
            )  # fmt: skip
            _advance(here, before, drive, fired_before, leak, share, threshold, mechanism)
            if len(gain) == steps * neurons:
                factor = gain[step * neurons : (step + 1) * neurons]
                if rows > 1:
                    _spread(memory[6, :size], factor)
                    factor = memory[6, :size]
            elif len(gain):
                factor = gain[left : left + size]
            if escapes:
                _distances(z, here, threshold, inverse)
                _escape(fire, one, p, density, z, u, kind)
            else:
                if len(expected):
                    _distances(z, here, threshold, inverse)
                    _probabilities(p, density, z, kind)
                to_noise(epsilon, u, kind)
                _sample(here, fire, epsilon, sigma, threshold)
                _membrane_scores(one, epsilon, u, kind)
            if len(score):
                _add_product(score[left : left + size], one, factor, len(gain) > 0)
            if len(scale):
                _add_scale_scores(scale[left : left + size], one, z if escapes else epsilon, escapes)
            if len(fired):
                _add_weighted(fired[left : left + size], fire, weight)
            if len(expected):
                _add_weighted(expected[left : left + size], p, weight)
            if left < len(pull):
                for i in range(size):
                    density[i] *= weight
                _add_product(pull[left : left + size], density, factor, len(gain) > 0)
                if len(pull_scale):
                    _add_scale_scores(pull_scale[left : left + size], density, z, True)
            if left < seen_mem.shape[1]:
                assign(seen_spikes[step, left : left + size], fire)
                assign(seen_mem[step, left : left + size], here)
            if step + 1 < steps:
                # Copies: LLVM does not vectorise what may overlap.
                before, fired_before = memory[7, :size], memory[8, :size]
                assign(before, here)
                assign(fired_before, fire)
        row += rows


@njit(**OPTIONS)
def _spread(to: Any, values: Any) -> None:
    for start in range(0, len(to), len(values)):
        assign(to[start : start + len(values)], values)


@njit(**OPTIONS)
def _repeat(values: Any, times: int) -> Any:
    out = np.empty(times * len(values), values.dtype)
    _spread(out, values)
    return out


@_INTRINSIC
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """An address as that of numbers like another one."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build  # type: ignore[no-untyped-call]


@_INTRINSIC
def _claim(context: Any, block: Any, count: Any) -> Any:
    """The first of the next rows, which no other thread gets: adds to the word at the start of a block."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.bitcast(arguments[0], context.get_value_type(_WORD))
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.voidptr, types.int64), build


@njit(**OPTIONS)
def _list(address: int, numbers: int, like: Any) -> Any:
    return carray(_pointer(address, like), (numbers if address else 0,))


@njit(**OPTIONS)
def _run_noise(address: Any, like: Any) -> None:
    block = carray(address, (1,), _NOISE)[0]
    rows, count, neurons = block.rows, block.claim, block.numbers
    out = _list(block.out, rows * neurons, like)
    while True:
        start = _claim(address, count)
        if start >= rows:
            return
        _noise(
            start, min(start + count, rows), out, neurons, np.uint64(block.key), block.batch, block.first, block.half,
            block.draw, block.kind,
        )  # fmt: skip


@njit(**OPTIONS)
def _run_pack(address: Any, like: Any, unpacks: bool) -> None:
    block = carray(address, (1,), _PACK)[0]
    rows, count = block.rows, block.claim
    packed, values = _list(block.packed, rows, np.uint8(0)), _list(block.values, block.count, like)
    while True:
        start = _claim(address, count)
        if start >= rows:
            return
        if unpacks:
            _unpack(start, min(start + count, rows), packed, values)
        else:
            _pack(start, min(start + count, rows), packed, values)


@njit(**OPTIONS)
def _run_step(address: Any, like: Any) -> None:
    block = carray(address, (1,), _STEP)[0]
    rows, count, neurons, steps = block.rows, block.claim, block.neurons, block.steps
    size, pulled = rows * neurons, block.pulled * neurons
    keys = _list(block.keys, rows // (block.batch * block.copies), np.uint64(0))
    current, gain = _list(block.current, block.currents * neurons, like), _list(block.gain, block.gains * neurons, like)
    new, spikes = _list(block.new, size, like), _list(block.spikes, size, like)
    reset, mem = _list(block.reset, size, like), _list(block.mem, size, like)
    syn, new_syn = _list(block.syn, size, like), _list(block.new_syn, size, like)
    leak, share = _list(block.leak, neurons, like), _list(block.share, neurons, like)
    alpha, threshold = _list(block.alpha, neurons, like), _list(block.threshold, neurons, like)
    sigma, weights = _list(block.sigma, neurons, like), _list(block.weights, steps, like)
    score, scale = _list(block.score, size, like), _list(block.scale, size, like)
    fired, expected = _list(block.fired, size, like), _list(block.expected, size, like)
    pull, pull_scale = _list(block.pull, pulled, like), _list(block.pull_scale, pulled, like)
    shape = (steps, block.seen * neurons)
    seen_spikes = carray(_pointer(block.seen_spikes, like), shape)
    seen_mem = carray(_pointer(block.seen_mem, like), shape)
    while True:
        start = _claim(address, count)
        if start >= rows:
            return
        _step(
            start, min(start + count, rows), neurons, new, spikes, keys, block.batch, block.copies, block.first,
            block.half, block.draw, block.stride, block.kind, block.mechanism, current, reset, mem, syn, new_syn, leak,
            share, alpha, threshold, sigma, weights, gain, score, scale, fired, expected, pull, pull_scale, seen_spikes,
            seen_mem,
        )  # fmt: skip


_ENTRY = types.void(types.voidptr)


def noise(dtype: Any) -> Any:
    """A function that fills rows with noise; see ``snntorch_lr.noise_stream.NoiseStream``."""
    given = dtype(0), _SOURCES

    @cfunc(_ENTRY, cache=True)
    def run(address: Any) -> None:
        _run_noise(address, given[0])

    return run


def pack(dtype: Any) -> Any:
    """A function that makes bits of numbers, whether they are zero, eight to a byte."""
    given = dtype(0), _SOURCES

    @cfunc(_ENTRY, cache=True)
    def run(address: Any) -> None:
        _run_pack(address, given[0], False)

    return run


def unpack(dtype: Any) -> Any:
    """A function that makes zeros and ones of bits."""
    given = dtype(0), _SOURCES

    @cfunc(_ENTRY, cache=True)
    def run(address: Any) -> None:
        _run_pack(address, given[0], True)

    return run


def step(dtype: Any) -> Any:
    """A function that takes time steps of a neuron, with its sums over time; see ``_step``."""
    given = dtype(0), _SOURCES

    @cfunc(_ENTRY, cache=True)
    def run(address: Any) -> None:
        _run_step(address, given[0])

    return run
