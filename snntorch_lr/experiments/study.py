"""Studies: the networks of a plan, trained and attacked, several at a time, and their page."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..robustness import SUITES, Protocol, Target, evaluate, score, share_of, suite
from . import data, files
from .options import Options, Outcome, Progress, WithDevice, option
from .page import REDUCED, write
from .train import (
    Recipe,
    load_trained,
    make_network,
    noise_levels,
    split,
    train,
    validation_accuracy,
)

T = TypeVar("T")
R = TypeVar("R", bound=Recipe)
SOURCES = ("surrogate", "ann")
GROUPS = ("source", "usual", "seed", "front", "tune")
PLANS = {path.stem: path for path in sorted((Path(__file__).parent / "plans").glob("*.toml"))}
"""The plans of this package, by name."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Options):
    """One way in which the networks of a group are attacked."""

    attacks: str | tuple[str, ...] = option(help="a suite, names of attacks, or reduced for those of REDUCED")
    images: int = option(help="number of images, from the first", least=1)
    epsilons: tuple[float, ...] = option(help="budgets, l∞", above=0, most=1)
    noise: str = option("off", "of the neurons", choices=("off", "on"))
    held_out: bool = option(False, "of training images that were never trained on, in place of test images")

    def __post_init__(self) -> None:
        if self.attacks == "reduced":
            object.__setattr__(self, "attacks", REDUCED)
        super().__post_init__()
        members = {name: {attack.name for attack in attacks} for name, attacks in SUITES.items()}
        chosen = {self.attacks} if isinstance(self.attacks, str) else {*self.attacks}
        if unknown := sorted(chosen - members.keys() - set().union(*members.values())):
            known = ", ".join(members)
            raise ValueError(f"unknown attack {unknown[0]!r}; use reduced, {known}, or a list of their attacks")
        in_turn = {attack.name for attacks in SUITES.values() for attack in attacks if attack.in_turn}
        if not chosen.union(*(members[name] for name in chosen & members.keys())) & {*REDUCED[:-1], *in_turn}:
            raise ValueError(
                f"attacks must have one of the reduced suite, which tables count: {', '.join(REDUCED[:-1])}"
            )


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
    evaluations: tuple[Evaluation, ...] = ()
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
    def needs(self) -> set[str]:
        """Names of the entries that must be finished before."""
        sources = set() if self.group == "source" else set(SOURCES)
        return sources | ({self.matches} if self.matches else set())


@dataclass(frozen=True, kw_only=True)
class _Plan(Options):
    """Tables of a file; networks are in the order of these groups."""

    like: str | None = option(None)
    recipes: dict[str, Any] | None = option(None)
    usual: dict[str, Any] | None = option(None)
    seed: dict[str, Any] | None = option(None)
    front: dict[str, Any] | None = option(None)
    tune: dict[str, Any] | None = option(None)


@dataclass(frozen=True, kw_only=True)
class _Group(Options):
    evaluations: tuple[dict[str, Any], ...] = option()
    networks: tuple[dict[str, Any], ...] = option()


@dataclass(frozen=True, kw_only=True)
class _Network(Recipe):
    family: str = option()
    label: str = option("")
    matches: str | None = option(None)


def plan_path(plan: str) -> Path:
    """The file of a plan."""
    if plan not in PLANS and not plan.endswith(".toml"):
        raise ValueError(f"unknown study {plan!r}; choose one of {', '.join(PLANS)}, or a file that ends in .toml")
    return PLANS.get(plan, Path(plan))


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
        for name, table in (tables.recipes or {}).items():
            with _within(f"recipes.{name}"):
                recipes[name] = _fields(table, recipes)
                _recipe(Recipe, recipes[name])
        with _within("recipes.surrogate, which attacks are transferred from"):
            for name, change in (("surrogate", {}), ("ann", {"model": "ann"})):
                recipe = _recipe(Recipe, recipes.get("surrogate", {}) | change)
                entries.append(Entry(name, name, "source", recipe))
        groups = {group: getattr(tables, group) for group in GROUPS[1:] if getattr(tables, group)}
        for group, table in groups.items():
            with _within(group):
                rows = _Group.from_table(table)
            evaluations = []
            for number, row in enumerate(rows.evaluations, start=1):
                with _within(f"{group}, evaluation {number}"):
                    evaluations.append(Evaluation.from_table(row))
            for number, row in enumerate(rows.networks, start=1):
                with _within(f"{group}, network {number}"):
                    network = _recipe(_Network, _fields(row, recipes))
                    entries.append(_entry(group, network, evaluations, entries))
        if not groups:
            raise ValueError(f"no network: add one of the tables {', '.join(GROUPS[1:])}")
    return entries


