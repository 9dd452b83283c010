"""Time steps of neurons and their backward pass, and noise, fused for CUDA by Triton, in single precision.

``numba_steps`` says what is computed; here it is one launch for all time steps. Random words are those of a CPU, bit by
bit. What is made of them is rounded as the device rounds, which may contract a product and a sum.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .._messages import first_line
from . import kinds

DTYPES = (torch.float32,)
CODES = {torch.float32: torch.int16}
"""Of what the backward pass keeps, by the dtype of the membrane potential."""
# Of a program at most: counters forward, each of four numbers or eight, and numbers backward.
_BLOCK = 128

_LOGISTIC_ESCAPE, _GAUSSIAN = tl.constexpr(kinds.LOGISTIC_ESCAPE), tl.constexpr(kinds.GAUSSIAN)
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
def _uniform(key, row, column, BLOCK: tl.constexpr, PER_COUNTER: tl.constexpr):
    """Uniform numbers in (−1, 1), ``[BLOCK, PER_COUNTER]``: Philox 4x32-10 of (column, row, 0, 0)."""
    zero = tl.cast(0, tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, column.to(tl.uint32), row.to(tl.uint32), zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK, 4)).to(tl.int32, bitcast=True)
    if PER_COUNTER == 8:
        halves = tl.reshape(tl.join(words << 16, words), (BLOCK, 8)) >> 16
        return (halves.to(tl.float32) + 0.5) * 2.0**-15
    else:
        return ((words >> 8).to(tl.float32) + 0.5) * 2.0**-23


@triton.jit
def _places(neurons, BLOCK: tl.constexpr, PER_COUNTER: tl.constexpr):
    """Columns of a program's counters, and which neurons of a row the numbers of each belong to."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    neuron = PER_COUNTER * tl.expand_dims(column, 1) + tl.expand_dims(tl.arange(0, PER_COUNTER), 0)
    return column, neuron, neuron < neurons


@triton.jit
def _to_noise(u, KIND: tl.constexpr):
    """Standard membrane noise of uniform numbers; these themselves for escape noise."""
    if KIND == _GAUSSIAN:
        w = -tl.log((1 - u) * (1 + u))
        near = _polynomial(w - 2.5, _NORMAL, _NORMAL_COUNT)
        far = _polynomial(tl.sqrt(w) - 3.5, _NORMAL_TAIL, _NORMAL_TAIL_COUNT)
        return u * tl.where(w < 5, near, far)
    else:
        return u


@triton.jit
def _normal(z):
    """φ(z) and the tail 1 − Φ(|z|)."""
    x = tl.abs(z)
    density = tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    t = 1 / (1 + x * 0.25)
    return density, density * t * _polynomial(t - 0.5, _MILLS, _MILLS_COUNT)


@triton.jit
def _chances(z, KIND: tl.constexpr):
    """Probability of a spike at a distance z to the threshold, and its derivative."""
    if KIND == _LOGISTIC_ESCAPE:
        p = 1 / (1 + tl.exp(-z))
        density = p * (1 - p)
    else:
        density, tail = _normal(z)
        p = tl.where(z > 0, 1 - tail, tail)
    return p, density


@triton.jit
def _advance(mem, current, fired, leak, share, threshold, MECHANISM: tl.constexpr):
    """The membrane potential of the next step, without noise."""
    if MECHANISM == _SUBTRACT:
        return mem * leak + current * share - fired * threshold
    elif MECHANISM == _ZERO:
        return mem * leak * (1 - fired) + current * share
    elif MECHANISM == _ERASE:
        return (mem * leak + current * share) * (1 - fired)
    else:
        return mem * leak + current * share


@triton.jit
def _keep(value, spike):
    """A number as 15 bits, rounded, and in the lowest bit a spike."""
    bits = (value.to(tl.int32, bitcast=True) + 0x10000) >> 16
    return ((bits & 0xFFFE) | spike.to(tl.int32)).to(tl.int16)


@triton.jit
def _recall(code):
    """The inverse of ``_keep``."""
    bits = code.to(tl.int32)
    return ((bits & 0xFFFE) << 16).to(tl.float32, bitcast=True), (bits & 1).to(tl.float32)


