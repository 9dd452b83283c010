"""The page of a study, made from its results alone: the same bytes from the same results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._messages import listed, markdown
from ...robustness import wilson
from ...robustness.figures import colors_of, new_figure, percent, with_legend
from ...robustness.figures import page as html_page
from .. import files
from ..options import Printed, option
from . import tables
from .plan import REDUCED
from .tables import Point, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOGETHER = "results.json"
_MARKERS = "osD^v<>PX*"


@dataclass(frozen=True, kw_only=True)
class Report(Printed):
    """Options of the command ``snntorch-lr report``."""

    results: Path = option(help="folder of results of a study", positional=True)
    out: Path | None = option(None, "folder for the page and its figures; that of the results")
    html: bool = option(False, "write report.html too, one page that needs nothing else")


def write(results: Path, out: Path, html: bool = False) -> list[Path]:
    """Writes ``index.md``, its figures, and ``results.json``, which is all that they are made from."""
    single = [path for path in sorted(results.glob("*.json")) if path.name != TOGETHER]
    return write_page(single or list(results.glob(TOGETHER)), out, results, html)


def write_page(paths: Sequence[Path], out: Path, source: Path, html: bool) -> list[Path]:
    """Writes the page of some files of a folder, as ``write`` does of all."""
    found = [result for path in paths for result in _read(path)]
    if not found:
        raise ValueError(f"{source} holds no results of a study")
    names = [result["entry"]["name"] for result in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{source} holds more than one result of {', '.join(sorted(twice))}")
    # A line for each network.
    lines = ",\n".join(json.dumps(result, ensure_ascii=False, allow_nan=False) for result in found)
    files.write_text(out / TOGETHER, f"[\n{lines}\n]\n")
    written, figures = [out / TOGETHER], {}
    if tables.of_group(found, "front"):
        written.append(out / "fronts.png")
        budgets = tables.budgets_of(tables.of_group(found, "front"))
        figure = _fronts_figure([(epsilon, tables.points(found, epsilon)) for epsilon in budgets])
        files.save_figure(written[-1], figure, dpi=120, metadata={"Software": None})
        figures["fronts.png"] = figure
    page = out / "index.md"
    text = to_markdown(found)
    files.write_text(page, text)
    if html:
        written.append(out / "report.html")
        files.write_text(written[-1], html_page(f"The study: {', '.join(_about(found))}", text, figures))
    return [page, *written]


def _read(path: Path) -> list[Result]:
    """The results of a file: of one network, or of many."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a result of a study: {error}") from error
    return [each for each in (read if isinstance(read, list) else [read]) if isinstance(each, dict) and "entry" in each]


def to_markdown(results: Sequence[Result]) -> str:
    """The whole page."""
    dataset, model = _about(results)
    parts = [f"# The study: {dataset}, {model}", _HEAD]
    usual = tables.of_group(results, "usual")
    if usual:
        parts += ["## In short", markdown(*tables.short(usual)), *tables.extremes(results), _NOTE_SHORT]
    if tables.of_group(results, "front"):
        parts += ["## Table B, at equal clean accuracy", "![accuracy and robustness](fronts.png)"]
        parts += [markdown(*tables.fronts(results)), _NOTE_B]
    for epsilon in tables.budgets_of(usual):
        parts += [f"## Table A, as usually compared: ε = {epsilon}", markdown(*tables.usual(usual, epsilon))]
    if usual:
        parts += [_note_a(usual), "## Worst case minus that of the surrogate", _NOTE_DIFFERENCES]
        parts += [markdown(*tables.differences(usual))]
        if any(row.get("corruptions") for result in usual for row in result["rows"]):
            parts += ["## Natural corruptions", "Mean of five severities.", markdown(*tables.corruptions(usual))]
        parts += ["## Noise levels", _NOTE_LEVELS, markdown(*tables.levels(results))]
    if tables.of_group(results, "seed"):
        parts += ["## Seeds", _NOTE_SEEDS, markdown(*tables.seeds(results))]
    if tables.of_group(results, "tune"):
        parts += ["## Tried on held-out training images", _NOTE_TUNE, markdown(*tables.tuning(results))]
    if usual:
        parts += ["## Gates", *(tables.gates(result) for result in usual)]
    return "\n\n".join([*parts, "## Settings", markdown(*tables.settings(results)), _foot(results)]) + "\n"


