"""Time steps of neurons and their backward pass, fused for a CPU by Numba: one pass over memory for each.

Numbers go through the first-level cache in blocks: those of a few rows, or of a part of a long row. In a block one loop
computes a time step, without a branch, so that LLVM turns it into vector instructions. What options switch off is
multiplied by zero there. While a step is computed, the memory that the next one reads or fills is fetched.

``noise``, ``forward`` and ``backward`` make functions for a dtype and a kind of noise that C code can call; those for a
*plain* neuron know that no reset multiplies, and that there is no synaptic current. Such a function takes the address
of a record, in which arrays are addresses, and zero where they are not wanted. Any number of threads may run it on one
record at once: each claims the next rows until none is left.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from . import kinds, numba_numbers
from .kinds import ERASE, GAUSSIAN, LOGISTIC_ESCAPE, SUBTRACT, ZERO
from .numba_numbers import (
    INLINE,
    OPTIONS,
    SINGLES,
    assign,
    keep,
    logistic_chance,
    logistic_chances,
    logistic_fires,
    normal_chance,
    normal_chances,
    normal_quantile,
    recall,
    uniform,
    words_of_rows,
)

_0, _HALF, _1, _ = SINGLES
# Numba looks at the age of this file alone when it takes compiled code from its cache, and at what a function closes
# over: the content of the other files is there.
_SOURCES = zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in (kinds, numba_numbers)))

_INTRINSIC: Any = intrinsic
_WORD = types.CPointer(types.int64)  # type: ignore[no-untyped-call]

# Numbers of a block. Its arrays have constant distances, so that LLVM knows that they do not overlap.
_BLOCK = 256

_CLAIMS = ("next", "rows", "claim")
_CONSTANTS = ("leak", "share", "alpha", "threshold", "sigma")
NOISE = (*_CLAIMS, "out", "neurons", "key")
"""What a record of ``noise`` holds, integers of 64 bits all of them."""
FORWARD = (
    *_CLAIMS, "neurons", "mechanism", *_CONSTANTS, "sets", "steps", "currents", "seen", "keys", "current", "mem",
    "shadow", "syn", "fired", "before", "new_shadow", "spikes", "seen_mem", "seen_syn", "code", "noise_code",
)  # fmt: skip
"""The same of ``forward``.

``rows``: of the batch. ``neurons``: of a row. ``mechanism``: of the reset. Constants, ``[neurons]``: what remains of
the membrane potential, what the current (or the synaptic current) adds to it, what remains of the synaptic current (0
without one), threshold and noise level. ``sets``: 1, or 2 with a shadow. ``steps``: number of time steps, of which
all, or the last one, hand out their states (``seen``). ``keys`` of the noise, ``[steps]``; row r of set k is row k ·
rows + r of the noise. ``current``: ``[currents = steps or 1, rows, neurons]``.

``mem``, ``shadow`` and ``syn``, ``[rows, neurons]``: membrane potentials of train and shadow, and the synaptic
current, before. ``fired``, ``[sets, rows, neurons]``: the spikes before, or ``before``, the code of the step before,
in their place. Filled are: ``new_shadow``; ``spikes`` of the train, ``[steps, rows, neurons]``; ``seen_mem`` and
``seen_syn`` of the train, ``[seen, rows, neurons]``; ``code``, ``[steps, sets, rows, neurons]``, z and spikes for the
backward pass, and ``noise_code``, the noise on the membrane potential.
"""
BACKWARD = (
    *_CLAIMS, "neurons", "mechanism", *_CONSTANTS, "steps", "currents", "fit_rows", "traces", "adds", "a", "b",
    "b_syn", "code", "noise_code", "fired", "before", "settings", "togo", "parted", "trace", "syn_trace", "to_current",
    "to_sigma", "sums",
)  # fmt: skip
"""The same of ``backward``; see ``snntorch_lr.node.CounterfactualSpike``, and for what is not named here ``FORWARD``.

``a``, ``b``, ``b_syn``, ``[steps, rows, neurons]``: ∂loss/∂(spikes, membrane potential, synaptic current) of the
train. ``settings``: λ and γ. In and out are: ``togo``, what later spikes did to the loss, ``[rows, neurons]``;
``parted``, what λ multiplies in it, of the first ``fit_rows`` rows; ``trace``, ``[traces, rows, neurons]``, the
gradient of the membrane potential of the next step: 2 where train and shadow decay differently, 1 where they may be
added, 0 for none; and ``syn_trace``, that of the synaptic current. Filled, or with ``adds`` added to, is
``to_current``, the gradient of the current, ``[currents, rows, neurons]``. Added to are ``to_sigma``, the gradient of
σ, times σ, ``[chunks, neurons]``, and ``sums``, ``[chunks, 2]``, Σ C₀C₁ and Σ C₁², where each claim of rows is a
chunk.

