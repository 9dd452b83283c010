"""Measurements that the gates judge: does a network's gradient lead anywhere, and has the attack converged?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..noise_stream import mix
from .budget import Budget
from .descent import LOSSES, Descent
from .scoring import ROWS, batch_size, device_of, pieces, score, seeded
from .target import Target
from .view import AttackableView


class _FrozenView(AttackableView):
    """A view whose noise is the same in each call."""

    def forward(self, images: Tensor) -> Tensor:
        self._generator.manual_seed(self._generator.initial_seed())
        with seeded(self._generator.initial_seed()):
            return super().forward(images)


@dataclass(frozen=True)
class FrozenTarget(Target):
    """A target whose views make the same single noise draw in each call."""

    def view(self, *, seed: int = 0, **_: Any) -> AttackableView:
        """The network with its noise frozen by the seed."""
        return _FrozenView(self.net, self.forward, 1, self.noise, seed, self.scale)


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

    def first(self, count: int) -> Probe:
        """The same with the first images only, on the network's device."""
        device = device_of(self.target)
        return replace(self, images=self.images[:count].to(device), labels=self.labels[:count].to(device))

    def right_after(self, epsilon: float, descent: Descent) -> Tensor:
        """What is still right after an attack with fresh noise, Boolean, ``[n]``."""
        right = [torch.zeros(0, dtype=torch.bool)]
        size = batch_size(self.target, self.rows, descent.draws)
        for index, (x, y) in enumerate(pieces(self.target, self.images, self.labels, size)):
            seed = mix(self.seed, index)
            with seeded(seed):
                adversarial = descent(self.target, x, y, Budget(epsilon, self.norm), seed)
            right.append(score(self.target, adversarial, y, self.votes, mix(seed, 1), self.rows).right)
        return torch.cat(right)

    def right_after_frozen(self, epsilon: float, descent: Descent) -> Tensor:
        """What is still right after an attack on a single noise draw, which is also the draw that judges it."""
        right = [torch.zeros(0, dtype=torch.bool)]
        target = FrozenTarget(self.target.net, self.target.forward, self.target.noise, scale=self.target.scale)
        for x, y in pieces(self.target, self.images, self.labels, self.rows):
            adversarial = descent(target, x, y, Budget(epsilon, self.norm), self.seed)
            with torch.no_grad():
                right.append((target.view(seed=self.seed)(adversarial).argmax(1) == y).cpu())
        return torch.cat(right)

    def curve(self, runs: Sequence[tuple[float, Descent]]) -> list[float]:
        """Fraction still right after attacks of growing budget or length, each on what the last one left right."""
        still = torch.ones(len(self.images), dtype=torch.bool)
        shares = []
        for epsilon, descent in runs:
            still[still.clone()] = self.only(still).right_after(epsilon, descent)
            shares.append(float(still.double().mean()))
        return shares

    def vanishing(self, loss: str) -> float:
        """Fraction of the images at which the gradient of a loss, ``"margin"`` or ``"cross-entropy"``, is zero."""
        zeros = 0
        for index, (x, y) in enumerate(
            pieces(self.target, self.images, self.labels, batch_size(self.target, self.rows))
        ):
            seed = mix(self.seed, index)
            x = x.clone().requires_grad_()
            with seeded(seed):
                total = LOSSES[loss](self.target.view(seed=seed)(x), y).sum()
            gradient = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
            zeros += len(x) if gradient is None else int((gradient.flatten(1) == 0).all(1).sum())
        return zeros / len(self.images)