def _tables(path: Path) -> _Plan:
    """Tables of a file; of one that is like a plan of this package, those of that plan with its own."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    own = _Plan.from_table(tomllib.loads(path.read_text(encoding="utf-8")))
    if own.like is None:
        return own
    base = _tables(_named(own.like, PLANS))
    recipes = dict(base.recipes or {})
    for name, table in (own.recipes or {}).items():
        recipes[name] = recipes.get(name, {}) | table if isinstance(table, dict) else table
    groups = {group: getattr(own, group) for group in GROUPS[1:] if getattr(own, group) is not None}
    return replace(base, recipes=recipes, **groups)


def _named(name: Any, known: Mapping[str, T]) -> T:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{name!r} is not among what stands above: {', '.join(known)}")
    return known[name]


def _entry(group: str, network: _Network, evaluations: list[Evaluation], above: list[Entry]) -> Entry:
    if network.dataset != above[0].recipe.dataset:
        raise ValueError(f"dataset must be that of recipes.surrogate, {above[0].recipe.dataset}")
    if any(e.held_out and e.images > network.validation for e in evaluations):
        raise ValueError(f"there are {network.validation} held-out images: raise validation, or attack fewer")
    # A network without noise has no row with its noise on.
    attacked = tuple(e for e in evaluations if e.noise == "off" or network.method != "surrogate")
    label = network.label.replace("{adversary}", f"{network.adversary:g}")
    name = f"{group}: {network.family}{f', {label}' if label else ''}"
    entry = Entry(name, network.family, group, Recipe.of(vars(network)), attacked, network.matches)
    if entry.slug in {other.slug for other in above}:
        raise ValueError(f"there is a network {name!r} above: give this one another label")
    if entry.matches is not None:
        _named(entry.matches, {other.name: other for other in above})
    return entry


def _fields(table: Any, recipes: Mapping[str, dict[str, Any]]) -> Any:
    """Fields of a recipe: those of the one that it is like, and its own."""
    if not isinstance(table, dict) or "like" not in table:
        return table
    return _named(table["like"], recipes) | {key: value for key, value in table.items() if key != "like"}


def _recipe(kind: type[R], table: Any) -> R:
    recipe = kind.from_table(table)
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


@dataclass(frozen=True, kw_only=True)
class Study(WithDevice):
    """Train and attack all networks of a plan, or those that are not finished yet, and write its page.

    Example: snntorch-lr study digits --jobs 2

    Interrupted, it goes on with the same command. The large ones, such as mnist, take hours; the remaining time is
    printed after each network.
    """

    place = "runs/study/{plan}"
    kept = "finished networks, epochs and attacks are kept: start again"
    plan: str = option(help=f"{', '.join(PLANS)}, or a file of your own that ends in .toml", positional=True)
    groups: tuple[str, ...] = option((), "networks to train; all by default", choices=GROUPS, flag="--group")
    jobs: int = option(1, "networks at a time, each with one thread", least=1, recorded=False)

    def about(self) -> dict[str, Any]:
        """The plan without its folder."""
        return {"plan": plan_path(self.plan).stem}

    def run(self) -> Outcome:
        """Writes a JSON file in ``results`` for each network, and the page.

        Every process computes with one thread. The same call goes on where an earlier one was interrupted: finished
        networks are not touched, and of others finished epochs and attacks are kept.
        """
        out, entries = self.folder, read_plan(self.plan)
        # What is missing is told now, and not by a process that was started for it.
        data.load(entries[0].recipe.dataset, self.data_root).to(self.torch_device())
        chosen = [entry for entry in entries if not self.groups or entry.group in self.groups]
        names = {entry.name for entry in chosen}.union(*(entry.needs for entry in chosen))
        wanted = [entry for entry in entries if entry.name in names]
        waiting = [entry for entry in wanted if not finished(entry, out)]
        done = names - {entry.name for entry in waiting}
        tell = Progress("networks")
        tell("training and attacks", len(done), len(wanted))
        strangers = set(multiprocessing.active_children())
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
            running: dict[Future[None], Entry] = {}
            try:
                while waiting or running:
                    for entry in [entry for entry in waiting if entry.needs <= done][: self.jobs - len(running)]:
                        with _interrupts_wait():
                            running[pool.submit(work, entry, entries, self)] = entry
                        waiting.remove(entry)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        entry = running.pop(future)
                        future.result()
                        done.add(entry.name)
                        tell(entry.name, len(done), len(wanted))
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a process was killed, perhaps for want of memory; start again to go on"
                ) from error
            except BaseException:
                for process in set(multiprocessing.active_children()) - strangers:
                    process.terminate()
                raise
        results = sorted(result_file(entry, out) for entry in entries if finished(entry, out))
        return write(results, out, out)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Processes that are started here never see a Ctrl-C, which reaches all of them: this one does, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Ends a process of the pool once the one that started it is killed: it would go on beside its successor."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def finished(entry: Entry, out: Path) -> bool:
    """True if the result of exactly this entry is there."""
    try:
        result = json.loads(result_file(entry, out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(result.get("mark") == entry.mark)


def result_file(entry: Entry, out: Path) -> Path:
    """The file of the result of an entry."""
    return out / "results" / f"{entry.slug}.json"


def checkpoint_file(entry: Entry, out: Path) -> Path:
    """The file of the network of an entry; another recipe has another file."""
    return out / "checkpoints" / f"{entry.slug}-{entry.mark}.pt"


def work(entry: Entry, entries: Sequence[Entry], options: Study) -> None:
    """Trains and evaluates one network, in a process of its own, and writes its result."""
    torch.set_num_threads(1)
    out = options.folder
    device = options.torch_device()
    images = data.load(entry.recipe.dataset, options.data_root).to(device)
    checkpoints = {other.name: checkpoint_file(other, out) for other in entries}
    recipe = entry.recipe
    if entry.matches:
        matched, net = load_trained(checkpoints[entry.matches])
        recipe = replace(recipe, stop_at=validation_accuracy(net.to(device), matched, images))
    run = train(recipe, images, checkpoints[entry.name], device, resume=True)
    result: dict[str, Any] = {
        "mark": entry.mark,
        "entry": asdict(entry),
        **files.origin(f"snntorch-lr study {options.plan}", device),
        "seconds_per_epoch": run.seconds_per_epoch,
        "history": run.history,
        "validation": validation_accuracy(run.net, recipe, images),
        "sigma": {
            "before": noise_levels(make_network(recipe, images.shape, images.classes)),
            "after": noise_levels(run.net),
        },
    }
    if entry.evaluations:
        own = next(other.recipe for other in entries if other.name == "surrogate")
        names = [name for name in SOURCES if name != "surrogate" or recipe != own]
        sources = {name: load_trained(checkpoints[name])[1].to(device).eval() for name in names}
        rows = [row for how in entry.evaluations for row in _attacked(entry, how, run.net, sources, images, out)]
        result |= {"clean": {}, "rows": rows}
        for noise in dict.fromkeys(row["noise"] for row in rows):
            scores = score(Target(run.net, noise=noise == "on"), images.test, images.test_labels)
            shares = {"majority vote": share_of(scores.right), "single draw": share_of(scores.single)}
            result["clean"][noise] = {name: asdict(share) for name, share in shares.items()}
    files.write_json(result_file(entry, out), result)


def _attacked(
    entry: Entry, evaluation: Evaluation, net: nn.Module, sources: dict[str, nn.Module], images: data.Dataset, out: Path
) -> list[dict[str, Any]]:
    """Accuracies of one network under attack, and what is right of each image as a string of zeros and ones."""
    x, y = images.test, images.test_labels
    if evaluation.held_out:
        _, held_out = split(entry.recipe, images)
        x, y = images.train[held_out], images.train_labels[held_out]
    attacks = suite(evaluation.attacks)
    if any(attack.in_turn and attack.name not in REDUCED for attack in attacks):
        # First those that the reduced worst case counts: in turn, others would leave them nothing to break.
        attacks = tuple({attack.name: attack for attack in (*suite(REDUCED), *attacks)}.values())
    report = evaluate(
        net.eval(), [(x[: evaluation.images], y[: evaluation.images])], evaluation.epsilons, attacks, sources=sources,
        name=entry.name, protocol=Protocol(noise=evaluation.noise), cache=out / "attacks" / entry.slug,
    )  # fmt: skip
    rows: list[dict[str, Any]] = report.to_json()["rows"]
    for row, measured in zip(rows, report.rows, strict=True):
        reduced = [name for name in measured.right if name.startswith(REDUCED)]
        row["right"] = {
            "clean": _bits(measured.clean),
            "worst": {f"{e:g}": _bits(measured.worst(e)) for e in report.epsilons},
            "reduced": {f"{e:g}": _bits(measured.with_gates(measured.under(reduced, e), e)) for e in report.epsilons},
        }
    return rows


def _bits(right: Tensor) -> str:
    return "".join("1" if value else "0" for value in right.tolist())
