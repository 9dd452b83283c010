"""Attacks by name and in suites, and the one way to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .budget import Budget
from .target import Target

Run = Callable[[Target, Tensor, Tensor, Budget, int], Tensor]


@dataclass(frozen=True)
class Attack:
    """One attack with its settings; a user's own attack is one such object.

    Attributes:
        name: unique within a suite.
        run: from target, images, labels, budget and seed to adversarial images of the same shape.
        settings: every hyper-parameter, for the report.
        access: ``"white-box"``, ``"black-box"`` or ``"transfer"``.
        norms: of budgets that it supports.
        needs_torchattacks: whether it runs only with the extra ``attacks``.
        needs_sources: whether it runs only on a target with ``sources``.
    """

    name: str
    run: Run
    settings: Mapping[str, Any]
    access: str
    norms: tuple[str, ...] = ("linf",)
    needs_torchattacks: bool = False
    needs_sources: bool = False


SUITES: dict[str, tuple[Attack, ...]] = {}


def suite(attacks: str | Sequence[str | Attack]) -> tuple[Attack, ...]:
    """The attacks of a suite, or of a list of names and attacks."""
    raise NotImplementedError


def perturb(attack: Attack, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
    """Runs an attack."""
    raise NotImplementedError
