"""The page of a study, made from its results alone: the same bytes from the same results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ..robustness import Gate
from ..robustness.statistics import mcnemar
from ..text import listed, markdown
from . import files, study_figures
from .fronts import Point, beside, difference, front
from .plans import REDUCED

Result = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
PAPER = ("FGSM", "RFGSM", "PGD", "MIFGSM")
REFERENCE = "surrogate, PGD-trained"


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
    files.write_json(together, found)
    written = [together]
    if points(found, "0.05"):
        figure = out / "fronts.png"
        files.save_figure(figure, partial(study_figures.fronts, [(e, points(found, e)) for e in ("0.05", "0.1")]))
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
    recipe = results[0]["entry"]["recipe"]
    parts = [f"# The study: {recipe['dataset']}, {_model(results)}", _HEAD]
    usual = _group(results, "usual")
    for epsilon in _budgets(usual):
        parts += [f"## Table A, as usually compared: ε = {epsilon}", markdown(*_usual(usual, epsilon))]
    if usual:
        parts += [_NOTE_A, "## Differences to the surrogate on the same images", markdown(*_differences(usual))]
        parts += ["## Natural corruptions (mean of five severities)", markdown(*_corruptions(usual))]
        parts += ["## Approximate and vanilla", _NOTE_COST, markdown(*_costs(usual))]
        parts += ["## Noise levels", _NOTE_LEVELS, markdown(*_levels(results))]
        parts += ["## Gates", *(_gates(result) for result in usual)]
    if _group(results, "seed"):
        parts += ["## Seeds", _NOTE_SEEDS, markdown(*_seeds(results))]
    if _group(results, "front"):
        parts += ["## Table B, at equal effort", "![accuracy and robustness](fronts.png)"]
        parts += [markdown(*_fronts(results)), _NOTE_B]
    if _group(results, "tune"):
        parts += ["## Tried on held-out training images", _NOTE_TUNE, markdown(*_tuning(results))]
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
    "Four epochs each; clean accuracy of the held-out images, and worst case over the reduced suite on 500 of them, "
    "noise off. Settings were chosen by this table, never by test images. 'to the front': as in table B, with the "
    "surrogate networks of this table; '-' where none of them is as accurate."
)


def _group(results: Iterable[Result], group: str) -> list[Result]:
    return [result for result in results if result["entry"]["group"] == group]


def _budgets(results: Sequence[Result]) -> list[str]:
    return list(results[0]["rows"][0]["worst_case"]) if results else []


def _model(results: Sequence[Result]) -> str:
    models = {r["entry"]["recipe"]["model"]: None for r in results if r["entry"]["group"] != "source"}
    return ", ".join(models)


def _columns(results: Sequence[Result]) -> list[tuple[str, Result, dict[str, Any]]]:
    """Label, result and row of each network with its noise off and on; surrogates first."""
    ordered = sorted(results, key=lambda r: (not r["entry"]["family"].startswith("surrogate"), r["entry"]["family"]))
    return [
        (r["entry"]["family"] + ("" if row["noise"] == "none" else f" (noise {row['noise']})"), r, row)
        for r in ordered
        for row in r["rows"]
    ]


def _usual(results: Sequence[Result], epsilon: str) -> Table:
    columns = _columns(results)
    lines = [
        ["clean", *(_share(r["clean"][row["noise"]]["majority vote"]) for _, r, row in columns)],
        ["clean, single draw", *(_share(r["clean"][row["noise"]]["single draw"]) for _, r, row in columns)],
        ["images attacked", *(str(len(row["right"]["clean"])) for _, _, row in columns)],
        *(
            [name, *(_share(row["attacks"].get(name, {}).get(epsilon)) for _, _, row in columns)]
            for name in PAPER
        ),
        ["worst, reduced suite", *(_reduced(row, epsilon) for _, _, row in columns)],
        ["worst", *(f"**{_share(row['worst_case'].get(epsilon))}**" for _, _, row in columns)],
        ["s / epoch", *(f"{r['seconds_per_epoch']:.3g}" for _, r, _ in columns)],
        ["gates", *(row["verdict"] for _, _, row in columns)],
    ]  # fmt: skip
    return ["", *(label for label, _, _ in columns)], lines


def _differences(results: Sequence[Result]) -> Table:
    columns = _columns(results)
    reference = columns[0][2]["right"]["worst"]
    budgets = _budgets(results)
    lines = []
    for label, _, row in columns[1:]:
        cells = []
        for epsilon in budgets:
            if epsilon not in row["right"]["worst"]:
                cells.append("-")
                continue
            mine = _array(row["right"]["worst"][epsilon])
            other = _array(reference[epsilon])[: len(mine)]
            test = mcnemar(torch.as_tensor(mine == 1), torch.as_tensor(other == 1))
            cells.append(f"{difference(mine, other)}, p = {test.p_value:.2g}")
        lines.append([label, *cells])
    return ["worst case, points; McNemar's p", *(f"ε = {epsilon}" for epsilon in budgets)], lines


def _corruptions(results: Sequence[Result]) -> Table:
    columns = [column for column in _columns(results) if column[2]["corruptions"]]
    names = dict.fromkeys(name for _, _, row in columns for name in row["corruptions"])
    lines = [
        [
            name,
            *(_percent(np.mean([s["accuracy"] for s in row["corruptions"][name].values()])) for _, _, row in columns),
        ]
        for name in names
    ]
    return ["", *(label for label, _, _ in columns)], lines


def _reduced(row: dict[str, Any], epsilon: str) -> str:
    right = row["right"]["reduced"].get(epsilon)
    return "-" if right is None else _percent(_array(right).mean())


def _costs(results: Sequence[Result]) -> Table:
    named = {r["entry"]["family"].removeprefix("likelihood ratio, "): r for r in results}
    pair = {name: named[name] for name in ("membrane, vanilla", "membrane, approximate") if name in named}
    rows = {name: r["rows"][0] for name, r in pair.items()}
    lines = [
        ["clean", *(_share(r["clean"]["off"]["majority vote"]) for r in pair.values())],
        *([f"worst, ε = {e}", *(_share(row["worst_case"][e]) for row in rows.values())] for e in _budgets(results)),
        ["seconds per epoch", *(f"{r['seconds_per_epoch']:.3g}" for r in pair.values())],
        ["memory of a step, MB", *(f"{r['step_megabytes']:.0f}" for r in pair.values())],
    ]
    return ["", *pair], lines


def _levels(results: Sequence[Result]) -> Table:
    shown = [r for r in results if r["entry"]["group"] == "usual" or "sigma" in r["entry"]["name"].partition(":")[2]]
    lines = [
        [r["entry"]["name"], name, _spread(before), _spread(r["sigma"]["after"][name])]
        for r in shown
        for name, before in r["sigma"]["before"].items()
    ]
    return ["network", "neurons", "σ before", "σ after"], lines


def _gates(result: Result) -> str:
    lines = [
        [row["noise"], gate.name, gate.verdict, gate.detail]
        for row in result["rows"]
        for gate in (Gate(**each) for each in row["gates"])
    ]
    return f"### {result['entry']['family']}\n\n" + markdown(["noise", "gate", "", "measured"], lines)


def _seeds(results: Sequence[Result]) -> Table:
    """Clean accuracy and worst case by family, over its seeds; table A's networks are the first seed."""
    both = [*_group(results, "usual"), *_group(results, "seed")]
    budgets = _budgets(_group(results, "seed"))
    lines = []
    for family in dict.fromkeys(r["entry"]["family"] for r in both):
        runs = [r for r in both if r["entry"]["family"] == family]
        rows = [r["rows"][0] for r in runs]
        clean = [r["clean"][row["noise"]]["majority vote"]["accuracy"] for r, row in zip(runs, rows, strict=True)]
        worst = [[float(_array(row["right"]["reduced"][epsilon]).mean()) for row in rows] for epsilon in budgets]
        lines.append([family, str(len(runs)), _over_seeds(clean), *map(_over_seeds, worst)])
    return ["", "seeds", "clean", *(f"worst, ε = {epsilon}" for epsilon in budgets)], lines