_HEAD = (
    "Accuracy in percent. Clean: all test images, noise off or by the majority of 32 noise draws. Under attack: the "
    "images attacked, per-example worst case. Intervals: 95 %."
)
_NOTE_SHORT = (
    "Intervals and p-values (exact McNemar tests, not corrected for their number) are over images, of networks that "
    "are given; what another training run gives is under Seeds, where there are any."
)
_NOTE_DIFFERENCES = (
    "In points, with McNemar's p, on the images that both were attacked on: fewer where the noise is on."
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
    "marks the networks on that front. Epochs and seconds of training differ between the networks. Those of table A "
    "were attacked at smaller budgets too, and what falls there stays wrong."
)
_NOTE_TUNE = (
    "Clean accuracy of the held-out images, and worst case over the reduced suite on the first of them, noise off; "
    "what a network has beside its label is under Settings. 'to the front': as in table B, with the surrogate "
    "networks of this table; '-' where none of them is as accurate."
)


def _note_a(usual: Sequence[Result]) -> str:
    attacks = usual[0]["entry"]["evaluations"][0]["attacks"]
    if attacks == [*REDUCED]:
        suite = "the reduced suite"
    else:
        suite = f"the suite {attacks!r}" if isinstance(attacks, str) else ", ".join(attacks)
    return (
        "Same network, same data, same number of epochs, no tuning for robustness. 'worst' is the worst case over "
        f"{suite} and transfers; the reduced suite is {', '.join(REDUCED)}. Noise off and on were attacked on "
        "different numbers of images: compare them on the first ones. Without 'all gates passed' a line is no claim "
        "of robustness."
    )


def _about(results: Sequence[Result]) -> tuple[str, str]:
    """Data set and network."""
    # Every study has it, to transfer from.
    recipe = next((r for r in results if r["entry"]["name"] == "surrogate"), results[0])["entry"]["recipe"]
    return recipe["dataset"], recipe["model"]


def _foot(results: Sequence[Result]) -> str:
    versions = dict.fromkeys(listed(r["versions"]) for r in results)
    machines = dict.fromkeys(r["machine"] for r in results)
    minutes = sum(entry["seconds"] for r in results for entry in r["history"]) / 60
    return (
        f"Command: `{results[0]['command']}`; this page again from its results: `snntorch-lr report DIR`, DIR the "
        f"folder of `{TOGETHER}`. {len(results)} networks, {minutes:.0f} minutes of training. Versions: "
        f"{'; '.join(versions)}. Machine: {'; '.join(machines)}."
    )


def _fronts_figure(panels: Sequence[tuple[str, Sequence[Point]]]) -> Figure:
    """Worst-case accuracy against clean error, a panel for each budget, a line for each family; surrogates hollow."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, axes = new_figure(11, 5.4, len(panels))
    families = list(dict.fromkeys(point.family for _, points in panels for point in points))
    colors = colors_of(families)
    for axis, (epsilon, points) in zip(axes, panels, strict=True):
        for index, family in enumerate(families):
            mine = sorted((p for p in points if p.family == family), key=lambda p: p.clean)
            if not mine:
                continue
            middle, bars = percent([wilson(int(point.right.sum()), len(point.right)) for point in mine])
            error, sides = percent([point.error for point in mine])
            look: dict[str, Any] = {"color": colors[family], "marker": _MARKERS[index % len(_MARKERS)]}
            look |= {"linestyle": "-" if len(mine) > 2 else "none"} | ({"mfc": "white"} if mine[0].surrogate else {})
            axis.errorbar(error, middle, bars, sides, lw=1, elinewidth=0.5, label=family, **look)
        # Most networks differ by a point or two, and some by ten.
        axis.set(xscale="log", xlabel="error on all test images (%), smaller to the right", title=f"ε = {epsilon}")
        axis.set_ylabel("worst-case accuracy, reduced suite (%)")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.invert_xaxis()
    figure.suptitle("Robust and accurate is at the top right; 95 % intervals, noise off; surrogate gradients hollow")
    return with_legend(figure, axes[0], 3)