With one set there is no shadow, and ``togo`` is a weight for each row, ``[rows]``, by which the scores are
multiplied.
"""
_WORDS = {4: np.int32, 8: np.int16}
_KEPT = {np.float32: np.uint16, np.float64: np.int64}
_NOISE, _FORWARD, _BACKWARD = (np.dtype([(name, np.int64) for name in names]) for names in (NOISE, FORWARD, BACKWARD))


@_INTRINSIC
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """An address as that of numbers like another one."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), build  # type: ignore[no-untyped-call]


@_INTRINSIC
def _claim(context: Any, record: Any, count: Any) -> Any:
    """The first of the next rows, which no other thread gets: adds to the word at the start of a record."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.bitcast(arguments[0], context.get_value_type(_WORD))
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.voidptr, types.int64), build


def _prefetch_for(write: bool) -> Any:
    """A function that fetches a line of memory into the first-level cache, to be read or to be written."""

    @_INTRINSIC
    def prefetch(context: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            operation = ir.FunctionType(ir.VoidType(), (pointer, number, number, number))
            function = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), operation)
            # Of the highest locality, and data.
            builder.call(function, (builder.inttoptr(arguments[0], pointer), number(int(write)), number(3), number(1)))
            return context.get_dummy_value()

        return types.void(types.int64), build

    return prefetch


_prefetch_to_read, _prefetch_to_write = _prefetch_for(False), _prefetch_for(True)
_LINE = 64


@njit(**OPTIONS)
def _will_read(address: int, size: int) -> None:
    for place in range(address, address + size, _LINE):
        _prefetch_to_read(place)


@njit(**OPTIONS)
def _will_write(address: int, size: int) -> None:
    for place in range(address, address + size, _LINE):
        _prefetch_to_write(place)


@njit(**OPTIONS)
def _list(address: int, numbers: int, like: Any) -> Any:
    return carray(_pointer(address, like), (numbers if address else 0,))


@njit(**OPTIONS)
def _shape(neurons: int) -> tuple[int, int]:
    """How many rows a block has, and how many neurons of each."""
    width = (neurons + 7) // 8 * 8
    return (1, _BLOCK) if width > _BLOCK else (_BLOCK // width, neurons)


@njit(**OPTIONS)
def _counters(neurons: int, per_counter: int) -> Any:
    """Columns and rows of the counters of a block, from the first ones on."""
    counters = np.zeros((2, _BLOCK // per_counter), np.int32)
    width = (neurons + per_counter - 1) // per_counter
    for place in range(_BLOCK // per_counter):
        row = place // width if width * per_counter <= _BLOCK else 0
        counters[0, place], counters[1, place] = place - row * width, row
    return counters


@njit(**INLINE)
def _random(words: Any, drawn: Any, memory: Any, counters: Any, key: Any, row: int, first: int, neurons: int) -> Any:
    """The random words of a block; see ``snntorch_lr.philox.draw``.

    Args:
        words: of the block, filled if those that are drawn have gaps between rows.
        drawn: of as many words as a block has.
        memory: of ``drawn``, as words of 32 bits.
        counters: from ``_counters``.
        key: of 64 bits.
        row: the first one.
        first: number of the first neuron in it.
        neurons: of a row, of which the block may have a part.
    """
    per_counter, size = len(drawn) // counters.shape[1], len(words)
    width = (neurons + per_counter - 1) // per_counter
    if per_counter * width > _BLOCK or neurons % per_counter == 0:
        count = (size + per_counter - 1) // per_counter
        words_of_rows(memory, counters[0, :count], counters[1, :count], key, row, first // per_counter)
        return drawn[:size]
    rows = size // neurons
    count = rows * width
    words_of_rows(memory, counters[0, :count], counters[1, :count], key, row, 0)
    for own_row in range(rows):
        start = per_counter * width * own_row
        assign(words[own_row * neurons : (own_row + 1) * neurons], drawn[start : start + neurons])
    return words


@njit(**INLINE)
def _take(to: Any, source: Any, start: int) -> None:
    """Fills a block from a place on; with zeros if there is nothing."""
    if len(source):
        assign(to, source[start : start + len(to)])
    else:
        to[:] = 0


@njit(**INLINE)
def _give(to: Any, start: int, value: Any) -> None:
    """Puts a block in a place."""
    assign(to[start : start + len(value)], value)


@njit(**OPTIONS)
def _take_constants(to: Any, source: Any, first: int, neurons: int) -> None:
    """Fills a block with numbers that are the same for all rows."""
    if neurons >= first + len(to):
        _take(to, source, first)
        return
    for start in range(0, len(to), neurons):
        own = to[start : start + neurons]
        assign(own, source[: len(own)])


def noise(dtype: Any, kind: int) -> Any:
    """A function that fills rows with noise of a kind; see ``snntorch_lr.philox.draw``."""
    zero, per_counter = dtype(0), kinds.numbers_of_counter(kind)
    is_gaussian = kind == GAUSSIAN
    word_type = _WORDS[per_counter]

    def fill(record: Any, start: int, stop: int) -> None:
        neurons = record.neurons
        out = _list(record.out, record.rows * neurons, zero)
        memory, counters = np.empty(4 * _BLOCK // per_counter, np.int32), _counters(neurons, per_counter)
        drawn, words, numbers = memory.view(word_type), np.empty(_BLOCK, word_type), np.empty(_BLOCK, out.dtype)
        rows, width = _shape(neurons)
        for first in range(0, neurons, width):
            for row in range(start, stop, rows):
                size = min(rows, stop - row) * min(width, neurons - first)
                number = numbers[:size]
                word = _random(words[:size], drawn, memory, counters, np.uint64(record.key), row, first, neurons)
                for i in range(size):
                    u = uniform(word[i], zero)
                    number[i] = normal_quantile(u) if is_gaussian else u
                _give(out, row * neurons + first, number)

    return _function(fill, _NOISE, "noise", dtype, kind)


def forward(dtype: Any, kind: int, plain: bool) -> Any:
    """A function that takes time steps with noise of a kind; see ``FORWARD``."""
    zero, kept = dtype(0), _KEPT[dtype]
    escapes = kind == LOGISTIC_ESCAPE
    per_counter = kinds.numbers_of_counter(kind)
    word_type = _WORDS[per_counter]
    size_of, size_of_kept = np.dtype(dtype).itemsize, np.dtype(kept).itemsize

    def take_steps(record: Any, start: int, stop: int) -> None:
        neurons, sets, steps, seen = record.neurons, record.sets, record.steps, record.seen
        whole = record.rows * neurons
        keys, current = _list(record.keys, steps, np.uint64(0)), _list(record.current, record.currents * whole, zero)
        mem, shadow, syn = (_list(record.mem, whole, zero), _list(record.shadow, whole, zero),
                            _list(record.syn, whole, zero))  # fmt: skip
        fired, before = _list(record.fired, sets * whole, zero), _list(record.before, sets * whole, kept(0))
        new_shadow, spikes = _list(record.new_shadow, whole, zero), _list(record.spikes, steps * whole, zero)
        seen_mem, seen_syn = _list(record.seen_mem, seen * whole, zero), _list(record.seen_syn, seen * whole, zero)
        code = _list(record.code, steps * sets * whole, kept(0))
        noise_code = _list(record.noise_code, steps * sets * whole, kept(0))

        memory, counters = np.empty(4 * _BLOCK // per_counter, np.int32), _counters(neurons, per_counter)
        drawn, words, codes = memory.view(word_type), np.empty(_BLOCK, word_type), np.empty((2, _BLOCK), kept)
        block = np.zeros((11, _BLOCK), spikes.dtype)
        clears, erases = zero + (record.mechanism == ZERO), zero + (record.mechanism == ERASE)
        rows, width = _shape(neurons)
        changes = len(current) > whole
        for first in range(0, neurons, width):
            width = min(width, neurons - first)
            size = min(rows, stop - start) * width
            _take_constants(block[0, :size], _list(record.leak, neurons, zero), first, neurons)
            _take_constants(block[1, :size], _list(record.share, neurons, zero), first, neurons)
            _take_constants(block[2, :size], _list(record.threshold, neurons, zero), first, neurons)
            _take_constants(block[3, :size], _list(record.sigma, neurons, zero), first, neurons)
            for i in range(size):
                block[4, i] = _1 / block[3, i]
            if record.alpha:
                _take_constants(block[5, :size], _list(record.alpha, neurons, zero), first, neurons)
            if record.mechanism == SUBTRACT:
                block[6] = block[2]
            for row in range(start, stop, rows):
                size = min(rows, stop - row) * width
                leak, share, threshold, sigma = block[0, :size], block[1, :size], block[2, :size], block[3, :size]
                inverse, alpha, resets = block[4, :size], block[5, :size], block[6, :size]
                here, fire, drive, flow = block[7, :size], block[8, :size], block[9, :size], block[10, :size]
                own_code, own_noise = codes[0, :size], codes[1, :size]
                for own in range(sets):
                    left = row * neurons + first
                    at = own * whole + left
                    _take(here, shadow if own else mem, left)
                    if len(before):
                        _take(own_code, before, at)
                        for i in range(size):
                            fire[i] = recall(own_code[i])[1]
                    else:
                        _take(fire, fired, at)
                    if not plain:
                        _take(flow, syn, left)
                    for step in range(steps):
                        moved = step * whole + left
                        if step == 0 or changes:
                            _take(drive, current, moved)
                        if changes and step < steps - 1:
                            _will_read(record.current + size_of * (moved + whole), size_of * size)
                        if len(code):
                            _will_write(record.code + size_of_kept * (step * sets * whole + at), size_of_kept * size)
                        if own == 0:
                            _will_write(record.spikes + size_of * moved, size_of * size)
                        if not plain and not record.alpha:
                            # Infinite times zero would stay.
                            flow[:] = zero
                        word = _random(
                            words[:size], drawn, memory, counters, keys[step], own * record.rows + row, first, neurons
                        )
                        for i in range(size):
                            u = uniform(word[i], zero)
                            if plain:
                                mean = here[i] * leak[i] + drive[i] * share[i] - fire[i] * resets[i]
                            else:
                                flow[i] = flow[i] * alpha[i] + drive[i]
                                mean = here[i] * leak[i] * (_1 - clears * fire[i]) + flow[i] * share[i]
                                mean = mean * (_1 - erases * fire[i]) - fire[i] * resets[i]
                            z = (mean - threshold[i]) * inverse[i]
                            if escapes:
                                spike = _1 if logistic_fires(z, u) else _0
                                here[i] = mean
                            else:
                                epsilon = normal_quantile(u)
                                here[i] = mean + sigma[i] * epsilon
                                spike = _1 if here[i] > threshold[i] else _0
                                own_noise[i] = keep(epsilon, spike)
                            fire[i] = spike
                            own_code[i] = keep(z, spike)
                        if len(code):
                            _give(code, step * sets * whole + at, own_code)
                            if not escapes:
                                _give(noise_code, step * sets * whole + at, own_noise)
                        if own == 0:
                            _give(spikes, moved, fire)
                            if seen == steps or step == steps - 1:
                                shown = left if seen != steps else moved
                                _give(seen_mem, shown, here)
                                if len(seen_syn):
                                    _give(seen_syn, shown, flow)
                    if own:
                        _give(new_shadow, left, here)

    return _function(take_steps, _FORWARD, "forward", dtype, kind, plain)


def backward(dtype: Any, kind: int, plain: bool, pairs: bool) -> Any:
    """A function that goes back through them, with a shadow (``pairs``) or without; see ``BACKWARD``."""
    zero, kept = dtype(0), _KEPT[dtype]
    escapes = kind == LOGISTIC_ESCAPE
    chance, chances = (logistic_chance, logistic_chances) if escapes else (normal_chance, normal_chances)
    size_of, size_of_kept = np.dtype(dtype).itemsize, np.dtype(kept).itemsize
    sets = 1 + pairs

    def go_back(record: Any, start: int, stop: int) -> None:
        neurons, steps, traces, claim = record.neurons, record.steps, record.traces, record.claim
        whole, chunk = record.rows * neurons, start // claim
        a, b = _list(record.a, steps * whole, zero), _list(record.b, steps * whole, zero)
        b_syn, fired = _list(record.b_syn, steps * whole, zero), _list(record.fired, sets * whole, zero)
        code = _list(record.code, steps * sets * whole, kept(0))
        noise_code = _list(record.noise_code, steps * sets * whole, kept(0))
        before, settings = _list(record.before, sets * whole, kept(0)), _list(record.settings, 2, zero)
        togo = _list(record.togo, whole if pairs else record.rows, zero)
        parted, trace = _list(record.parted, record.fit_rows * neurons, zero), _list(record.trace, traces * whole, zero)
        syn_trace, to_current = (_list(record.syn_trace, whole, zero),
                                 _list(record.to_current, record.currents * whole, zero))  # fmt: skip
        chunks = (record.rows + claim - 1) // claim
        to_sigma, sums = _list(record.to_sigma, chunks * neurons, zero), _list(record.sums, chunks * 2, zero)

        codes = np.zeros((6, _BLOCK), kept)
        block = np.zeros((18, _BLOCK), togo.dtype)
        control, discount = (settings[0], settings[1]) if pairs else (zero, zero)
        erases, reads = record.mechanism == ERASE, len(b) > 0
        # Train and shadow decay differently where the reset multiplies.
        apart = zero + (erases or record.mechanism == ZERO)
        constant, adds = len(to_current) == whole, record.adds > 0 and len(to_current) > 0
        adds_up = zero + (adds or constant)
        rows, width = _shape(neurons)
        for first in range(0, neurons, width):
            width = min(width, neurons - first)
            size = min(rows, stop - start) * width
            _take_constants(block[0, :size], _list(record.leak, neurons, zero), first, neurons)
            _take_constants(block[1, :size], _list(record.share, neurons, zero), first, neurons)
            _take_constants(block[2, :size], _list(record.sigma, neurons, zero), first, neurons)
            for i in range(size):
                block[3, i] = _1 / block[2, i]
            if record.alpha:
                _take_constants(block[4, :size], _list(record.alpha, neurons, zero), first, neurons)
            block[5] = zero
            for row in range(start, stop, rows):
                size = min(rows, stop - row) * width
                fit_size = max(0, min(rows, stop - row, record.fit_rows - row)) * width
                fits = fit_size > 0
                leak, share, sigma, inverse = block[0, :size], block[1, :size], block[2, :size], block[3, :size]
                alpha, to_scale, effect, read = block[4, :size], block[5, :size], block[6, :size], block[7, :size]
                read_syn, later, split, g0 = block[8, :size], block[9, :size], block[10, :size], block[11, :size]
                g1, flow, driven = block[12, :size], block[13, :size], block[14, :size]
                products, squares = block[15, :size], block[16, :size]
                c0, c1, n0, n1 = codes[0, :size], codes[1, :size], codes[2, :size], codes[3, :size]
                f0, f1 = codes[4, :size], codes[5, :size]
                left = row * neurons + first
                if pairs:
                    _take(later, togo, left)
                else:
                    for own_row in range(size // width):
                        later[own_row * width : (own_row + 1) * width] = togo[row + own_row]
                if fits:
                    split[:] = products[:] = squares[:] = zero
                    _take(split[:fit_size], parted, left)
                _take(g0, trace, left)
                if adds and constant:
                    _take(driven, to_current, left)
                else:
                    driven[:] = zero
                if not plain:
                    codes[4:] = 0
                    _take(flow, syn_trace, left)
                    if traces > 1:
                        _take(g1, trace, whole + left)
                    else:
                        g1[:] = zero
                for step in range(steps - 1, -1, -1):
                    moved = step * whole + left
                    at = step * sets * whole + left
                    _take(c0, code, at)
                    if pairs:
                        _take(c1, code, at + whole)
                    if not escapes:
                        _take(n0, noise_code, at)
                        if pairs:
                            _take(n1, noise_code, at + whole)
                    _take(effect, a, moved)
                    if reads:
                        _take(read, b, moved)
                    if not plain:
                        _take(read_syn, b_syn, moved)
                    if step:
                        _will_read(record.code + size_of_kept * (at - sets * whole), size_of_kept * size)
                        if pairs:
                            _will_read(record.code + size_of_kept * (at - whole), size_of_kept * size)
                        if len(a):
                            _will_read(record.a + size_of * (moved - whole), size_of * size)
                        if len(to_current) and not constant:
                            _will_write(record.to_current + size_of * (moved - whole), size_of * size)
                    if not plain and erases:
                        if step:
                            _take(f0, code, at - sets * whole)
                        elif len(before):
                            _take(f0, before, left)
                        else:
                            _take(f0, fired, left)
                        if pairs:
                            if step:
                                _take(f1, code, at - whole)
                            elif len(before):
                                _take(f1, before, whole + left)
                            else:
                                _take(f1, fired, whole + left)
                    if adds and not constant:
                        _take(driven, to_current, moved)
                    for i in range(size):
                        z0, s0 = recall(c0[i])
                        if pairs:
                            z1, s1 = recall(c1[i])
                            p0, d0, p1 = chances(z0, z1)
                        else:
                            p0, d0 = chance(z0)
                        e0 = recall(n0[i])[0]
                        q0 = s0 - p0 if escapes else e0
                        known = later[i]
                        if pairs:
                            e1 = recall(n1[i])[0]
                            q1 = s1 - p1 if escapes else e1
                            half = _HALF * effect[i]
                            parting = half * ((s1 - p1) - (s0 - p0))
                            known = discount * known + half * (s0 - s1) + control * parting
                            direct = effect[i] * d0
                            if fits:
                                other = discount * split[i] + parting
                                multiplied = (q0 - q1) * other + direct
                                split[i] = other
                                products[i] += (q0 - q1) * (known - control * other) * multiplied
                                squares[i] += multiplied * multiplied
                            direct = control * direct
                            own = (q0 * known + direct) * inverse[i]
                            others = -q1 * known * inverse[i]
                            if escapes:
                                scale = (z1 * q1 - z0 * q0) * known - z0 * direct
                            else:
                                scale = (e0 * q0 - e1 * q1) * known - z0 * direct
                        else:
                            own, others = q0 * known * inverse[i], zero
                            scale = -z0 * q0 * known if escapes else (e0 * q0 - _1) * known
                        if plain:
                            own += others
                            if escapes:
                                own += g0[i] * leak[i]
                        else:
                            if escapes:
                                own += g0[i] * leak[i] * (_1 - apart * s0)
                                if pairs:
                                    others += apart * g1[i] * leak[i] * (_1 - s1)
                            own += (_1 - apart) * others
                            others = apart * others
                        if reads:
                            own += read[i]
                            if pairs and escapes:
                                known += _HALF * read[i] * sigma[i] * (z0 - z1)
                            elif pairs:
                                known += _HALF * read[i] * sigma[i] * ((z0 + e0) - (z1 + e1))
                                scale += read[i] * e0 * sigma[i]
                        later[i], g0[i] = known, own
                        to_scale[i] += scale
                        if plain:
                            driven[i] = adds_up * driven[i] + share[i] * own
                        else:
                            g1[i] = others
                            own = own * (_1 - recall(f0[i])[1]) + others * (_1 - recall(f1[i])[1])
                            flow[i] = flow[i] * alpha[i] + share[i] * own + read_syn[i]
                            driven[i] = adds_up * driven[i] + flow[i]
                    if len(to_current) and (step == 0 or not constant):
                        _give(to_current, moved, driven)
                if pairs:
                    _give(togo, left, later)
                if fits:
                    _give(parted, left, split[:fit_size])
                if traces:
                    _give(trace, left, g0)
                if traces > 1:
                    _give(trace, whole + left, g1)
                if len(syn_trace):
                    _give(syn_trace, left, flow)
                for i in range(fit_size):
                    sums[2 * chunk] += products[i]
                    sums[2 * chunk + 1] += squares[i]
            if len(to_sigma):
                own_sigma = to_sigma[chunk * neurons : (chunk + 1) * neurons]
                for place in range(0, min(rows, stop - start) * width, width):
                    for i in range(width):
                        own_sigma[first + i] += block[5, place + i]

    return _function(go_back, _BACKWARD, "backward", dtype, kind, plain, pairs)


_ENTRY = types.void(types.voidptr)


def _function(part: Any, layout: Any, *options: Any) -> Any:
    """A function for C code that claims rows of a record until none is left, and has a part done for each claim.

    Args:
        part: takes the record, the first row and the end of the rows.
        layout: of the record.
        *options: what the part was made from.
    """
    identity = zlib.crc32(repr(options).encode()), _SOURCES

    def run(address: Any) -> None:
        record = carray(address, (1,), layout)[0]
        while identity[0] >= 0:
            start = _claim(address, record.claim)
            if start >= record.rows:
                return
            _part(record, start, min(start + record.claim, record.rows))  # type: ignore[name-defined] # noqa: F821

    # Code from the cache is found by its name alone where another one calls it: no two functions may share one.
    for function in part, run:
        function.__qualname__ += "_{:x}_{:x}".format(*identity)
    # Inlined before it is compiled. Numba optimises a compiled function once more where another one calls it: code just
    # compiled would call the former, code from the cache the latter, and the two round differently.
    inlined = njit(inline="always", **OPTIONS)(part)
    # The key of the cache is what a function closes over, and compiled functions look different in each process there.
    known = globals() | {"_part": inlined}
    apart = FunctionType(run.__code__, known, run.__name__, None, run.__closure__)
    apart.__qualname__ = run.__qualname__
    return cfunc(_ENTRY, cache=True)(apart)
