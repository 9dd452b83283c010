from __future__ import annotations

import numpy as np
import pytest
from snntorch_lr.experiments.fronts import Point, beside, difference, front


def point(name: str, clean: float, right: int, images: int = 10) -> Point:
    return Point(name, clean, np.array([1.0] * right + [0.0] * (images - right)))


def test_the_front_leaves_out_what_another_beats() -> None:
    points = [point("a", 0.9, 3), point("b", 0.8, 6), point("c", 0.85, 2), point("d", 0.8, 5), point("e", 0.9, 3)]
    assert [p.name for p in front(points)] == ["b", "a"]


def test_between_two_neighbours_robustness_is_interpolated() -> None:
    others = [point("a", 0.9, 3), point("b", 0.8, 6)]
    found = beside(point("x", 0.85, 7), others)
    assert found is not None
    assert found.mean == pytest.approx(0.7 - 0.45)
    assert found.low < found.mean < found.high


def test_below_the_front_its_least_accurate_network_counts() -> None:
    found = beside(point("x", 0.5, 7), [point("a", 0.9, 3), point("b", 0.8, 6)])
    assert found is not None
    assert found.mean == pytest.approx(0.1)


def test_above_the_front_there_is_nothing_to_compare_with() -> None:
    assert beside(point("x", 0.95, 7), [point("a", 0.9, 3)]) is None


def test_the_interval_is_students() -> None:
    first, second = np.array([1.0, 1, 0, 1]), np.array([0.0, 1, 0, 1])
    found = difference(first, second)
    # Mean 1/4, standard error 1/4, quantile 3.182 for three degrees of freedom.
    assert (found.low, found.high) == pytest.approx((0.25 - 3.182446 / 4, 0.25 + 3.182446 / 4))
    assert str(difference(first, first)) == "+0.0 [+0.0, +0.0]"
