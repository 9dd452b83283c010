"""Training and evaluation of the networks of a plan, several at a time; it goes on after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...robustness import Protocol, RobustnessReport, Target, evaluate, score, share_of
from .. import data, files
from ..options import DataPlace, check, command_line, option
from ..recipe import load_trained, make_network, noise_levels
from ..train import split, train, validation_accuracy
from .plan import GROUPS, PRESETS, REDUCED, SOURCES, Entry, Evaluation, plan_path, read_plan

CPU = torch.device("cpu")
Tell = Callable[[str, int, int, float], None]
"""Called with what was finished last, how many are finished, how many there are, and the seconds left, about."""


@dataclass(frozen=True, kw_only=True)
class Study(DataPlace):
    """Options of the command ``snntorch-lr study``."""

    plan: str = option(help=f"{', '.join(PRESETS)}, or a file of your own that ends in .toml", positional=True)
    groups: tuple[str, ...] = option((), "networks to train; all by default", choices=GROUPS, flag="--group")
    jobs: int = option(1, "networks at a time, each with one thread", least=1, recorded=False)
    out: Path | None = option(None, "folder of results and checkpoints; runs/study/PLAN", recorded=False)

    @property
    def folder(self) -> Path:
        """Folder for results, checkpoints and finished attacks."""
        return self.out or Path("runs/study") / plan_path(self.plan).stem


def study(options: Study, tell: Tell = lambda what, done, total, left: None) -> list[Path]:
    """Trains and evaluates what is not finished yet of a plan; one JSON file in ``results`` for each network.

    Every process computes with one thread. The same call goes on where an earlier one was interrupted: finished
    networks are not touched, and of others finished epochs and attacks are kept.
    """
    check(options)
    out, entries = options.folder, read_plan(options.plan)
    files.check_writable(out)
    data.load(entries[0].recipe.dataset, options.data_root)
    wanted = _with_needs(entries, [e for e in entries if not options.groups or e.group in options.groups])
    waiting = [entry for entry in wanted if not finished(entry, out)]
    done = {entry.name for entry in wanted} - {entry.name for entry in waiting}
    started, worked = time.perf_counter(), 0.0
    strangers = set(multiprocessing.active_children())
    with (
        files.locked(out, command_line("study", options)),
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool,
    ):
        running: dict[Future[None], Entry] = {}
        try:
            while waiting or running:
                for entry in [entry for entry in waiting if _needs(entry) <= done][: options.jobs - len(running)]:
                    with _interrupts_wait():
                        running[pool.submit(work, entry, entries, options)] = entry
                    waiting.remove(entry)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    entry = running.pop(future)
                    future.result()
                    done.add(entry.name)
                    worked += entry.work
                    left = sum(other.work for other in (*waiting, *running.values()))
                    seconds = (time.perf_counter() - started) * left / worked
                    tell(entry.name, len(done), len(wanted), seconds)
        except BrokenProcessPool as error:
            raise ChildProcessError("a process was killed, perhaps for want of memory; start again to go on") from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - strangers:
                process.terminate()
            raise
    return sorted(result_file(entry, out) for entry in entries if finished(entry, out))


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


def _needs(entry: Entry) -> set[str]:
    """Names of the entries that must be finished before."""
    sources = set() if entry.group == "source" else set(SOURCES)
    return sources | ({entry.matches} if entry.matches else set())


def _with_needs(entries: Sequence[Entry], wanted: Collection[Entry]) -> list[Entry]:
    names = {name for entry in wanted for name in _needs(entry)} | {entry.name for entry in wanted}
    return [entry for entry in entries if entry.name in names]


def work(entry: Entry, entries: Sequence[Entry], options: Study) -> None:
    """Trains and evaluates one network, in a process of its own, and writes its result."""
    torch.set_num_threads(1)
    out = options.folder
    images = data.load(entry.recipe.dataset, options.data_root)
    named = {other.name: other for other in entries}
    recipe = entry.recipe
    if entry.matches:
        matched, net = load_trained(checkpoint_file(named[entry.matches], out))
        recipe = replace(recipe, stop_at=validation_accuracy(net, matched, images))
    run = train(recipe, images, checkpoint_file(entry, out), CPU, resume=True)
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
        sources = {name: load_trained(checkpoint_file(named[name], out))[1].eval() for name in SOURCES}
        if recipe == named["surrogate"].recipe:
            del sources["surrogate"]
        rows = [row for each in entry.evaluations for row in _attacked(entry, each, run.net, sources, images, out)]
        result |= {"clean": _clean(run.net, rows, images), "rows": rows}
    files.write_json(result_file(entry, out), result)


def _attacked(
    entry: Entry,
    evaluation: Evaluation,
    net: nn.Module,
    sources: dict[str, nn.Module],
    images: data.Images,
    out: Path,
) -> list[dict[str, Any]]:
    """Accuracies of one network under attack, with what is right image by image."""
    x, y = images.test, images.test_labels
    if evaluation.held_out:
        _, rows = split(entry.recipe, images)
        x, y = images.train[rows], images.train_labels[rows]
    report = evaluate(
        net.eval(),
        [(x[: evaluation.images], y[: evaluation.images])],
        evaluation.epsilons,
        evaluation.attacks if isinstance(evaluation.attacks, str) else list(evaluation.attacks),
        sources=sources,
        name=entry.name,
        protocol=Protocol(noise=evaluation.noise),
        cache=out / "attacks" / entry.slug,
    )
    # With the images that attacks broke, which the results have no room for.
    made = f"Command: `snntorch-lr study`, {entry.name}"
    report.html(out / "reports" / f"{entry.slug}-noise-{evaluation.noise}.html", entry.name, note=made)
    return _rows(report)


def _clean(net: nn.Module, rows: Sequence[dict[str, Any]], images: data.Images) -> dict[str, Any]:
    """Accuracy on all test images, for each way the noise was in the rows."""
    clean = {}
    for noise in dict.fromkeys(row["noise"] for row in rows):
        scores = score(Target(net, noise=noise == "on"), images.test, images.test_labels)
        clean[noise] = {
            "majority vote": asdict(share_of(scores.right)),
            "single draw": asdict(share_of(scores.single)),
        }
    return clean


def _rows(report: RobustnessReport) -> list[dict[str, Any]]:
    """Rows of the report, with what is right of each image as a string of zeros and ones."""
    rows: list[dict[str, Any]] = report.to_json()["rows"]
    for row, measured in zip(rows, report.rows, strict=True):
        reduced = [name for name in measured.right if name.startswith(REDUCED)]
        row["right"] = {
            "clean": _bits(measured.clean),
            "worst": {f"{e:g}": _bits(measured.worst(e)) for e in report.epsilons},
            "reduced": {f"{e:g}": _bits(measured.with_gates(measured.under(reduced, e), e)) for e in report.epsilons},
        }
    return rows


def _bits(right: torch.Tensor) -> str:
    return "".join("1" if value else "0" for value in right.tolist())
