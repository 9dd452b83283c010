"""Attacks by name and in suites, and the one way to run them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .budget import NORMS, Budget
from .descent import Descent
from .gradient_free import RandomNoise, Transfer
from .target import Target
from .torchattacks_runs import AutoPgd, Library, SquareSearch, import_torchattacks

Run = Callable[[Target, Tensor, Tensor, Budget, int], Tensor]
ACCESS = ("white-box", "black-box", "transfer")


@dataclass(frozen=True)
class Attack:
    """One attack with its settings. A user's own attack is one such object.

    Attributes:
        name: unique within a suite.
        run: from target, images in [0, 1], labels, budget and seed to adversarial images of the same shape.
        settings: every hyper-parameter, for the report; what JSON can hold.
        access: what it knows of the network: ``"white-box"``, ``"black-box"`` or ``"transfer"``.
        norms: of the budgets that it keeps to, ``"linf"``, ``"l2"``.
        needs_torchattacks: whether it runs only with the extra ``attacks``.
        needs_sources: whether it runs only on a target with ``sources``.

    Raises:
        ValueError: if access or a norm is unknown.
    """

    name: str
    run: Run
    settings: Mapping[str, Any]
    access: str
    norms: tuple[str, ...] = ("linf",)
    needs_torchattacks: bool = False
    needs_sources: bool = False

    def __post_init__(self) -> None:
        if self.access not in ACCESS:
            raise ValueError(f"{self.name}: unknown access {self.access!r}; choose one of {', '.join(ACCESS)}")
        if not self.norms or any(norm not in NORMS for norm in self.norms):
            raise ValueError(f"{self.name}: norms must be among {', '.join(NORMS)}, got {self.norms}")


def gradient_attack(name: str, descent: Descent) -> Attack:
    """A white-box attack of this package under a name of its own."""
    norms = ("linf",) if descent.rule == "sa-pgd" else NORMS
    return Attack(name, descent, {"library": "snntorch_lr"} | asdict(descent), "white-box", norms)


def _library(name: str, run: Library | AutoPgd | SquareSearch) -> Attack:
    settings = {"library": "torchattacks"} | asdict(run)
    access = "black-box" if isinstance(run, SquareSearch) else "white-box"
    norms = ("linf",) if isinstance(run, Library) else NORMS
    return Attack(name, run, settings, access, norms, needs_torchattacks=True)


def _free(name: str, run: RandomNoise | Transfer) -> Attack:
    settings = {"library": "snntorch_lr"} | asdict(run)
    if isinstance(run, Transfer):
        return Attack(name, run, settings, "transfer", NORMS, needs_sources=True)
    return Attack(name, run, settings, "black-box", NORMS)


_PAPER = (
    _library("FGSM", Library("FGSM")),
    _library("RFGSM", Library("RFGSM", {"steps": 10}, {"alpha": 0.25})),
    _library("PGD", Library("PGD", {"steps": 10, "random_start": True}, {"alpha": 0.25})),
    _library("MIFGSM", Library("MIFGSM", {"steps": 10, "decay": 1.0}, {"alpha": 0.25})),
)

SUITES: dict[str, tuple[Attack, ...]] = {
    "quick": (
        gradient_attack("FGSM", Descent(steps=1, length=1.0, random_start=False)),
        gradient_attack("PGD-20", Descent()),
    ),
    "paper": _PAPER,
    "standard": (
        *_PAPER,
        _library("EOTPGD", Library("EOTPGD", {"steps": 20, "eot_iter": 8, "random_start": True}, {"alpha": 0.25}, 1)),
        _library("APGD-CE", AutoPgd("ce", draws=4)),
        _library("APGD-DLR", AutoPgd("dlr", draws=4)),
        *(gradient_attack(f"EOT-PGD {name}", Descent(name)) for name in ("training", "gaussian", "atan", "ste")),
        gradient_attack("RGA", Descent("rga")),
        gradient_attack("BPTR", Descent("bptr")),
        gradient_attack("ASSG", Descent("assg")),
        gradient_attack("SA-PGD", Descent(rule="sa-pgd")),
        gradient_attack("SA-PGD ASSG", Descent("assg", rule="sa-pgd")),
        gradient_attack("margin EOT-PGD-40x8", Descent(loss="margin", steps=40, draws=8)),
        gradient_attack("targeted EOT-PGD", Descent(targets=3)),
        _free("transfer", Transfer()),
        _free("random noise", RandomNoise()),
        _library("Square", SquareSearch()),
    ),
}
"""Attacks from mild to strong: ``"quick"`` runs without torchattacks, ``"paper"`` has what papers report, and
``"standard"`` is what a claim of robustness has to stand."""


def suite(attacks: str | Sequence[str | Attack]) -> tuple[Attack, ...]:
    """The attacks of a suite, or of a list of names and attacks.

    Args:
        attacks: name of a suite; or a list of names of attacks and suites and of ``Attack`` objects. Where suites have
            attacks of the same name, it is the one that needs no torchattacks.

    Raises:
        ValueError: if a name is unknown, one occurs twice, or there is none.
        ImportError: if an attack needs torchattacks and that is not installed.
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


