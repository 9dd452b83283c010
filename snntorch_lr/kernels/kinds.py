"""What fused time steps are told by numbers, and the coefficients of their polynomials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

LOGISTIC_ESCAPE, GAUSSIAN, UNIFORM = range(3)
"""Kinds of noise that kernels know: escape and membrane noise, and uniform numbers of which torch makes any other."""


def numbers_of_counter(kind: int) -> int:
    """How many numbers are made of the four random words of a counter."""
    return 8 if kind == LOGISTIC_ESCAPE else 4


SUBTRACT, ZERO, ERASE, NONE = range(4)
"""Mechanisms of reset: subtract the threshold; to zero, before the current is added or after that; none."""
NORMAL = (
    2.12331357, 0.34880266, -5.90817092e-3, -1.77301016e-3, 3.0915016e-4, -6.21799195e-6, -4.99055329e-6,
    4.86103935e-7, 4.03536144e-8)  # fmt: skip
"""Quantile of the normal distribution at (1 + u) / 2, over u, in w − 2.5 where w = −log(1 − u²) is below 5.

Lowest power first, as the next two; minimax fits of ours.
"""
NORMAL_TAIL = (
    4.71708756, 1.42462769, 4.67120146e-3, -2.85860556e-3, 1.40192063e-3, -1.08386542e-3, 8.11869517e-4,
    -2.44643778e-4, -5.13831735e-6)  # fmt: skip
"""The same in √w − 3.5, above that."""
MILLS = (
    0.47330476, 0.76188513, 0.97041083, 0.93510919, 0.60553343, 0.15058164, -0.13926279, -0.12501582, 0.02040831,
    0.0495862)  # fmt: skip
"""Mills ratio (1 − Φ(x)) / φ(x), x ≥ 0, over t = 1 / (1 + x / 4), in t − ½."""


@dataclass(frozen=True)
class Update:
    """A time step of a neuron that is known to fused kernels.

    Attributes:
        mechanism: of the reset, see ``SUBTRACT``.
        constants: what the vectors are made of.
        vectors: what remains of the membrane potential, what the current adds to it, and what remains of the synaptic
            current, None without one; tensors that broadcast against a row.
    """

    mechanism: int
    constants: tuple[Tensor, ...]
    vectors: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
