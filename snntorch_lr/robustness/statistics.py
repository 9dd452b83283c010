"""Confidence intervals of accuracies, and paired tests between networks on the same images, through scipy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Accuracy with its confidence interval.

    Attributes:
        accuracy: in [0, 1].
        low: lower end of the interval.
        high: upper end of the interval.
        images: number of images.
    """

    accuracy: float
    low: float
    high: float
    images: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * self.half_width:.1f}"


def wilson(right: int, total: int, confidence: float = 0.95) -> Share:
    """Accuracy with its Wilson score interval.

    Args:
        right: images that are right.
        total: images.
        confidence: in (0, 1).

    Raises:
        ValueError: if ``right`` is not in [0, total], or total is 0.

    Source: Wilson (1927); recommended over other intervals by Newcombe (1998), "Two-sided confidence intervals for
    the single proportion: comparison of seven methods".

    Examples:
        >>> print(wilson(81, 263))
        30.8 ± 5.5
    """
    return _interval(right, total, confidence, "wilson")


def clopper_pearson(right: int, total: int, confidence: float = 0.95) -> Share:
    """Accuracy with its Clopper-Pearson interval, whose coverage is at least ``confidence``.

    Args:
        right: images that are right.
        total: images.
        confidence: in (0, 1).

    Raises:
        ValueError: if ``right`` is not in [0, total], or total is 0.

    Source: Clopper & Pearson (1934).

    Examples:
        >>> print(clopper_pearson(81, 263))
        30.8 ± 5.7
    """
    return _interval(right, total, confidence, "exact")


def share_of(right: Tensor) -> Share:
    """Accuracy with its Wilson interval from a tensor ``[images]``: Boolean, or the fraction of right noise draws.

    The interval is that of one draw for each image, hence conservative for fractions, which vary less.

    Examples:
        >>> import torch
        >>> print(share_of(torch.tensor([True, True, False, True])))
        75.0 ± 32.7
    """
    mean = float(right.double().mean())
    interval = wilson(round(mean * len(right)), len(right))
    return Share(mean, min(interval.low, mean), max(interval.high, mean), len(right))


@dataclass(frozen=True)
class McNemar:
    """Result of an exact McNemar test of two networks on the same images.

    Attributes:
        only_first: images that only the first network has right.
        only_second: images that only the second network has right.
        p_value: two-sided, of the hypothesis that both are right equally often.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Tensor, second: Tensor) -> McNemar:
    """Exact McNemar test that two networks are right equally often, on the images that only one of them has right.

    Args:
        first: images that the first network has right, Boolean, ``[images]``.
        second: the same for the second network.

    Raises:
        ValueError: if the shapes differ.

    Source: McNemar (1947); in its exact form a binomial test of the discordant pairs.

    Examples:
        >>> import torch
        >>> mcnemar(torch.tensor([True, True, True]), torch.tensor([True, False, False]))
        McNemar(only_first=2, only_second=0, p_value=0.5)
    """
    if first.shape != second.shape:
        raise ValueError(f"a paired test needs the same images; got {tuple(first.shape)} and {tuple(second.shape)}")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = float(_scipy().binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)


def _interval(right: int, total: int, confidence: float, method: str) -> Share:
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"right must be in [0, {total}] and there must be images, got {right} of {total}")
    interval = _scipy().binomtest(right, total).proportion_ci(confidence, method)
    return Share(right / total, float(interval.low), float(interval.high), total)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("scipy is missing: pip install 'snntorch-lr[experiments]'") from error
    return stats
