"""Time steps of neurons and their backward pass, fused for a CPU by Numba: one pass over memory for each.

All intermediate numbers of a row stay in the cache, and each loop is over the neurons of a row, or of a few rows if
they are short, so that LLVM turns it into vector instructions.

``noise``, ``forward`` and ``backward`` make functions for a dtype that C code can call. Such a function takes the
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
from .kinds import ERASE, GAUSSIAN_ESCAPE, LOGISTIC_ESCAPE, SUBTRACT, ZERO
from .numba_numbers import (
    OPTIONS,
    SINGLES,
    assign,
    chances,
    counters,
    escape_scores,
    escape_spikes,
    keep,
    membrane_scores,
    recall,
    to_noise,
    uniform,
)

_0, _HALF, _1, _ = SINGLES
# Numba looks at the age of this file alone when it takes compiled code from its cache, and at what a function closes
# over: the content of the other files is there.
_SOURCES = zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in (kinds, numba_numbers)))

_INTRINSIC: Any = intrinsic
_WORD = types.CPointer(types.int64)  # type: ignore[no-untyped-call]

# Neurons of short rows that are computed together.
_BLOCK = 1024

_CLAIMS = ("next", "rows", "claim")
NOISE = (*_CLAIMS, "out", "numbers", "key", "kind")
"""What a block of ``noise`` holds, integers of 64 bits all of them."""
_CONSTANTS = ("leak", "share", "alpha", "threshold", "sigma")
FORWARD = (
    *_CLAIMS, "neurons", "sets", "steps", "currents", "seen", "kind", "mechanism", "keys", "current", "mem", "shadow",
    "syn", "fired", "before", *_CONSTANTS, "new_shadow", "new_fired", "spikes", "seen_mem", "seen_syn", "code",
    "noise_code",
)  # fmt: skip
"""The same of ``forward``; see ``_forward``."""
BACKWARD = (
    *_CLAIMS, "neurons", "steps", "currents", "kind", "mechanism", "a", "b", "b_syn", "code", "noise_code", "fired",
    "before", *_CONSTANTS, "settings", "togo", "parted", "fit_rows", "trace", "traces", "syn_trace",
    "to_current", "adds", "to_sigma", "sums",
)  # fmt: skip
"""The same of ``backward``; see ``_backward``."""
_NOISE, _FORWARD, _BACKWARD = (np.dtype([(name, np.int64) for name in names]) for names in (NOISE, FORWARD, BACKWARD))


@njit(**OPTIONS)
def _noise(start: int, stop: int, out: Any, neurons: int, key: Any, kind: int) -> None:
    """Fills rows from ``start`` to ``stop`` with noise; see ``snntorch_lr.philox.draw``."""
    most = max(1, _BLOCK // neurons)
    words, columns, rows = counters(most, neurons)
    memory = np.empty(most * neurons, out.dtype)
    for row in range(start, stop, most):
        own = out[row * neurons : min(row + most, stop) * neurons]
        # Apart: LLVM does not vectorise what overlaps.
        u = memory[: len(own)]
        uniform(u, words, columns, rows, neurons, key, row)
        to_noise(own, u, kind)


@njit(**OPTIONS)
def _advance(
    new: Any, mem: Any, current: Any, fired: Any, leak: Any, share: Any, threshold: Any, mechanism: int
) -> None:
    """The membrane potential of the next step, without noise."""
    if mechanism == SUBTRACT:
        for i in range(len(new)):
            new[i] = mem[i] * leak[i] + current[i] * share[i] - fired[i] * threshold[i]
    elif mechanism == ZERO:
        for i in range(len(new)):
            new[i] = mem[i] * leak[i] * (_1 - fired[i]) + current[i] * share[i]
    elif mechanism == ERASE:
        for i in range(len(new)):
            new[i] = (mem[i] * leak[i] + current[i] * share[i]) * (_1 - fired[i])
    else:
        for i in range(len(new)):
            new[i] = mem[i] * leak[i] + current[i] * share[i]


@njit(**OPTIONS)
def _repeat(values: Any, times: int) -> Any:
    out = np.empty(times * len(values), values.dtype)
    for start in range(0, len(out), max(1, len(values))):
        assign(out[start : start + len(values)], values)
    return out


@njit(**OPTIONS)
def _forward(
    start: int, stop: int, batch: int, neurons: int, sets: int, steps: int, seen: int, kind: int, mechanism: int,
    keys: Any, current: Any, mem: Any, shadow: Any, syn: Any, fired: Any, before_code: Any, leak: Any, share: Any,
    alpha: Any, threshold: Any, sigma: Any, new_shadow: Any, new_fired: Any, spikes: Any, seen_mem: Any, seen_syn: Any,
    code: Any, noise_code: Any,
) -> None:  # fmt: skip
    """Time steps of a train, and its shadow if there are two sets, in rows from ``start`` to ``stop``.

    Arrays have one dimension; empty ones are not wanted, or are zeros.

    Args:
        start: first row.
        stop: end of the rows.
        batch: number of rows in all.
        neurons: of a row.
        sets: 1, or 2 with a shadow.
        steps: number of time steps.
        seen: of how many of them, all or the last one, states are handed out.
        kind: of the noise.
        mechanism: of the reset.
        keys: of the noise, ``[steps]``; row r of set k is row ``k * batch + r`` of the noise.
        current: ``[steps or 1, batch, neurons]``.
        mem: membrane potential of the train before, ``[batch, neurons]``.
        shadow: that of the shadow.
        syn: synaptic current before, alike.
        fired: spikes before, ``[sets, batch, neurons]``.
        before_code: the code of the step before, in place of them.
        leak: what remains of the membrane potential, ``[neurons]``.
        share: what the current, or the synaptic current, adds to it, ``[neurons]``.
        alpha: what remains of the synaptic current, ``[neurons]``; empty without one.
        threshold: ``[neurons]``.
        sigma: noise level, ``[neurons]``.
        new_shadow: filled with the membrane potential of the shadow after the last step.
        new_fired: filled with the spikes of the last step, as ``fired``.
        spikes: filled with those of the train, ``[steps, batch, neurons]``.
        seen_mem: filled with membrane potentials of the train, ``[seen, batch, neurons]``.
        seen_syn: filled with synaptic currents, alike.
        code: what the backward pass needs, ``[steps, sets, batch, neurons]``: z and spikes.
        noise_code: the same of membrane noise.
    """
    most = max(1, _BLOCK // neurons)
    words, columns, counted = counters(most, neurons)
    leak, share, alpha = _repeat(leak, most), _repeat(share, most), _repeat(alpha, most)
    threshold, sigma = _repeat(threshold, most), _repeat(sigma, most)
    inverse = _1 / sigma
    memory = np.empty((8, most * neurons), spikes.dtype)
    escapes = kind in (LOGISTIC_ESCAPE, GAUSSIAN_ESCAPE)
    whole = batch * neurons
    for row in range(start, stop, most):
        size, left = (min(row + most, stop) - row) * neurons, row * neurons
        u, z, epsilon, here = memory[0, :size], memory[1, :size], memory[2, :size], memory[3, :size]
        before, fire, drive, flow = memory[4, :size], memory[5, :size], memory[6, :size], memory[7, :size]
        for own in range(sets):
            at = own * whole + left
            if own == 0 and len(mem):
                assign(before, mem[left : left + size])
            elif own and len(shadow):
                assign(before, shadow[left : left + size])
            else:
                before[:] = _0
            if len(before_code):
                recall(z, fire, before_code[at : at + size])
            elif len(fired):
                assign(fire, fired[at : at + size])
            else:
                fire[:] = _0
            if len(alpha):
                if len(syn):
                    assign(flow, syn[left : left + size])
                else:
                    flow[:] = _0
            for step in range(steps):
                moved = step * whole + left
                assign(drive, current[moved % len(current) : moved % len(current) + size])
                if len(alpha):
                    for i in range(size):
                        flow[i] = flow[i] * alpha[i] + drive[i]
                    assign(drive, flow)
                uniform(u, words, columns, counted, neurons, keys[step], own * batch + row)
                _advance(here, before, drive, fire, leak, share, threshold, mechanism)
                for i in range(size):
                    z[i] = (here[i] - threshold[i]) * inverse[i]
                if escapes:
                    escape_spikes(fire, z, u, kind)
                else:
                    to_noise(epsilon, u, kind)
                    for i in range(size):
                        here[i] += sigma[i] * epsilon[i]
                        fire[i] = _1 if here[i] > threshold[i] else _0
                if len(code):
                    kept = step * sets * whole + at
                    keep(code[kept : kept + size], z, fire)
                    if len(noise_code):
                        keep(noise_code[kept : kept + size], epsilon, fire)
                if own == 0:
                    assign(spikes[moved : moved + size], fire)
                    if seen == steps or step == steps - 1:
                        shown = left if seen != steps else moved
                        assign(seen_mem[shown : shown + size], here)
                        if len(seen_syn):
                            assign(seen_syn[shown : shown + size], flow)
                assign(before, here)
            if own:
                assign(new_shadow[left : left + size], before)
            if len(new_fired):
                assign(new_fired[at : at + size], fire)


@njit(**OPTIONS)
def _backward(
    start: int, stop: int, batch: int, neurons: int, steps: int, kind: int, mechanism: int, a: Any, b: Any, b_syn: Any,
    code: Any, noise_code: Any, fired: Any, before_code: Any, leak: Any, share: Any, alpha: Any, sigma: Any,
    control: Any, discount: Any, togo: Any, parted: Any, fit_rows: int, trace: Any, traces: int, syn_trace: Any,
    to_current: Any, adds: bool, to_sigma: Any, sums: Any,
) -> None:  # fmt: skip
    """Counterfactual credit in time steps, the last one first, in rows from ``start`` to ``stop``.

    See ``snntorch_lr.node.CounterfactualSpike``; arrays as for ``_forward``.

    Args:
        start: first row.
        stop: end of the rows.
        batch: number of rows in all.
        neurons: of a row.
        steps: number of time steps.
        kind: of the noise.
        mechanism: of the reset.
        a: ∂loss/∂spikes, ``[steps, batch, neurons]``.
        b: ∂loss/∂(membrane potential of the train), alike.
        b_syn: ∂loss/∂(synaptic current), alike.
        code: from the forward pass.
        noise_code: see there.
        fired: spikes before the first step, ``[2, batch, neurons]``.
        before_code: in place of them.
        leak: see there.
        share: see there.
        alpha: see there.
        sigma: see there.
        control: λ.
        discount: γ.
        togo: what later spikes did to the loss, ``[batch, neurons]``, in and out.
        parted: what λ multiplies in it, in the first rows.
        fit_rows: of how many rows λ is fitted.
        trace: gradient of the membrane potential of the next step, ``[traces, batch, neurons]``, in and out.
        traces: 2 where train and shadow decay differently, 1 where they may be added, 0 without a trace.
        syn_trace: gradient of the synaptic current of the next step, ``[batch, neurons]``, in and out.
        to_current: gradient of the current, ``[steps or 1, batch, neurons]``.
        adds: it is added to what is there.
        to_sigma: gradient of σ, times σ, added to, ``[neurons]``.
        sums: Σ C₀C₁ and Σ C₁², added to.
    """
    most = max(1, _BLOCK // neurons)
    leak, share, alpha, sigma = _repeat(leak, most), _repeat(share, most), _repeat(alpha, most), _repeat(sigma, most)
    inverse = _1 / sigma
    memory = np.empty((20, most * neurons), togo.dtype)
    escapes = kind in (LOGISTIC_ESCAPE, GAUSSIAN_ESCAPE)
    erases, clears = mechanism == ERASE, mechanism in (ZERO, ERASE)
    whole = batch * neurons
    for row in range(start, stop, most):
        size, left = (min(row + most, stop) - row) * neurons, row * neurons
        fitted = max(0, min(row + most, stop, fit_rows) - row) * neurons
        z0, z1, s0, s1 = memory[0, :size], memory[1, :size], memory[2, :size], memory[3, :size]
        p0, p1, d0, d1 = memory[4, :size], memory[5, :size], memory[6, :size], memory[7, :size]
        q0, q1, e0, e1 = memory[8, :size], memory[9, :size], memory[10, :size], memory[11, :size]
        later, g0, g1, flow = memory[12, :size], memory[13, :size], memory[14, :size], memory[15, :size]
        part, effect, f0, f1 = memory[16, :size], memory[17, :size], memory[18, :size], memory[19, :size]
        assign(later, togo[left : left + size])
        if fitted:
            assign(part[:fitted], parted[left : left + fitted])
        g0[:] = _0
        g1[:] = _0
        flow[:] = _0
        if traces:
            assign(g0, trace[left : left + size])
        if traces == 2:
            assign(g1, trace[whole + left : whole + left + size])
        if len(alpha):
            assign(flow, syn_trace[left : left + size])
        for back in range(steps):
            step = steps - 1 - back
            moved = step * whole + left
            kept = step * 2 * whole + left
            recall(z0, s0, code[kept : kept + size])
            recall(z1, s1, code[kept + whole : kept + whole + size])
            chances(p0, d0, z0, kind)
            chances(p1, d1, z1, kind)
            if escapes:
                escape_scores(q0, z0, p0, s0, kind)
                escape_scores(q1, z1, p1, s1, kind)
            else:
                recall(e0, s0, noise_code[kept : kept + size])
                recall(e1, s1, noise_code[kept + whole : kept + whole + size])
                membrane_scores(q0, e0, kind)
                membrane_scores(q1, e1, kind)
            if len(a):
                assign(effect, a[moved : moved + size])
                for i in range(fitted):
                    parting = effect[i] * ((s1[i] - p1[i]) - (s0[i] - p0[i]))
                    part[i] = discount * part[i] + _HALF * parting
                for i in range(size):
                    parting = (s0[i] - s1[i]) + control * ((s1[i] - p1[i]) - (s0[i] - p0[i]))
                    later[i] = discount * later[i] + _HALF * effect[i] * parting
                # From here on the derivative of the probability, weighted.
                for i in range(size):
                    effect[i] *= d0[i]
            else:
                effect[:] = _0
                for i in range(fitted):
                    part[i] *= discount
                for i in range(size):
                    later[i] *= discount
            product, square = _0 * control, _0 * control
            for i in range(fitted):
                both = q0[i] - q1[i]
                multiplied = both * part[i] + effect[i]
                product += both * (later[i] - control * part[i]) * multiplied
                square += multiplied * multiplied
            if fitted:
                sums[0] += product
                sums[1] += square
            if len(to_sigma):
                if escapes:
                    for i in range(size):
                        d1[i] = (z1[i] * q1[i] - z0[i] * q0[i]) * later[i] - control * z0[i] * effect[i]
                else:
                    for i in range(size):
                        d1[i] = (e0[i] * q0[i] - e1[i] * q1[i]) * later[i] - control * z0[i] * effect[i]
                    if len(b):
                        for i in range(size):
                            d1[i] += b[moved + i] * e0[i] * sigma[i]
                for first in range(0, size, neurons):
                    for i in range(neurons):
                        to_sigma[i] += d1[first + i]
            # What comes back from the next step, then what this one adds.
            if escapes:
                if clears:
                    for i in range(size):
                        g0[i] *= leak[i] * (_1 - s0[i])
                        g1[i] *= leak[i] * (_1 - s1[i])
                else:
                    for i in range(size):
                        g0[i] *= leak[i]
            else:
                g0[:] = _0
                g1[:] = _0
            if clears:
                for i in range(size):
                    g0[i] += (q0[i] * later[i] + control * effect[i]) * inverse[i]
                    g1[i] -= q1[i] * later[i] * inverse[i]
            else:
                for i in range(size):
                    g0[i] += ((q0[i] - q1[i]) * later[i] + control * effect[i]) * inverse[i]
            if len(b):
                for i in range(size):
                    g0[i] += b[moved + i]
                if escapes:
                    for i in range(size):
                        later[i] += _HALF * b[moved + i] * sigma[i] * (z0[i] - z1[i])
                else:
                    for i in range(size):
                        later[i] += _HALF * b[moved + i] * sigma[i] * ((z0[i] + e0[i]) - (z1[i] + e1[i]))
            if erases:
                if step:
                    earlier = kept - 2 * whole
                    recall(d1, f0, code[earlier : earlier + size])
                    recall(d1, f1, code[earlier + whole : earlier + whole + size])
                elif len(before_code):
                    recall(d1, f0, before_code[left : left + size])
                    recall(d1, f1, before_code[whole + left : whole + left + size])
                elif len(fired):
                    assign(f0, fired[left : left + size])
                    assign(f1, fired[whole + left : whole + left + size])
                else:
                    f0[:] = _0
                    f1[:] = _0
                for i in range(size):
                    effect[i] = share[i] * (g0[i] * (_1 - f0[i]) + g1[i] * (_1 - f1[i]))
            else:
                for i in range(size):
                    effect[i] = share[i] * (g0[i] + g1[i])
            if len(alpha):
                for i in range(size):
                    flow[i] = flow[i] * alpha[i] + effect[i]
                if len(b_syn):
                    for i in range(size):
                        flow[i] += b_syn[moved + i]
                assign(effect, flow)
            if len(to_current):
                at = moved % len(to_current)
                own = to_current[at : at + size]
                if adds or (back and len(to_current) == whole):
                    for i in range(size):
                        own[i] += effect[i]
                else:
                    assign(own, effect)
        assign(togo[left : left + size], later)
        if fitted:
            assign(parted[left : left + fitted], part[:fitted])
        if traces:
            assign(trace[left : left + size], g0)
        if traces == 2:
            assign(trace[whole + left : whole + left + size], g1)
        if len(alpha):
            assign(syn_trace[left : left + size], flow)


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
        _noise(start, min(start + count, rows), out, neurons, np.uint64(block.key), block.kind)


@njit(**OPTIONS)
def _run_forward(address: Any, like: Any, kept: Any) -> None:
    block = carray(address, (1,), _FORWARD)[0]
    batch, count, neurons, sets, steps = block.rows, block.claim, block.neurons, block.sets, block.steps
    size = batch * neurons
    keys, current = _list(block.keys, steps, np.uint64(0)), _list(block.current, block.currents * size, like)
    mem, shadow = _list(block.mem, size, like), _list(block.shadow, size, like)
    syn, fired = _list(block.syn, size, like), _list(block.fired, sets * size, like)
    before, leak = _list(block.before, sets * size, kept), _list(block.leak, neurons, like)
    share, alpha = _list(block.share, neurons, like), _list(block.alpha, neurons, like)
    threshold, sigma = _list(block.threshold, neurons, like), _list(block.sigma, neurons, like)
    new_shadow, new_fired = _list(block.new_shadow, size, like), _list(block.new_fired, sets * size, like)
    spikes, seen_mem = _list(block.spikes, steps * size, like), _list(block.seen_mem, block.seen * size, like)
    seen_syn = _list(block.seen_syn, block.seen * size, like)
    code, noise_code = _list(block.code, steps * sets * size, kept), _list(block.noise_code, steps * sets * size, kept)
    while True:
        start = _claim(address, count)
        if start >= batch:
            return
        _forward(
            start, min(start + count, batch), batch, neurons, sets, steps, block.seen, block.kind, block.mechanism,
            keys, current, mem, shadow, syn, fired, before, leak, share, alpha, threshold, sigma, new_shadow, new_fired,
            spikes, seen_mem, seen_syn, code, noise_code,
        )  # fmt: skip


@njit(**OPTIONS)
def _run_backward(address: Any, like: Any, kept: Any) -> None:
    block = carray(address, (1,), _BACKWARD)[0]
    batch, count, neurons, steps = block.rows, block.claim, block.neurons, block.steps
    size, chunks = batch * neurons, (batch + count - 1) // count
    a, b = _list(block.a, steps * size, like), _list(block.b, steps * size, like)
    b_syn, fired = _list(block.b_syn, steps * size, like), _list(block.fired, 2 * size, like)
    code, noise_code = _list(block.code, 2 * steps * size, kept), _list(block.noise_code, 2 * steps * size, kept)
    before, leak = _list(block.before, 2 * size, kept), _list(block.leak, neurons, like)
    share = _list(block.share, neurons, like)
    alpha, sigma = _list(block.alpha, neurons, like), _list(block.sigma, neurons, like)
    settings, togo = _list(block.settings, 2, like), _list(block.togo, size, like)
    parted = _list(block.parted, block.fit_rows * neurons, like)
    trace, syn_trace = _list(block.trace, block.traces * size, like), _list(block.syn_trace, size, like)
    to_current = _list(block.to_current, block.currents * size, like)
    to_sigma, sums = _list(block.to_sigma, chunks * neurons, like), _list(block.sums, chunks * 2, like)
    while True:
        start = _claim(address, count)
        if start >= batch:
            return
        chunk = start // count
        own_sigma = to_sigma[chunk * neurons : (chunk + 1) * neurons] if len(to_sigma) else to_sigma
        _backward(
            start, min(start + count, batch), batch, neurons, steps, block.kind, block.mechanism, a, b, b_syn, code,
            noise_code, fired, before, leak, share, alpha, sigma, settings[0], settings[1], togo, parted,
            block.fit_rows, trace, block.traces, syn_trace, to_current, block.adds != 0, own_sigma,
            sums[2 * chunk : 2 * chunk + 2],
        )  # fmt: skip


_ENTRY = types.void(types.voidptr)
_KEPT = {np.float32: np.uint16, np.float64: np.int64}


def noise(dtype: Any) -> Any:
    """A function that fills rows with noise; see ``snntorch_lr.philox.draw``."""
    given = dtype(0), _SOURCES

    @cfunc(_ENTRY, cache=True)
    def run(address: Any) -> None:
        _run_noise(address, given[0])

    return run


def forward(dtype: Any) -> Any:
    """A function that takes time steps; see ``_forward``."""
    given = dtype(0), _KEPT[dtype](0), _SOURCES

    @cfunc(_ENTRY, cache=True)
    def run(address: Any) -> None:
        _run_forward(address, given[0], given[1])

    return run


def backward(dtype: Any) -> Any:
    """A function that goes back through them; see ``_backward``."""
    given = dtype(0), _KEPT[dtype](0), _SOURCES

    @cfunc(_ENTRY, cache=True)
    def run(address: Any) -> None:
        _run_backward(address, given[0], given[1])

    return run