def points(results: Sequence[Result], epsilon: str) -> list[tuple[str, str, Point]]:
    """Family, change and point of every network of tables A and B, noise off."""
    found = []
    for result in [*_group(results, "usual"), *_group(results, "front")]:
        row = result["rows"][0]
        if epsilon in row["right"]["reduced"]:
            entry = result["entry"]
            clean = result["clean"][row["noise"]]["majority vote"]["accuracy"]
            change = entry["name"].partition(": ")[2].removeprefix(entry["family"]).removeprefix(", ")
            found.append(
                (entry["family"], change, Point(entry["name"], clean, _array(row["right"]["reduced"][epsilon])))
            )
    return found


def _rivals(points: Sequence[tuple[str, str, Point]], family: str) -> list[Point]:
    """Surrogate networks that a family is compared with: the PGD-trained only with what is trained so too."""
    with_reference = family.endswith("PGD-trained")
    return [p for f, _, p in points if f.startswith("surrogate") and (with_reference or f != REFERENCE)]


def _fronts(results: Sequence[Result]) -> Table:
    budgets = [e for e in ("0.05", "0.1") if points(results, e)]
    by_budget = {epsilon: points(results, epsilon) for epsilon in budgets}
    named = {result["entry"]["name"]: result for result in results}
    lines = []
    for family, change, point in sorted(by_budget[budgets[0]], key=lambda item: (item[0], -item[2].clean)):
        cells = []
        for epsilon in budgets:
            rivals = _rivals(by_budget[epsilon], family)
            own = next(p for _, _, p in by_budget[epsilon] if p.name == point.name)
            on_front = any(p.name == own.name for p in front(rivals))
            apart = None if any(p.name == own.name for p in rivals) else beside(own, rivals)
            cells += [_percent(own.worst) + (" *" if on_front else ""), "-" if apart is None else str(apart)]
        result = named[point.name]
        lines.append([family, change, _percent(point.clean), *cells, f"{result['seconds_per_epoch']:.3g}"])
    header = ["family", "change", "clean"]
    for epsilon in budgets:
        header += [f"worst, ε = {epsilon}", "to the front"]
    return [*header, "s / epoch"], lines


