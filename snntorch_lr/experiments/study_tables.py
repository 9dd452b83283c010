"""Tables of the page of a study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from .._messages import markdown
from ..robustness import Gate
from ..robustness.statistics import mcnemar
from .fronts import Point, beside, difference, front

Result = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
PAPER = ("FGSM", "RFGSM", "PGD", "MIFGSM")
SHOWN = "0.05"
"""Budget of the summary."""
REFERENCE = "surrogate, PGD-trained"


def of_group(results: Iterable[Result], group: str) -> list[Result]:
    """Results of a group of entries."""
    return [result for result in results if result["entry"]["group"] == group]


def budgets_of(results: Sequence[Result]) -> list[str]:
    """Budgets at which networks were attacked, as they are written."""
    return list(results[0]["rows"][0]["worst_case"]) if results else []


def _columns(results: Sequence[Result]) -> list[tuple[str, Result, dict[str, Any]]]:
    """Label, result and row of each network with its noise off and on; surrogates first."""
    ordered = sorted(results, key=lambda r: (not r["entry"]["family"].startswith("surrogate"), r["entry"]["family"]))
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
            cells = [_share(clean["majority vote"]), _share(clean["single draw"])]
            cells += [_share(row["attacks"].get(name, {}).get(epsilon)) for name in PAPER]
            cells += [_right(right["reduced"][epsilon]), f"**{_share(row['worst_case'][epsilon])}**"]
            cells += [_right(right["worst"][epsilon][:fewest]), str(len(right["clean"])), row["verdict"]]
            lines.append([label, *cells])
    header = ["", "clean", "clean, single draw", *PAPER, "worst, reduced suite", "worst"]
    return [*header, f"worst, first {fewest} images", "images", "gates"], lines


def short(results: Sequence[Result]) -> Table:
    """Table A at one budget, noise off."""
    epsilon = SHOWN if SHOWN in budgets_of(results) else budgets_of(results)[0]
    reference = _reference(results, epsilon)
    lines = []
    for label, result, row in _columns(results):
        if row["noise"] != "on":
            cells = [_share(result["clean"][row["noise"]]["majority vote"]), _share(row["worst_case"][epsilon])]
            own = result["entry"]["family"] == "surrogate"
            cells += ["-" if own else _against(row["right"]["worst"][epsilon], reference)]
            cells += [_seconds(result), row["verdict"]]
            lines.append([label, *cells])
    return ["table A", "clean", f"worst, ε = {epsilon}", "minus the surrogate", "training, s", "gates"], lines


def extremes(results: Sequence[Result]) -> list[str]:
    """The most accurate networks, and how far those of the likelihood ratio are from the front, in words."""
    found = points(results, SHOWN)
    best = {
        kind: max((p for f, _, p in found if f.startswith(kind)), key=lambda p: p.clean, default=None)
        for kind in ("surrogate", "likelihood ratio")
    }
    said = [f"{_named(point)}, {_percent(point.clean)} %" for point in best.values() if point]
    parts = [f"Most accurate on all test images: {'; '.join(said)}."] if said else []
    gaps = [(p, beside(p, _rivals(found, f))) for f, _, p in found if f.startswith("likelihood ratio")]
    known = [(gap, point) for point, gap in gaps if gap is not None]
    ahead = len(gaps) - len(known)
    if known and of_group(results, "front"):
        gap, point = max(known, key=lambda item: item[0].mean)
        parts.append(
            f"At equal clean accuracy (table B, ε = {SHOWN}) the worst case of {len(known)} likelihood-ratio networks "
            f"lies {100 * min(g.mean for g, _ in known):+.1f} to {100 * gap.mean:+.1f} points from the front of the "
            f"surrogate networks{f'; {ahead} more are more accurate than all of these' if ahead else ''}. The highest, "
            f"with an interval that does not account for its being the highest, is {_named(point)}: {gap}."
        )
    return parts


def _named(point: Point) -> str:
    return point.name.partition(": ")[2]


def _reference(results: Sequence[Result], epsilon: str) -> str | None:
    """What the surrogate network of table A has right in the worst case."""
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
    """Accuracy on natural corruptions, the mean of five severities."""
    columns = [column for column in _columns(results) if column[2]["corruptions"]]
    names = list(dict.fromkeys(name for _, _, row in columns for name in row["corruptions"]))
    lines = []
    for label, _, row in columns:
        found = [[share["accuracy"] for share in row["corruptions"][name].values()] for name in names]
        lines.append([label, *(_percent(np.mean(each)) for each in found), str(len(row["right"]["clean"]))])
    return ["", *names, "images"], lines


def pair(results: Sequence[Result]) -> dict[str, Result]:
    """Vanilla and approximate with membrane noise, if both are there."""
    named = {r["entry"]["family"].removeprefix("likelihood ratio, "): r for r in results}
    wanted = ("membrane, vanilla", "membrane, approximate")
    return {name: named[name] for name in wanted} if named.keys() >= {*wanted} else {}


def costs(results: Sequence[Result]) -> Table:
    """Membrane noise: vanilla and approximate side by side."""
    both = pair(results)
    rows = [r["rows"][0] for r in both.values()]
    lines = [
        ["clean", *(_share(r["clean"]["off"]["majority vote"]) for r in both.values())],
        *([f"worst, ε = {e}", *(_share(row["worst_case"][e]) for row in rows)] for e in budgets_of(results)),
        ["training, s", *map(_seconds, both.values())],
        ["memory of a step, MB", *(f"{r['step_megabytes']:.0f}" for r in both.values())],
    ]
    return ["", *both], lines


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
    """What each network was trained with."""
    lines = []
    for result in results:
        recipe, evaluations = result["entry"]["recipe"], result["entry"]["evaluations"]
        ratio = recipe["method"] == "likelihood ratio"
        noise = f"{recipe['noise']}, {recipe['distribution']}, σ = {recipe['sigma']:g}"
        copies = f"{recipe['copies']}" + (f", late {recipe['late_copies']}" if recipe["late_copies"] else "")
        extras = [f"{name} {recipe[name]:g}" for name in ("decay", "input_noise", "adversary") if recipe[name]]
        extras += [] if recipe["learn_sigma"] else ["σ fixed"]
        extras += ["σ per neuron"] if recipe["per_neuron"] else []
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
    """What the gates of a network measured."""
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
    for result in [*of_group(results, "usual"), *of_group(results, "front")]:
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


def fronts(results: Sequence[Result]) -> Table:
    """Table B: every network, and its distance to the front of the surrogate networks."""
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
        lines.append([family, change, _percent(point.clean), *cells, _seconds(result)])
    header = ["family", "change", "clean"]
    for epsilon in budgets:
        header += [f"worst, ε = {epsilon}", "to the front"]
    return [*header, "training, s"], lines


def tuning(results: Sequence[Result]) -> Table:
    """What was tried on held-out images, and its distance to the surrogate networks that were tried."""
    tried = of_group(results, "tune")
    budgets = budgets_of(tried)
    header, lines = ["", "clean"], [[r["entry"]["name"].partition(": ")[2], _percent(r["validation"])] for r in tried]
    for epsilon in budgets:
        header += [f"worst, ε = {epsilon}", "to the front"]
        held_out = [_held_out(result, epsilon) for result in tried]
        for line, (family, _, point) in zip(lines, held_out, strict=True):
            own = family.startswith("surrogate")
            apart = None if own else beside(point, _rivals(held_out, family))
            line += [_percent(point.worst), "-" if apart is None else str(apart)]
    return [*header, "training, s"], [[*line, _seconds(r)] for line, r in zip(lines, tried, strict=True)]


def _held_out(result: Result, epsilon: str) -> tuple[str, str, Point]:
    """A network on held-out images, as ``points`` gives those on test images."""
    entry = result["entry"]
    family = entry["family"] + (", PGD-trained" if entry["recipe"]["adversary"] else "")
    right = _array(result["rows"][0]["right"]["worst"][epsilon])
    return family, "", Point(entry["name"], result["validation"], right)


def _array(bits: str) -> NDArray[np.float64]:
    return np.array([bit == "1" for bit in bits], dtype=np.float64)


def _percent(value: Any) -> str:
    return f"{100 * float(value):.1f}"


def _right(bits: str) -> str:
    return _percent(_array(bits).mean())


def _share(share: dict[str, float] | None) -> str:
    return "-" if share is None else f"{100 * share['accuracy']:.1f} ± {50 * (share['high'] - share['low']):.1f}"


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
