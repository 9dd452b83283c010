"""Robustness evaluation of networks: clean accuracy, attacks, their worst case, transfers and gates, in a report."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from .. import _files as atomic
from .._messages import first_line, versions, warn
from ..convert import noise_gap
from ..network import left_as_found, noises, not_finite, reset, searched_once
from ..philox import mix
from . import gates
from .attacks import COUNTERFACTUAL, Attack, Budget, perturb
from .input_gradient import likelihood_ratio_input_gradient, with_noise
from .report import PACKAGES, Protocol, RobustnessReport, Row, Subject
from .scoring import Scores, count_votes, is_random, seeded, share_of
from .suites import SUITES, suite
from .view import Forward, Target, device_of

DONE = "done"
FINGERPRINT_IMAGES = 8
PROBED = 64
"""Images of the pass that the estimate of time is made from."""
Progress = Callable[[str, float, int], None]
"""Called with the name of the next piece, and how much of the work is done, of 100."""


def evaluate(
    net: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    epsilons: float | Sequence[float],
    attacks: str | Sequence[str | Attack] = "standard",
    forward: Forward | None = None,
    baselines: Mapping[str, nn.Module | Target] | None = None,
    seed: int = 0,
    *,
    protocol: Protocol | None = None,
    sources: Mapping[str, nn.Module | Target] | None = None,
    name: str = "network",
    cache: str | Path | None = None,
    progress: bool | Progress = True,
    limit: float = math.inf,
) -> RobustnessReport:
    """Robustness of a network and its baselines: the per-example worst case over attacks, beside gates that must pass.

    Every attack runs at every budget, from the smallest, on what is right clean and under the same attack at smaller
    budgets, and is scored with noise draws that it has not seen: an accuracy under attack is a fraction of all images.
    Those of ``"standard"`` run in turn, each on the images that those before it left, which saves most of the time.
    Adversarial images of every other network, with its noise off, are tried too. An image is right in the worst case if
    it is right clean and under all of these attacks, those of the gates included; with noise, each has a fresh chance
    at an image near the decision boundary: it errs on the attacker's side. An attack that fails does not count, and
    fails the gate G9. ``docs/robustness.md`` explains the protocol.

    The result is a function of the seed. Modes, states, gradients and torch's global random state are left as found.

    Args:
        net: any snnTorch network, with noise or without.
        loader: batches of images ``[batch, ...]`` in [0, 1] and labels ``[batch]`` from 0, in the same order each time
            if a cache is used. Images of any shape: pixels, event frames, features of sound.
        epsilons: budgets, positive; one, or several.
        attacks: ``"quick"``, ``"paper"``, ``"standard"``, ``"exhaustive"``, or names and ``Attack`` objects.
        forward: as ``AttackableView``'s, for the network and the baselines.
        baselines: other networks by name; a ``Target`` for one that needs another ``forward``.
        seed: of attacks and noise.
        protocol: norm, noise draws and votes, gates and so on; the defaults of ``Protocol`` if it is None.
        sources: networks by name that adversarial images are transferred from, and that are not evaluated themselves.
        name: of the network in the report.
        cache: folder for finished attacks; the same call goes on from there, also after Ctrl-C. An attack of yours is
            known by its name and settings, so change these with its code.
        progress: says on stderr what it will take and the time left, on a terminal or else a line every half minute;
            or is called with the name of the next piece, the work done, and 100. False for silence.
        limit: seconds after which no attack and no gate goes on. What was not finished does not count, and the report
            names it and makes no claim.

    Raises:
        ValueError: if an argument, the data or a network cannot be used, said before any attack.
        ImportError: if an attack needs a package that is not installed.

    Examples:
        >>> images = torch.tensor([[[[0.9, 0.2]]], [[[0.4, 0.5]]]])  # of two pixels, which are the logits
        >>> report = evaluate(nn.Flatten(), [(images, torch.tensor([0, 1]))], [0.1, 0.2], ["FGSM"], progress=False)
        >>> print(report.worst_case[0.2])
        50.0 ± 40.5 % (masking not ruled out (G5, G10 not run))
    """
    started = time.monotonic()
    chosen = suite(attacks)
    protocol = protocol or Protocol()
    budgets = _budgets(epsilons, protocol.norm)
    if not any(protocol.norm in attack.norms for attack in chosen):
        raise ValueError(f"none of the attacks {', '.join(a.name for a in chosen)} has the norm {protocol.norm}")
    sources, baselines = sources or {}, baselines or {}
    if sources.keys() & baselines.keys():
        raise ValueError("a source is called like a baseline; rename it")
    models = _models(net, name, {**baselines, **sources}, forward, protocol)
    images, labels = _collect(loader)
    nets = [model.net for model in models.values()]
    with left_as_found(*nets, gradients=True, modes=True, states=True, random=True), ExitStack() as stack:
        for key, model in models.items():
            model.net.eval()
            _check_network(key, model, images, labels, seed, protocol.rows)
        # Networks may make neurons in their first pass.
        stack.enter_context(searched_once(*nets))
        uses = [use for key, model in models.items() for use in _subjects(key, model, images)]
        attacked = ("off", "on", "none") if protocol.noise == "both" else (protocol.noise, "none")
        subjects = [use for use in uses if use.network not in sources and use.noise in attacked]
        # Without noise, where a gradient costs less.
        silent = [use for use in uses if use.noise != "on"]
        folder = None if cache is None else Path(cache)
        tell = _Lines() if progress is True else progress or (lambda what, done, total: None)
        evaluation = _Evaluation(
            protocol, budgets, seed, chosen, subjects, silent, images, labels, folder, tell, started + limit
        )
        rows = evaluation.rows()
    _warn_about_noise_gaps(rows)
    suites = attacks if isinstance(attacks, str) else ", ".join(a if isinstance(a, str) else a.name for a in attacks)
    return RobustnessReport(protocol, budgets, seed, chosen, rows, suites, time.monotonic() - started)


def _warn_about_noise_gaps(rows: Sequence[Row]) -> None:
    """Warns of networks whose accuracy is another one without their noise than by the majority of noise draws."""
    off = {row.subject.network: row.clean for row in rows if row.subject.noise == "off"}
    for row in rows:
        name, noise = row.subject.network, row.subject.noise
        compared = noise == "on" and name in off and not row.subject.noisy_in_evaluation
        if compared and (gap := noise_gap(off[name], row.clean)):
            warn(f"{name}: {gap}")


def _budgets(epsilons: float | Sequence[float], norm: str) -> tuple[float, ...]:
    wanted = list(epsilons) if isinstance(epsilons, Iterable) else [epsilons]
    try:
        budgets = tuple(sorted({float(epsilon) for epsilon in wanted}))
    except (TypeError, ValueError):
        budgets = ()
    if not budgets or any(not 0 < epsilon < math.inf for epsilon in budgets):
        raise ValueError(f"epsilons must be positive numbers and there must be one, got {wanted}")
    if norm == "linf" and budgets[-1] > 1:
        raise ValueError(f"epsilons of linf are in units of pixels in [0, 1], as 8 / 255; got {budgets[-1]:g}")
    return budgets


def _models(
    net: nn.Module, name: str, others: Mapping[str, nn.Module | Target], forward: Forward | None, protocol: Protocol
) -> dict[str, Target]:
    """The networks by name, the first one first."""
    if name in others:
        raise ValueError(f"a baseline or source is called {name!r}, like the network itself; rename it")
    models = {}
    for key, value in {name: net, **others}.items():
        if not isinstance(value, (nn.Module, Target)):
            raise ValueError(f"{key} must be a network or a Target, got {type(value).__name__}")
        if isinstance(value, nn.Module):
            value = Target(value, forward, draws=protocol.draws, scale=protocol.scale)
        models[key] = value
    return models


def _check_network(name: str, target: Target, images: Tensor, labels: Tensor, seed: int, rows: int) -> None:
    """Error for a network whose answers are not finite or no logits: they must not count as wrong ones."""
    reset(target.net)
    if broken := not_finite(target.net):
        # Logits do not show it: a membrane potential that is NaN never spikes.
        raise ValueError(
            f"{name}: NaN or infinite values in {', '.join(broken)}; training diverged, or the file is damaged: load "
            "earlier weights, or train again with a lower learning rate"
        )
    try:
        count_votes(replace(target, noise=False), images, labels, 1, seed, rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _subjects(name: str, model: Target, images: Tensor) -> list[Subject]:
    """A network with its noise off and, if it has any, on."""
    silent = replace(model, noise=False)
    random = is_random(silent, images)
    if noises(model.net):
        return [Subject(name, "off", silent, random), Subject(name, "on", replace(model, noise=True), True)]
    # Attacks average over the draws of a target with noise: also where a network draws its own, as rate codes do.
    return [Subject(name, "none", replace(model, noise=random), random)]


def _collect(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All images and labels, on the CPU."""
    pairs = list(loader)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError("loader must give pairs of images and labels: a DataLoader, or [(images, labels)]")
    batches = [(images.detach().cpu().float(), torch.as_tensor(labels).cpu()) for images, labels in pairs]
    if not batches:
        raise ValueError("the loader gives no images")
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    if images.dim() < 2 or labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"images [n, ...] and integer labels [n] are needed, got {tuple(images.shape)} and "
            f"{tuple(labels.shape)} ({labels.dtype})"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"images must be in [0, 1], got {images.min():.3g} to {images.max():.3g}; normalise inside forward=, and "
            "divide counts of events by their largest"
        )
    return images, labels.long()


