"""Plans of studies: TOML files of the networks to train, and of how to attack them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ...robustness import SUITES
from ..options import from_table, made, option
from ..recipe import Recipe, check_recipe

T = TypeVar("T")
REDUCED = ("EOT-PGD training", "EOT-PGD gaussian", "margin EOT-PGD-40x8", "targeted EOT-PGD", "transfer")
"""The attacks that find the most on these networks, where all of ``"standard"`` would take too long."""
SOURCES = ("surrogate", "ann")
GROUPS = ("source", "tune", "usual", "front", "seed")
PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "plans").glob("*.toml"))}
"""The plans of this package, by name."""


@dataclass(frozen=True)
class Evaluation:
    """One way in which the networks of a group are attacked.

    Attributes:
        attacks: name of a suite, or names of attacks; in a file ``"reduced"`` stands for those of ``REDUCED``.
        images: number of images, from the first.
        epsilons: budgets, l∞.
        noise: ``"off"`` or ``"on"``.
        held_out: on training images that were held out, and so never trained on, in place of test images.
    """

    attacks: str | tuple[str, ...] = option()
    images: int = option(least=1)
    epsilons: tuple[float, ...] = option(above=0, most=1)
    noise: str = option("off", choices=("off", "on"))
    held_out: bool = False


@dataclass(frozen=True)
class Entry:
    """One network of a study.

    Attributes:
        name: unique in its plan.
        family: networks that differ only in how far they are regularised have the same; the fronts are drawn by it.
        group: ``"source"`` (transferred from, not attacked), ``"tune"`` (on held-out images), ``"usual"`` (table A),
            ``"front"`` (table B) or ``"seed"`` (table A, other seeds).
        recipe: what to train.
        evaluations: how to attack it; none for a source. Each has its own row of results, in this order.
        matches: entry at whose accuracy on held-out images the training stops.
    """

    name: str
    family: str
    group: str
    recipe: Recipe
    evaluations: tuple[Evaluation, ...]
    matches: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    @property
    def mark(self) -> str:
        """Hash of the entry: another mark, another result. The networks that it depends on have marks of their own."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def work(self) -> float:
        """About how long it takes, in epochs of a surrogate-gradient network, by the seconds on committed pages."""
        epochs = self.recipe.epochs * (3 if self.recipe.method == "likelihood ratio" else 1)
        attacked = sum(e.images * len(e.epsilons) * (5 if e.noise == "on" else 1) for e in self.evaluations)
        return epochs * (5 if self.recipe.adversary else 1) + 0.02 * attacked


class _File:
    """Tables of a file; hints only."""

    like: str
    recipes: dict[str, Any]
    usual: dict[str, Any]
    seed: dict[str, Any]
    front: dict[str, Any]
    tune: dict[str, Any]


@dataclass(frozen=True)
class _Group:
    """Keys of a group."""

    evaluations: tuple[dict[str, Any], ...] = option()
    networks: tuple[dict[str, Any], ...] = option()


@dataclass(frozen=True)
class _Network:
    """Keys of a network, beside those of its recipe."""

    family: str = option()
    label: str = ""
    matches: str | None = None


def plan_path(plan: str) -> Path:
    """The file of a plan."""
    if plan in PRESETS:
        return PRESETS[plan]
    if not plan.endswith(".toml"):
        raise ValueError(f"unknown study {plan!r}; choose one of {', '.join(PRESETS)}, or a file that ends in .toml")
    return Path(plan)


def read_plan(plan: str) -> list[Entry]:
    """The networks of a plan, what others depend on first; docs/results/index.md describes the format of a file.

    Raises:
        ValueError: if the name is unknown, or something in the file is wrong; it names the file and the place.
    """
    path = plan_path(plan)
    recipes: dict[str, dict[str, Any]] = {}
    entries: list[Entry] = []
    with _within(str(path)):
        tables = _tables(path)
        for name, table in tables.pop("recipes", {}).items():
            with _within(f"recipes.{name}"):
                recipes[name] = _fields(table, recipes)
        for name, change in (("surrogate", {}), ("ann", {"model": "ann"})):
            with _within("recipes.surrogate, which attacks are transferred from"):
                recipe = _recipe(recipes.get("surrogate", {}) | change)
                entries.append(Entry(name, name, "source", recipe, ()))
        for group, table in tables.items():
            with _within(group):
                rows = made(_Group, from_table(_Group, table))
            evaluations = []
            for number, row in enumerate(rows.evaluations, start=1):
                with _within(f"{group}, evaluation {number}"):
                    evaluations.append(_evaluation(row))
            for number, row in enumerate(rows.networks, start=1):
                with _within(f"{group}, network {number}"):
                    entries.append(_entry(group, row, evaluations, recipes, entries))
        if not tables:
            raise ValueError(f"no network: add one of the tables {', '.join(GROUPS[1:])}")
    return entries


