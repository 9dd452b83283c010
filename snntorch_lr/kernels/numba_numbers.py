"""Random numbers and the functions that shape them, compiled for a CPU by Numba, for ``numba_steps``.

In single precision nothing calls a mathematical library, which could not be vectorised: polynomials take its place,
whose errors are below 2 · 10⁻⁶. In double precision, which is for tests, accuracy comes first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from .kinds import MILLS, NORMAL, NORMAL_TAIL

# No leave to reorder sums, on which rounding to an integer and the exactness of the uniform numbers depend, nor to take
# for granted that there is no NaN, which has to reach the gradient to be found.
OPTIONS: Any = {
    "nogil": True, "error_model": "numpy", "fastmath": {"nsz", "contract"},
    "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip
# A loop in which LLVM leaves a call in place is not vectorised, and takes eight times as long.
INLINE: Any = OPTIONS | {"forceinline": True}

# Constants of single precision, so that they do not turn the numbers beside them into double precision.
SINGLES = tuple(np.float32(value) for value in (0, 0.5, 1, 2))
_0, _HALF, _1, _2 = SINGLES
# (exp(r) − 1 − r) / r² for |r| ≤ ln 2 / 2, lowest power first; this and the next three are minimax fits of ours.
_EXP = tuple(np.float32(c) for c in (0.49999993, 0.16666521, 0.04166839, 0.00836871, 0.00138146))
# tanh(y) / y in y², over the polynomial below it, for |y| up to an end at which it is 1 − 10⁻⁷; to 3 · 10⁻⁷.
_TANH = tuple(np.float32(c) for c in (0.99999995, 0.13412686, 3.53356149e-3, 2.12518263e-5, 1.4287987e-8))
_TANH_BELOW = tuple(np.float32(c) for c in (1, 0.46746, 2.60204612e-2, 3.34845971e-4, 8.14893945e-7))
_TANH_END = np.float32(8.4)
# (log(1 + f) − f + f²/2) / f³ for 1 + f between √½ and √2.
_LOG = tuple(np.float32(c) for c in (
    0.33333332, -0.25000821, 0.20001227, -0.16623356, 0.14201762, -0.13160195, 0.1276155, -0.0763443))  # fmt: skip
_NORMAL, _NORMAL_TAIL, _MILLS = (
    tuple(np.float32(c) for c in coefficients) for coefficients in (NORMAL, NORMAL_TAIL, MILLS)
)
_INV_SQRT_2PI = np.float32(1 / math.sqrt(2 * math.pi))
_LOG2E, _LN2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
# ln 2 in two parts, of which the first times a small integer is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
# Adding this rounds to an integer, and leaves it in the lowest bits.
_ROUND = np.float32(1.5 * 2**23)
_LEAST_EXPONENT = np.float32(-87)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)


@njit(**INLINE)
def _polynomial(x: Any, coefficients: Any) -> Any:
    total = x * _0 + coefficients[-1]
    for index in range(len(coefficients) - 2, -1, -1):
        total = total * x + coefficients[index]
    return total


def exp(x: Any) -> Any:
    """exp(x) for x ≤ 0."""
    return math.exp(x)


def _log(x: Any) -> Any:
    """log(x) for positive normal numbers."""
    return math.log(x)


@overload(exp)
def _overload_exp(x: Any) -> Any:

    def double(x: Any) -> Any:
        return math.exp(x)

    def single(x: Any) -> Any:
        # Written so that NaN stays NaN, as the limits below.
        x = _LEAST_EXPONENT if x < _LEAST_EXPONENT else x
        shifted = x * _LOG2E + _ROUND
        whole = shifted - _ROUND
        r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
        power = _1 + r + r * r * _polynomial(r, _EXP)
        doublings = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
        return np.int32(np.float32(power).view(np.int32) + doublings).view(np.float32)

    return double if x == types.float64 else single


@overload(_log)
def _overload_log(x: Any) -> Any:

    def double(x: Any) -> Any:
        return math.log(x)

    def single(x: Any) -> Any:
        bits = np.float32(x).view(np.int32)
        exponent = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> np.int32(23))
        f = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - _1
        return np.float32(exponent) * _LN2 + (f - f * f * _HALF + f * f * f * _polynomial(f, _LOG))

    return double if x == types.float64 else single


@njit(**INLINE)
def normal_quantile(u: Any) -> Any:
    """Standard Gaussian noise of a uniform number."""
    w = -_log((_1 - u) * (_1 + u))
    near = _polynomial(w - np.float32(2.5), _NORMAL)
    far = _polynomial(math.sqrt(w) - np.float32(3.5), _NORMAL_TAIL)
    return u * (near if w < np.float32(5) else far)


def normal(z: Any) -> Any:
    """φ(z), and the tail 1 − Φ(|z|)."""


@overload(normal)
def _overload_normal(z: Any) -> Any:
    def double(z: Any) -> Any:
        density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return density, 0.5 * math.erfc(abs(z) / math.sqrt(2.0))

    def single(z: Any) -> Any:
        x = abs(z)
        density = exp(-_HALF * x * x) * _INV_SQRT_2PI
        t = _1 / (_1 + x * np.float32(0.25))
        return density, density * t * _polynomial(t - _HALF, _MILLS)

    return double if z == types.float64 else single


def _half_tanh_parts(z: Any) -> Any:
    """Numerator and denominator of tanh(z / 2); the latter is positive."""


@overload(_half_tanh_parts)
def _overload_half_tanh_parts(z: Any) -> Any:
    def double(z: Any) -> Any:
        return math.tanh(0.5 * z), 1.0

    def single(z: Any) -> Any:
        y = z * _HALF
        # Written so that NaN stays NaN.
        y = _TANH_END if y > _TANH_END else y
        y = -_TANH_END if y < -_TANH_END else y
        square = y * y
        return y * _polynomial(square, _TANH), _polynomial(square, _TANH_BELOW)

    return double if z == types.float64 else single


@njit(**INLINE)
def assign(to: Any, value: Any) -> None:
    """Copies an array."""
    for i in range(len(to)):
        to[i] = value[i]


@njit(**INLINE)
def words_of_rows(words: Any, columns: Any, rows: Any, key: Any, row: int, column: int) -> None:
    """Random words: Philox 4x32-10 of (column, row, 0, 0).

    Args:
        words: filled, four for each counter.
        columns: of the counters, from the first one on.
        rows: alike.
        key: of 64 bits.
        row: the first one.
        column: the first one.
    """
    for place in range(len(columns)):
        c0, c1 = np.uint32(column + columns[place]), np.uint32(np.uint32(row) + np.uint32(rows[place]))
        c2, c3 = np.uint32(0), np.uint32(0)
        k0, k1 = np.uint32(key), np.uint32(key >> np.uint64(32))
        for _ in range(10):
            low = np.uint64(np.uint32(0xD2511F53)) * np.uint64(c0)
            high = np.uint64(np.uint32(0xCD9E8D57)) * np.uint64(c2)
            c0 = np.uint32(np.uint32(high >> np.uint64(32)) ^ c1 ^ k0)
            c2 = np.uint32(np.uint32(low >> np.uint64(32)) ^ c3 ^ k1)
            c1, c3 = np.uint32(high), np.uint32(low)
            k0, k1 = np.uint32(k0 + np.uint32(0x9E3779B9)), np.uint32(k1 + np.uint32(0xBB67AE85))
        words[4 * place], words[4 * place + 1] = np.int32(c0), np.int32(c1)
        words[4 * place + 2], words[4 * place + 3] = np.int32(c2), np.int32(c3)


def uniform(word: Any, like: Any) -> Any:
    """A uniform number in (−1, 1), (k + ½) / 2ⁿ of the upper n + 1 bits of a word; of all bits of half a word."""


@overload(uniform)
def _overload_uniform(word: Any, like: Any) -> Any:
    def half(word: Any, like: Any) -> Any:
        return (like + np.float32(word) + _HALF) * np.float32(2.0**-15)

    if word == types.int16:
        return half

    def double(word: Any, like: Any) -> Any:
        return (np.float64(word) + 0.5) * 2.0**-31

    def single(word: Any, like: Any) -> Any:
        return (np.float32(np.int32(word >> np.int32(8))) + _HALF) * np.float32(2.0**-23)

    return double if like == types.float64 else single


def keep(value: Any, spike: Any) -> Any:
    """A number, and in its lowest bit a spike: in single precision as 15 bits, rounded."""


@overload(keep)
def _overload_keep(value: Any, spike: Any) -> Any:
    def double(value: Any, spike: Any) -> Any:
        return (np.float64(value).view(np.int64) & ~np.int64(1)) | np.int64(spike)

    def single(value: Any, spike: Any) -> Any:
        bits = np.int32(np.float32(value).view(np.int32) + np.int32(0x10000))
        return np.uint16(np.uint16(np.uint16(bits >> np.int32(16)) & np.uint16(0xFFFE)) | np.uint16(spike))

    return double if value == types.float64 else single


def recall(code: Any) -> Any:
    """The inverse of ``keep``."""


@overload(recall)
def _overload_recall(code: Any) -> Any:
    def double(code: Any) -> Any:
        return np.int64(code & ~np.int64(1)).view(np.float64), np.float64(code & np.int64(1))

    def single(code: Any) -> Any:
        value = np.int32(np.int32(np.uint32(code & np.uint16(0xFFFE)) << np.uint32(16))).view(np.float32)
        return value, np.float32(np.int32(code & np.uint16(1)))

    return double if code == types.int64 else single


@njit(**INLINE)
def logistic_fires(z: Any, u: Any) -> Any:
    """A neuron with logistic escape noise fires at a distance z to the threshold, by a uniform number."""
    # u > −tanh(z / 2), without a division.
    over, under = _half_tanh_parts(z)
    return u * under > -over


@njit(**INLINE)
def logistic_chance(z: Any) -> Any:
    """Probability of a spike at a distance z to the threshold, and its derivative."""
    over, under = _half_tanh_parts(z)
    p = _HALF + _HALF * (over / under)
    return p, p * (_1 - p)


@njit(**INLINE)
def logistic_chances(z0: Any, z1: Any) -> Any:
    """The same at two distances, of the second one without the derivative."""
    # With one division for both.
    over0, under0 = _half_tanh_parts(z0)
    over1, under1 = _half_tanh_parts(z1)
    half = _HALF / (under0 * under1)
    p0, p1 = _HALF + over0 * under1 * half, _HALF + over1 * under0 * half
    return p0, p0 * (_1 - p0), p1


@njit(**INLINE)
def normal_chance(z: Any) -> Any:
    """As ``logistic_chance``, of Gaussian membrane noise."""
    density, tail = normal(z)
    return (_1 - tail if z > _0 else tail), density


@njit(**INLINE)
def normal_chances(z0: Any, z1: Any) -> Any:
    """As ``logistic_chances``."""
    p0, slope = normal_chance(z0)
    return p0, slope, normal_chance(z1)[0]
