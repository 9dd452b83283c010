"""White-box attacks by gradient that no library has: iterated steps through a chosen surrogate, noise averaged out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .budget import Budget, per_image
from .surrogates import make_surrogate
from .target import Target


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit − the right one, ``[batch]``; positive where the prediction is wrong.

    Its gradient does not vanish where a network is sure, as that of the cross-entropy does.
    """
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, ``[batch]``."""
    return F.cross_entropy(logits, labels, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": cross_entropy, "margin": margin}


class Best:
    """The perturbed images with the largest margin so far, each with its own.

    Args:
        images: where the comparison starts; replaced by whatever is offered first.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.margins = torch.full((len(images),), -torch.inf, device=images.device)

    def offer(self, images: Tensor, margins: Tensor) -> None:
        """Keeps those images that are better."""
        better = margins.detach() > self.margins
        self.images[better] = images.detach()[better]
        self.margins[better] = margins.detach()[better].to(self.margins.dtype)


class SignSteps:
    """Steepest ascent with momentum 0, in steps that shrink linearly to 0.

    Args:
        budget: of the attack.
        steps: number of steps.
        size: of the first step, in units of the budget's radius.
    """

    def __init__(self, budget: Budget, steps: int, size: float) -> None:
        self.budget, self.steps, self.size, self.done = budget, steps, size, 0

    def __call__(self, gradient: Tensor) -> Tensor:
        """The next step, in the shape of the gradient."""
        size = self.size * self.budget.epsilon * (1 - self.done / self.steps)
        self.done += 1
        return size * self.budget.steepest(gradient)
