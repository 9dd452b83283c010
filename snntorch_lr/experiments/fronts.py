"""The accuracy-robustness front of a set of networks, and the distance of another network from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """A paired difference of accuracies with its 95 % interval (Student's t over the images)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class Point:
    """One network on the plane of accuracy and robustness.

    Attributes:
        name: of the network.
        clean: accuracy, in [0, 1].
        right: what is right under attack, 0 or 1, ``[images]``.
    """

    name: str
    clean: float
    right: NDArray[np.float64]

    @property
    def worst(self) -> float:
        """Worst-case accuracy."""
        return float(self.right.mean())


def difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """Mean difference of two networks on the same images."""
    each = first - second
    if np.ptp(each) == 0:
        return Difference(float(each[0]), float(each[0]), float(each[0]))
    interval = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    return Difference(float(each.mean()), float(interval.low), float(interval.high))


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both accuracies, in the order of clean accuracy; of equal ones the first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.clean, -p.worst)):
        if not kept or point.worst > kept[-1].worst:
            kept.append(point)
    return kept[::-1]


def beside(point: Point, others: Sequence[Point]) -> Difference | None:
    """How much more robust a network is than the front of others at its clean accuracy.

    Between two neighbours on the front, robustness is interpolated over clean accuracy; below the least accurate of
    them it is that one's, which is more accurate and at least as robust as anything known there.

    Returns:
        The difference; None if no other network is as accurate.
    """
    line = front(others)
    above = next((index for index, other in enumerate(line) if other.clean >= point.clean), None)
    if above is None:
        return None
    right = line[above].right
    if above > 0:
        low, high = line[above - 1], line[above]
        share = (point.clean - low.clean) / (high.clean - low.clean)
        right = share * high.right + (1 - share) * low.right
    return difference(point.right, right)
