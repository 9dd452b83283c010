"""The page of a study, made from its results alone: the same bytes from the same results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from .._messages import listed, markdown
from ..robustness import Gate, Share, mcnemar, wilson
from ..robustness.figures import colors_of, new_figure, percent, with_legend
from . import files
from .options import Command, Outcome, option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
"""Result of a network, as ``study`` writes it."""
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and lines."""
Right = NDArray[np.float64]
"""Images that are right, 0 or 1, ``[images]``."""
REDUCED = ("EOT-PGD training", "EOT-PGD gaussian", "margin EOT-PGD-40x8", "targeted EOT-PGD", "transfer")
"""The attacks that find the most on these networks, where all of ``"standard"`` would take too long."""
TOGETHER = "results.json"
_PAPER = ("FGSM", "RFGSM", "PGD", "MIFGSM")
_NUMBERS = ("decay", "input_noise", "adversary", "free", "penalty", "anneal")
_SWITCHES = ("input_noise_each_step", "learn_input_noise")
_MARKERS = "osD^v<>PX*"


class Difference(NamedTuple):
    """A paired difference of accuracies with its 95 % interval (Student's t over the images)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def difference(first: Right, second: Right) -> Difference:
    """Mean difference of two networks on the same images, with Student's interval.

    Where no image tells them apart, the interval is that of the rule of three (Hanley & Lippman-Hand 1983): ± 3 / n.
    """
    apart = first - second
    if np.ptp(apart) == 0:
        half = min(1.0, 3 / len(apart))
        return Difference(float(apart[0]), float(apart[0]) - half, float(apart[0]) + half)
    interval = stats.ttest_1samp(apart, 0).confidence_interval(0.95)
    return Difference(float(apart.mean()), float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Point:
    """One network on the plane of accuracy and robustness."""

    name: str
    family: str
    surrogate: bool  # trained by surrogate gradients
    adversarial: bool  # trained on adversarial images
    clean: float  # accuracy, in [0, 1], of so many images
    images: int
    right: Right  # under attack

    @property
    def worst(self) -> float:
        """Worst-case accuracy."""
        return float(self.right.mean())

    def rivals(self, points: Sequence[Point]) -> list[Point]:
        """Surrogate networks that it is compared with: the adversarially trained only if it is trained so too."""
        return [p for p in points if p.surrogate and (self.adversarial or not p.adversarial)]


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both accuracies, in the order of clean accuracy; of equal ones the first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.clean, -p.worst)):
        if not kept or point.worst > kept[-1].worst:
            kept.append(point)
    return kept[::-1]


def beside(point: Point, others: Sequence[Point]) -> Difference | None:
    """Distance of a network from the front of others at its clean accuracy; None if none of them is as accurate.

    Between two neighbours on the front, robustness is interpolated over clean accuracy; below the least accurate of
    them it is that one's, which is more accurate and at least as robust as anything known there.
    """
    line = front(others)
    above = next((index for index, other in enumerate(line) if other.clean >= point.clean), None)
    if above is None:
        return None
    right = line[above].right
    if above > 0:
        low, high = line[above - 1], line[above]
        share = (point.clean - low.clean) / (high.clean - low.clean)
        right = share * high.right + (1 - share) * low.right
    return difference(point.right, right)


def to_the_front(points: Sequence[Point], star: str) -> dict[str, list[str]]:
    """By name the worst case, with a star on the front of the rivals, and the distance of the others to this front."""
    cells = {}
    for point in points:
        rivals = point.rivals(points)
        on_front = any(other.name == point.name for other in front(rivals))
        apart = None if point.surrogate else beside(point, rivals)
        cells[point.name] = [_percent(point.worst) + (star if on_front else ""), "-" if apart is None else str(apart)]
    return cells


class Line:
    """A network of a study with its noise off or on: a row of its result.

    Attributes:
        label: family, and the noise of networks that have any.
        surrogate: True if it was trained by surrogate gradients.
        clean: accuracies on all test images, by ``"majority vote"`` and ``"single draw"``.
        worst, reduced: images that are right in the worst case, and in that of the reduced suite, by budget.
    """

    def __init__(self, result: Result, row: dict[str, Any]) -> None:
        self.result, self.row, self.recipe = result, row, result["entry"]["recipe"]
        self.name, self.family = result["entry"]["name"], result["entry"]["family"]
        self.label = self.family + ("" if row["noise"] == "none" else f" (noise {row['noise']})")
        self.surrogate = self.recipe["method"] != "likelihood ratio"
        self.clean = {kind: Share(**share) for kind, share in result["clean"][row["noise"]].items()}
        self.worst, self.reduced = (
            {epsilon: np.array([*bits], dtype=np.float64) for epsilon, bits in row["right"][suite].items()}
            for suite in ("worst", "reduced")
        )

    def point(self, clean: float, images: int, right: Right) -> Point:
        """Its place by accuracy, on so many images, and robustness."""
        return Point(self.name, self.family, self.surrogate, bool(self.recipe["adversary"]), clean, images, right)


class Page:
    """Tables and words of the page of a study, from its results."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        groups = {
            name: [r for r in results if r["entry"]["group"] == name] for name in ("usual", "front", "seed", "tune")
        }
        usual = [Line(result, row) for result in groups["usual"] for row in result["rows"]]
        self.usual = sorted(usual, key=lambda line: (not line.surrogate, line.family))
        # The first row of each network: noise off.
        self.silent = {name: [Line(r, r["rows"][0]) for r in members] for name, members in groups.items()}
        self.budgets = {name: [*lines[0].row["worst_case"]] if lines else [] for name, lines in self.silent.items()}
        self.reference = next((line for line in self.usual if line.family == "surrogate"), None)
        # Budget of the summary.
        self.budget = "0.05" if "0.05" in self.budgets["usual"] else next(iter(self.budgets["usual"]), "")

    def against(self, line: Line, epsilon: str) -> str:
        """Difference to the surrogate network on the images that both were attacked on, with McNemar's p."""
        own, other = line.worst.get(epsilon), self.reference.worst.get(epsilon) if self.reference else None
        if own is None or other is None:
            return "-"
        other = other[: len(own)]
        test = mcnemar(torch.as_tensor(own == 1), torch.as_tensor(other == 1))
        return f"{test}, p = {test.p_value:.2g}"

    def short(self) -> Table:
        """Table A at one budget, noise off."""
        lines = [
            [line.label, str(line.clean["majority vote"]), _share(line.row["worst_case"][self.budget]),
             "-" if line.family == "surrogate" else self.against(line, self.budget), _seconds(line.result),
             line.row["verdict"]]
            for line in self.usual if line.row["noise"] != "on"
        ]  # fmt: skip
        return ["table A", "clean", f"worst, ε = {self.budget}", "minus the surrogate", "training, s", "gates"], lines

    def extremes(self) -> list[str]:
        """The most accurate networks, and how far those of the likelihood ratio are from the front, in words."""
        points = self.points(self.budget)
        kinds = [[p for p in points if p.surrogate is surrogate] for surrogate in (True, False)]
        best = [max(kind, key=lambda p: p.clean) for kind in kinds if kind]
        said = [f"{_short(point.name)}, {_percent(point.clean)} %" for point in best]
        parts = [f"Most accurate on all test images: {'; '.join(said)}."] if said else []
        gaps = [(beside(p, p.rivals(points)), p) for p in kinds[1]]
        known = [(gap, point) for gap, point in gaps if gap is not None]
        if known and self.silent["front"]:
            gap, point = max(known, key=lambda item: item[0].mean)
            ahead = len(gaps) - len(known)
            more = f"; {ahead} more are more accurate than all of these" if ahead else ""
            parts.append(
                f"At equal clean accuracy (table B, ε = {self.budget}) the worst case of {len(known)} likelihood-ratio "
                f"networks lies {100 * min(g.mean for g, _ in known):+.1f} to {100 * gap.mean:+.1f} points from the "
                f"front of the surrogate networks{more}. The highest, with an interval that does not account for its "
                f"being the highest, is {_short(point.name)}: {gap}."
            )
        return parts

    def table_a(self, epsilon: str) -> Table:
        """Table A at one budget."""
        fewest = min(len(line.row["right"]["clean"]) for line in self.usual)
        lines = []
        for line in (line for line in self.usual if epsilon in line.worst):
            attacks = [line.row["attacks"].get(name, {}).get(epsilon) for name in _PAPER]
            worst = line.worst[epsilon]
            lines.append(
                [line.label, *map(str, line.clean.values()), *map(_share, attacks),
                 _percent(line.reduced[epsilon].mean()), f"**{_share(line.row['worst_case'][epsilon])}**",
                 _percent(worst[:fewest].mean()), str(len(worst)), line.row["verdict"]]
            )  # fmt: skip
        header = ["", "clean", "clean, single draw", *_PAPER, "worst, reduced suite", "worst"]
        return [*header, f"worst, first {fewest} images", "images", "gates"], lines

    def differences(self) -> Table:
        """Paired differences to the surrogate network at every budget."""
        budgets = self.budgets["usual"]
        others = [line for line in self.usual if line.family != "surrogate"]
        lines = [[line.label, *(self.against(line, epsilon) for epsilon in budgets)] for line in others]
        return ["", *(f"ε = {epsilon}" for epsilon in budgets)], lines

    def corruptions(self) -> Table:
        """Accuracy on natural corruptions, the mean of five severities, in results of 0.2."""
        corrupted = [line for line in self.usual if line.row.get("corruptions")]
        names = list(dict.fromkeys(name for line in corrupted for name in line.row["corruptions"]))
        lines = []
        for line in corrupted:
            severities = [line.row["corruptions"][name].values() for name in names]
            means = [_percent(np.mean([share["accuracy"] for share in shares])) for shares in severities]
            lines.append([line.label, *means, str(len(line.row["right"]["clean"]))])
        return ["", *names, "images"], lines

    def levels(self) -> Table:
        """Noise levels before and after training."""
        lines = [
            [r["entry"]["name"], name, _spread(before), _spread(r["sigma"]["after"][name])]
            for r in self.results
            if r["entry"]["group"] == "usual" or "sigma" in _short(r["entry"]["name"])
            for name, before in r["sigma"]["before"].items()
        ]
        return ["network", "neurons", "σ before", "σ after"], lines

    def settings(self) -> Table:
        """Options that each network was trained with."""
        lines = []
        for result in self.results:
            recipe, evaluations = result["entry"]["recipe"], result["entry"]["evaluations"]
            ratio = recipe["method"] == "likelihood ratio"
            noise = f"{recipe['noise']}, {recipe['distribution']}, σ = {recipe['sigma']:g}"
            copies = f"{recipe['copies']}" + (f", late {recipe['late_copies']}" if recipe["late_copies"] else "")
            further = [f"{name.replace('_', ' ')} {recipe[name]:g}" for name in _NUMBERS if recipe.get(name)]
            further += [name.replace("_", " ") for name in _SWITCHES if recipe.get(name)]
            further += ["counterfactual attacker"] if recipe.get("attacker") == "counterfactual" else []
            further += [] if recipe["learn_sigma"] else ["σ fixed"]
            attacked = [f"{e['images']}{' held out' if e['held_out'] else ''}" for e in evaluations]
            lines.append(
                [result["entry"]["name"], recipe["model"], f"{result['history'][-1]['epoch']:.3g}",
                 f"{recipe['learning_rate']:g}", "-" if recipe["method"] == "surrogate" else noise,
                 f"{recipe['estimator']}, {copies}" if ratio else "-", recipe.get("objective", "cross-entropy"),
                 ", ".join(further) or "-",
                 str(recipe["seed"]), " and ".join(attacked) or "-", _seconds(result)]
            )  # fmt: skip
        header = ["network", "model", "epochs", "learning rate", "noise", "estimator, copies", "objective", "further"]
        return [*header, "seed", "images attacked", "training, s"], lines

    def seeds(self) -> Table:
        """Clean accuracy and worst case by family, over its seeds; table A's networks are the first seed."""
        runs = [*self.silent["usual"], *self.silent["seed"]] if self.silent["seed"] else []
        budgets = [epsilon for epsilon in self.budgets["seed"] if all(epsilon in line.reduced for line in runs)]
        lines = []
        for family in dict.fromkeys(line.family for line in runs):
            own = [line for line in runs if line.family == family]
            worst = [[line.reduced[epsilon].mean() for line in own] for epsilon in budgets]
            clean = [line.clean["majority vote"].accuracy for line in own]
            lines.append([family, str(len(own)), _over_seeds(clean), *map(_over_seeds, worst)])
        return ["", "seeds", "clean", *(f"worst, ε = {epsilon}" for epsilon in budgets)], lines

    def points(self, epsilon: str) -> list[Point]:
        """Every network of tables A and B, noise off, on the images that all of them were attacked on."""
        lines = [line for line in [*self.silent["usual"], *self.silent["front"]] if epsilon in line.reduced]
        shared = min((len(line.reduced[epsilon]) for line in lines), default=0)
        return [
            line.point(share.accuracy, share.images, line.reduced[epsilon][:shared])
            for line in lines
            for share in [line.clean["majority vote"]]
        ]

    def fronts(self) -> Table:
        """Table B: every network, and its distance to the front of the surrogate networks."""
        points = [self.points(epsilon) for epsilon in self.budgets["front"]]
        cells = [to_the_front(at_budget, " *") for at_budget in points]
        seconds = {result["entry"]["name"]: _seconds(result) for result in self.results}
        lines = [
            [point.family, _short(point.name).removeprefix(point.family).removeprefix(", "), _percent(point.clean),
             *(cell for by_name in cells for cell in by_name.get(point.name, ["-", "-"])), seconds[point.name]]
            for point in sorted(next(iter(points), []), key=lambda p: (p.family, -p.clean))
        ]  # fmt: skip
        return ["family", "change", "clean", *_headings(self.budgets["front"]), "training, s"], lines

    def tuning(self) -> Table:
        """Settings that were tried on held-out images, and their distance to the surrogate networks that were tried."""
        tried, cells = self.silent["tune"], []
        for epsilon in self.budgets["tune"]:
            clean = [(line.result["validation"], line.recipe["validation"]) for line in tried]
            points = [line.point(*share, line.worst[epsilon]) for line, share in zip(tried, clean, strict=True)]
            cells.append(to_the_front(points, ""))
        lines = [
            [_short(line.name), _percent(line.result["validation"]),
             *(cell for by_name in cells for cell in by_name[line.name]), _seconds(line.result)]
            for line in tried
        ]  # fmt: skip
        return ["", "clean", *_headings(self.budgets["tune"]), "training, s"], lines

    def gates(self) -> list[str | Table]:
        """What every gate measured, a table for each network."""
        parts: list[str | Table] = []
        for result in (line.result for line in self.silent["usual"]):
            gates = [(row["noise"], Gate(**values)) for row in result["rows"] for values in row["gates"]]
            lines = [[noise, gate.name, gate.verdict, gate.detail] for noise, gate in gates]
            parts += [f"### {result['entry']['family']}", (["noise", "gate", "", "measured"], lines)]
        return parts

    def foot(self) -> str:
        """The command, versions and machines."""
        versions = dict.fromkeys(listed(r["versions"]) for r in self.results)
        machines = dict.fromkeys(r["machine"] for r in self.results)
        minutes = sum(entry["seconds"] for r in self.results for entry in r["history"]) / 60
        return (
            f"Command: `{self.results[0]['command']}`; this page again from its results: `snntorch-lr report DIR`, DIR "
            f"the folder of `{TOGETHER}`. {len(self.results)} networks, {minutes:.0f} minutes of training. Versions: "
            f"{'; '.join(versions)}. Machine: {'; '.join(machines)}."
        )

    def to_markdown(self) -> str:
        """The whole page; a section whose table has no lines is left out."""
        # Every study has it, to transfer from.
        recipe = next((r for r in self.results if r["entry"]["name"] == "surrogate"), self.results[0])["entry"][
            "recipe"
        ]
        picture = "![accuracy and robustness](fronts.png)"
        tables_a: list[tuple[str, list[str | Table]]] = [
            (f"Table A, as usually compared: ε = {epsilon}", [self.table_a(epsilon)])
            for epsilon in self.budgets["usual"]
        ]
        if self.usual:
            attacks = self.usual[0].result["entry"]["evaluations"][0]["attacks"]
            suite = f"the suite {attacks!r}" if isinstance(attacks, str) else ", ".join(attacks)
            suite = "the reduced suite" if attacks == [*REDUCED] else suite
            tables_a[-1][1].append(_NOTE_A.format(suite=suite, reduced=", ".join(REDUCED)))
        sections: list[tuple[str, list[str | Table]]] = [
            ("In short", [self.short(), *self.extremes(), _NOTE_SHORT]),
            ("Table B, at equal clean accuracy", [picture, self.fronts(), _NOTE_B]),
            *tables_a,
            ("Worst case minus that of the surrogate", [_NOTE_DIFFERENCES, self.differences()]),
            ("Natural corruptions", ["Mean of five severities.", self.corruptions()]),
            ("Noise levels", [_NOTE_LEVELS, self.levels()]),
            ("Seeds", [_NOTE_SEEDS, self.seeds()]),
            ("Tried on held-out training images", [_NOTE_TUNE, self.tuning()]),
            ("Gates", self.gates()),
            ("Settings", [self.settings(), self.foot()]),
        ]
        parts = [f"# The study: {recipe['dataset']}, {recipe['model']}", _HEAD]
        for heading, content in sections:
            if any(table[1] for table in content if not isinstance(table, str)):
                parts.append(f"## {heading}")
                parts += [part if isinstance(part, str) else markdown(*part) for part in content]
        return "\n\n".join(parts) + "\n"

    def figure(self) -> Figure:
        """Worst case against clean error, a panel for each budget, a line for each family; surrogates hollow."""
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        panels = [(epsilon, self.points(epsilon)) for epsilon in self.budgets["front"]]
        figure, axes = new_figure(11, 5.4, len(panels))
        families = list(dict.fromkeys(point.family for _, points in panels for point in points))
        colors = colors_of(families)
        for axis, (epsilon, points) in zip(axes, panels, strict=True):
            for index, family in enumerate(families):
                mine = sorted((p for p in points if p.family == family), key=lambda p: p.clean)
                if not mine:
                    continue
                middle, bars = percent([wilson(int(point.right.sum()), len(point.right)) for point in mine])
                wrong = [wilson(round(point.images * (1 - point.clean)), point.images) for point in mine]
                error, sides = percent(wrong)
                look: dict[str, Any] = {"color": colors[family], "marker": _MARKERS[index % len(_MARKERS)]}
                look |= {"linestyle": "-" if len(mine) > 2 else "none"} | (
                    {"mfc": "white"} if mine[0].surrogate else {}
                )
                axis.errorbar(error, middle, bars, sides, lw=1, elinewidth=0.5, label=family, **look)
            # Most networks differ by a point or two, and some by ten.
            axis.set(xscale="log", xlabel="error on all test images (%), smaller to the right", title=f"ε = {epsilon}")
            axis.set_ylabel("worst-case accuracy, reduced suite (%)")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.invert_xaxis()
        figure.suptitle(
            "Robust and accurate is at the top right; 95 % intervals, noise off; surrogate gradients hollow"
        )
        return with_legend(figure, axes[0], 3)


