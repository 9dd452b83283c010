"""Suites of attacks, and attacks by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from .attacks import Attack
from .gradient_attacks import Descent, gradient_attack
from .other_attacks import AutoPgd, Library, RandomNoise, SquareSearch, Transfer, import_torchattacks


def _other(name: str, run: Library | AutoPgd | SquareSearch | RandomNoise | Transfer) -> Attack:
    settings = {"library": run.package} | asdict(run)
    with_torchattacks, with_sources = run.package == "torchattacks", run.access == "transfer"
    return Attack(name, run, settings, run.access, run.norms, with_torchattacks, with_sources)


_PAPER = (
    _other("FGSM", Library("FGSM")),
    _other("RFGSM", Library("RFGSM", {"steps": 10}, {"alpha": 0.25})),
    _other("PGD", Library("PGD", {"steps": 10, "random_start": True}, {"alpha": 0.25})),
    _other("MIFGSM", Library("MIFGSM", {"steps": 10, "decay": 1.0}, {"alpha": 0.25})),
)

SUITES: dict[str, tuple[Attack, ...]] = {
    "quick": (
        gradient_attack("FGSM", Descent(steps=1, length=1.0, random_start=False)),
        gradient_attack("PGD-20", Descent()),
    ),
    "paper": _PAPER,
    "standard": (
        *_PAPER,
        _other("EOTPGD", Library("EOTPGD", {"steps": 20, "eot_iter": 8, "random_start": True}, {"alpha": 0.25}, 1)),
        _other("APGD-CE", AutoPgd("ce", draws=4)),
        _other("APGD-DLR", AutoPgd("dlr", draws=4)),
        *(gradient_attack(f"EOT-PGD {name}", Descent(name)) for name in ("training", "gaussian", "atan", "ste")),
        gradient_attack("RGA", Descent("rga")),
        gradient_attack("BPTR", Descent("bptr")),
        gradient_attack("ASSG", Descent("assg")),
        gradient_attack("SA-PGD", Descent(rule="sa-pgd")),
        gradient_attack("SA-PGD ASSG", Descent("assg", rule="sa-pgd")),
        gradient_attack("margin EOT-PGD-40x8", Descent(loss="margin", steps=40, draws=8)),
        gradient_attack("targeted EOT-PGD", Descent(targets=3)),
        _other("transfer", Transfer()),
        _other("random noise", RandomNoise()),
        _other("Square", SquareSearch()),
    ),
}
"""Attacks from mild to strong: ``"quick"`` runs without torchattacks, ``"paper"`` has what papers report, and
``"standard"`` is what a claim of robustness has to stand."""


def suite(attacks: str | Sequence[str | Attack]) -> tuple[Attack, ...]:
    """Attacks of a suite, or of a list of names and attacks.

    Args:
        attacks: name of a suite; or a list of names of attacks and suites and of ``Attack`` objects. Where suites have
            attacks of the same name, it is the one that needs no torchattacks.

    Raises:
        ValueError: if a name is unknown, one occurs twice, or there is none.
        ImportError: if an attack needs torchattacks and that is not installed.

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
