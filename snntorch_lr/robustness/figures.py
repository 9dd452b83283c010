"""Figures: colours of networks, panels, legends, intervals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .._messages import install
from .scoring import Share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Colours by name: the fixed ones of ``COLORS``, and for other names those that are left, in order.

    Hyphens and commas in a name do not matter, and ``lr`` is the likelihood ratio, as in names of checkpoints.

    Examples:
        >>> colors_of(["network", "surrogate"])
        {'surrogate': '#0072B2', 'network': '#D55E00'}
    """
    names = list(dict.fromkeys(names))
    words = {name: " ".join(re.findall(r"[^\W_]+", name.lower())) for name in names}
    plain = {name: _LONG.get(text, text) for name, text in words.items()}
    fixed = {name: COLORS[plain[name]] for name in names if plain[name] in COLORS}
    free = cycle([color for color in COLORS.values() if color not in fixed.values()] or ["#7F7F7F"])
    return fixed | {name: next(free) for name in names if name not in fixed}


def percent(shares: Sequence[Share]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Accuracies in percent, and the lengths of their intervals below and above, for ``errorbar``."""
    # Rounding may put an end of the interval on the wrong side of its middle.
    below = [100 * max(0.0, share.accuracy - share.low) for share in shares]
    above = [100 * max(0.0, share.high - share.accuracy) for share in shares]
    return [100 * share.accuracy for share in shares], (below, above)


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
    look = {"fontsize": "small", "title_fontsize": "small", "ncols": columns}
    figure.legend(handles, labels, loc="outside lower center", title=title, **look)
    return figure
