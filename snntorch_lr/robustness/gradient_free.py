"""Attacks that need no gradient of the network: random noise, and adversarial images of other networks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .budget import Budget
from .descent import Best, Descent, margin
from .target import Target


@dataclass(frozen=True)
class RandomNoise:
    """The worst of many random perturbations.

    For l∞ every other one has all pixels moved by epsilon, up or down; the others are uniform in the ball.

    Attributes:
        samples: number of perturbations of each image.
    """

    samples: int = 64

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Images in the shape of x."""
        view, generator = target.view(seed=seed), torch.Generator(x.device).manual_seed(seed)
        best = Best(x)
        for sample in range(self.samples):
            z = budget.random(x, generator)
            if budget.norm == "linf" and sample % 2:
                signs = torch.empty_like(x).uniform_(-1, 1, generator=generator).sign()
                z = budget.project(x + budget.epsilon * signs, x)
            with torch.no_grad():
                best.offer(z, margin(view(z), y))
        return best.images


@dataclass(frozen=True)
class Transfer:
    """Adversarial images of the target's sources, of which the target is shown one each and the worst counts.

    Attributes:
        descent: the attack on each source.
    """

    descent: Descent = field(default_factory=Descent)

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x.

        Raises:
            ValueError: if the target has no sources.
        """
        if not target.sources:
            raise ValueError("a transfer attack needs other networks: give the target sources, evaluate baselines=")
        view, best = target.view(seed=seed), Best(x)
        for source in target.sources.values():
            z = self.descent(source, x, y, budget, seed)
            with torch.no_grad():
                best.offer(z, margin(view(z), y))
        return best.images