@triton.jit(do_not_specialize=["key"])
def _noise(out, key, neurons, KIND: tl.constexpr, PER_COUNTER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column, neuron, inside = _places(neurons, BLOCK, PER_COUNTER)
    u = _uniform(key, row, column, BLOCK, PER_COUNTER)
    tl.store(out + row.to(tl.int64) * neurons + neuron, _to_noise(u, KIND), inside)


@triton.jit(do_not_specialize=["batch", "steps", "seen"])
def _forward(
    keys, current, mem, shadow, syn, fired, before, leak, share, alpha, threshold, sigma, new_shadow, spikes,
    seen_mem, seen_syn, code, noise_code, batch, neurons, steps, seen,
    SETS: tl.constexpr, CHANGES: tl.constexpr, PER_COUNTER: tl.constexpr, KIND: tl.constexpr, MECHANISM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some neurons of one row of one set in all time steps; None for what is not wanted, or is zero."""
    escapes: tl.constexpr = KIND == _LOGISTIC_ESCAPE
    row = tl.program_id(0)
    is_train = row < batch
    column, neuron, inside = _places(neurons, BLOCK, PER_COUNTER)
    train, other = inside & is_train, inside & (row >= batch)
    whole = tl.cast(batch, tl.int64) * neurons
    # Of a row among those of all sets, and of its sample.
    own, left = row.to(tl.int64) * neurons + neuron, (row % batch).to(tl.int64) * neurons + neuron
    kept, decays, weight = own, tl.load(leak + neuron, inside, 0.0), tl.load(share + neuron, inside, 0.0)
    limit, level = tl.load(threshold + neuron, inside, 0.0), tl.load(sigma + neuron, inside, 1.0)
    if alpha is not None:
        remains = tl.load(alpha + neuron, inside, 0.0)
    here = tl.zeros((BLOCK, PER_COUNTER), tl.float32)
    fire, flow = here, here
    if mem is not None:
        here += tl.load(mem + left, train, 0.0)
    if shadow is not None:
        here += tl.load(shadow + left, other, 0.0)
    if before is not None:
        fire = _recall(tl.load(before + own, inside, 0))[1]
    elif fired is not None:
        fire += tl.load(fired + own, inside, 0.0)
    if syn is not None:
        flow += tl.load(syn + left, inside, 0.0)
    moved = left
    for step in range(steps):
        drive = tl.load(current + (moved if CHANGES else left), inside, 0.0)
        if alpha is not None:
            flow = flow * remains + drive
            drive = flow
        u = _uniform(tl.load(keys + step), row, column, BLOCK, PER_COUNTER)
        here = _advance(here, drive, fire, decays, weight, limit, MECHANISM)
        z = (here - limit) / level
        if escapes:
            fire = tl.where(u > 1 - 2 * _chances(z, KIND)[0], 1.0, 0.0)
        else:
            epsilon = _to_noise(u, KIND)
            here += level * epsilon
            fire = tl.where(here > limit, 1.0, 0.0)
            if noise_code is not None:
                tl.store(noise_code + kept, _keep(epsilon, fire), inside)
        if code is not None:
            tl.store(code + kept, _keep(z, fire), inside)
        tl.store(spikes + moved, fire, train)
        is_seen = train & ((seen == steps) | (step == steps - 1))
        shown = tl.where(seen == steps, moved, left)
        tl.store(seen_mem + shown, here, is_seen)
        if seen_syn is not None:
            tl.store(seen_syn + shown, flow, is_seen)
        moved += whole
        kept += SETS * whole
    if new_shadow is not None:
        tl.store(new_shadow + left, here, other)


@triton.jit(do_not_specialize=["batch", "steps", "fit_rows"])
def _backward(
    a, b, b_syn, code, noise_code, fired, before, leak, share, alpha, sigma, settings, togo, parted, trace, syn_trace,
    to_current, to_sigma, sums, batch, neurons, steps, fit_rows,
    PAIRS: tl.constexpr, TRACES: tl.constexpr, CHANGES: tl.constexpr, ADDS: tl.constexpr, KIND: tl.constexpr,
    MECHANISM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some neurons of one row in all time steps, the last one first; None for what is not wanted, or is zero."""
    escapes: tl.constexpr = KIND == _LOGISTIC_ESCAPE
    clears: tl.constexpr = MECHANISM == _ZERO or MECHANISM == _ERASE
    row = tl.program_id(0)
    neuron = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < neurons
    fits = inside & (row < fit_rows)
    whole = tl.cast(batch, tl.int64) * neurons
    left = row.to(tl.int64) * neurons + neuron
    decays, weight = tl.load(leak + neuron, inside, 0.0), tl.load(share + neuron, inside, 0.0)
    level = tl.load(sigma + neuron, inside, 1.0)
    zero = tl.zeros((BLOCK,), tl.float32)
    sets: tl.constexpr = 2 if PAIRS else 1
    if PAIRS:
        control, discount = tl.load(settings), tl.load(settings + 1)
        later, part = tl.load(togo + left, inside, 0.0), tl.load(parted + left, fits, 0.0)
    else:
        later, part = zero + tl.load(togo + row), zero
    g0, g1, flow, product, square, scale, total = zero, zero, zero, zero, zero, zero, zero
    if TRACES > 0:
        g0 = tl.load(trace + left, inside, 0.0)
    if TRACES > 1:
        g1 = tl.load(trace + whole + left, inside, 0.0)
    if alpha is not None:
        remains = tl.load(alpha + neuron, inside, 0.0)
        flow = tl.load(syn_trace + left, inside, 0.0)
    moved = left + (steps - 1) * whole
    for back in range(steps):
        step = steps - 1 - back
        kept = left + sets * step * whole
        z0, s0 = _recall(tl.load(code + kept, inside, 0))
        p0, d0 = _chances(z0, KIND)
        if escapes:
            q0 = s0 - p0
        else:
            e0 = _recall(tl.load(noise_code + kept, inside, 0))[0]
            q0 = e0
        # Of the shadow; what comes back from the next step is kept apart where the two decay differently.
        others = zero
        if PAIRS:
            z1, s1 = _recall(tl.load(code + kept + whole, inside, 0))
            p1 = _chances(z1, KIND)[0]
            if escapes:
                q1 = s1 - p1
            else:
                e1 = _recall(tl.load(noise_code + kept + whole, inside, 0))[0]
                q1 = e1
            later *= discount
            part *= discount
            direct = zero
            if a is not None:
                effect = tl.load(a + moved, inside, 0.0)
                parting = 0.5 * effect * ((s1 - p1) - (s0 - p0))
                part += parting
                later += 0.5 * effect * (s0 - s1) + control * parting
                direct = effect * d0
            multiplied = (q0 - q1) * part + direct
            product += tl.where(fits, (q0 - q1) * (later - control * part) * multiplied, 0.0)
            square += tl.where(fits, multiplied * multiplied, 0.0)
            own = (q0 * later + control * direct) / level
            others -= q1 * later / level
            if escapes:
                scale += (z1 * q1 - z0 * q0) * later - control * z0 * direct
            else:
                scale += (e0 * q0 - e1 * q1) * later - control * z0 * direct
        else:
            own = q0 * later / level
            if escapes:
                scale -= z0 * q0 * later
            else:
                scale += (e0 * q0 - 1) * later
        if escapes:
            g0 *= decays
            if clears:
                g0 *= 1 - s0
                if PAIRS:
                    g1 *= decays * (1 - s1)
        else:
            g0, g1 = zero, zero
        g0 += own
        if clears:
            g1 += others
        else:
            g0 += others
        if b is not None:
            read = tl.load(b + moved, inside, 0.0)
            g0 += read
            if PAIRS:
                if escapes:
                    later += 0.5 * read * level * (z0 - z1)
                else:
                    scale += read * e0 * level
                    later += 0.5 * read * level * ((z0 + e0) - (z1 + e1))
        if MECHANISM == _ERASE:
            at_start = inside & (step == 0)
            f0 = _recall(tl.load(code + kept - sets * whole, inside & (step > 0), 0))[1]
            if before is not None:
                f0 += _recall(tl.load(before + left, at_start, 0))[1]
            elif fired is not None:
                f0 += tl.load(fired + left, at_start, 0.0)
            driven = weight * g0 * (1 - f0)
            if PAIRS:
                f1 = _recall(tl.load(code + kept - whole, inside & (step > 0), 0))[1]
                if before is not None:
                    f1 += _recall(tl.load(before + whole + left, at_start, 0))[1]
                elif fired is not None:
                    f1 += tl.load(fired + whole + left, at_start, 0.0)
                driven += weight * g1 * (1 - f1)
        else:
            driven = weight * (g0 + g1)
        if alpha is not None:
            flow = flow * remains + driven
            if b_syn is not None:
                flow += tl.load(b_syn + moved, inside, 0.0)
            driven = flow
        if CHANGES:
            if to_current is not None:
                if ADDS:
                    driven += tl.load(to_current + moved, inside, 0.0)
                tl.store(to_current + moved, driven, inside)
        else:
            total += driven
        moved -= whole
    if to_current is not None and not CHANGES:
        if ADDS:
            total += tl.load(to_current + left, inside, 0.0)
        tl.store(to_current + left, total, inside)
    if PAIRS:
        tl.store(togo + left, later, inside)
        tl.store(parted + left, part, fits)
        place = sums + 2 * (row * tl.num_programs(1) + tl.program_id(1))
        tl.store(place, tl.load(place) + tl.sum(product, 0), row < fit_rows)
        tl.store(place + 1, tl.load(place + 1) + tl.sum(square, 0), row < fit_rows)
    if TRACES > 0:
        tl.store(trace + left, g0, inside)
    if TRACES > 1:
        tl.store(trace + whole + left, g1, inside)
    if alpha is not None:
        tl.store(syn_trace + left, flow, inside)
    tl.store(to_sigma + left, tl.load(to_sigma + left, inside, 0.0) + scale, inside)


def noise(out: Tensor, key: int, kind: int) -> None:
    """Fills ``[rows, numbers]`` with noise; see ``snntorch_lr.philox.draw``."""
    rows, numbers = out.shape
    share = kinds.numbers_of_counter(kind)
    _launch(_noise, rows, -(-numbers // share), out=out, key=key, neurons=numbers, KIND=kind, PER_COUNTER=share)


class TimeSteps:
    """Time steps of a neuron, forward and backward; ``numba_steps`` says what its arguments are.

    Args:
        kind: of the noise.
        mechanism: of the reset.
        constants: leak, share, alpha or None, threshold and noise level, ``[neurons]``, contiguous.
    """

    def __init__(self, kind: int, mechanism: int, *constants: Tensor | None) -> None:
        self._leak, self._share, self._alpha, self._threshold, self._sigma = constants
        assert self._leak is not None
        self._neurons = self._leak.numel()
        self._options = {"KIND": kind, "MECHANISM": mechanism}
        self._per_counter = kinds.numbers_of_counter(kind)

    def forward(
        self, rows: int, sets: int, steps: int, currents: int, seen: int, keys: Tensor, current: Tensor,
        mem: Tensor | None, shadow: Tensor | None, syn: Tensor | None, fired: Tensor | None, before: Tensor | None,
        new_shadow: Tensor | None, spikes: Tensor, seen_mem: Tensor, seen_syn: Tensor | None, code: Tensor | None,
        noise_code: Tensor | None,
    ) -> None:  # fmt: skip
        """See ``numba_steps.FORWARD``; tensors are contiguous, and read or filled; the keys are on any device."""
        _launch(
            _forward, sets * rows, -(-self._neurons // self._per_counter),
            keys=keys.to(spikes.device, non_blocking=True), current=current, mem=mem, shadow=shadow, syn=syn,
            fired=fired, before=before, leak=self._leak, share=self._share, alpha=self._alpha,
            threshold=self._threshold, sigma=self._sigma, new_shadow=new_shadow, spikes=spikes, seen_mem=seen_mem,
            seen_syn=seen_syn, code=code, noise_code=noise_code, batch=rows, neurons=self._neurons, steps=steps,
            seen=seen, SETS=sets, CHANGES=currents > 1, PER_COUNTER=self._per_counter, **self._options,
        )  # fmt: skip

    def backward(
        self, rows: int, sets: int, steps: int, currents: int, a: Tensor | None, b: Tensor | None, b_syn: Tensor | None,
        code: Tensor, noise_code: Tensor | None, fired: Tensor | None, before: Tensor | None, settings: Tensor | None,
        togo: Tensor, parted: Tensor | None, fit_rows: int, trace: Tensor | None, traces: int, syn_trace: Tensor | None,
        to_current: Tensor | None, adds: bool, sums: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """See ``numba_steps.BACKWARD``; ``sums`` are from ``sums_of``."""
        _launch(
            _backward, rows, self._neurons, a=a, b=b, b_syn=b_syn, code=code, noise_code=noise_code, fired=fired,
            before=before, leak=self._leak, share=self._share, alpha=self._alpha, sigma=self._sigma, settings=settings,
            togo=togo, parted=parted, trace=trace, syn_trace=syn_trace, to_current=to_current, to_sigma=sums[0],
            sums=sums[1], batch=rows, neurons=self._neurons, steps=steps, fit_rows=fit_rows, PAIRS=sets == 2,
            TRACES=traces, CHANGES=currents > 1, ADDS=adds, **self._options,
        )  # fmt: skip

    def sums_of(self, rows: int) -> tuple[Tensor, Tensor]:
        """Zeros that backward passes add to: the gradient of σ, times σ, ``[parts, neurons]``; ΣC₀C₁, ΣC₁²."""
        assert self._leak is not None
        # Of each program: sums that do not depend on which of them is done first.
        programs = rows * _blocks(self._neurons)[1]
        return self._leak.new_zeros(rows, self._neurons), self._leak.new_zeros(programs, 2)


def _blocks(numbers: int) -> tuple[int, int]:
    """How many of so many numbers a program has, and how many programs that makes."""
    block = min(_BLOCK, triton.next_power_of_2(numbers))
    return block, -(-numbers // block)


def _launch(kernel: Any, rows: int, numbers: int, **arguments: Any) -> None:
    """Runs a kernel on the device of its tensors, in the stream that torch uses there now."""
    block, count = _blocks(numbers)
    device = next(argument.device for argument in arguments.values() if isinstance(argument, Tensor))
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[rows, count](**arguments, BLOCK=block, num_warps=max(1, block // 32))
    except TritonError as error:
        raise RuntimeError(
            f"a fused time step does not compile: {first_line(error)}; torch computes the same in the context "
            "snntorch_lr.kernels.off()"
        ) from error
