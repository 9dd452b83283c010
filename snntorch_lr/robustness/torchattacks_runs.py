"""Attacks of torchattacks, with the settings and the care that noisy spiking networks need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .budget import Budget
from .target import Target

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


@dataclass(frozen=True)
class Library:
    """An attack of torchattacks with an l∞ budget, as it comes.

    Attributes:
        name: of its class.
        options: its arguments.
        shares: its arguments that are lengths, as shares of the budget's epsilon.
        draws: noise draws of each forward pass; None for the target's.
    """

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
class AutoPgd:
    """APGD of torchattacks.

    Called as usual it returns the clean image where it failed, and counts one lucky draw of the noise as success. Here
    it returns the iterate with the largest loss instead.

    Attributes:
        loss: ``"ce"`` or ``"dlr"``.
        steps: number of steps; torchattacks would make 10 where the source makes 100.
        draws: noise draws of each step; None for the target's.

    Source: Croce & Hein (2020), "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks".
    """

    loss: str = "ce"
    steps: int = 100
    draws: int | None = None

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
        attack = import_torchattacks().APGD(
            target.view(draws=self.draws, seed=seed),
            norm=_NORM_NAMES[budget.norm], eps=budget.epsilon, steps=self.steps, loss=self.loss, seed=seed,
        )  # fmt: skip
        _, adversarial = attack.perturb(x, y, best_loss=True)
        images: Tensor = adversarial
        return images


@dataclass(frozen=True)
class SquareSearch:
    """Square attack of torchattacks.

    Called as usual it returns the clean image where it failed; here it returns its last candidate. It searches the
    network without its noise: a search that keeps what looked best keeps lucky draws, and finds far less.

    Attributes:
        queries: candidates for each image.

    Source: Andriushchenko, Croce, Flammarion & Hein (2020), "Square Attack: a Query-efficient Black-box Adversarial
    Attack via Random Search".
    """

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
        _, adversarial = attack.attack_single_run(x, y)
        images: Tensor = adversarial
        return images
