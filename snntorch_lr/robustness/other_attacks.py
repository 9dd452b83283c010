"""Attacks of torchattacks with the care that noisy networks need, and attacks that need no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .attacks import NORMS, Budget
from .gradient_attacks import Best, Descent, margin
from .view import Target

_NORM_NAMES = {"linf": "Linf", "l2": "L2"}


def import_torchattacks() -> Any:
    """The module ``torchattacks``.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError("torchattacks is missing: pip install 'snntorch-lr[attacks]'") from error
    return torchattacks


class _Run:
    """Package, access and norms of a kind of attack, for its ``Attack``."""

    package: ClassVar[str] = "snntorch_lr"
    access: ClassVar[str] = "black-box"
    norms: ClassVar[tuple[str, ...]] = NORMS


@dataclass(frozen=True)
class Library(_Run):
    """An attack of torchattacks with an l∞ budget, as it comes.

    Attributes:
        name: of its class.
        options: its arguments.
        shares: its arguments that are lengths, as shares of the budget's epsilon.
        draws: noise draws of each forward pass; None for the target's.
    """

    package, access, norms = "torchattacks", "white-box", ("linf",)

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    draws: int | None = None

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
        lengths = {name: share * budget.epsilon for name, share in self.shares.items()}
        make = getattr(import_torchattacks(), self.name)
        attack = make(target.view(draws=self.draws, seed=seed), eps=budget.epsilon, **self.options, **lengths)
        adversarial: Tensor = attack(x, y)
        return adversarial


@dataclass(frozen=True)
class AutoPgd(_Run):
    """Automatic projected gradient descent (APGD) of torchattacks.

    Called as usual it returns the clean image where it failed, and counts one lucky draw of the noise as success. Here
    it returns the iterate with the largest loss instead.

    Attributes:
        loss: ``"ce"`` or ``"dlr"``.
        steps: number of steps; torchattacks would make 10 where the source makes 100.
        draws: noise draws of each step; None for the target's.

    Source: Croce & Hein (2020), "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks".
    """

    package, access = "torchattacks", "white-box"

    loss: str = "ce"
    steps: int = 100
    draws: int | None = None

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
        attack = import_torchattacks().APGD(
            target.view(draws=self.draws, seed=seed),
            norm=_NORM_NAMES[budget.norm], eps=budget.epsilon, steps=self.steps, loss=self.loss, seed=seed,
        )  # fmt: skip
        images: Tensor = attack.perturb(x, y, best_loss=True)[1]
        return images


@dataclass(frozen=True)
class SquareSearch(_Run):
    """Square attack of torchattacks.

    Called as usual it returns the clean image where it failed; here it returns its last candidate. It searches the
    network without its noise: a search that keeps what looked best keeps lucky draws, and finds far less.

    Attributes:
        queries: candidates for each image.

    Source: Andriushchenko, Croce, Flammarion & Hein (2020), "Square Attack: a Query-efficient Black-box Adversarial
    Attack via Random Search".
    """

    package = "torchattacks"

    queries: int = 5000

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x.

        Raises:
            ValueError: if the images are too small for the first pattern of the search in l2.
        """
        if budget.norm == "l2" and min(x.shape[2:]) < 5:
            raise ValueError(f"Square in l2 needs images of 5 × 5 pixels or more, got {tuple(x.shape[2:])}")
        view = target.view(noise=False, seed=seed)
        attack = import_torchattacks().Square(
            view, norm=_NORM_NAMES[budget.norm], eps=budget.epsilon, n_queries=self.queries, seed=seed
        )
        attack.init_hyperparam(x)
        images: Tensor = attack.attack_single_run(x, y)[1]
        return images


@dataclass(frozen=True)
class RandomNoise(_Run):
    """Random perturbations, of which the worst counts.

    For l∞ every other one has all pixels moved by epsilon, up or down; the others are uniform in the ball.

    Attributes:
        samples: number of perturbations of each image.
    """

    samples: int = 64

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
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
class Transfer(_Run):
    """Adversarial images of the target's sources, of which the target is shown one each and the worst counts.

    Attributes:
        descent: the attack on each source.
    """

    access = "transfer"

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
