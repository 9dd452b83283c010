"""Measurements that the gates judge: does a network's gradient lead anywhere, and has the attack converged?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..stream import mix
from .budget import Budget
from .scoring import ROWS, pieces, score, seeded
from .target import Target

Logits = Callable[[Tensor, int], Tensor]
"""Logits with a graph, of images and the index of the call."""


@dataclass(frozen=True)
class Probe:
    """Images that a network has right, and how it is asked about them.

    Attributes:
        target: the network and how it is read.
        images: ``[n, channels, height, width]`` that are right clean.
        labels: ``[n]``.
        norm: ``"linf"`` or ``"l2"``.
        votes: noise draws for each score.
        seed: of the noise.
        rows: images times draws that the network sees at once.
    """

    target: Target
    images: Tensor
    labels: Tensor
    norm: str = "linf"
    votes: int = 32
    seed: int = 0
    rows: int = ROWS

    @property
    def span(self) -> float:
        """Size of the smallest budget that holds every image: there, nothing can be robust."""
        return 1.0 if self.norm == "linf" else math.sqrt(self.images[0].numel())

    def only(self, chosen: Tensor) -> Probe:
        """The same with some of the images."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def right_after(
        self, epsilon: float, steps: int, draws: int | None = None, random_start: bool = False, frozen: bool = False
    ) -> Tensor:
        """What is still right after projected gradient ascent on the margin, Boolean, ``[n]``.

        Args:
            epsilon: budget.
            steps: of the ascent.
            draws: noise draws that each gradient averages over; the target's by default.
            random_start: start within the budget at random; otherwise from the image, where a network without gradient
                stays.
            frozen: the same single noise draw at every step and in the score.
        """
        right = [torch.zeros(0, dtype=torch.bool)]
        draws = 1 if frozen else draws or self.target.draws
        budget = Budget(epsilon, self.norm)
        for index, (x, y) in enumerate(pieces(self.target, self.images, self.labels, self.rows // draws)):
            seed = mix(self.seed, index)
            logits = noisy_logits(self.target, seed, draws, frozen)
            adversarial = ascend(logits, x, y, budget, steps, seed if random_start else None)
            if frozen:
                with torch.no_grad():
                    right.append((logits(adversarial, 0).argmax(1) == y).cpu())
            else:
                right.append(score(self.target, adversarial, y, self.votes, mix(seed, 1), self.rows).right)
        return torch.cat(right)

    def curve(self, epsilons: Sequence[float], steps: Sequence[int]) -> list[float]:
        """Fraction still right after ascents of growing budget or length, each on what the last one left right."""
        still = torch.ones(len(self.images), dtype=torch.bool)
        shares = []
        for epsilon, count in zip(epsilons, steps, strict=True):
            still[still.clone()] = self.only(still).right_after(epsilon, count)
            shares.append(float(still.double().mean()))
        return shares

    def vanishing(self, loss: str) -> float:
        """Fraction of the images at which the gradient of a loss, ``"margin"`` or ``"cross-entropy"``, is zero."""
        zeros = 0
        for index, (x, y) in enumerate(pieces(self.target, self.images, self.labels, self.rows // self.target.draws)):
            logits = noisy_logits(self.target, mix(self.seed, index), self.target.draws)
            gradient = input_gradient(logits, x, y, loss)
            zeros += int((gradient.flatten(1) == 0).all(1).sum())
        return zeros / len(self.images)


def noisy_logits(target: Target, seed: int, draws: int, frozen: bool = False) -> Logits:
    """Logits averaged over noise draws, which are new in each call unless they are frozen."""

    def logits(images: Tensor, index: int) -> Tensor:
        call = seed if frozen else mix(seed, index)
        with seeded(call):
            value: Tensor = target.view(draws=draws, seed=call)(images)
        return value

    return logits


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, ``[n]``: positive where the class is wrong, and never saturated."""
    true = logits.gather(1, labels[:, None])[:, 0]
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -math.inf)
    return others.amax(1) - true


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, ``[n]``; its gradient vanishes in floating point where logits are far apart."""
    return F.cross_entropy(logits, labels, reduction="none")


LOSSES = {"margin": margin, "cross-entropy": cross_entropy}


def input_gradient(logits: Logits, images: Tensor, labels: Tensor, loss: str = "margin", index: int = 0) -> Tensor:
    """Gradient of a loss with respect to the images; zeros where no graph leads there."""
    x = images.detach().clone().requires_grad_()
    total = LOSSES[loss](logits(x, index), labels).sum()
    gradient = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(images) if gradient is None else gradient


def ascend(
    logits: Logits, images: Tensor, labels: Tensor, budget: Budget, steps: int, start: int | None = None
) -> Tensor:
    """Projected gradient ascent on the margin with steps of 2.5 ε / ``steps`` and nothing that helps a bad gradient.

    Args:
        logits: of images and the index of the step.
        images: ``[n, channels, height, width]`` in [0, 1].
        labels: ``[n]``.
        budget: of the change.
        steps: number of steps.
        start: seed of a random start; None to start from the images.

    Source: Madry et al. (2018), "Towards Deep Learning Models Resistant to Adversarial Attacks", with the margin loss of
    Carlini & Wagner (2017), "Towards Evaluating the Robustness of Neural Networks".
    """
    x = images
    if start is not None:
        x = budget.random(images, torch.Generator(images.device).manual_seed(start))
    for step in range(steps):
        gradient = input_gradient(logits, x, labels, index=step)
        x = budget.project(x + 2.5 * budget.epsilon / steps * budget.steepest(gradient), images)
    return x
