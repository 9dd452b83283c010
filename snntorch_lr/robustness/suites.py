"""Suites of attacks by name, and their attacks that are not ``Descent``: those of torchattacks, and transfers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .._messages import install
from .attacks import Attack, Budget, Descent, Procedure, gradient_attack, worst_of
from .view import Target

_NORM_NAMES = {"linf": "Linf", "l2": "L2"}


def import_torchattacks() -> Any:
    """The module ``torchattacks``, or an error that says how to install it."""
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(f"torchattacks is missing: {install('attacks')}") from error
    return torchattacks


class _OfImages(nn.Module):
    """A view of inputs of any shape, which takes them in the shape of images."""

    def __init__(self, view: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.view, self.shape = view, inputs.shape[1:]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.view(images.view(len(images), *self.shape))
        return logits


@dataclass(frozen=True)
class Library(Procedure):
    """An attack of torchattacks with an l∞ budget, as it comes.

    It takes images: time steps of frames become channels, and other inputs images of one channel.

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
        view = _OfImages(target.view(draws=self.draws, seed=seed), x)
        adversarial: Tensor = make(view, eps=budget.epsilon, **self.options, **lengths)(_as_images(x), y)
        return adversarial.view_as(x)


@dataclass(frozen=True)
class AutoPgd(Procedure):
    """Automatic projected gradient descent (APGD) of torchattacks, with the 100 steps of the source.

    Called as usual it returns the clean image where it failed, and counts one lucky draw of the noise as success. Here
    it returns the iterate with the largest loss instead.

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
            _OfImages(target.view(draws=self.draws, seed=seed), x),
            norm=_NORM_NAMES[budget.norm], eps=budget.epsilon, steps=self.steps, loss=self.loss, seed=seed,
        )  # fmt: skip
        images: Tensor = attack.perturb(_as_images(x), y, best_loss=True)[1]
        return images.view_as(x)


@dataclass(frozen=True)
class SquareSearch(Procedure):
    """Square attack of torchattacks.

    Called as usual it returns the clean image where it failed; here it returns its last candidate. It searches the
    network without its noise: a search that keeps what looked best keeps lucky draws, and finds far less.

    Source: Andriushchenko, Croce, Flammarion & Hein (2020), "Square Attack: a Query-efficient Black-box Adversarial
    Attack via Random Search".
    """

    package = "torchattacks"

    queries: int = 5000

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
        images = _as_images(x)
        if budget.norm == "l2" and min(images.shape[2:]) < 5:
            raise ValueError(f"Square in l2 needs images of 5 × 5 pixels or more, got {tuple(images.shape[2:])}")
        attack = import_torchattacks().Square(
            _OfImages(target.view(noise=False, seed=seed), x),
            norm=_NORM_NAMES[budget.norm], eps=budget.epsilon, n_queries=self.queries, seed=seed,
        )  # fmt: skip
        attack.init_hyperparam(images)
        return attack.attack_single_run(images, y)[1].view_as(x)  # type: ignore[no-any-return]


def _as_images(x: Tensor) -> Tensor:
    """Inputs ``[batch, ...]`` as images ``[batch, channels, height, width]``."""
    return x.flatten(1, -3) if x.dim() > 4 else x.view(len(x), *[1] * (4 - x.dim()), *x.shape[1:])


@dataclass(frozen=True)
class Transfer(Procedure):
    """Adversarial images of the target's sources, of which the target is shown one each and the worst counts."""

    access = "transfer"

    descent: Descent = field(default_factory=Descent)

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
        if not target.sources:
            raise ValueError("a transfer attack needs other networks: give the target sources, evaluate baselines=")
        candidates = [self.descent(source, x, y, budget, seed) for source in target.sources.values()]
        return candidates[0] if len(candidates) == 1 else worst_of(candidates, target.view(seed=seed), x, y)


