"""Plans of studies: TOML files of the networks to train, and of how to attack them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...robustness import SUITES
from ..options import check, from_table, option
from ..recipe import Recipe, check_recipe

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
        corruptions: natural corruptions are scored too.
        held_out: on training images that were held out, and so never trained on, in place of test images.
    """

    attacks: str | tuple[str, ...] = option()
    images: int = option(least=1)
    epsilons: tuple[float, ...] = option(above=0, most=1)
    noise: str = option("off", choices=("off", "on"))
    corruptions: bool = False
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
        """About how long it takes, in arbitrary units."""
        recipe = self.recipe
        training = recipe.epochs * (10.0 if recipe.method == "likelihood ratio" else 1.0)
        training *= (8 if recipe.adversary else 1) * (8 if recipe.model == "conv" else 1)
        for each in self.evaluations:
            attacked = each.images * len(each.epsilons) * (0.04 if each.attacks == "standard" else 0.01)
            training += attacked * (5 if each.noise == "on" else 1)
        return training


@dataclass(frozen=True)
class _Row:
    """Keys of a network in a file, beside those of its recipe."""

    family: str
    recipe: str = "surrogate"
    label: str = ""
    matches: str | None = None


@dataclass
class _Plan:
    """A plan while it is read.

    Attributes:
        recipes: tables of the file, by name, with what they are like filled in.
        entries: the networks so far.
    """

    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


def plan_path(plan: str) -> Path:
    """The file of a plan.

    Args:
        plan: one of ``PRESETS``, or the path of a file ending in ``.toml``.

    Raises:
        ValueError: if it is neither.
    """
    if plan in PRESETS:
        return PRESETS[plan]
    if not plan.endswith(".toml"):
        raise ValueError(f"unknown study {plan!r}; choose one of {', '.join(PRESETS)}, or a file that ends in .toml")
    return Path(plan)


def read_plan(plan: str) -> list[Entry]:
    """The networks of a plan, what others depend on first.

    Args:
        plan: one of ``PRESETS``, or the path of a file, whose format docs/results/index.md describes.

    Raises:
        ValueError: if the name is unknown, or something in the file is wrong; it names the file and the place.
        OSError: if the file cannot be read.
    """
    path = plan_path(plan)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with _within(str(path)):
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        found = _Plan()
        for name, table in _tables(tables.pop("recipes", {})).items():
            with _within(f"recipes.{name}"):
                start = _pick(table, "like", found.recipes)
                found.recipes[name] = start | from_table(Recipe, {k: v for k, v in table.items() if k != "like"})
        if "surrogate" not in found.recipes:
            raise ValueError("a recipe 'surrogate' is missing: every study trains it, to transfer attacks from")
        for name, changes in (("surrogate", {}), ("ann", {"model": "ann"})):
            with _within("recipes.surrogate"):
                recipe = _recipe(found.recipes["surrogate"] | changes)
                found.entries.append(Entry(name, name, "source", recipe, ()))
        for group, table in tables.items():
            with _within(group):
                _add_group(found, group, table)
        if len(found.entries) == len(SOURCES):
            raise ValueError(f"there is no network: add a table of the groups {', '.join(GROUPS[1:])}")
    return found.entries


def _add_group(found: _Plan, group: str, table: Any) -> None:
    if group not in GROUPS[1:]:
        raise ValueError(f"unknown group; use one of {', '.join(GROUPS[1:])}")
    lists = {"evaluations": [], "networks": []} | _tables({group: table})[group]
    if unknown := lists.keys() - {"evaluations", "networks"}:
        raise ValueError(f"unknown key {unknown.pop()!r}; a group has evaluations and networks")
    for key, rows in lists.items():
        if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{key} must be a list of tables, such as {key} = [{{ ... }}]")
    evaluations = []
    for number, row in enumerate(lists["evaluations"], start=1):
        with _within(f"evaluations, row {number}"):
            evaluations.append(_evaluation(row))
    for number, row in enumerate(lists["networks"], start=1):
        with _within(f"networks, row {number}"):
            _add_network(found, group, row, evaluations)


def _evaluation(table: Mapping[str, Any]) -> Evaluation:
    found = from_table(Evaluation, table)
    if missing := [name for name in ("attacks", "images", "epsilons") if name not in found]:
        raise ValueError(f"{missing[0]} is missing")
    if found["attacks"] == "reduced":
        found["attacks"] = REDUCED
    evaluation = Evaluation(**found)
    check(evaluation, flags=False)
    attacks = evaluation.attacks
    known = {attack.name for suite in SUITES.values() for attack in suite}
    for name in {attacks} - {*SUITES} if isinstance(attacks, str) else {*attacks} - {*SUITES} - known:
        raise ValueError(f"unknown attacks {name!r}; use reduced, {', '.join(SUITES)}, or a list of attacks of these")
    names = {attack.name for attack in SUITES[attacks]} if isinstance(attacks, str) else {*attacks}
    if "standard" not in names and not names & {*REDUCED[:-1]}:
        raise ValueError(f"attacks must have one of the reduced suite, which tables count: {', '.join(REDUCED[:-1])}")
    return evaluation


def _add_network(found: _Plan, group: str, table: Mapping[str, Any], evaluations: list[Evaluation]) -> None:
    own = {"family", "recipe", "label", "matches"}
    row = from_table(_Row, {key: value for key, value in table.items() if key in own})
    if not row.get("family"):
        raise ValueError("family is missing: the name under which tables show the network")
    about = _Row(**row)
    start = _pick({"recipe": about.recipe}, "recipe", found.recipes)
    recipe = _recipe(start | from_table(Recipe, {key: value for key, value in table.items() if key not in own}))
    if recipe.dataset != (dataset := found.entries[0].recipe.dataset):
        raise ValueError(f"dataset must be {dataset}, that of the recipe 'surrogate', got {recipe.dataset}")
    if any(each.held_out and each.images > recipe.validation for each in evaluations):
        raise ValueError(f"there are {recipe.validation} held-out images: raise validation, or attack fewer images")
    # A network without noise has no row with its noise on.
    attacked = tuple(each for each in evaluations if each.noise == "off" or recipe.method != "surrogate")
    name = f"{group}: {about.family}{f', {about.label}' if about.label else ''}"
    entry = Entry(name, about.family, group, recipe, attacked, about.matches)
    if entry.slug in {other.slug for other in found.entries}:
        raise ValueError(f"there is a network {name!r} already: give this one another label")
    if about.matches is not None:
        _pick({"matches": about.matches}, "matches", {other.name: {} for other in found.entries})
    found.entries.append(entry)


def _recipe(fields: Mapping[str, Any]) -> Recipe:
    if "method" not in fields:
        raise ValueError("method is missing")
    recipe = Recipe(**fields)
    check_recipe(recipe)
    if not recipe.validation:
        raise ValueError("validation must be at least 1: a study reports the accuracy on held-out training images")
    return recipe


def _pick(table: Mapping[str, Any], key: str, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The table that a key names; an empty one if the key is not there."""
    if key not in table:
        return {}
    if not isinstance(table[key], str) or table[key] not in known:
        raise ValueError(f"{key} names {table[key]!r}, which stands nowhere above; there are {', '.join(known)}")
    return known[table[key]]


def _tables(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        raise ValueError(f"expected tables, got {value!r}")
    return value


@contextmanager
def _within(place: str) -> Iterator[None]:
    """Puts a place in front of what errors of the block say."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
