"""Figures of an evaluation, and the colours of networks in every figure of this package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .._messages import install
from .gates import mark
from .scoring import Share, share_of, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import RobustnessReport, Row

COLORS = {
    "likelihood ratio": "#D55E00",
    "surrogate": "#0072B2",
    "surrogate same noise": "#56B4E9",
    "surrogate stopped": "#009E73",
    "surrogate noisy input": "#882255",
    "likelihood ratio noisy input": "#E69F00",
    "surrogate adversarial training": "#332288",
    "likelihood ratio adversarial training": "#CC79A7",
}
"""Colours of networks by name, warm for the likelihood ratio and cold for the surrogate.

Source: Okabe & Ito (2008), "Color Universal Design", which people with any colour vision tell apart.
"""
_LONG = {
    "surrogate noise": "surrogate same noise",
    "surrogate adversarial": "surrogate adversarial training",
    "lr": "likelihood ratio",
    "lr noisy input": "likelihood ratio noisy input",
    "lr adversarial": "likelihood ratio adversarial training",
}
_FURTHER = ("#7F7F7F", "#999933", "#44AA99", "#661100")
_SIGNS = {" !": "! a gate failed: masking suspected", " ?": "? a gate was not run: masking not ruled out"}


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Colours by name: the fixed ones of ``COLORS``, and for other names those that are left, in order.

    Hyphens and commas in a name do not matter, and ``lr`` is the likelihood ratio: checkpoints are called like their
    networks.

    Examples:
        >>> colors_of(["network", "surrogate"])
        {'surrogate': '#0072B2', 'network': '#D55E00'}
    """
    names = list(dict.fromkeys(names))
    plain = {name: " ".join(re.findall(r"[^\W_]+", name.lower())) for name in names}
    plain = {name: _LONG.get(said, said) for name, said in plain.items()}
    found = {name: COLORS[plain[name]] for name in names if plain[name] in COLORS}
    left = [color for color in (*COLORS.values(), *_FURTHER) if color not in found.values()]
    rest = [name for name in names if name not in found]
    return found | dict(zip(rest, cycle(left or _FURTHER), strict=False))


def percent(shares: Sequence[Share]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Accuracies in percent, and the lengths of their intervals below and above, for ``errorbar``."""
    middle = [100 * share.accuracy for share in shares]
    # Rounding may put an end of the interval on the wrong side of its middle.
    below = [100 * max(0.0, share.accuracy - share.low) for share in shares]
    above = [100 * max(0.0, share.high - share.accuracy) for share in shares]
    return middle, (below, above)


def new_figure(width: float = 7.0, height: float = 4.8, panels: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with panels in a row.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"matplotlib is missing: {install('experiments')}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, **shared)[0])


def with_legend(figure: Figure, axes: Axes, columns: int = 2, title: str | None = None) -> Figure:
    """The figure with the legend of one panel below all of them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
        title=title,
        title_fontsize="small",
    )
    return figure


def epsilon_figure(report: RobustnessReport) -> Figure:
    """The worst case against the budget, and plain ascent at larger budgets."""
    figure, (axes,) = new_figure()
    for row, look in _looks(report):
        worst = [share_of(row.clean), *(share_of(row.worst(e)) for e in report.epsilons)]
        middle, bars = percent(worst)
        axes.errorbar([0.0, *report.epsilons], middle, bars, label=row.marked, capsize=2, elinewidth=0.8, **look)
        # Both bound the accuracy at a larger budget: what is wrong within a smaller one, and what ascent breaks. The
        # ladder was measured on images that are right clean.
        beyond = {e: share for e, share in row.findings.ladder.items() if e > report.epsilons[-1]}
        heights = [100 * min(worst[-1].accuracy, worst[0].accuracy * share) for share in beyond.values()]
        line = {"color": look["color"], "marker": ".", "lw": 1, "ls": ":"}
        axes.plot([report.epsilons[-1], *beyond], [middle[-1], *heights], **line)
    axes.set_xscale("symlog", linthresh=report.epsilons[0])
    rungs = {e for row in report.rows for e in row.findings.ladder if e > report.epsilons[-1]}
    ticks = sorted({0.0, *report.epsilons, *rungs})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45, ha="right")
    axes.minorticks_off()
    axes.set(xlabel=f"ε ({report.protocol.norm})", ylabel="accuracy (%)", ylim=(-2, 103))
    beyond_said = "; beyond, plain ascent (dotted)" if rungs else ""
    axes.set_title(f"Worst case over all attacks, with 95 % intervals{beyond_said}", fontsize="medium")
    return with_legend(figure, axes, title=_signs(report))