def _share(share: dict[str, Any] | None) -> str:
    return "-" if share is None else str(Share(**share))


def _short(name: str) -> str:
    """Name of a network without its group."""
    return name.partition(": ")[2]


def _headings(budgets: Sequence[str]) -> list[str]:
    return [heading for epsilon in budgets for heading in (f"worst, ε = {epsilon}", "to the front")]


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f}"


def _seconds(result: Result) -> str:
    return f"{sum(entry['seconds'] for entry in result['history']):.0f}"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"mean {np.mean(values):.3g}, {min(values):.3g} to {max(values):.3g}"


def _over_seeds(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _percent(values[0])
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{_percent(np.mean(values))} ± {_percent(half)}"


_HEAD = (
    "Accuracy in percent. Clean: all test images, noise off or by the majority of 32 noise draws. Under attack: the "
    "images attacked, per-example worst case. Intervals: 95 %."
)
_NOTE_SHORT = (
    "Intervals and p-values (exact McNemar tests, not corrected for their number) are over images, of networks that "
    "are given; what another training run gives is under Seeds, where there are any."
)
_NOTE_DIFFERENCES = (
    "In points, with Newcombe's interval for pairs and McNemar's p, on the images that both were attacked on: fewer "
    "where the noise is on."
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
_NOTE_A = (
    "Same network, same data, same number of epochs, no tuning for robustness. 'worst' is the worst case over {suite} "
    "and transfers; the reduced suite is {reduced}. Noise off and on were attacked on different numbers of images: "
    "compare them on the first ones. Without 'all gates passed' a line is no claim of robustness."
)


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write the tables and figures of a study again, from its results alone.

    Example: snntorch-lr report runs/study/digits
    """

    place = "{results}"
    results: Path = option(help="folder of results of a study", positional=True)

    def run(self) -> Outcome:
        """Writes the page of the results of a folder: of single files, or else of the one with all of them."""
        single = [path for path in sorted(self.results.glob("*.json")) if path.name != TOGETHER]
        return write(single or [*self.results.glob(TOGETHER)], self.results, self.folder)


def write(paths: Sequence[Path], source: Path, out: Path) -> Outcome:
    """Writes ``index.md``, its figure, and ``results.json``, all that they are made from, from files of a source."""
    results = [result for path in paths for result in _read(path)]
    if not results:
        raise ValueError(f"{source} holds no results of a study")
    names = [result["entry"]["name"] for result in results]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{source} holds more than one result of {', '.join(sorted(twice))}")
    page, written = Page(results), ["index.md", TOGETHER]
    # A line for each network.
    lines = ",\n".join(json.dumps(result, ensure_ascii=False, allow_nan=False) for result in results)
    files.write_text(out / TOGETHER, f"[\n{lines}\n]\n")
    if page.silent["front"]:
        files.save_figure(out / "fronts.png", page.figure(), dpi=120, metadata={"Software": None})
        written.append("fronts.png")
    files.write_text(out / "index.md", page.to_markdown())
    return Outcome(results, f"Written: {', '.join(str(out / name) for name in written)}")


def _read(path: Path) -> list[Result]:
    """The results of a file: of one network, or of many."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a result of a study: {error}") from error
    results = read if isinstance(read, list) else [read]
    return [result for result in results if isinstance(result, dict) and "entry" in result]
