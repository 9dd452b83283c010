"""Pictures of a robustness report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .gates import mark
from .measure import Protocol, Row
from .statistics import share_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def epsilon(rows: Sequence[Row], protocol: Protocol) -> Figure:
    """Worst case with its interval, and the ladder of plain ascent, against the budget."""
    figure = _figure()
    axes = figure.subplots()
    for index, row in enumerate(rows):
        budgets = [0.0, *protocol.epsilons]
        shares = [share_of(row.clean), *(share_of(row.worst(e)) for e in protocol.epsilons)]
        middle = [100 * share.accuracy for share in shares]
        axes.plot(budgets, middle, marker="o", color=f"C{index}", label=_label(row))
        axes.fill_between(
            budgets, [100 * s.low for s in shares], [100 * s.high for s in shares], color=f"C{index}", alpha=0.15, lw=0
        )
        # The ladder is measured on images that are right clean.
        heights = [middle[0] * share for share in (1.0, *row.findings.ladder.values())]
        axes.plot([0.0, *row.findings.ladder], heights, color=f"C{index}", ls=":", lw=1)
    axes.set_xscale("symlog", linthresh=protocol.epsilons[0])
    ticks = sorted({0.0, *protocol.epsilons, *(e for row in rows for e in row.findings.ladder)})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel=f"ε ({protocol.norm})", ylabel="accuracy (%)", ylim=(0, 103))
    axes.set_title("worst case over all attacks (solid), plain ascent from the image (dotted)", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def steps(rows: Sequence[Row]) -> Figure:
    """Accuracy of the probed images against the steps of plain ascent."""
    figure = _figure()
    axes = figure.subplots()
    for index, row in enumerate(rows):
        curve = row.findings.steps
        axes.plot(list(curve), [100 * share for share in curve.values()], marker="o", color=f"C{index}",
                  label=f"{_label(row)}, ε = {row.findings.epsilon:g}")  # fmt: skip
    counts = sorted({count for row in rows for count in row.findings.steps})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="steps", ylabel="accuracy on images that are right clean (%)", ylim=(0, 103))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def surrogates(rows: Sequence[Row], protocol: Protocol) -> Figure:
    """Accuracy through each surrogate, a panel for each budget."""
    figure = _figure(width=3 + 2.5 * len(protocol.epsilons))
    panels = figure.subplots(1, len(protocol.epsilons), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, protocol.epsilons, strict=True):
        for index, row in enumerate(rows):
            found = {name: right[budget] for name, right in row.by_surrogate().items()} | {
                "worst case": row.worst(budget)
            }
            shares = [share_of(right) for right in found.values()]
            places = [place + 0.6 * (index + 0.5) / len(rows) - 0.3 for place in range(len(found))]
            middle = [100 * share.accuracy for share in shares]
            # Rounding may put an end of the interval on the wrong side of its middle.
            below = [100 * max(0.0, share.accuracy - share.low) for share in shares]
            above = [100 * max(0.0, share.high - share.accuracy) for share in shares]
            label = _label(row) if axes is panels[0] else None
            axes.errorbar(middle, places, xerr=[below, above], fmt="o", ms=4, lw=1, color=f"C{index}", label=label)
            axes.set_yticks(range(len(found)), list(found))
        axes.set(title=f"ε = {budget:g}", xlabel="accuracy (%)", xlim=(-2, 103))
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _label(row: Row) -> str:
    return f"{row.subject.label}{mark(row.findings.gates)}"


def _figure(width: float = 7.0) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing: pip install 'snntorch-lr[experiments]'") from error
    return Figure(figsize=(width, 4.5), layout="constrained")