def steps_figure(report: RobustnessReport) -> Figure:
    """The accuracy under plain ascent against its steps."""
    figure, (axes,) = new_figure()
    for row, look in _looks(report):
        probed = min(report.protocol.gate_images, int(row.clean.sum()))
        curve = {steps: wilson(round(share * probed), probed) for steps, share in row.findings.steps.items()}
        label = f"{row.marked}, ε = {row.findings.epsilon:g}, {probed} images"
        middle, bars = percent([*curve.values()])
        axes.errorbar([*curve], middle, bars, label=label, capsize=2, elinewidth=0.8, **look)
    if not any(row.findings.steps for row in report.rows):
        axes.text(0.5, 0.5, "not measured: the gates were left out", ha="center", transform=axes.transAxes)
    counts = sorted({count for row in report.rows for count in row.findings.steps})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="steps", ylabel="accuracy on images that are right clean (%)", ylim=(-2, 103))
    axes.set_title("Plain ascent by its number of steps, with 95 % intervals", fontsize="medium")
    return with_legend(figure, axes, title=_signs(report))


def surrogates_figure(report: RobustnessReport) -> Figure:
    """The accuracy under the attacks through each surrogate, beside the worst case; a panel for each budget."""
    lines = 1 + max(len(row.by_surrogate()) for row in report.rows)
    height = 1.8 + 0.2 * lines * len(report.rows)
    figure, panels = new_figure(3 + 2.5 * len(report.epsilons), height, len(report.epsilons), sharey=True)
    names = list(dict.fromkeys(name for row in report.rows for name in row.by_surrogate()))
    for axes, epsilon in zip(panels, report.epsilons, strict=True):
        for index, (row, look) in enumerate(_looks(report)):
            found = {name: share_of(right[epsilon]) for name, right in row.by_surrogate().items()}
            found["worst case"] = share_of(row.worst(epsilon))
            offset = 0.7 * (index + 0.5) / len(report.rows) - 0.35
            places = [[*names, "worst case"].index(name) + offset for name in found]
            middle, bars = percent([*found.values()])
            axes.errorbar(middle, places, xerr=bars, label=row.marked, **look | {"ls": "none", "lw": 1, "ms": 4})
        axes.set_yticks(range(len(names) + 1), [*(f"through {name}" for name in names), "worst case"])
        axes.set(title=f"ε = {epsilon:g}", xlabel="accuracy (%)", xlim=(-2, 103))
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.suptitle("Attacks by the derivative of a spike that they use, with 95 % intervals", fontsize="medium")
    return with_legend(figure, panels[0], title=_signs(report))


def _looks(report: RobustnessReport) -> list[tuple[Row, dict[str, Any]]]:
    """Rows with how they are drawn: the network has the colour; with its noise on it is hollow and dashed."""
    colors = colors_of(row.subject.network for row in report.rows)
    return [(row, {"color": colors[row.subject.network]} | look_of(row.subject.noise)) for row in report.rows]


def look_of(noise: str) -> dict[str, Any]:
    """Line and marker of a network whose noise is ``"on"``, ``"off"`` or ``"none"``."""
    return {"marker": "o", "ls": "--", "mfc": "white"} if noise == "on" else {"marker": "o", "ls": "-"}


def _signs(report: RobustnessReport) -> str | None:
    marks = {mark(row.findings.gates) for row in report.rows}
    return "; ".join(words for sign, words in _SIGNS.items() if sign in marks) or None