def _tuning(results: Sequence[Result]) -> Table:
    tried = _group(results, "tune")
    budgets = _budgets(tried)
    header, lines = ["", "clean"], [[r["entry"]["name"].partition(": ")[2], _percent(r["validation"])] for r in tried]
    for epsilon in budgets:
        header += [f"worst, ε = {epsilon}", "to the front"]
        held_out = [_held_out(result, epsilon) for result in tried]
        for line, (family, _, point) in zip(lines, held_out, strict=True):
            own = family.startswith("surrogate")
            apart = None if own else beside(point, _rivals(held_out, family))
            line += [_percent(point.worst), "-" if apart is None else str(apart)]
    paces = [f"{result['seconds_per_epoch']:.3g}" for result in tried]
    return [*header, "s / epoch"], [[*line, pace] for line, pace in zip(lines, paces, strict=True)]


def _held_out(result: Result, epsilon: str) -> tuple[str, str, Point]:
    """A network on held-out images, as ``points`` gives those on test images."""
    entry = result["entry"]
    family = entry["family"] + (", PGD-trained" if entry["recipe"]["adversary"] else "")
    right = _array(result["rows"][0]["right"]["worst"][epsilon])
    return family, "", Point(entry["name"], result["validation"], right)


def _foot(results: Sequence[Result]) -> str:
    versions = dict.fromkeys(listed(r["versions"]) for r in results)
    machines = dict.fromkeys(r["machine"] for r in results)
    minutes = sum(entry["seconds"] for r in results for entry in r["history"]) / 60
    dataset = results[0]["entry"]["recipe"]["dataset"]
    name = dataset + ("-conv" if "conv" in _model(results).split(", ") else "")
    return (
        f"Commands: `snntorch-lr study {name}`, then `snntorch-lr report` on its results. {len(results)} networks, "
        f"{minutes:.0f} minutes of training. Versions: {'; '.join(versions)}. Machine: {'; '.join(machines)}."
    )


def _array(bits: str) -> NDArray[np.float64]:
    return np.array([bit == "1" for bit in bits], dtype=np.float64)


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f}"


def _share(share: dict[str, float] | None) -> str:
    return "-" if share is None else f"{100 * share['accuracy']:.1f} ± {50 * (share['high'] - share['low']):.1f}"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"mean {np.mean(values):.3g}, {min(values):.3g} to {max(values):.3g}"


def _over_seeds(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _percent(values[0])
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{_percent(np.mean(values))} ± {_percent(half)}"
