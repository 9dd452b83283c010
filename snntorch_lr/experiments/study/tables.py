"""Tables of the page of a study, and fronts of accuracy and robustness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ..._messages import markdown
from ...robustness import Gate, Share, mcnemar, wilson
from ..files import share_text

Result = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
PAPER = ("FGSM", "RFGSM", "PGD", "MIFGSM")
NUMBERS = ("decay", "input_noise", "adversary", "free", "penalty", "anneal")
SWITCHES = ("input_noise_each_step", "learn_input_noise")


@dataclass(frozen=True)
class Difference:
    """A paired difference of accuracies with its 95 % interval (Student's t over the images)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class Point:
    """One network on the plane of accuracy and robustness; ``change`` is its label within the family."""

    name: str
    family: str
    change: str
    surrogate: bool  # trained by surrogate gradients
    adversarial: bool  # trained on adversarial images
    clean: float  # accuracy, in [0, 1], of so many images
    right: NDArray[np.float64]  # under attack, 0 or 1, [images]
    images: int

    @property
    def error(self) -> Share:
        """Fraction of the clean images that are wrong, with its interval."""
        return wilson(round(self.images * (1 - self.clean)), self.images)

    @property
    def worst(self) -> float:
        """Worst-case accuracy."""
        return float(self.right.mean())


def difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """Mean difference of two networks on the same images."""
    each = first - second
    if np.ptp(each) == 0:
        return Difference(float(each[0]), float(each[0]), float(each[0]))
    interval = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    return Difference(float(each.mean()), float(interval.low), float(interval.high))


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


def of_group(results: Iterable[Result], group: str) -> list[Result]:
    """Results of a group of entries."""
    return [result for result in results if result["entry"]["group"] == group]


def budgets_of(results: Sequence[Result]) -> list[str]:
    """Budgets at which networks were attacked, as they are written."""
    return list(results[0]["rows"][0]["worst_case"]) if results else []


def shown(results: Sequence[Result]) -> str:
    """Budget of the summary."""
    budgets = budgets_of(of_group(results, "usual"))
    return "0.05" if "0.05" in budgets else budgets[0]


def _is_surrogate(result: Result) -> bool:
    return bool(result["entry"]["recipe"]["method"] != "likelihood ratio")


def _columns(results: Sequence[Result]) -> list[tuple[str, Result, dict[str, Any]]]:
    """Label, result and row of each network with its noise off and on; surrogates first."""
    ordered = sorted(results, key=lambda r: (not _is_surrogate(r), r["entry"]["family"]))
    return [
        (r["entry"]["family"] + ("" if row["noise"] == "none" else f" (noise {row['noise']})"), r, row)
        for r in ordered
        for row in r["rows"]
    ]


def usual(results: Sequence[Result], epsilon: str) -> Table:
    """Table A at one budget."""
    columns = _columns(results)
    fewest = min(len(row["right"]["clean"]) for _, _, row in columns)
    lines = []
    for label, result, row in columns:
        clean, right = result["clean"][row["noise"]], row["right"]
        if epsilon in right["worst"]:
            cells = [share_text(clean["majority vote"]), share_text(clean["single draw"])]
            cells += [share_text(row["attacks"].get(name, {}).get(epsilon)) for name in PAPER]
            cells += [_right(right["reduced"][epsilon]), f"**{share_text(row['worst_case'][epsilon])}**"]
            cells += [_right(right["worst"][epsilon][:fewest]), str(len(right["clean"])), row["verdict"]]
            lines.append([label, *cells])
    header = ["", "clean", "clean, single draw", *PAPER, "worst, reduced suite", "worst"]
    return [*header, f"worst, first {fewest} images", "images", "gates"], lines


def short(results: Sequence[Result]) -> Table:
    """Table A at one budget, noise off."""
    epsilon = shown(results)
    reference = _reference(results, epsilon)
    lines = []
    for label, result, row in _columns(results):
        if row["noise"] != "on":
            cells = [share_text(result["clean"][row["noise"]]["majority vote"]), share_text(row["worst_case"][epsilon])]
            own = result["entry"]["family"] == "surrogate"
            cells += ["-" if own else _against(row["right"]["worst"][epsilon], reference)]
            cells += [_seconds(result), row["verdict"]]
            lines.append([label, *cells])
    return ["table A", "clean", f"worst, ε = {epsilon}", "minus the surrogate", "training, s", "gates"], lines


def extremes(results: Sequence[Result]) -> list[str]:
    """The most accurate networks, and how far those of the likelihood ratio are from the front, in words."""
    epsilon = shown(results)
    found = points(results, epsilon)
    kinds = [[p for p in found if p.surrogate is surrogate] for surrogate in (True, False)]
    best = [max(kind, key=lambda p: p.clean) for kind in kinds if kind]
    said = [f"{_named(point)}, {_percent(point.clean)} %" for point in best]
    parts = [f"Most accurate on all test images: {'; '.join(said)}."] if said else []
    gaps = [(beside(p, _rivals(found, p)), p) for p in kinds[1]]
    known = [(gap, point) for gap, point in gaps if gap is not None]
    ahead = len(gaps) - len(known)
    if known and of_group(results, "front"):
        gap, point = max(known, key=lambda item: item[0].mean)
        parts.append(
            f"At equal clean accuracy (table B, ε = {epsilon}) the worst case of {len(known)} likelihood-ratio "
            f"networks lies {100 * min(g.mean for g, _ in known):+.1f} to {100 * gap.mean:+.1f} points from the front "
            f"of the surrogate networks{f'; {ahead} more are more accurate than all of these' if ahead else ''}. The "
            f"highest, with an interval that does not account for its being the highest, is {_named(point)}: {gap}."
        )
    return parts


def _named(point: Point) -> str:
    return point.name.partition(": ")[2]


def _reference(results: Sequence[Result], epsilon: str) -> str | None:
    """Images that the surrogate network of table A has right in the worst case."""
    rows = [r["rows"][0] for r in results if r["entry"]["family"] == "surrogate"]
    return rows[0]["right"]["worst"].get(epsilon) if rows else None


def _against(bits: str | None, reference: str | None) -> str:
    """Difference of two networks on the images that both were attacked on, with McNemar's p."""
    if bits is None or reference is None:
        return "-"
    mine, other = _array(bits), _array(reference)[: len(bits)]
    p = mcnemar(torch.as_tensor(mine == 1), torch.as_tensor(other == 1)).p_value
    return f"{difference(mine, other)}, p = {p:.2g}"


def differences(results: Sequence[Result]) -> Table:
    """Paired differences to the surrogate network at every budget."""
    budgets = budgets_of(results)
    lines = [
        [label, *(_against(row["right"]["worst"].get(e), _reference(results, e)) for e in budgets)]
        for label, result, row in _columns(results)
        if result["entry"]["family"] != "surrogate"
    ]
    return ["", *(f"ε = {epsilon}" for epsilon in budgets)], lines


def corruptions(results: Sequence[Result]) -> Table:
    """Accuracy on natural corruptions, the mean of five severities, in results of 0.2."""
    columns = [column for column in _columns(results) if column[2].get("corruptions")]
    names = list(dict.fromkeys(name for _, _, row in columns for name in row["corruptions"]))
    lines = []
    for label, _, row in columns:
        found = [[share["accuracy"] for share in row["corruptions"][name].values()] for name in names]
        lines.append([label, *(_percent(np.mean(each)) for each in found), str(len(row["right"]["clean"]))])
    return ["", *names, "images"], lines


def levels(results: Sequence[Result]) -> Table:
    """Noise levels before and after training."""
    shown = [r for r in results if r["entry"]["group"] == "usual" or "sigma" in r["entry"]["name"].partition(":")[2]]
    lines = [
        [r["entry"]["name"], name, _spread(before), _spread(r["sigma"]["after"][name])]
        for r in shown
        for name, before in r["sigma"]["before"].items()
    ]
    return ["network", "neurons", "σ before", "σ after"], lines


def settings(results: Sequence[Result]) -> Table:
    """Options that each network was trained with."""
    lines = []
    for result in results:
        recipe, evaluations = result["entry"]["recipe"], result["entry"]["evaluations"]
        ratio = recipe["method"] == "likelihood ratio"
        noise = f"{recipe['noise']}, {recipe['distribution']}, σ = {recipe['sigma']:g}"
        copies = f"{recipe['copies']}" + (f", late {recipe['late_copies']}" if recipe["late_copies"] else "")
        extras = [f"{name.replace('_', ' ')} {recipe[name]:g}" for name in NUMBERS if recipe.get(name)]
        extras += [name.replace("_", " ") for name in SWITCHES if recipe.get(name)]
        extras += ["counterfactual attacker"] if recipe.get("attacker") == "counterfactual" else []
        extras += [] if recipe["learn_sigma"] else ["σ fixed"]
        attacked = [f"{each['images']}{' held out' if each['held_out'] else ''}" for each in evaluations]
        lines.append(
            [
                result["entry"]["name"], recipe["model"], f"{result['history'][-1]['epoch']:.3g}",
                f"{recipe['learning_rate']:g}", "-" if recipe["method"] == "surrogate" else noise,
                f"{recipe['estimator']}, {copies}" if ratio else "-", recipe["objective"], ", ".join(extras) or "-",
                str(recipe["seed"]), " and ".join(attacked) or "-", _seconds(result),
            ]
        )  # fmt: skip
    header = ["network", "model", "epochs", "learning rate", "noise", "estimator, copies", "objective", "further"]
    return [*header, "seed", "images attacked", "training, s"], lines


def gates(result: Result) -> str:
    """Measurements of the gates of a network."""
    lines = [
        [row["noise"], gate.name, gate.verdict, gate.detail]
        for row in result["rows"]
        for gate in (Gate(**each) for each in row["gates"])
    ]
    return f"### {result['entry']['family']}\n\n" + markdown(["noise", "gate", "", "measured"], lines)


def seeds(results: Sequence[Result]) -> Table:
    """Clean accuracy and worst case by family, over its seeds; table A's networks are the first seed."""
    both = [*of_group(results, "usual"), *of_group(results, "seed")]
    budgets = budgets_of(of_group(results, "seed"))
    budgets = [e for e in budgets if all(e in r["rows"][0]["right"]["reduced"] for r in both)]
    lines = []
    for family in dict.fromkeys(r["entry"]["family"] for r in both):
        runs = [r for r in both if r["entry"]["family"] == family]
        rows = [r["rows"][0] for r in runs]
        clean = [r["clean"][row["noise"]]["majority vote"]["accuracy"] for r, row in zip(runs, rows, strict=True)]
        worst = [[float(_array(row["right"]["reduced"][epsilon]).mean()) for row in rows] for epsilon in budgets]
        lines.append([family, str(len(runs)), _over_seeds(clean), *map(_over_seeds, worst)])
    return ["", "seeds", "clean", *(f"worst, ε = {epsilon}" for epsilon in budgets)], lines


def points(results: Sequence[Result], epsilon: str) -> list[Point]:
    """Every network of tables A and B, noise off, on the images that all of them were attacked on."""
    found: list[Point] = []
    for result in [*of_group(results, "usual"), *of_group(results, "front")]:
        row = result["rows"][0]
        if epsilon in row["right"]["reduced"]:
            clean = result["clean"][row["noise"]]["majority vote"]
            found.append(_point(result, clean["accuracy"], row["right"]["reduced"][epsilon], clean["images"]))
    shared = min((len(point.right) for point in found), default=0)
    return [replace(point, right=point.right[:shared]) for point in found]


def _point(result: Result, clean: float, right: str, images: int) -> Point:
    entry = result["entry"]
    change = entry["name"].partition(": ")[2].removeprefix(entry["family"]).removeprefix(", ")
    adversarial = bool(entry["recipe"]["adversary"])
    return Point(
        entry["name"], entry["family"], change, _is_surrogate(result), adversarial, clean, _array(right), images
    )  # fmt: skip


def _rivals(points: Sequence[Point], own: Point) -> list[Point]:
    """Surrogate networks that a network is compared with: the PGD-trained only if it is trained so too."""
    return [p for p in points if p.surrogate and (own.adversarial or not p.adversarial)]


def fronts(results: Sequence[Result]) -> Table:
    """Table B: every network, and its distance to the front of the surrogate networks."""
    budgets = budgets_of(of_group(results, "front"))
    by_budget = {epsilon: {p.name: p for p in points(results, epsilon)} for epsilon in budgets}
    named = {result["entry"]["name"]: result for result in results}
    lines = []
    for point in sorted(by_budget[budgets[0]].values(), key=lambda p: (p.family, -p.clean)):
        cells = []
        for epsilon in budgets:
            if own := by_budget[epsilon].get(point.name):
                rivals = _rivals([*by_budget[epsilon].values()], own)
                on_front = any(p.name == own.name for p in front(rivals))
                apart = None if any(p.name == own.name for p in rivals) else beside(own, rivals)
                cells += [_percent(own.worst) + (" *" if on_front else ""), "-" if apart is None else str(apart)]
            else:
                cells += ["-", "-"]
        lines.append([point.family, point.change, _percent(point.clean), *cells, _seconds(named[point.name])])
    return ["family", "change", "clean", *_headings(budgets), "training, s"], lines


def tuning(results: Sequence[Result]) -> Table:
    """Settings that were tried on held-out images, and their distance to the surrogate networks that were tried."""
    tried = of_group(results, "tune")
    budgets = budgets_of(tried)
    lines = [[r["entry"]["name"].partition(": ")[2], _percent(r["validation"])] for r in tried]
    for epsilon in budgets:
        held_out = [
            _point(r, r["validation"], r["rows"][0]["right"]["worst"][epsilon], r["entry"]["recipe"]["validation"])
            for r in tried
        ]
        for line, point in zip(lines, held_out, strict=True):
            apart = None if point.surrogate else beside(point, _rivals(held_out, point))
            line += [_percent(point.worst), "-" if apart is None else str(apart)]
    header = ["", "clean", *_headings(budgets), "training, s"]
    return header, [[*line, _seconds(r)] for line, r in zip(lines, tried, strict=True)]


def _headings(budgets: Sequence[str]) -> list[str]:
    return [heading for epsilon in budgets for heading in (f"worst, ε = {epsilon}", "to the front")]


def _array(bits: str) -> NDArray[np.float64]:
    return np.array([bit == "1" for bit in bits], dtype=np.float64)


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f}"


def _right(bits: str) -> str:
    return _percent(_array(bits).mean())


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
