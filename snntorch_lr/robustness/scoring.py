"""Accuracy of a network on images, over noise draws that no attack has seen, with intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._messages import install
from ..network import left_as_found
from ..philox import mix
from .view import Target, device_of

ROWS = 4000
"""Images times draws that a network sees at once, by default; bounds the memory."""


@dataclass(frozen=True)
class Share:
    """Accuracy in [0, 1] with both ends of its confidence interval, and its number of images."""

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
    """Accuracy with its Wilson score interval, from the numbers of images that are right and of all.

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
    """As ``wilson``, with the Clopper-Pearson interval (1934), whose coverage is at least ``confidence``.

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
    """Numbers of images that only one of two networks has right, and the two-sided p-value of their being as good.

    ``difference`` is that of the accuracies, the first minus the second, ``low`` and ``high`` are its 95 % interval.
    """

    only_first: int
    only_second: int
    p_value: float
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def mcnemar(first: Tensor, second: Tensor) -> McNemar:
    """Exact McNemar test that two networks are right equally often, and the interval of their difference.

    It takes the images that each network has right, Boolean, ``[images]``. The interval is Newcombe's square-and-add of
    two Wilson intervals with a continuity correction of their correlation: it has a width also where no image tells the
    networks apart.

    Raises:
        ValueError: if the shapes differ, or there are no images.

    Source: McNemar (1947); in its exact form a binomial test of the discordant pairs. Newcombe (1998), "Improved
    confidence intervals for the difference between binomial proportions based on paired data", method 10.

    Examples:
        >>> import torch
        >>> print(mcnemar(torch.tensor([True, True, True]), torch.tensor([True, False, False])))
        +66.7 [-5.9, +93.9]
    """
    if first.shape != second.shape:
        raise ValueError(f"a paired test needs the same images; got {tuple(first.shape)} and {tuple(second.shape)}")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant, both = only_first + only_second, int((first & second).sum())
    p_value = float(_binomial(only_first, discordant).pvalue) if discordant else 1.0
    one, other = share_of(first), share_of(second)
    product = both * (len(first) - both - discordant) - only_first * only_second
    rows = one.accuracy * other.accuracy * (1 - one.accuracy) * (1 - other.accuracy)
    corrected = max(product - len(first) / 2, 0) if product > 0 else product
    correlation = corrected / (len(first) ** 2 * math.sqrt(rows)) if rows > 0 else 0.0

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * correlation * down * up + up**2, 0))

    difference = one.accuracy - other.accuracy
    low = difference - reach(one.accuracy - one.low, other.high - other.accuracy)
    high = difference + reach(one.high - one.accuracy, other.accuracy - other.low)
    return McNemar(only_first, only_second, p_value, difference, low, high)


def _interval(right: int, total: int, confidence: float, method: str) -> Share:
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"right must be in [0, {total}] and there must be images, got {right} of {total}")
    interval = _binomial(right, total).proportion_ci(confidence, method)
    return Share(right / total, float(interval.low), float(interval.high), total)


def _binomial(successes: int, trials: int) -> Any:
    """Exact two-sided test that successes and failures are as likely."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise ImportError(f"scipy is missing: {install('experiments')}") from error
    return binomtest(successes, trials)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit − the right one, ``[batch]``; positive where the prediction is wrong.

    Its gradient does not vanish where a network is sure, as that of the cross-entropy does.
    """
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": margin,
    "cross-entropy": partial(F.cross_entropy, reduction="none"),
}


@dataclass(frozen=True)
class Scores:
    """Correct predictions of a network, on the CPU.

    Attributes:
        right: True where the majority of the votes is right, ``[images]``.
        single: expected accuracy of a single noise draw: fraction of the draws that are right, ``[images]``.
    """

    right: Tensor
    single: Tensor


def score(target: Target, images: Tensor, labels: Tensor, votes: int = 32, seed: int = 0, rows: int = ROWS) -> Scores:
    """Accuracy of a network on images with fresh noise draws: of their majority, and of each draw alone.

    Each draw votes for its class; a tie goes to the class with the larger mean probability among those tied. A network
    that gives the same logits whatever the noise is run once.

    Args:
        target: the network and how it is read.
        images: ``[n, ...]`` in [0, 1].
        labels: ``[n]``.
        votes: noise draws for each image.
        seed: of the draws.
        rows: images times draws that the network sees at once.

    Raises:
        ValueError: if a label is none of the network's classes, or its output is not finite or no logits.

    Examples:
        >>> images = torch.tensor([[[[0.9, 0.2]]], [[[0.9, 0.2]]]])  # of two pixels, which are the logits
        >>> score(Target(torch.nn.Flatten()), images, torch.tensor([0, 1])).right
        tensor([ True, False])
    """
    return count_votes(target, images, labels, votes if is_random(target, images) else 1, seed, rows)


def count_votes(target: Target, images: Tensor, labels: Tensor, votes: int, seed: int, rows: int) -> Scores:
    """As ``score``, with so many votes whether the network draws noise or not."""
    right, single = [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.double)]
    for index, (x, y) in enumerate(pieces(target, images, labels, max(1, rows // votes))):
        logits = logits_of(target, x.repeat(votes, *[1] * (x.dim() - 1)), mix(seed, index))
        logits = logits.view(votes, len(x), -1).float()
        classes = logits.shape[2]
        strange = y[(y < 0) | (y >= classes)]
        if len(strange):
            raise ValueError(
                f"labels must be from 0 to {classes - 1}, for the {classes} logits of an image, got {int(strange[0])}; "
                "count labels from 0, and look at what forward= returns"
            )
        chosen = logits.argmax(2)
        tally = torch.zeros_like(logits[0]).scatter_add_(1, chosen.T, torch.ones_like(chosen.T, dtype=logits.dtype))
        # Mean probabilities differ by less than a vote, and so decide ties only.
        right.append(((tally + logits.softmax(2).mean(0)).argmax(1) == y).cpu())
        single.append((chosen == y).double().mean(0).cpu())
    return Scores(torch.cat(right), torch.cat(single))


def is_random(target: Target, images: Tensor) -> bool:
    """True if another seed gives other logits: noise is on, or the network draws random numbers itself."""
    x = images[:8].to(device_of(target.net))
    return len(x) > 0 and not torch.equal(logits_of(target, x, 1), logits_of(target, x, 2))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with torch's global generators seeded, for networks that draw from them; their state comes back."""
    with left_as_found(random=True):
        # torch.manual_seed keeps its call stack each time for a device that is not in use yet.
        in_use = torch.cuda.is_initialized() or torch.backends.mps.is_available()  # type: ignore[no-untyped-call]
        (torch.manual_seed if in_use else torch.default_generator.manual_seed)(seed)
        yield


def logits_of(target: Target, images: Tensor, seed: int) -> Tensor:
    """Logits of a single noise draw ``[n, classes]``, with all noise frozen by the seed."""
    with torch.no_grad(), seeded(seed):
        logits: Tensor = target.view(draws=1, seed=seed)(images)
    return logits


def pieces(target: Target, images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of at most ``size`` images, on the network's device; none of no images."""
    device = device_of(target.net)
    for start in range(0, len(images), size):
        yield images[start : start + size].to(device), labels[start : start + size].to(device)


def batch_size(target: Target, rows: int, draws: int | None = None) -> int:
    """Number of images, each with its noise draws (the target's by default), that make that many rows; at least one."""
    return max(1, rows // ((draws or target.draws) if target.noise else 1))