def unfit(attack: Attack, target: Target, budget: Budget) -> str | None:
    """Why an attack cannot run on a target within a budget, or None if it can."""
    if budget.norm not in attack.norms:
        return f"{attack.name} has no {budget.norm} version"
    if attack.needs_sources and not target.sources:
        return f"{attack.name} needs other networks to start from (baselines)"
    return None


def perturb(
    attack: Attack, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int, rows: int = 2048
) -> Tensor:
    """Adversarial images of an attack, checked: in the budget, in [0, 1], finite, of the right shape.

    torch's random state is as it was afterwards, whatever the attack did to it. Images that are wrong already are
    attacked too: leave them out to save time.

    Args:
        attack: what to run.
        target: on what.
        x: images in [0, 1], ``[batch, channels, height, width]``, on the network's device.
        y: labels ``[batch]``.
        budget: how far.
        seed: of everything random.
        rows: images times noise draws in one forward pass, for the memory that there is.

    Returns:
        Detached images of the shape of x. An attack that failed on an image returns the image that it tried.

    Raises:
        ValueError: if the attack cannot run on this target within this budget, or images and labels do not fit.
        RuntimeError: if it returned images that it must not.
    """
    if reason := unfit(attack, target, budget):
        raise ValueError(reason)
    if x.dim() != 4 or len(x) != len(y):
        raise ValueError(
            "images [batch, channels, height, width] and one label each are needed, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    draws = max(target.draws, attack.settings.get("draws") or 1) if target.noise else 1
    chunk = max(rows // draws, 1)
    parts = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
        for index, (images, labels) in enumerate(zip(torch.split(x, chunk), torch.split(y, chunk), strict=True)):
            torch.manual_seed(seed + index)
            adversarial = attack.run(target, images.detach(), labels, budget, seed + index).detach()
            _check(attack.name, adversarial, images, budget)
            parts.append(adversarial)
    return torch.cat(parts) if parts else x.clone()


def _check(name: str, adversarial: Tensor, clean: Tensor, budget: Budget) -> None:
    if adversarial.shape != clean.shape:
        raise RuntimeError(f"{name} made images of shape {tuple(adversarial.shape)} from {tuple(clean.shape)}")
    if not bool(adversarial.isfinite().all()):
        raise RuntimeError(f"{name} made images that are not finite")
    low, high = (value.item() for value in adversarial.aminmax())
    if low < -1e-6 or high > 1 + 1e-6:
        raise RuntimeError(f"{name} made images outside [0, 1]: {low:.3g} to {high:.3g}")
    size = budget.size(adversarial, clean).max().item()
    # Half precision apart, sums of images and steps are off by no more than this.
    if size > budget.epsilon + 1e-5 * math.sqrt(1 + budget.epsilon):
        raise RuntimeError(f"{name} left its budget: {budget.norm} {size:.6g} where {budget.epsilon:.6g} is allowed")
