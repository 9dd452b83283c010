"""The report of ``evaluate``: tables, JSON and pictures, in which no worst case stands without its gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .._messages import listed, markdown, versions
from . import figures
from .attacks import Attack
from .gates import Gate, mark, verdict
from .measure import PACKAGES, Protocol, Row
from .statistics import McNemar, Share, mcnemar, share_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[str, list[str], list[list[str]]]
"""Title, header and lines."""

_NOTE = (
    "Accuracy in percent of all images, with the half-width of its 95 % Wilson interval. An image is right under an "
    "attack if it is right clean, under that attack, and under that attack at every smaller budget; 'worst case' asks "
    "this of every attack. Noise: predictions by the majority of {votes} fresh draws; attacks average over draws of "
    "their own. A worst case with '!' has a failed gate: masking suspected, no robustness claim. One with '?' has a "
    "gate that the suite could not run: masking not ruled out."
)


@dataclass(frozen=True)
class Headline(Share):
    """A worst-case accuracy with its interval and what the gates say of it.

    Attributes:
        verdict: of the gates, in a few words.
    """

    verdict: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()} % ({self.verdict})"


@dataclass(frozen=True)
class Comparison:
    """Paired tests of two networks on the same images.

    Attributes:
        first: label of the one.
        second: label of the other.
        clean: test of the clean predictions.
        worst: of the worst cases, by budget.
    """

    first: str
    second: str
    clean: McNemar
    worst: dict[float, McNemar]


@dataclass(frozen=True)
class RobustnessReport:
    """What ``evaluate`` measured; prints as a table.

    Attributes:
        protocol: how it was measured.
        attacks: of the suite.
        rows: one for each network with its noise off and on, the network itself first.
    """

    protocol: Protocol
    attacks: tuple[Attack, ...]
    rows: tuple[Row, ...]

    @property
    def headline(self) -> Row:
        """The row of the network as it runs in evaluation mode: noise off, unless it was made with ``at_eval=True``."""
        own = [row for row in self.rows if row.subject.network == self.rows[0].subject.network]
        return own[-1] if own[0].subject.noisy_in_evaluation else own[0]

    @property
    def worst_case(self) -> dict[float, Headline]:
        """Worst-case accuracy of the headline row by budget; each says what the gates say."""
        row = self.headline
        return {
            epsilon: Headline(**asdict(share_of(row.worst(epsilon))), verdict=verdict(self.gates))
            for epsilon in self.protocol.epsilons
        }

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Gates of the headline row."""
        return self.headline.findings.gates

    @property
    def comparisons(self) -> list[Comparison]:
        """Each row of the network against each row of the baselines."""
        own = self.rows[0].subject.network
        return [
            Comparison(
                row.subject.label,
                other.subject.label,
                mcnemar(row.clean, other.clean),
                {e: mcnemar(row.worst(e), other.worst(e)) for e in self.protocol.epsilons},
            )
            for row in self.rows
            for other in self.rows
            if row.subject.network == own != other.subject.network
        ]

    def table(self) -> str:
        """All figures as aligned plain text, gates included."""
        parts = [f"{title}\n{_aligned(header, lines)}" for title, header, lines in self._tables()]
        return "\n\n".join([self._summary(), *parts, self._note()])

    def __str__(self) -> str:
        return self.table()

    def to_markdown(self, level: int = 2) -> str:
        """All figures as Markdown, gates included, with the settings of every attack.

        Args:
            level: of the headings.
        """
        parts = [self._summary()]
        for title, header, lines in (*self._tables(), self._settings()):
            parts.append(f"{'#' * level} {title}\n\n{markdown(header, lines)}")
        made = f"Seed {self.protocol.seed}. Versions: {listed(versions(*PACKAGES))}."
        return "\n\n".join([*parts, self._note(), made]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """All figures and settings as plain dicts and numbers, ready for ``json.dump``."""
        return {
            "protocol": asdict(self.protocol) | {"epsilons": list(self.protocol.epsilons)},
            "versions": versions(*PACKAGES),
            "attacks": [{"name": a.name, "access": a.access, "settings": dict(a.settings)} for a in self.attacks],
            "headline": self.headline.subject.label,
            "rows": [_row(row, self.protocol.epsilons) for row in self.rows],
            "comparisons": [
                asdict(each) | {"worst": {f"{e:g}": asdict(test) for e, test in each.worst.items()}}
                for each in self.comparisons
            ],
        }

    def plot_epsilon(self) -> Figure:
        """Worst-case accuracy against the budget, and the ladder of plain ascent down to zero.

        Returns:
            A figure; ``figure.savefig(path)`` writes it.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return figures.epsilon(self.rows, self.protocol)

    def plot_steps(self) -> Figure:
        """Accuracy under plain ascent against its number of steps; flat at the end if the attack has converged."""
        return figures.steps(self.rows)

    def plot_surrogates(self) -> Figure:
        """Accuracy under the attacks through each surrogate, beside the worst case over all attacks."""
        return figures.surrogates(self.rows, self.protocol)

    def _summary(self) -> str:
        lines = [
            f"{self.headline.subject.label}: worst case over {len(self.headline.attacks)} attacks, {self.protocol.norm}"
        ]
        lines += [f"  ε = {epsilon:g}: {share}" for epsilon, share in self.worst_case.items()]
        return "\n".join(lines)

    def _note(self) -> str:
        return _NOTE.format(votes=self.protocol.votes)

    def _tables(self) -> list[Table]:
        labels = [row.subject.label for row in self.rows]
        clean = [
            ["majority vote", *(str(share_of(row.clean)) for row in self.rows)],
            ["single draw", *(str(row.single) for row in self.rows)],
        ]
        attacked = [
            (f"Accuracy, ε = {epsilon:g}", ["", *labels], self._attacked(epsilon)) for epsilon in self.protocol.epsilons
        ]
        tables = [("Clean accuracy", ["", *labels], clean), *attacked]
        if self.protocol.corruptions:
            tables.append(("Corruptions, by severity", ["", *labels], self._corrupted()))
        tables += [
            (
                f"Gates: {row.subject.label}",
                ["gate", "", "measured"],
                [[g.name, g.verdict, g.detail] for g in row.findings.gates],
            )
            for row in self.rows
        ]
        if self.comparisons:
            header = ["", "images", "only the first", "only the second", "p"]
            tables.append(("Paired McNemar tests", header, self._compared()))
        return tables

    def _attacked(self, epsilon: float) -> list[list[str]]:
        names = dict.fromkeys(attack.name for row in self.rows for attack in row.attacks)
        lines = [
            [name, *(str(share_of(row.right[name][epsilon])) if name in row.right else "-" for row in self.rows)]
            for name in names
        ]
        gates = [row.findings.gates for row in self.rows]
        worst = [f"{share_of(row.worst(epsilon))}{mark(each)}" for row, each in zip(self.rows, gates, strict=True)]
        return [*lines, ["worst case", *worst], ["gates", *map(verdict, gates)]]

    def _corrupted(self) -> list[list[str]]:
        return [
            [f"{name} {severity}", *(str(row.corruptions[name][severity]) for row in self.rows)]
            for name in self.protocol.corruptions
            for severity in self.rows[0].corruptions[name]
        ]

    def _compared(self) -> list[list[str]]:
        return [
            [f"{each.first} / {each.second}", what, str(test.only_first), str(test.only_second), f"{test.p_value:.2g}"]
            for each in self.comparisons
            for what, test in (("clean", each.clean), *((f"ε = {e:g}", test) for e, test in each.worst.items()))
        ]

    def _settings(self) -> Table:
        lines = [
            [attack.name, attack.access, ", ".join(f"{key} {value}" for key, value in attack.settings.items())]
            for attack in self.attacks
        ]
        return "Attacks", ["attack", "access", "settings"], lines


def _row(row: Row, epsilons: Sequence[float]) -> dict[str, Any]:
    return {
        "network": row.subject.network,
        "noise": row.subject.noise,
        "clean": asdict(share_of(row.clean)),
        "single_draw": asdict(row.single),
        "attacks": {
            name: {f"{epsilon:g}": asdict(share_of(right)) for epsilon, right in under.items()}
            for name, under in row.right.items()
        },
        "worst_case": {f"{epsilon:g}": asdict(share_of(row.worst(epsilon))) for epsilon in epsilons},
        "verdict": verdict(row.findings.gates),
        "gates": [asdict(gate) for gate in row.findings.gates],
        "corruptions": {
            name: {str(severity): asdict(share) for severity, share in shares.items()}
            for name, shares in row.corruptions.items()
        },
        "ladder": {f"{epsilon:g}": share for epsilon, share in row.findings.ladder.items()},
        "steps": {"epsilon": row.findings.epsilon, "right": {str(n): s for n, s in row.findings.steps.items()}},
    }


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, ["-" * width for width in widths], *lines)
    )