class AttackFailedError(RuntimeError):
    """An attack raised an error, or its images were refused."""


class _Lines:
    """Progress on stderr with the time left: one line that changes on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        self.started, self.said = time.monotonic(), -math.inf
        self.terminal = sys.stderr.isatty()

    def __call__(self, what: str, done: float, total: int) -> None:
        """Tells what is done next."""
        now = time.monotonic()
        if now - self.said < (0 if self.terminal else 30) and what != DONE:
            return
        left = f", about {duration((now - self.started) * (total - done) / done)} left" if 1 < done < total else ""
        start, end = ("\r\033[K", "" if done > 0 and what != DONE else "\n") if self.terminal else ("", "\n")
        print(f"{start}evaluate: {done:.0f} %{left}: {what}", end=end, file=sys.stderr, flush=True)
        self.said = now


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


@dataclass
class _Evaluation:
    """One run of ``evaluate``, piece by piece; all networks see the same images."""

    protocol: Protocol
    epsilons: tuple[float, ...]
    seed: int
    suite: tuple[Attack, ...]
    subjects: Sequence[Subject]
    sources: Sequence[Subject]
    images: Tensor
    labels: Tensor
    cache: Path | None
    progress: Progress
    deadline: float

    def __post_init__(self) -> None:
        self.attacks = {subject.label: self._attacks_on(subject) for subject in self.subjects}
        # Transfers run on the networks that they come from.
        every = {subject.label: subject for subject in (*self.subjects, *self.sources)}
        self.marks = {} if self.cache is None else {label: self._mark(subject) for label, subject in every.items()}
        self.clean = {subject.label: self._score(subject, self.images, self.labels) for subject in self.subjects}
        # Passes that are done, and those to come of subjects that have not begun.
        self.done, self.coming = 0.0, {s.label: self._passes(s, self.clean[s.label].right) for s in self.subjects}

    def rows(self) -> tuple[Row, ...]:
        """Measurements of every subject."""
        seconds = sum(self.coming[subject.label] * self._seconds_of_a_pass(subject) for subject in self.subjects)
        self._tell(f"{len(self.images)} images and {len(self.subjects)} networks take at most {duration(seconds)}", 0)
        rows = tuple(self._row(subject) for subject in self.subjects)
        self.progress(DONE, 100, 100)
        return rows

    def _row(self, subject: Subject) -> Row:
        """All attacks and gates of one subject."""
        clean = self.clean[subject.label]
        self.coming.pop(subject.label)
        right: dict[str, dict[float, Tensor]] = {}
        unchanged: dict[str, float] = {}
        failures: dict[str, str] = {}
        left_out: list[str] = []
        attacks, standing = self.attacks[subject.label], clean.right
        before = {attack.name: clean.right for attack in attacks}
        pieces_left = self._pieces(subject)
        while pieces_left:
            epsilon, attack = pieces_left[0]
            still = before[attack.name] & standing if attack.in_turn else before[attack.name]
            self._tell(f"{subject.label}: {attack.name} {epsilon:g}", self._passes(subject, still, pieces_left))
            pieces_left = pieces_left[1:]
            if attack.name in failures:
                continue
            try:
                finished = self._finished(subject, attack, epsilon, still)
            except gates.TimeIsUpError:
                left_out.append(f"{attack.name} at {epsilon:g}")
                continue
            except AttackFailedError as error:
                # One attack that fails must not cost hours of the others; the gate G9 tells.
                failures[attack.name] = str(error)
                continue
            self.done += attack.passes(subject.target) * int(still.sum())
            before[attack.name] = before[attack.name] & (finished["right"] | ~still)
            standing = standing & before[attack.name] if attack.in_turn else standing
            share = finished["unchanged"] / max(1, int(clean.right.sum()))
            unchanged[attack.name] = max(share, unchanged.get(attack.name, 0))
            # What breaks nothing more, for want of time or by an error, still broke that within smaller budgets.
            right.setdefault(attack.name, dict.fromkeys(self.epsilons, clean.right))
            right[attack.name] |= dict.fromkeys(self.epsilons[self.epsilons.index(epsilon) :], before[attack.name])
        ran = tuple(attack for attack in attacks if attack.name in right)
        row = Row(subject, clean.right, share_of(clean.single), ran, right, unchanged, failures, tuple(left_out))
        self._tell(f"{subject.label}: gates", 0)
        protocol, chosen = self.protocol, row.clean.nonzero()[: self.protocol.gate_images, 0]
        probe = gates.Probe(
            gates.until(subject.target, self.deadline), self.images[chosen], self.labels[chosen], protocol.norm,
            protocol.votes, self.seed, protocol.rows, subject.random,
        )  # fmt: skip
        return replace(row, findings=gates.judge(probe, row, self.epsilons, chosen, protocol.gates))

    def _pieces(self, subject: Subject) -> list[tuple[float, Attack]]:
        return [(epsilon, attack) for epsilon in self.epsilons for attack in self.attacks[subject.label]]

    def _passes(self, subject: Subject, still: Tensor, pieces: Sequence[tuple[float, Attack]] | None = None) -> float:
        """Passes that pieces and gates take at most: those in turn may break more of the images."""
        attacks = sum(attack.passes(subject.target) for _, attack in pieces or self._pieces(subject))
        draws = subject.target.draws if subject.target.noise else 1
        ascent, longest = gates.ASCENT.steps * len(gates.LADDER) * draws, gates.longer(subject.target)
        probed = min(len(self.images), self.protocol.gate_images) if self.protocol.gates else 0
        return int(still.sum()) * attacks + probed * (ascent + longest.steps * (longest.draws or 1) / 4)

    def _seconds_of_a_pass(self, subject: Subject) -> float:
        """Seconds that one image takes, forward and backward."""
        few = self.images[: min(PROBED, self.protocol.rows)].to(device_of(subject.target.net)).requires_grad_()
        view, seconds = subject.target.view(draws=1), math.inf
        # The first one may compile.
        for _ in range(2):
            began = time.perf_counter()
            try:
                torch.autograd.grad(view(few).sum(), few)[0].sum().item()
            except RuntimeError:
                # The gates say what is wrong with it.
                return 0.0
            seconds = min(seconds, (time.perf_counter() - began) / len(few))
        return seconds

    def _attacks_on(self, subject: Subject) -> tuple[Attack, ...]:
        """The attacks that have the norm; transfers are always among them, one for each source."""
        usable = [attack for attack in self.suite if self.protocol.norm in attack.norms]
        counterfactual = [attack for attack in usable if attack.settings.get("surrogate") == COUNTERFACTUAL]
        if counterfactual and not self._has_likelihood_ratio(subject.target):
            usable = [attack for attack in usable if attack not in counterfactual]
        transfers = [attack for attack in usable if attack.needs_sources] or [
            attack for attack in SUITES["standard"] if attack.needs_sources and self.protocol.norm in attack.norms
        ]
        others = [source for source in self.sources if source.network != subject.network]
        return (
            *(attack for attack in usable if not attack.needs_sources),
            *(self._from_source(attack, source) for attack in transfers for source in others),
        )

    def _has_likelihood_ratio(self, target: Target) -> bool:
        x, y = (values[:2].to(device_of(target.net)) for values in (self.images, self.labels))
        try:
            likelihood_ratio_input_gradient(with_noise(target), x, y, copies=2, seed=self.seed)
        except ValueError:
            # G7 says so too.
            return False
        return True

    def _attack(self, subject: Subject, attack: Attack, epsilon: float, still: Tensor) -> dict[str, Any]:
        seed = mix(self.seed, crc32(f"{attack.name} {epsilon:g}".encode()))
        budget, target = Budget(epsilon, self.protocol.norm), gates.until(subject.target, self.deadline)
        x, y = (values[still].to(device_of(target.net)) for values in (self.images, self.labels))
        try:
            adversarial = perturb(attack, target, x, y, budget, seed, self.protocol.rows)
        except gates.TimeIsUpError:
            raise
        except Exception as error:
            raise AttackFailedError(first_line(error)) from error
        after = still.clone()
        after[still] = self._score(subject, adversarial, y, seed, 1).right
        return {"right": after, "unchanged": int((adversarial == x).flatten(1).all(1).sum())}

    def _score(self, subject: Subject, images: Tensor, labels: Tensor, *seeds: int) -> Scores:
        votes = self.protocol.votes if subject.random else 1
        return count_votes(subject.target, images, labels, votes, mix(self.seed, *seeds), self.protocol.rows)

    def _mark(self, subject: Subject) -> str:
        """Fingerprint of a network and its target's settings, with its logits and their gradient on a few images."""
        target = subject.target
        state = [part for item in target.net.state_dict().items() for part in item]
        few = self.images[:FINGERPRINT_IMAGES].to(device_of(target.net))
        with seeded(0):
            x = few.clone().requires_grad_()
            logits = target.view(draws=1)(x)
            (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        return fingerprint(*state, logits, gradient, target.noise, target.draws, target.scale)

    def _finished(self, subject: Subject, attack: Attack, epsilon: float, still: Tensor) -> dict[str, Any]:
        """Result of an attack, from the cache if it is there."""
        if self.cache is None:
            return self._attack(subject, attack, epsilon, still)
        mark = fingerprint(
            self.marks[subject.label], self.marks.get(str(attack.settings.get("source"))), self.images, self.labels,
            still, self.protocol.norm, self.protocol.votes, self.protocol.rows, self.seed, versions(*PACKAGES),
            attack.name, dict(attack.settings), epsilon,
        )  # fmt: skip
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{subject.label} {attack.name} {epsilon:g}")
        path = self.cache / f"{name}-{mark}.pt"
        finished: dict[str, Any]
        try:
            finished = atomic.load(path)
        except (OSError, ValueError):  # Absent, or damaged.
            finished = self._attack(subject, attack, epsilon, still)
            atomic.save(path, finished)
        return finished

    def _tell(self, what: str, left: float) -> None:
        """Says what is done next; ``left`` are the passes that the subject has left."""
        share = self.done / max(1, self.done + left + sum(self.coming.values()))
        self.progress(what, 100 * share, 100)

    def _from_source(self, attack: Attack, source: Subject) -> Attack:
        def run(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
            sources = {source.label: gates.until(source.target, self.deadline)}
            return attack.run(replace(target, sources=sources), x, y, budget, seed)

        name, settings = f"{attack.name} from {source.label}", {**attack.settings, "source": source.label}
        return replace(attack, name=name, run=run, settings=settings, needs_sources=False)


def fingerprint(*parts: Any) -> str:
    """Hash of tensors, and of what JSON can hold; other objects count by their ``str``."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().contiguous()
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            # As bytes, since NumPy has no bfloat16.
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"|")
    return digest.hexdigest()
