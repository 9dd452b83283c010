"""The report of ``gradient_report``: figures of each parameter and estimator, as a table, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SURROGATE = "surrogate, 1 draw"
_HEADER = ("parameter", "estimator", "cosine", "at most", "surrogate", "SNR", "bias", "floor")
_NOTE = """\
cosine     of one call's gradient to the mean of the reference calls, averaged over the calls
at most    what a gradient without noise would reach; where it is "-" the reference is noise: take more calls
surrogate  cosine between the expected gradient and the mean surrogate gradient
SNR        |E g|^2 / tr Cov(g) of one call; around or below zero where it is not resolved
bias       |E g - E g_reference| / |E g_reference|, noise subtracted; less than the floor is not resolved
-          not resolved by that many calls, or not available
The inputs are the same in all calls: noise of the batch is not part of these figures."""


@dataclass(frozen=True)
class GradientQuality:
    """Gradient of one parameter tensor by one estimator; None where a figure is not resolved or not available.

    Attributes:
        cosine: mean cosine of one call's gradient to the mean of the reference calls, in [-1, 1].
        surrogate_cosine: cosine between the expected gradient and the mean surrogate gradient, in [-1, 1]; the noise of
            both is subtracted from their norms.
        snr: ‖E g‖² / tr Cov(g) of one call; unbiased numerator, so that it may be below zero.
        bias: ‖E g − E g_ref‖ / ‖E g_ref‖, with the expected Monte-Carlo part subtracted, at least 0.
        bias_floor: the Monte-Carlo part, in the units of ``bias``: what noise alone would show if it were not
            subtracted. A bias below it is not resolved. How well ‖E g_ref‖ is known, which scales both, is not part
            of it.
    """

    cosine: float | None
    surrogate_cosine: float | None
    snr: float | None
    bias: float | None
    bias_floor: float | None


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        milliseconds: median time of a call.
        megabytes: peak memory above that before the call, in 10⁶ bytes; None if it cannot be measured.
    """

    milliseconds: float
    megabytes: float | None


@dataclass(frozen=True)
class GradientReport:
    """What ``gradient_report`` measured; prints as a table.

    Attributes:
        quality: by name of the parameter, then of the estimator.
        cost: by name of the estimator; also of one draw of the surrogate gradient.
        reference_cosine: by name of the parameter, the cosine that the mean of the reference calls has to its own
            expectation, which no estimate can exceed; None where it is not resolved.
        copies: K of the reference and of estimators given by name.
        repeats: calls of each estimator.
        reference: calls of the reference.
        seed: of the noise.
        device: where the network is.
        control: λ at the end, by name of each ``Counterfactual``, then of the neuron.
        zero: by name of each parameter whose gradient was exactly zero in all calls of the reference, the likely cause.
    """

    quality: dict[str, dict[str, GradientQuality]]
    cost: dict[str, Cost]
    reference_cosine: dict[str, float | None]
    copies: int
    repeats: int
    reference: int
    seed: int
    device: str
    zero: dict[str, str] = field(default_factory=dict)
    control: dict[str, dict[str, float]] = field(default_factory=dict)

    def table(self) -> str:
        """The figures as aligned plain text, with a key."""
        rows = [
            (
                parameter,
                estimator,
                _text(figures.cosine),
                _text(self.reference_cosine[parameter]),
                _text(figures.surrogate_cosine),
                _text(figures.snr, ".3g"),
                _text(figures.bias, ".2g"),
                _text(figures.bias_floor, ".2g"),
            )
            for parameter, by_estimator in self.quality.items()
            for estimator, figures in by_estimator.items()
        ]
        costs = [
            (name, _text(cost.milliseconds, ".3g"), _text(cost.megabytes, ".3g")) for name, cost in self.cost.items()
        ]
        settings = (
            f"{self.copies} copies, {self.repeats} calls of each estimator, {self.reference} calls of the reference "
            f"(vanilla), seed {self.seed}, {self.device}"
        )
        tables = (_aligned(_HEADER, rows, left=2), _aligned(("estimator", "ms/call", "peak MB"), costs, left=1))
        zero = "\n".join(f"{name}: the gradient is exactly zero, {why}" for name, why in self.zero.items())
        fitted = "\n".join(
            f"λ of {name}: {', '.join(f'{neuron} {value:.2f}' for neuron, value in values.items())}"
            for name, values in self.control.items()
        )
        return "\n\n".join((settings, *tables, *filter(None, [zero, fitted]), _NOTE))

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """All figures and settings as plain dicts and numbers, ready for ``json.dump``."""
        return asdict(self)

    def plot(self) -> Figure:
        """Bars of cosine, signal-to-noise and bias for each parameter; a tick marks the noise floor of the bias.

        Returns:
            A figure; ``figure.savefig(path)`` writes it.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("matplotlib is missing: pip install 'snntorch-lr[experiments]'") from error
        parameters = list(self.quality)
        estimators = list(self.quality[parameters[0]])
        figure = Figure(figsize=(11, 1.5 + 0.3 * len(parameters) * (1 + len(estimators) / 2)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        height = 0.8 / len(estimators)
        for index, estimator in enumerate(estimators):
            places = [place + (index + 0.5) * height - 0.4 for place in range(len(parameters))]
            found = [self.quality[parameter][estimator] for parameter in parameters]
            for axes, values in zip(
                panels,
                # A logarithmic axis has no place for what is not resolved.
                ([q.cosine for q in found], [max(q.snr or 0, 0) or None for q in found], [q.bias for q in found]),
                strict=True,
            ):
                axes.barh(places, [math.nan if value is None else value for value in values], height, label=estimator)
            floors = [math.nan if q.bias_floor is None else q.bias_floor for q in found]
            panels[2].scatter(floors, places, marker="|", color="black", label="" if index else "noise floor", zorder=3)
        panels[0].set_yticks(range(len(parameters)), parameters)
        panels[0].invert_yaxis()
        panels[0].set(xlabel="cosine to the reference")
        panels[1].set(xlabel="signal-to-noise of a call", xscale="log")
        panels[2].set(xlabel="relative bias")
        figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=len(estimators) + 1)
        return figure


def _text(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns of text, the first ``left`` of them flush left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
