"""Studies: the networks of a plan, trained and attacked, several at a time; ``reproduce`` is a study of four."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .._messages import markdown
from ..robustness import SUITES, Gate, Protocol, Row, Scores, Share, Target, evaluate, score, share_of, suite, verdict
from . import data, files
from .options import Options, Outcome, WithData, WithDevice, option
from .page import REDUCED, difference, write
from .train import (
    METHODS,
    MODELS,
    Recipe,
    Trained,
    load_trained,
    make_network,
    noise_levels,
    split,
    train,
    validation_accuracy,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .cli import Watch

T = TypeVar("T")
R = TypeVar("R", bound=Recipe)
CPU = torch.device("cpu")
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
        if not chosen.union(*(members[name] for name in chosen & members.keys())) & {*REDUCED[:-1]}:
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
    def work(self) -> float:
        """About how long it takes, in epochs of a surrogate-gradient network, by the seconds on committed pages."""
        epochs = self.recipe.epochs * (3 if self.recipe.method == "likelihood ratio" else 1)
        attacked = sum(e.images * len(e.epsilons) * (5 if e.noise == "on" else 1) for e in self.evaluations)
        return epochs * (5 if self.recipe.adversary else 1) + 0.02 * attacked

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
class Study(WithData):
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

    def run(self, watch: Watch) -> Outcome:
        """Writes a JSON file in ``results`` for each network, and the page.

        Every process computes with one thread. The same call goes on where an earlier one was interrupted: finished
        networks are not touched, and of others finished epochs and attacks are kept.
        """
        out, entries = self.folder, read_plan(self.plan)
        data.load(entries[0].recipe.dataset, self.data_root)
        chosen = [entry for entry in entries if not self.groups or entry.group in self.groups]
        names = {entry.name for entry in chosen}.union(*(entry.needs for entry in chosen))
        wanted = [entry for entry in entries if entry.name in names]
        waiting = [entry for entry in wanted if not finished(entry, out)]
        done = names - {entry.name for entry in waiting}
        started, worked = time.perf_counter(), 0.0
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
                        worked += entry.work
                        left = sum(other.work for other in (*waiting, *running.values()))
                        minutes = (time.perf_counter() - started) * left / worked / 60
                        watch.say(
                            f"{len(done)} of {len(wanted)} finished, about {minutes:.0f} minutes left: {entry.name}"
                        )
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a process was killed, perhaps for want of memory; start again to go on"
                ) from error
            except BaseException:
                for process in set(multiprocessing.active_children()) - strangers:
                    process.terminate()
                raise
        results = sorted(result_file(entry, out) for entry in entries if finished(entry, out))
        return write(results, out, out, html=True)


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


def trained(
    entry: Entry, checkpoints: Mapping[str, Path], images: data.Images, device: torch.device, resume: bool = True,
    **callbacks: Any,
) -> tuple[Recipe, Trained]:  # fmt: skip
    """Trains the network of an entry, to the accuracy of the one that it matches; callbacks are those of ``train``."""
    recipe = entry.recipe
    if entry.matches:
        matched, net = load_trained(checkpoints[entry.matches])
        recipe = replace(recipe, stop_at=validation_accuracy(net.to(device), matched, images.to(device)))
    return recipe, train(recipe, images, checkpoints[entry.name], device, resume, **callbacks)


def work(entry: Entry, entries: Sequence[Entry], options: Study) -> None:
    """Trains and evaluates one network, in a process of its own, and writes its result."""
    torch.set_num_threads(1)
    out = options.folder
    images = data.load(entry.recipe.dataset, options.data_root)
    checkpoints = {other.name: checkpoint_file(other, out) for other in entries}
    recipe, run = trained(entry, checkpoints, images, CPU)
    result: dict[str, Any] = {
        "mark": entry.mark,
        "entry": asdict(entry),
        **files.origin(f"snntorch-lr study {options.plan}", CPU),
        "seconds_per_epoch": run.seconds_per_epoch,
        "history": run.history,
        "validation": validation_accuracy(run.net, recipe, images),
        "sigma": {"before": noise_levels(make_network(recipe, images.shape)), "after": noise_levels(run.net)},
    }
    if entry.evaluations:
        own = next(other.recipe for other in entries if other.name == "surrogate")
        names = [name for name in SOURCES if name != "surrogate" or recipe != own]
        sources = {name: load_trained(checkpoints[name])[1].eval() for name in names}
        rows = [row for how in entry.evaluations for row in _attacked(entry, how, run.net, sources, images, out)]
        result |= {"clean": {}, "rows": rows}
        for noise in dict.fromkeys(row["noise"] for row in rows):
            scores = score(Target(run.net, noise=noise == "on"), images.test, images.test_labels)
            shares = {"majority vote": share_of(scores.right), "single draw": share_of(scores.single)}
            result["clean"][noise] = {name: asdict(share) for name, share in shares.items()}
    files.write_json(result_file(entry, out), result)


def _attacked(
    entry: Entry, evaluation: Evaluation, net: nn.Module, sources: dict[str, nn.Module], images: data.Images, out: Path
) -> list[dict[str, Any]]:
    """Accuracies of one network under attack, and what is right of each image as a string of zeros and ones."""
    x, y = images.test, images.test_labels
    if evaluation.held_out:
        _, held_out = split(entry.recipe, images)
        x, y = images.train[held_out], images.train_labels[held_out]
    attacks = evaluation.attacks if isinstance(evaluation.attacks, str) else list(evaluation.attacks)
    report = evaluate(
        net.eval(), [(x[: evaluation.images], y[: evaluation.images])], evaluation.epsilons, attacks, sources=sources,
        name=entry.name, protocol=Protocol(noise=evaluation.noise), cache=out / "attacks" / entry.slug,
    )  # fmt: skip
    # With the images that attacks broke, which the results have no room for.
    made = f"Command: `snntorch-lr study`, {entry.name}"
    report.html(out / "reports" / f"{entry.slug}-noise-{evaluation.noise}.html", entry.name, note=made)
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


LIKELIHOOD_RATIO, STOPPED = "likelihood ratio", "surrogate, stopped"
PASSED = verdict([Gate("", True, "")])
NOTE = (
    "Accuracy in percent, with the half-width of its 95 % Wilson interval: clean of all test images, the worst case of "
    "those attacked. Noise on: majority of 32 draws. The worst case counts an image as right only if it is right clean "
    "and under every attack of that size, transfers from the other networks included. Unless all gates passed these "
    "figures compare training methods and are no robustness claim."
)


@dataclass(frozen=True, kw_only=True)
class Reproduce(WithDevice, Recipe):
    """Train surrogate baselines and the likelihood-ratio network, attack them, print and save a table.

    Example: snntorch-lr reproduce --dataset digits

    MNIST and Fashion-MNIST are downloaded: --dataset mnist --data-root data.
    """

    place = "runs/{dataset}-{model}-seed{seed}"
    kept = "finished epochs are kept: the same command with --resume goes on from there"
    method: str = option(LIKELIHOOD_RATIO, choices=METHODS, offered=False)
    model: str = option("mlp", "network", choices=MODELS)
    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget, l∞", above=0, most=1, flag="--epsilon")
    attack_images: int = option(1000, "test images to attack", least=1)
    draws: int = option(8, "noise draws that attacks average over if noise is on", least=1)
    suite: str = option("quick", "attacks", choices=SUITES)
    resume: bool = option(False, "go on from the checkpoints in --out", recorded=False)

    def run(self, watch: Watch) -> Outcome:
        """Trains the networks, attacks them, and writes ``results.json``, ``table.md``, ``robustness.md`` and figures.

        The likelihood-ratio network stands beside surrogate-gradient networks without noise, with the same noise, and
        without noise but stopped at its own accuracy on the held-out images: robustness falls while accuracy rises,
        and is to be compared where accuracy is equal.
        """
        out, device = self.folder, self.torch_device()
        suite(self.suite)  # an attack library that is missing is told now
        images = data.load(self.dataset, self.data_root).to(device)
        # A tenth of the training images is held out.
        sizes = {"batch_size": 32 if self.dataset == "digits" else 128, "validation": len(images.train) // 10}
        recipe = Recipe.of(vars(self) | sizes)
        entries = [Entry(name, name, "usual", replace(recipe, method=name)) for name in METHODS]
        entries.append(Entry(STOPPED, STOPPED, "usual", entries[0].recipe, matches=LIKELIHOOD_RATIO))
        checkpoints = {entry.name: out / f"{entry.slug}.pt" for entry in entries}
        there = [path.name for path in checkpoints.values() if path.exists()]
        if there and not self.resume:
            raise ValueError(f"{out} holds {', '.join(there)} already: add --resume to go on, or choose another --out")
        runs = {}
        # First the one that has the most settings that may be wrong.
        for entry in sorted(entries, key=lambda entry: entry.name != LIKELIHOOD_RATIO):
            steps = self.epochs * -(-len(split(entry.recipe, images)[0]) // entry.recipe.batch_size)
            callbacks = watch.training(entry.name, self.epochs, steps)
            runs[entry.name] = trained(entry, checkpoints, images, device, self.resume, **callbacks)
        runs = {name: runs[name] for name in checkpoints}
        nets = {name: run.net for name, (_, run) in runs.items()}
        evaluation = evaluate(
            nets.pop(LIKELIHOOD_RATIO), [(images.test[: self.attack_images], images.test_labels[: self.attack_images])],
            self.epsilons, self.suite, baselines=nets, seed=self.seed, name=LIKELIHOOD_RATIO,
            protocol=Protocol(draws=self.draws), cache=out / "attacks", progress=watch.pieces("attacks"),
        )  # fmt: skip
        rows = sorted(evaluation.rows, key=lambda row: [*runs].index(row.subject.network))
        scores = [score(row.subject.target, images.test, images.test_labels, seed=self.seed) for row in rows]
        measured = [*zip(rows, scores, strict=True)]
        results = files.origin(self.command_line(), device) | {
            "settings": self.recorded(),
            "recipes": {name: asdict(recipe) for name, (recipe, _) in runs.items()},
            "training": {
                name: {"seconds_per_epoch": run.seconds_per_epoch, "history": run.history}
                for name, (_, run) in runs.items()
            },
            "rows": [
                {
                    "network": row.subject.network,
                    "noise": row.subject.noise,
                    "clean": asdict(share_of(scores.right)),
                    "single draw": asdict(share_of(scores.single)),
                    "worst case": {f"{e:g}": asdict(share_of(row.worst(e))) for e in sorted(self.epsilons)},
                    "verdict": verdict(row.findings.gates),
                }
                for row, scores in measured
            ],
            "conclusions": conclusions(measured, self.suite),
            "evaluation": evaluation.to_json(),
        }
        files.write_json(out / "results.json", results)
        title = f"{self.dataset}, {self.model}"
        sentences = "\n".join(f"- {sentence}" for sentence in results["conclusions"])
        head = f"{sentences}\n\n{markdown(*table(results))}\n\n{NOTE}"
        note = files.origin_note(results)
        files.write_text(out / "table.md", f"# {title}, seed {self.seed}\n\n{head}\n\n{note}")
        files.write_evaluation(evaluation, out, note, f"{title}, seed {self.seed}", f"{head}\n\n## Robustness")
        written = f"Written: {out}/report.html, table.md, robustness.md, results.json and figures"
        shown = (f"{title}, accuracy in percent", *table(results))
        return Outcome(results, "\n".join([*results["conclusions"], written]), [shown])


def conclusions(measured: Sequence[tuple[Row, Scores]], suite: str) -> list[str]:
    """Three sentences: the more accurate network, the more robust one, and what the gates allow.

    The likelihood ratio is held against the best of the surrogate networks in each, all with their noise off.
    """
    silent = [(row, scores) for row, scores in measured if row.subject.noise != "on"]
    own = next(row for row, _ in silent if row.subject.network == LIKELIHOOD_RATIO)
    epsilon = own.findings.epsilon or min(next(iter(own.right.values())))
    verdicts: dict[str, list[str]] = {}
    for row, _ in measured:
        verdicts.setdefault(verdict(row.findings.gates), []).append(row.subject.label)
    if [*verdicts] == [PASSED]:
        gates = f"All gates passed: worst cases over the suite {suite!r} may be claimed."
    else:
        failed = [f"{said} for {', '.join(labels)}" for said, labels in verdicts.items() if said != PASSED]
        reasons = "; ".join(failed if len(verdicts) > 1 else verdicts)
        more = "" if suite == "standard" else f" The suite {suite} leaves attacks out; --suite standard has them all."
        gates = f"The gates allow no claim of robustness: {reasons}.{more}"
    clean = {row.subject.network: scores.right for row, scores in silent}
    worst = {row.subject.network: row.worst(epsilon) for row, _ in silent}
    said = compared(f"In the worst case at ε = {epsilon:g}", "robust", worst)
    return [compared("On clean images", "accurate", clean), said, gates]


def compared(where: str, what: str, right: Mapping[str, Tensor]) -> str:
    """The likelihood ratio and the best of the other networks on the same images, in a sentence."""
    own = right[LIKELIHOOD_RATIO]
    name = max((name for name in right if name != LIKELIHOOD_RATIO), key=lambda name: int(right[name].sum()))
    apart = difference(own.double().numpy(), right[name].double().numpy())
    shown = {key: f"{key} ({100 * float(right[key].double().mean()):.1f} %)" for key in (LIKELIHOOD_RATIO, name)}
    paired = f"{apart} points, paired over {len(own)} images"
    if apart.low <= 0 <= apart.high:
        first, second = shown.values()
        return f"{where} there is no difference beyond chance between {first} and {second}: {paired}."
    better, worse = (LIKELIHOOD_RATIO, name) if apart.mean > 0 else (name, LIKELIHOOD_RATIO)
    return f"{where} {shown[better]} is more {what} than {shown[worse]}; likelihood ratio minus {name}: {paired}."


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the results, as text: a line for each network and each use of its noise."""
    lines = []
    for row in results["rows"]:
        training = results["training"][row["network"]]
        noise = "" if row["noise"] == "none" else f" (noise {row['noise']} at test)"
        cells = [f"{training['history'][-1]['epoch']:.3g}", f"{training['seconds_per_epoch']:.2g}"]
        shares = row["clean"], row["single draw"], *row["worst case"].values()
        lines.append([row["network"] + noise, *cells, *(str(Share(**share)) for share in shares), row["verdict"]])
    worst = [f"worst, ε = {epsilon}" for epsilon in results["rows"][0]["worst case"]]
    return ["network", "epochs", "s/epoch", "clean", "single draw", *worst, "gates"], lines
