"""Report of an evaluation: measurements, tables, JSON and figures; no worst case stands in it without its gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._messages import aligned, listed, markdown, versions
from ..network import noises
from .attacks import NORMS, Attack
from .figures import colors_of, new_figure, percent, with_legend
from .scoring import ROWS, McNemar, Share, mcnemar, share_of
from .view import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[str, list[str], list[list[str]]]
"""Title, header and lines."""
PACKAGES = ("snntorch-lr", "snntorch", "torch", "torchattacks")

_NOTE = (
    "Accuracy in percent of all images, with the half-width of its 95 % Wilson interval. An image is right under an "
    "attack if it is right clean, under that attack, and under that attack at every smaller budget; 'worst case' asks "
    "this of every attack, those of the gates included. An attack with '→' ran on what those with '→' above it left, "
    "and its line says what they left together. A worst case with '!' has a failed gate: masking suspected, no claim "
    "of robustness. One with '?' has a gate that was not run, or too few images: no claim."
)
_WITHOUT_GATES = " The attacks of the gates were left out (gates=False): no claim of robustness is possible."
_SIGNS = {" !": "! a gate failed: masking suspected", " ?": "? a gate was not run, or too few images: no claim"}


@dataclass(frozen=True)
class Protocol:
    """Settings of an evaluation, for ``evaluate(protocol=...)``.

    Attributes:
        norm: of the budgets, ``"linf"`` or ``"l2"``.
        noise: ``"off"``, ``"on"`` or ``"both"``: how networks with noise are evaluated.
        draws: noise draws that the gradient of an attack averages over.
        votes: noise draws for each prediction.
        scale: as ``AttackableView``'s.
        gates: False leaves out the attacks that the gates make themselves, for a quick look. Without them no claim of
            robustness is possible, and the report says so.
        gate_images: images that are right, for these attacks.
        rows: images times draws that a network sees at once; bounds the memory.

    Raises:
        ValueError: if a number is below 1, or a norm or noise is unknown.

    Examples:
        >>> Protocol(norm="l2").votes
        32
    """

    norm: str = "linf"
    noise: str = "both"
    draws: int = 8
    votes: int = 32
    scale: float = 10.0
    gates: bool = True
    gate_images: int = 128
    rows: int = ROWS

    def __post_init__(self) -> None:
        if self.noise not in ("off", "on", "both"):
            raise ValueError(f"noise must be 'off', 'on' or 'both', got {self.noise!r}")
        for name in "draws", "votes", "gate_images", "rows":
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; choose one of {', '.join(NORMS)}")


@dataclass(frozen=True)
class Subject:
    """A network by name, with its noise ``"on"`` or ``"off"``, or ``"none"`` for one that has none.

    ``random`` is True if its logits differ from pass to pass.
    """

    network: str
    noise: str
    target: Target
    random: bool = True

    @property
    def label(self) -> str:
        """Name for tables."""
        return self.network if self.noise == "none" else f"{self.network}, noise {self.noise}"

    @property
    def noisy_in_evaluation(self) -> bool:
        """True if the network draws noise after ``net.eval()``."""
        return any(noise.at_eval for noise in noises(self.target.net).values())


@dataclass(frozen=True)
class Gate:
    """Check of an evaluation, with its measurement; ``passed`` is None if it could not be run, or was left out.

    Examples:
        >>> print(Gate("G3 ladder", True, "1: 0.0 %"))
        PASS    G3 ladder: 1: 0.0 %
    """

    name: str
    passed: bool | None
    detail: str

    @property
    def verdict(self) -> str:
        """PASS, FAIL or NOT RUN."""
        return {True: "PASS", False: "FAIL", None: "NOT RUN"}[self.passed]

    def __str__(self) -> str:
        return f"{self.verdict:7} {self.name}: {self.detail}"


def verdict(gates: Sequence[Gate]) -> str:
    """Verdict of the gates on a headline, in a few words; without gates, or with too few images, no claim passes.

    Examples:
        >>> verdict([Gate("G1 gradients", True, ""), Gate("G6 surrogates", None, "")])
        'masking not ruled out (G6 not run)'
    """
    failed = [gate.name for gate in gates if gate.passed is False]
    missing = [gate.name for gate in gates if gate.passed is None]
    if failed:
        return f"MASKING SUSPECTED ({', '.join(name.split()[0] for name in failed)} failed)"
    if [name.split()[0] for name in missing] == ["G10"]:
        return "too few images for a claim"
    if missing or not gates:
        return f"masking not ruled out ({', '.join(name.split()[0] for name in missing) or 'gates'} not run)"
    return "all gates passed"


def mark(gates: Sequence[Gate]) -> str:
    """Sign behind a worst case: `` !`` if a gate failed, `` ?`` if one was not run, else nothing."""
    passed = {gate.passed for gate in gates} or {None}
    return " !" if False in passed else " ?" if None in passed else ""


@dataclass(frozen=True)
class GateFindings:
    """Gates of one network, and what their attacks broke.

    Attributes:
        gates: G0 to G10.
        epsilon: the budget of G4 and G6: where the worst case is nearest to half.
        ladder: fraction of the probed images that is right after ascent from the image, by budget.
        survived: images that no attack of a gate broke, by budget, Boolean, ``[images]``.
    """

    gates: tuple[Gate, ...] = ()
    epsilon: float = 0.0
    ladder: dict[float, float] = field(default_factory=dict)
    survived: dict[float, Tensor] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Row:
    """Measurements of one network with its noise on or off.

    Attributes:
        subject: the network.
        clean: images that the majority of the votes has right, Boolean, ``[images]``.
        single: expected accuracy of a single noise draw.
        attacks: the attacks that ran, transfers included.
        right: images that are right clean and that an attack did not break, by its name and budget, Boolean,
            ``[images]``. One in turn does not break what those before it broke.
        unchanged: fraction of the images that an attack returned as they were, by its name.
        failures: what went wrong in attacks that failed, by their names.
        left_out: attacks and budgets that there was no time for.
        findings: gates, and what their attacks broke.
    """

    subject: Subject
    clean: Tensor
    single: Share
    attacks: tuple[Attack, ...]
    right: Mapping[str, Mapping[float, Tensor]]
    unchanged: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    findings: GateFindings = GateFindings()

    def under(self, attacks: Iterable[str], epsilon: float) -> Tensor:
        """Images that are right clean and under all of these attacks at a budget, Boolean, ``[images]``."""
        return torch.stack([self.clean, *(self.right[name][epsilon] for name in attacks)]).all(0)

    def with_gates(self, right: Tensor, epsilon: float) -> Tensor:
        """Those of some images that no attack of a gate broke at a budget, Boolean, ``[images]``."""
        return right & self.findings.survived.get(epsilon, right)

    def by_surrogate(self) -> dict[str, dict[float, Tensor]]:
        """Images that are right clean and under all attacks through each surrogate, by surrogate and budget."""
        names: dict[str, list[str]] = {}
        for attack in self.attacks:
            if "surrogate" in attack.settings and attack.access == "white-box":
                names.setdefault(str(attack.settings["surrogate"]), []).append(attack.name)
        budgets = list(next(iter(self.right.values()), {}))
        return {key: {epsilon: self.under(through, epsilon) for epsilon in budgets} for key, through in names.items()}

    def worst(self, epsilon: float) -> Tensor:
        """Images that are right clean and under every attack at a budget, Boolean, ``[images]``."""
        return self.with_gates(self.under(self.right, epsilon), epsilon)

    def shares(self, epsilon: float) -> dict[str, Share]:
        """Accuracies at a budget under each attack, of attacks in turn with those before it, and in the worst case."""
        shares, in_turn = {}, [attack.name for attack in self.attacks if attack.in_turn]
        for name in self.right:
            above = in_turn[: in_turn.index(name) + 1] if name in in_turn else [name]
            shares[name] = share_of(self.under(above, epsilon))
        return shares | {"worst case": share_of(self.worst(epsilon))}

    def to_json(self, epsilons: Sequence[float]) -> dict[str, Any]:
        """All figures as plain dicts and numbers."""
        shares = {epsilon: self.shares(epsilon) for epsilon in epsilons}
        attacks = {
            name: {f"{epsilon:g}": asdict(under[name]) for epsilon, under in shares.items()}
            for name in (*self.right, "worst case")
        }
        findings = self.findings
        return {
            "network": self.subject.network,
            "noise": self.subject.noise,
            "clean": asdict(share_of(self.clean)),
            "single_draw": asdict(self.single),
            "worst_case": attacks.pop("worst case"),
            "attacks": attacks,
            "left_out": list(self.left_out),
            "verdict": verdict(findings.gates),
            "gates": [asdict(gate) for gate in findings.gates],
            "ladder": {f"{epsilon:g}": share for epsilon, share in findings.ladder.items()},
        }


@dataclass(frozen=True)
class Headline(Share):
    """Worst-case accuracy with its interval, and the verdict of the gates in a few words.

    Examples:
        >>> print(Headline(0.5, 0.4, 0.6, 96, "all gates passed"))
        50.0 ± 10.0 % (all gates passed)
    """

    verdict: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()} % ({self.verdict})"


@dataclass(frozen=True)
class Comparison:
    """Paired tests of two networks, by their labels, on the same images: clean, and of the worst cases by budget."""

    first: str
    second: str
    clean: McNemar
    worst: dict[float, McNemar]


@dataclass(frozen=True)
class RobustnessReport:
    """Result of ``evaluate``; prints as a table.

    Attributes:
        protocol: how it was measured.
        epsilons: budgets, from the smallest.
        seed: of attacks and noise.
        attacks: of the suite.
        rows: one for each network with its noise off and on, the network itself first.
        suite: name of the suite, or names of the attacks.
        seconds: that it took.
    """

    protocol: Protocol
    epsilons: tuple[float, ...]
    seed: int
    attacks: tuple[Attack, ...]
    rows: tuple[Row, ...]
    suite: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def headline(self) -> Row:
        """The row of the network as it runs in evaluation mode: noise off, unless it was made with ``at_eval=True``."""
        own = [row for row in self.rows if row.subject.network == self.rows[0].subject.network]
        return own[-1] if own[0].subject.noisy_in_evaluation else own[0]

    @property
    def worst_case(self) -> dict[float, Headline]:
        """Worst-case accuracy of the headline row by budget, each with the verdict of the gates."""
        words = verdict(self.gates)
        return {e: Headline(**asdict(share_of(self.headline.worst(e))), verdict=words) for e in self.epsilons}

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Gates of the headline row."""
        return self.headline.findings.gates

    @property
    def comparisons(self) -> list[Comparison]:
        """Each row of the network against each row of the baselines."""
        own = self.rows[0].subject.network
        pairs = [(row, other) for row in self.rows for other in self.rows]
        return [
            Comparison(
                row.subject.label, other.subject.label, mcnemar(row.clean, other.clean),
                {e: mcnemar(row.worst(e), other.worst(e)) for e in self.epsilons},
            )
            for row, other in pairs if row.subject.network == own != other.subject.network
        ]  # fmt: skip

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.rows[0].clean)

    def summary(self) -> str:
        """The worst case of the headline row, a line for each budget, and how it was measured."""
        row = self.headline
        lines = [f"{row.subject.label}: worst case over {len(row.attacks)} attacks, {self.protocol.norm}"]
        lines += [f"  ε = {epsilon:g}: {share}" for epsilon, share in self.worst_case.items()]
        return "\n".join([*lines, *(f"  {name}: {value}" for name, value in self.settings().items())])

    def settings(self) -> dict[str, str]:
        """What stands beside every figure, in words: images, suite, budgets, noise, seed, time, versions."""
        protocol, states = self.protocol, dict.fromkeys(row.subject.noise for row in self.rows)
        draws = f"majority of {protocol.votes} draws, attacks average over up to {protocol.draws}"
        noise = {"off": "off", "on": f"on, {draws}", "none": "none"}
        late = [f"{row.subject.label}: {', '.join(row.left_out)}" for row in self.rows if row.left_out]
        return {
            "images": str(self.images),
            "suite": f"{self.suite}, seed {self.seed}",
            "budgets": f"{protocol.norm}, ε = {', '.join(f'{epsilon:g}' for epsilon in self.epsilons)}",
            "noise": "; ".join(noise[state] for state in states),
            "time": f"{self.seconds:.0f} s",
            "versions": listed(versions(*PACKAGES)),
        } | ({"no time for": "; ".join(late)} if late else {})

    def sentence(self) -> str:
        """One sentence for a paper: worst case and intervals, images, suite, noise, verdict, seed and versions."""
        row, noise = self.headline, self.headline.subject.noise
        judged = {"off": ", noise off,", "on": f", majority of {self.protocol.votes} noise draws,", "none": ""}[noise]
        worst = [
            f"{100 * share.accuracy:.1f} % (95 % Wilson interval {100 * share.low:.1f} to {100 * share.high:.1f}) "
            f"at ε = {epsilon:g}" for epsilon, share in self.worst_case.items()
        ]  # fmt: skip
        return (
            f"Of {self.images} images the {row.subject.network}{judged} has "
            f"{100 * share_of(row.clean).accuracy:.1f} % right clean, and in the worst case over {len(row.attacks)} "
            f"{self.protocol.norm} attacks (suite {self.suite}) {' and '.join(worst)}; {verdict(self.gates)} "
            f"(seed {self.seed}; {listed(versions(*PACKAGES))})."
        )

    def tables(self) -> list[Table]:
        """All figures as titles, headers and lines of text, gates included."""
        header = ["", *(row.subject.label for row in self.rows)]
        clean = [
            ["majority vote", *(str(share_of(row.clean)) for row in self.rows)],
            ["single draw", *(str(row.single) for row in self.rows)],
        ]
        tables = [("Clean accuracy", header, clean)]
        tables += [(f"Accuracy, ε = {epsilon:g}", header, self._attacked(epsilon)) for epsilon in self.epsilons]
        for row in self.rows:
            lines = [[gate.name, gate.verdict, gate.detail] for gate in row.findings.gates]
            tables.append((f"Gates: {row.subject.label}", ["gate", "", "measured"], lines))
        tests = [
            [f"{pair.first} / {pair.second}", images, f"{test.only_first}", f"{test.only_second}",
             f"{test.p_value:.2g}", str(test)]
            for pair in self.comparisons
            for images, test in (("clean", pair.clean), *((f"ε = {e:g}", test) for e, test in pair.worst.items()))
        ]  # fmt: skip
        if tests:
            header = ["", "images", "only the first", "only the second", "p", "points between them [95 %]"]
            tables.append(("Paired McNemar tests, and intervals of Newcombe's method 10", header, tests))
        return tables

    def table(self) -> str:
        """All figures as aligned plain text, gates included."""
        parts = [f"{title}\n{aligned(header, lines)}" for title, header, lines in self.tables()]
        return "\n\n".join([self.summary(), *parts, self._note(), self.sentence()])

    __str__ = table

    def to_markdown(self, level: int = 2) -> str:
        """All figures as Markdown, gates included, with the settings of every attack, under headings of a level."""
        settings = [
            [attack.name, attack.access, ", ".join(f"{key} {value}" for key, value in attack.settings.items())]
            for attack in self.attacks
        ]
        tables = [*self.tables(), ("Attacks", ["attack", "access", "settings"], settings)]
        parts = [f"{'#' * level} {title}\n\n{markdown(header, lines)}" for title, header, lines in tables]
        summary = self.summary().replace("\n  ", "\n- ").replace("\n", "\n\n", 1)
        return "\n\n".join([summary, *parts, self._note(), self.sentence()]) + "\n"

    def _repr_markdown_(self) -> str:
        """What a notebook shows, as HTML."""
        return self.to_markdown()

    def to_json(self) -> dict[str, Any]:
        """All figures and settings as plain dicts and numbers, ready for ``json.dump``."""
        return {
            "protocol": {"epsilons": list(self.epsilons), "seed": self.seed} | asdict(self.protocol),
            "images": self.images,
            "suite": self.suite,
            "seconds": self.seconds,
            "sentence": self.sentence(),
            "versions": versions(*PACKAGES),
            "attacks": [{"name": a.name, "access": a.access, "settings": dict(a.settings)} for a in self.attacks],
            "headline": self.headline.subject.label,
            "rows": [row.to_json(self.epsilons) for row in self.rows],
            "comparisons": [
                asdict(pair) | {"worst": {f"{e:g}": asdict(test) for e, test in pair.worst.items()}}
                for pair in self.comparisons
            ],
        }

    def plot_epsilon(self) -> Figure:
        """Figure of the worst case against the budget; beyond the largest, of plain ascent, which has to reach zero.

        A network has one colour; with its noise on it is hollow and dashed.
        """
        figure, (axes,) = new_figure()
        colors, largest = colors_of(row.subject.network for row in self.rows), self.epsilons[-1]
        rungs = sorted({e for row in self.rows for e in row.findings.ladder if e > largest})
        for row in self.rows:
            worst = [share_of(row.clean), *(share_of(row.worst(e)) for e in self.epsilons)]
            middle, bars = percent(worst)
            color = colors[row.subject.network]
            look: dict[str, Any] = {"ls": "--", "mfc": "white"} if row.subject.noise == "on" else {"ls": "-"}
            look |= {"label": f"{row.subject.label}{mark(row.findings.gates)}", "color": color, "marker": "o"}
            axes.errorbar([0.0, *self.epsilons], middle, bars, capsize=2, elinewidth=0.8, **look)
            # Both bound the accuracy at a larger budget: what is wrong within a smaller one, and what ascent breaks.
            # The ladder was measured on images that are right clean.
            beyond = {e: share for e, share in row.findings.ladder.items() if e > largest}
            heights = [100 * min(worst[-1].accuracy, worst[0].accuracy * share) for share in beyond.values()]
            axes.plot([largest, *beyond], [middle[-1], *heights], color=color, marker=".", lw=1, ls=":")
        axes.set_xscale("symlog", linthresh=self.epsilons[0])
        ticks = [0.0, *self.epsilons, *rungs]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45, ha="right")
        axes.minorticks_off()
        axes.set(xlabel=f"ε ({self.protocol.norm})", ylabel="accuracy (%)", ylim=(-2, 103))
        dotted = "; beyond, plain ascent (dotted)" if rungs else ""
        axes.set_title(f"Worst case over all attacks, with 95 % intervals{dotted}", fontsize="medium")
        marks = {mark(row.findings.gates) for row in self.rows}
        return with_legend(figure, axes, title="; ".join(_SIGNS[sign] for sign in _SIGNS if sign in marks) or None)

    def _note(self) -> str:
        return _NOTE + ("" if self.protocol.gates else _WITHOUT_GATES)

    def _attacked(self, epsilon: float) -> list[list[str]]:
        shares = [row.shares(epsilon) for row in self.rows]
        names = dict.fromkeys(name for under in shares for name in under if name != "worst case")
        in_turn = {attack.name for row in self.rows for attack in row.attacks if attack.in_turn}
        lines = [
            [f"→ {name}" if name in in_turn else name, *(str(under.get(name, "-")) for under in shares)]
            for name in names
        ]
        signs = [mark(row.findings.gates) for row in self.rows]
        worst = [f"{under['worst case']}{sign}" for under, sign in zip(shares, signs, strict=True)]
        return [*lines, ["worst case", *worst], ["gates", *(verdict(row.findings.gates) for row in self.rows)]]
