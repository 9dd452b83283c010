"""One network under every attack of an evaluation, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .._messages import first_line, versions
from ..network import noisy_neurons
from ..noise_stream import mix
from .attacks import SUITES, Attack, perturb
from .budget import Budget
from .cache import Cache, fingerprint
from .corruptions import CORRUPTIONS
from .gates import Gate
from .judge import Evidence, Findings, judge
from .probes import Probe
from .scoring import Scores, batch_size, device_of, logits_of, pieces, score, seeded
from .statistics import Share, share_of
from .target import Target

SEVERITIES = (1, 2, 3, 4, 5)
FINGERPRINT_IMAGES = 8
PACKAGES = ("snntorch-lr", "snntorch", "torch", "torchattacks")
Progress = Callable[[str, int, int], None]
"""Called with what is done next, the number of pieces done, and their total."""


@dataclass(frozen=True)
class Protocol:
    """How networks are evaluated; the arguments of ``evaluate``."""

    epsilons: tuple[float, ...]
    norm: str
    votes: int
    seed: int
    rows: int
    gate_images: int
    corruptions: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """A network with its noise on or off.

    Attributes:
        network: its name.
        noise: ``"on"``, ``"off"``, or ``"none"`` for a network that has none.
        target: the network and how it is read.
    """

    network: str
    noise: str
    target: Target

    @property
    def label(self) -> str:
        """Name for tables."""
        return self.network if self.noise == "none" else f"{self.network}, noise {self.noise}"

    @property
    def noisy_in_evaluation(self) -> bool:
        """Whether the network draws noise after ``net.eval()``."""
        return any(
            neuron.noise is not None and neuron.noise.at_eval for neuron in noisy_neurons(self.target.net).values()
        )


@dataclass(frozen=True)
class Row:
    """What was measured of one subject.

    Attributes:
        subject: the network.
        clean: what the majority of the votes has right, Boolean, ``[images]``.
        single: expected accuracy of a single noise draw.
        attacks: the attacks that ran, transfers included.
        right: what is right under an attack, by its name and budget, Boolean, ``[images]``.
        corruptions: accuracy by corruption and severity.
        findings: gates and curves.
    """

    subject: Subject
    clean: Tensor
    single: Share
    attacks: tuple[Attack, ...]
    right: Mapping[str, Mapping[float, Tensor]]
    corruptions: Mapping[str, Mapping[int, Share]]
    findings: Findings

    def under(self, attacks: Iterable[str], epsilon: float) -> Tensor:
        """What is right clean and under all of these attacks at a budget, Boolean, ``[images]``."""
        return torch.stack([self.clean, *(self.right[name][epsilon] for name in attacks)]).all(0)

    def by_surrogate(self) -> dict[str, dict[float, Tensor]]:
        """What is right clean and under all attacks through each surrogate, by surrogate and budget."""
        names: dict[str, list[str]] = {}
        for attack in self.attacks:
            if "surrogate" in attack.settings and attack.access == "white-box":
                names.setdefault(str(attack.settings["surrogate"]), []).append(attack.name)
        budgets = list(next(iter(self.right.values()), {}))
        return {key: {epsilon: self.under(found, epsilon) for epsilon in budgets} for key, found in names.items()}

    def worst(self, epsilon: float) -> Tensor:
        """What is right clean and under every attack at a budget, Boolean, ``[images]``."""
        return self.under(self.right, epsilon)


class AttackFailedError(RuntimeError):
    """An attack that raised an error, or whose images were refused."""


class Measurement:
    """Measures subjects on the same images.

    Args:
        protocol: how.
        attacks: of the suite.
        subjects: what to measure; each is a source of transferred images for the others.
        images: ``[n, channels, height, width]`` in [0, 1].
        labels: ``[n]``.
        cache: of finished pieces.
        progress: told before each piece.
        lent: subjects that are sources only.
    """

    def __init__(
        self,
        protocol: Protocol,
        attacks: Sequence[Attack],
        subjects: Sequence[Subject],
        images: Tensor,
        labels: Tensor,
        cache: Cache,
        progress: Progress,
        lent: Sequence[Subject] = (),
    ) -> None:
        self.protocol = protocol
        self.sources = [*subjects, *lent]
        self.images = images
        self.labels = labels
        self.cache = cache
        self.progress = progress
        self.attacks = {subject.label: self._attacks_on(subject, attacks) for subject in subjects}
        # Transfers run on the networks that they come from.
        self.size = min(batch_size(subject.target, protocol.rows) for subject in self.sources)
        self.marks = {subject.label: self._mark(subject) for subject in self.sources}
        budgets = len(protocol.epsilons)
        self.total = sum(2 + len(attacks) * budgets + len(protocol.corruptions) for attacks in self.attacks.values())
        self.done = 0

    def measure(self, subject: Subject) -> Row:
        """Clean accuracy, all attacks, corruptions and gates of one subject."""
        clean = Scores(
            **self._once(subject, "clean", (), lambda: asdict(self._score(subject, self.images, self.labels)))
        )
        right: dict[str, dict[float, Tensor]] = {}
        unchanged: dict[str, float] = {}
        failures: dict[str, str] = {}
        for attack in self.attacks[subject.label]:
            try:
                right[attack.name], unchanged[attack.name] = self._ladder(subject, attack, clean.right)
            except AttackFailedError as error:
                # One attack that fails must not cost hours of the others; the gate G9 tells.
                failures[attack.name] = str(error)
        ran = tuple(attack for attack in self.attacks[subject.label] if attack.name in right)
        corrupted = {name: self._corrupted(subject, name) for name in self.protocol.corruptions}
        row = Row(subject, clean.right, share_of(clean.single), ran, right, corrupted, Findings())
        return replace(row, findings=self._judge(row, unchanged, failures))

    def _attacks_on(self, subject: Subject, attacks: Sequence[Attack]) -> tuple[Attack, ...]:
        """The attacks that have the norm; transfers are always among them, one for each source."""
        usable = [attack for attack in attacks if self.protocol.norm in attack.norms]
        transfers = [attack for attack in usable if attack.needs_sources] or [
            attack for attack in SUITES["standard"] if attack.needs_sources and self.protocol.norm in attack.norms
        ]
        sources = [other for other in self.sources if _is_source(other, subject)]
        return (
            *(attack for attack in usable if not attack.needs_sources),
            *(_from_source(attack, source) for attack in transfers for source in sources),
        )

    def _ladder(self, subject: Subject, attack: Attack, still: Tensor) -> tuple[dict[float, Tensor], float]:
        """What is right by budget, each attacking what smaller ones left right, and the fraction that it left as is."""
        under: dict[float, Tensor] = {}
        unchanged, attacked = 0, 0
        source = str(attack.settings.get("source"))
        for epsilon in self.protocol.epsilons:
            found = self._once(
                subject,
                f"{attack.name} {epsilon:g}",
                [attack.name, dict(attack.settings), epsilon, self.marks.get(source)],
                partial(self._attack, subject, attack, epsilon, still),
                still,
            )
            attacked += int(still.sum())
            unchanged += found["unchanged"]
            under[epsilon] = still = found["right"]
        return under, unchanged / max(1, attacked)

    def _attack(self, subject: Subject, attack: Attack, epsilon: float, still: Tensor) -> dict[str, Any]:
        right, unchanged = [], 0
        seed = mix(self.protocol.seed, crc32(f"{attack.name} {epsilon:g}".encode()))
        budget = Budget(epsilon, self.protocol.norm)
        for index, (x, y) in enumerate(pieces(subject.target, self.images[still], self.labels[still], self.size)):
            try:
                adversarial = perturb(attack, subject.target, x, y, budget, mix(seed, index), self.protocol.rows)
            except (RuntimeError, ValueError) as error:
                raise AttackFailedError(first_line(error)) from error
            right.append(self._score(subject, adversarial, y, seed, index, 1).right)
            unchanged += int((adversarial == x).flatten(1).all(1).sum())
        after = still.clone()
        after[still] = torch.cat([*right, still[:0]])
        return {"right": after, "unchanged": unchanged}

    def _corrupted(self, subject: Subject, name: str) -> dict[int, Share]:
        """Accuracy by severity; the corrupted images are the same for all subjects."""

        def scores() -> dict[str, Any]:
            right = {}
            for severity in SEVERITIES:
                seed = mix(self.protocol.seed, crc32(name.encode()), severity)
                images = CORRUPTIONS[name](self.images, severity, torch.Generator().manual_seed(seed))
                right[str(severity)] = self._score(subject, images, self.labels, seed, 1).right
            return right

        found = self._once(subject, name, (), scores)
        return {int(severity): share_of(right) for severity, right in found.items()}

    def _judge(self, row: Row, unchanged: Mapping[str, float], failures: Mapping[str, str]) -> Findings:
        white = [attack.name for attack in row.attacks if attack.access == "white-box"]
        others = [attack.name for attack in row.attacks if attack.access != "white-box"]
        rows = row.clean.nonzero()[: self.protocol.gate_images, 0]
        probe = Probe(
            row.subject.target, self.images[rows], self.labels[rows], self.protocol.norm, self.protocol.votes,
            self.protocol.seed, self.protocol.rows,
        )  # fmt: skip
        evidence = Evidence(
            probe=probe,
            rows=rows,
            clean=row.clean,
            white={epsilon: row.under(white, epsilon) for epsilon in self.protocol.epsilons if white},
            others={epsilon: row.under(others, epsilon) for epsilon in self.protocol.epsilons if others},
            surrogates=row.by_surrogate(),
            unchanged={name: unchanged[name] for name in white},
            failures=dict(failures),
        )
        found = self._once(
            row.subject,
            "gates",
            [str(evidence.surrogates), evidence.unchanged, evidence.failures, self.protocol.gate_images],
            lambda: asdict(judge(evidence, self.protocol.epsilons)),
            *evidence.white.values(),
            *evidence.others.values(),
        )
        return Findings(
            tuple(Gate(**gate) for gate in found["gates"]), found["epsilon"], found["ladder"], found["steps"]
        )

    def _score(self, subject: Subject, images: Tensor, labels: Tensor, *seeds: int) -> Scores:
        seed = mix(self.protocol.seed, *seeds)
        return score(subject.target, images, labels, self.protocol.votes, seed, self.protocol.rows)

    def _mark(self, subject: Subject) -> str:
        """Fingerprint of a network, of how it is read, and of what it and its gradient do on a few images."""
        target = subject.target
        state = [part for item in target.net.state_dict().items() for part in item]
        few = self.images[:FINGERPRINT_IMAGES].to(device_of(target))
        logits = logits_of(target, few, 0)
        with seeded(0):
            x = few.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(target.view(draws=1)(x).square().sum(), x)
        return fingerprint(*state, logits, gradient, target.noise, target.draws, target.scale)

    def _once(
        self, subject: Subject, what: str, depends: Any, compute: Callable[[], dict[str, Any]], *tensors: Tensor
    ) -> dict[str, Any]:
        """A piece of the evaluation of a subject, from the cache if it is there."""
        self.progress(f"{subject.label}: {what}", self.done, self.total)
        self.done += 1
        protocol = self.protocol
        mark = fingerprint(
            self.marks[subject.label], self.images, self.labels, protocol.norm, protocol.votes, protocol.seed,
            protocol.rows, versions(*PACKAGES), what, depends, *tensors,
        )  # fmt: skip
        return self.cache.once(f"{subject.label} {what}", mark, compute)


def _is_source(other: Subject, victim: Subject) -> bool:
    """Without noise a source gives its gradient at less cost; the victim itself is one with its noise switched over."""
    if other.network == victim.network:
        return other.noise != victim.noise
    return other.noise != "on"


def _from_source(attack: Attack, source: Subject) -> Attack:
    def run(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        return attack.run(replace(target, sources={source.label: source.target}), x, y, budget, seed)

    name = f"{attack.name} from {source.label}"
    return replace(
        attack, name=name, run=run, settings={**attack.settings, "source": source.label}, needs_sources=False
    )
