"""Suites of attacks by name, and their attacks that are not ``Descent``: those of torchattacks, and transfers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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


@dataclass(frozen=True)
class Library(Procedure):
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
            target.view(draws=self.draws, seed=seed),
            norm=_NORM_NAMES[budget.norm], eps=budget.epsilon, steps=self.steps, loss=self.loss, seed=seed,
        )  # fmt: skip
        images: Tensor = attack.perturb(x, y, best_loss=True)[1]
        return images


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
    "standard": (
        _FGSM,
        _MIFGSM,
        Library("EOTPGD", {"steps": 20, "eot_iter": 8, "random_start": True}, {"alpha": 0.25}, 1).named("EOTPGD"),
        AutoPgd("ce", draws=4).named("APGD-CE"),
        AutoPgd("dlr", draws=4).named("APGD-DLR"),
        gradient_attack("EOT-PGD training", Descent("training")),
        gradient_attack("EOT-PGD gaussian", Descent("gaussian")),
        gradient_attack("RGA", Descent("rga")),
        gradient_attack("ASSG", Descent("assg")),
        gradient_attack("SA-PGD", Descent(rule="sa-pgd")),
        gradient_attack("SA-PGD ASSG", Descent("assg", rule="sa-pgd")),
        gradient_attack("margin EOT-PGD-40x8", Descent(loss="margin", steps=40, draws=8)),
        gradient_attack("targeted EOT-PGD", Descent(targets=3)),
        gradient_attack("counterfactual", Descent("counterfactual", loss="margin")),
        Transfer().named("transfer"),
        SquareSearch().named("Square"),
    ),
}
"""Attacks from mild to strong: ``"quick"`` runs without torchattacks, ``"paper"`` has what papers report, and
``"standard"`` is what a claim of robustness has to stand."""


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
