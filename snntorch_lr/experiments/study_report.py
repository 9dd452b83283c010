"""The page of a study, made from its results alone: the same bytes from the same results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..text import listed, markdown
from . import files, study_figures
from . import study_tables as tables
from .plans import REDUCED
from .study_tables import Result


def write(results: Path, out: Path) -> list[Path]:
    """Writes ``index.md``, its figures, and ``results.json``, which is all that they are made from.

    Args:
        results: folder of JSON files of ``study``, or of one ``results.json``.
        out: folder for the page.

    Returns:
        The files.

    Raises:
        ValueError: if there is no result in the folder, or a file cannot be read as one.
    """
    found = [result for path in sorted(results.glob("*.json")) for result in _read(path)]
    if not found:
        raise ValueError(f"{results} holds no results of a study")
    together = out / "results.json"
    # A line for each network.
    lines = ",\n".join(json.dumps(result, ensure_ascii=False, allow_nan=False) for result in found)
    files.write_text(together, f"[\n{lines}\n]\n")
    written = [together]
    if tables.points(found, "0.05"):
        figure = out / "fronts.png"
        files.save_figure(
            figure, partial(study_figures.fronts, [(e, tables.points(found, e)) for e in ("0.05", "0.1")])
        )
        written.append(figure)
    page = out / "index.md"
    files.write_text(page, to_markdown(found))
    return [page, *written]


def _read(path: Path) -> list[Result]:
    """The results of a file: of one network, or of many."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a result of a study: {error}") from error
    return [result for result in (read if isinstance(read, list) else [read]) if "entry" in result]


def to_markdown(results: Sequence[Result]) -> str:
    """The whole page."""
    dataset, model = _about(results)
    parts = [f"# The study: {dataset}, {model}", _HEAD]
    usual = tables.of_group(results, "usual")
    if usual:
        parts += ["## In short", markdown(*tables.short(usual)), *tables.extremes(results)]
    for epsilon in tables.budgets_of(usual):
        parts += [f"## Table A, as usually compared: ε = {epsilon}", markdown(*tables.usual(usual, epsilon))]
    if usual:
        parts += [_NOTE_A, "## Differences to the surrogate on the same images", markdown(*tables.differences(usual))]
        parts += [
            "## Natural corruptions (mean of five severities; the images attacked)",
            markdown(*tables.corruptions(usual)),
        ]
        if tables.pair(usual):
            parts += ["## Approximate and vanilla", _NOTE_COST, markdown(*tables.costs(usual))]
        parts += ["## Noise levels", _NOTE_LEVELS, markdown(*tables.levels(results))]
        parts += ["## Gates", *(tables.gates(result) for result in usual)]
    if tables.of_group(results, "seed"):
        parts += ["## Seeds", _NOTE_SEEDS, markdown(*tables.seeds(results))]
    if tables.of_group(results, "front"):
        parts += ["## Table B, at equal effort", "![accuracy and robustness](fronts.png)"]
        parts += [markdown(*tables.fronts(results)), _NOTE_B]
    if tables.of_group(results, "tune"):
        parts += ["## Tried on held-out training images", _NOTE_TUNE, markdown(*tables.tuning(results))]
    return "\n\n".join([*parts, _foot(results)]) + "\n"


_HEAD = (
    "Accuracy in percent. Clean: all test images, noise off or by the majority of 32 noise draws. Under attack: the "
    "images attacked, per-example worst case. Intervals: 95 %."
)
_NOTE_A = (
    "Same network, same data, same number of epochs, no tuning for robustness. 'worst' is the worst case over the "
    f"suite \"standard\" and transfers; 'reduced suite' is that over {', '.join(REDUCED)}. What the gates say stands "
    "in the last line: without 'all gates passed' a column is no claim of robustness."
)
_NOTE_COST = (
    "Membrane noise: what the approximate estimator saves, and what it costs. Memory: the peak of one training step "
    "above weights, gradients and the optimizer's state."
)
_NOTE_LEVELS = (
    "Noise levels as they were initialised and as they were learned, the networks of the ablation among those tried on "
    "held-out images included."
)
_NOTE_SEEDS = "Worst case over the reduced suite, noise off; Student's t over seeds."
_NOTE_B = (
    "Noise off; worst case over the reduced suite, whose distance from \"standard\" table A shows. 'to the front': "
    "worst case minus that of the best surrogate networks (all families called surrogate; the PGD-trained only beside "
    "the PGD-trained) at the same clean accuracy, interpolated between neighbours on their front, paired by image. '*' "
    "marks the networks on that front."
)
_NOTE_TUNE = (
    "Two epochs each; clean accuracy of the held-out images, and worst case over the reduced suite on 500 of them, "
    "noise off. Settings were chosen by this table, never by test images. 'to the front': as in table B, with the "
    "surrogate networks of this table; '-' where none of them is as accurate."
)


def _about(results: Sequence[Result]) -> tuple[str, str]:
    """Data set, and network; that of the sources says little."""
    recipes = [r["entry"]["recipe"] for r in sorted(results, key=lambda r: r["entry"]["group"] == "source")]
    return recipes[0]["dataset"], recipes[0]["model"]


def _foot(results: Sequence[Result]) -> str:
    versions = dict.fromkeys(listed(r["versions"]) for r in results)
    machines = dict.fromkeys(r["machine"] for r in results)
    minutes = sum(entry["seconds"] for r in results for entry in r["history"]) / 60
    dataset, model = _about(results)
    name = f"{dataset}-conv" if model == "conv" else dataset
    return (
        f"Commands: `snntorch-lr study {name}`, then `snntorch-lr report` on its results. {len(results)} networks, "
        f"{minutes:.0f} minutes of training. Versions: {'; '.join(versions)}. Machine: {'; '.join(machines)}."
    )
