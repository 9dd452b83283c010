"""Figures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..robustness.statistics import wilson
from .fronts import Point

_MARKERS = "osD^v<>PX*"


def fronts(panels: Sequence[tuple[str, Sequence[tuple[str, str, Point]]]], path: Path) -> None:
    """Worst-case accuracy against clean error, a panel for each budget and a line for each family; surrogates hollow.

    Args:
        panels: budget, and family, change and point of each network.
        path: file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    families = list(dict.fromkeys(family for _, points in panels for family, _, _ in points))
    for axis, (epsilon, points) in zip(axes, panels, strict=True):
        for index, family in enumerate(families):
            mine = sorted((p for f, _, p in points if f == family), key=lambda p: p.clean)
            if not mine:
                continue
            shares = [wilson(int(point.right.sum()), len(point.right)) for point in mine]
            axis.errorbar(
                [100 * (1 - point.clean) for point in mine],
                [100 * share.accuracy for share in shares],
                yerr=[
                    [max(0.0, 100 * (share.accuracy - share.low)) for share in shares],
                    [max(0.0, 100 * (share.high - share.accuracy)) for share in shares],
                ],
                marker=_MARKERS[index % len(_MARKERS)],
                linestyle="-" if len(mine) > 2 else "none",
                elinewidth=0.7,
                color=f"C{index % 10}",
                markerfacecolor="white" if family.startswith("surrogate") else None,
                label=family,
            )
        # Most networks differ by a point or two, and some by ten.
        axis.set(xscale="log", xlabel="clean error (%)", ylabel="worst-case accuracy (%)", title=f"ε = {epsilon}")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.invert_xaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