_FGSM = Library("FGSM").named("FGSM")
_MIFGSM = Library("MIFGSM", {"steps": 10, "decay": 1.0}, {"alpha": 0.25}).named("MIFGSM")
# The cheapest that breaks much first, and those without the gradient last, which G5 holds against all others.
_WHITE = (
    gradient_attack("margin PGD-40x1", Descent(loss="margin", steps=40, draws=1)),
    gradient_attack("ASSG margin-100x1", Descent("assg", "margin", steps=100, draws=1, length=0.05)),
    gradient_attack("targeted PGD-20x2", Descent(targets=3, draws=2)),
    gradient_attack("gaussian PGD-20x4", Descent("gaussian", draws=4)),
    gradient_attack("RGA", Descent("rga", draws=4)),
    gradient_attack("counterfactual", Descent("counterfactual", loss="margin", draws=4)),
)
_MORE = (
    gradient_attack("EOT-PGD training", Descent("training")),
    gradient_attack("EOT-PGD gaussian", Descent("gaussian")),
    gradient_attack("margin EOT-PGD-40x8", Descent(loss="margin", steps=40, draws=8)),
    gradient_attack("targeted EOT-PGD", Descent(targets=3)),
    gradient_attack("SA-PGD", Descent(rule="sa-pgd")),
    gradient_attack("SA-PGD ASSG", Descent("assg", rule="sa-pgd")),
    AutoPgd("ce", draws=4).named("APGD-CE"),
    AutoPgd("dlr", draws=4).named("APGD-DLR"),
)
_SQUARE = SquareSearch().named("Square")
# Alone: its images are cheap, and each network's are a measurement of their own.
_TRANSFER = Transfer().named("transfer")


def _in_turn(*attacks: Attack) -> tuple[Attack, ...]:
    return tuple(replace(attack, in_turn=True) for attack in attacks)


SUITES: dict[str, tuple[Attack, ...]] = {
    "quick": (
        gradient_attack("FGSM", Descent(steps=1, length=1.0, random_start=False)),
        gradient_attack("PGD-20", Descent()),
    ),
    "paper": (
        _FGSM,
        Library("RFGSM", {"steps": 10}, {"alpha": 0.25}).named("RFGSM"),
        Library("PGD", {"steps": 10, "random_start": True}, {"alpha": 0.25}).named("PGD"),
        _MIFGSM,
    ),
    "standard": (*_in_turn(*_WHITE), _TRANSFER, *_in_turn(_SQUARE)),
    "exhaustive": (*_in_turn(*_WHITE, *_MORE), _TRANSFER, *_in_turn(_SQUARE)),
}  # fmt: skip
"""Attacks from mild to strong: ``"quick"`` runs without torchattacks, ``"paper"`` has what papers report,
``"standard"`` is what a claim of robustness has to stand, and ``"exhaustive"`` takes two to five times as long for
images that are hardly ever found."""


def suite(attacks: str | Sequence[str | Attack]) -> tuple[Attack, ...]:
    """Attacks of a suite, or of a list of names of attacks and suites and of ``Attack`` objects.

    Where suites have attacks of the same name, it is the one that needs no torchattacks.

    Examples:
        >>> [attack.name for attack in suite("quick")]
        ['FGSM', 'PGD-20']
    """
    known: dict[str, Attack] = {}
    for attack in (attack for members in SUITES.values() for attack in members):
        known.setdefault(attack.name, attack)
    chosen: list[Attack] = []
    for item in [attacks] if isinstance(attacks, str) else attacks:
        if isinstance(item, Attack):
            chosen.append(item)
        elif item in SUITES:
            chosen.extend(SUITES[item])
        elif item in known:
            chosen.append(known[item])
        else:
            raise ValueError(
                f"unknown attack {item!r}; there are the suites {', '.join(SUITES)} and {', '.join(known)}"
            )
    names = [attack.name for attack in chosen]
    if not names:
        raise ValueError("no attack is given")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"attacks need names of their own; given more than once: {', '.join(twice)}")
    if any(attack.needs_torchattacks for attack in chosen):
        import_torchattacks()
    return tuple(chosen)