def _tables(path: Path) -> dict[str, Any]:
    """Tables of a file; of one that is like a plan of this package, those of that plan with its own; empty ones go."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    tables = from_table(_File, tomllib.loads(path.read_text(encoding="utf-8")))
    if "like" not in tables:
        return tables
    base, own = _tables(_named(tables.pop("like"), PRESETS)), tables.pop("recipes", {})
    recipes = {name: base["recipes"].get(name, {}) | table for name, table in own.items()}
    tables = base | tables | {"recipes": base["recipes"] | recipes}
    return {name: table for name, table in tables.items() if table}


def _fields(table: Any, recipes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Fields of a recipe: those of the one that it is like, and its own."""
    if not isinstance(table, dict) or "like" not in table:
        return from_table(Recipe, table)
    own = {key: value for key, value in table.items() if key != "like"}
    return _named(table["like"], recipes) | from_table(Recipe, own)


def _named(name: Any, known: Mapping[str, T]) -> T:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{name!r} is not among what stands above: {', '.join(known)}")
    return known[name]


def _evaluation(table: Mapping[str, Any]) -> Evaluation:
    found = from_table(Evaluation, table)
    if found.get("attacks") == "reduced":
        found["attacks"] = REDUCED
    evaluation = made(Evaluation, found)
    members = {name: {attack.name for attack in attacks} for name, attacks in SUITES.items()}
    given = {evaluation.attacks} if isinstance(evaluation.attacks, str) else {*evaluation.attacks}
    if unknown := sorted(given - members.keys() - set().union(*members.values())):
        raise ValueError(
            f"unknown attack {unknown[0]!r}; use reduced, {', '.join(members)}, or a list of their attacks"
        )
    if not given.union(*(members[name] for name in given & members.keys())) & {*REDUCED[:-1]}:
        raise ValueError(f"attacks must have one of the reduced suite, which tables count: {', '.join(REDUCED[:-1])}")
    return evaluation


def _entry(
    group: str, table: dict[str, Any], evaluations: list[Evaluation], recipes: Mapping[str, dict[str, Any]],
    above: list[Entry],
) -> Entry:  # fmt: skip
    keys = get_type_hints(_Network)
    about = made(_Network, from_table(_Network, {key: value for key, value in table.items() if key in keys}))
    recipe = _recipe(_fields({key: value for key, value in table.items() if key not in keys}, recipes))
    if recipe.dataset != above[0].recipe.dataset:
        raise ValueError(f"dataset must be that of recipes.surrogate, {above[0].recipe.dataset}")
    if any(each.held_out and each.images > recipe.validation for each in evaluations):
        raise ValueError(f"there are {recipe.validation} held-out images: raise validation, or attack fewer")
    # A network without noise has no row with its noise on.
    attacked = tuple(each for each in evaluations if each.noise == "off" or recipe.method != "surrogate")
    label = about.label.replace("{adversary}", f"{recipe.adversary:g}")
    name = f"{group}: {about.family}{f', {label}' if label else ''}"
    entry = Entry(name, about.family, group, recipe, attacked, about.matches)
    if entry.slug in {other.slug for other in above}:
        raise ValueError(f"there is a network {name!r} above: give this one another label")
    if about.matches is not None:
        _named(about.matches, {other.name: other for other in above})
    return entry


def _recipe(fields: Mapping[str, Any]) -> Recipe:
    recipe = made(Recipe, fields)
    check_recipe(recipe)
    if not recipe.validation:
        raise ValueError("validation must be at least 1: studies report the accuracy on held-out training images")
    return recipe


@contextmanager
def _within(place: str) -> Iterator[None]:
    """Puts a place in front of what errors of the block say."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
