"""Gates, the checks that an evaluation has to pass before its figures mean robustness: G0 to G9.

A stochastic or non-differentiable network looks robust when the gradient that attacks it is bad. Each gate looks for
one sign of that, on images that the network has right. What could not be checked has not passed.

Source: Athalye, Carlini & Wagner (2018), "Obfuscated Gradients Give a False Sense of Security"; Carlini et al. (2019),
"On Evaluating Adversarial Robustness".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import first_line
from ..convert import noise_on
from ..network import spiking_neurons
from ..philox import mix
from .attacks import COUNTERFACTUAL, Budget, Descent
from .input_gradient import alignment
from .report import Gate, GateFindings, Row
from .scoring import LOSSES, ROWS, batch_size, count_votes, pieces, seeded, share_of
from .view import Target, device_of, plain

FEW, ALMOST_NONE = 0.01, 0.05
"""Fraction of images that a gate lets pass as exceptions; the second where the attack has not every advantage."""
LADDER = (0.25, 0.5, 1.0)
"""Budgets, as fractions of the one that holds every image, where robustness has to end."""
ASCENT = Descent(loss="margin", steps=20, length=0.125, random_start=False)
"""From the image itself: a network without gradient stays there, while a random start could break it by chance."""
LONGER = 80
"""Twice the steps of the longest attack that averages over noise."""
FEW_IMAGES = 16
"""Images for checks that are slow or need no more."""
SURROGATES = ("training", "gaussian", "rga", "assg")
"""The derivatives of a spike that a suite has to attack through."""
COSINE_FLOOR = 0.6
RESOLVED = 0.2

Measured = tuple[bool | None, str]
"""Whether a gate passed, None if it could not be run, and its measurement in words."""


@dataclass(frozen=True)
class Probe:
    """Images that a network has right, for attacks of the gates; settings as in ``score`` and ``Protocol``.

    ``random`` is False if nothing is: then one vote is enough, and ascent ends once it has broken all images.
    """

    target: Target
    images: Tensor
    labels: Tensor
    norm: str = "linf"
    votes: int = 32
    seed: int = 0
    rows: int = ROWS
    random: bool = True

    @property
    def span(self) -> float:
        """Size of the smallest budget that holds every image: there, nothing can be robust."""
        return 1.0 if self.norm == "linf" else math.sqrt(self.images[0].numel())

    def only(self, chosen: Tensor | slice) -> Probe:
        """The same with some of the images."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def right_after(self, epsilon: float, descent: Descent) -> Tensor:
        """Correct predictions after an attack with fresh noise, Boolean, ``[n]``; each of its candidates counts."""
        right = [torch.zeros(0, dtype=torch.bool)]
        budget, votes = Budget(epsilon, self.norm), self.votes if self.random else 1
        for seed, x, y in self._pieces(descent.draws):
            with seeded(seed):
                candidates = descent.candidates(self.target, x, y, budget, seed, until_wrong=not self.random)
            labels = y.repeat(len(candidates))
            scores = count_votes(self.target, torch.cat(candidates), labels, votes, mix(seed, 1), self.rows)
            right.append(scores.right.view(len(candidates), -1).all(0))
        return torch.cat(right)

    def right_after_frozen(self, epsilon: float, descent: Descent) -> Tensor:
        """Correct predictions after an attack on a single noise draw, which is also the draw that judges it."""
        right = [torch.zeros(0, dtype=torch.bool)]
        target, budget = frozen(self.target, self.seed), Budget(epsilon, self.norm)
        for x, y in pieces(self.target, self.images, self.labels, self.rows):
            candidates = descent.candidates(target, x, y, budget, self.seed, until_wrong=True)
            # One by one: the draw of a larger batch would be another one.
            with torch.no_grad():
                right.append(torch.stack([target.view()(z).argmax(1) == y for z in candidates]).all(0).cpu())
        return torch.cat(right)

    def vanishing(self) -> dict[str, float]:
        """Fraction of the images at which the gradient of a loss is zero, by loss."""
        zeros = dict.fromkeys(LOSSES, 0)
        for seed, x, y in self._pieces():
            x = x.clone().requires_grad_()
            with seeded(seed):
                logits = self.target.view(seed=seed)(x)
            for name, loss in LOSSES.items():
                (gradient,) = torch.autograd.grad(loss(logits, y).sum(), x, retain_graph=True)
                zeros[name] += int((gradient.flatten(1) == 0).all(1).sum())
        return {name: count / len(self.images) for name, count in zeros.items()}

    def _pieces(self, draws: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        size = batch_size(self.target, self.rows, draws)
        for index, (x, y) in enumerate(pieces(self.target, self.images, self.labels, size)):
            yield mix(self.seed, index), x, y


def judge(
    probe: Probe,
    row: Row,
    epsilons: Sequence[float],
    chosen: Tensor,
    unchanged: Mapping[str, float],
    failures: Mapping[str, str],
    may_attack: bool,
) -> GateFindings:
    """Gates of one network, and what their attacks broke; ``chosen`` are the indices of the probe's images."""
    if not len(chosen):
        return GateFindings((Gate("G0 forward pass", None, "no image is right clean: there is nothing to attack"),))
    middle = min(epsilons, key=lambda e: abs(float(row.worst(e).double().mean()) - 0.5))
    white = [attack.name for attack in row.attacks if attack.access == "white-box"]
    others = [attack.name for attack in row.attacks if attack.access != "white-box"]
    findings = GateFindings(epsilon=middle, survived={e: torch.ones_like(row.clean) for e in epsilons})

    def record(epsilon: float, right: Tensor) -> None:
        """Counts what an attack of a gate broke, at larger budgets too."""
        for budget, survived in findings.survived.items():
            survived[chosen] &= right | (budget < epsilon)

    def climb() -> Measured:
        right = torch.ones(len(chosen), dtype=torch.bool)
        for rung in sorted({*epsilons, *(part * probe.span for part in LADDER)}):
            right[right.clone()] = probe.only(right).right_after(rung, ASCENT)
            findings.ladder[rung] = float(right.double().mean())
            record(rung, right)
        return ladder(findings.ladder)

    def converge() -> Measured:
        before, longest = row.worst(middle)[chosen], longer(probe.target.draws)
        after = before.clone()
        after[before] = probe.only(before).right_after(middle, longest)
        record(middle, after | ~before)
        return convergence(before, after, middle, longest)

    def under(names: Sequence[str]) -> dict[float, Tensor]:
        return {e: row.under(names, e) for e in epsilons if names}

    attacking: dict[str, Callable[[], Measured]] = {
        "G0 forward pass": lambda: forward_pass(probe.target, probe.images),
        "G1 gradients": lambda: gradients(probe, {name: unchanged[name] for name in white}),
        "G2 frozen noise": lambda: frozen_noise(probe),
        "G3 ladder": climb,
        "G4 convergence": converge,
        "G7 direction": lambda: direction(probe),
        "G8 canary": lambda: canary(probe),
    }
    measured = {
        name: guarded(check) if may_attack else (None, "left out by gates=False") for name, check in attacking.items()
    }
    measured["G5 black box"] = black_box(under(white), under(others))
    by_surrogate = {name: right[middle] for name, right in row.by_surrogate().items()}
    measured["G6 surrogates"] = surrogate_sweep(probe.target.net, by_surrogate)
    failed = "; ".join(f"{name}: {message}" for name, message in failures.items())
    asserted = "budget, range and finiteness asserted for every adversarial image"
    measured["G9 budget"] = (not failures, failed or asserted)
    return replace(findings, gates=tuple(Gate(name, *measured[name]) for name in sorted(measured)))


def guarded(check: Callable[[], Measured]) -> Measured:
    """Result of a check; one that cannot run has failed, and says why."""
    try:
        return check()
    except Exception as error:
        return False, f"could not be checked: {type(error).__name__}: {first_line(error)}"


def frozen(target: Target, seed: int) -> Target:
    """The same network with the same single noise draw in each pass."""

    def forward(net: nn.Module, images: Tensor) -> Any:
        generator = torch.Generator(images.device).manual_seed(seed)
        with noise_on(net, generator) if target.noise else nullcontext(), seeded(seed):
            return (target.forward or plain)(net, images)

    return replace(target, forward=forward, draws=1)


def masked(target: Target) -> Target:
    """The same network with an input gradient of zero."""
    return replace(target, forward=lambda net, images: (target.forward or plain)(net, images.detach()))


def forward_pass(target: Target, images: Tensor) -> Measured:
    """G0: logits are a function of images and noise alone, and torch's global random state is left to the caller."""
    images = images.to(device_of(target.net))

    def logits_and_state(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with seeded(seed), torch.no_grad():
            return target.view(draws=1, seed=seed)(images), torch.get_rng_state()

    logits, state = logits_and_state(images, 1)
    _, other_state = logits_and_state(images.flip(0), 2)
    if not torch.equal(logits_and_state(images, 1)[0], logits):
        return False, "the same images and noise give other logits: a state is not reset between calls"
    if torch.equal(state, other_state):
        return False, "the network sets torch's global seed: its noise is the same in each call"
    return True, "logits depend on images and noise alone; torch's seed is left alone"


def gradients(probe: Probe, unchanged: Mapping[str, float]) -> Measured:
    """G1: the network's own gradient is zero at few images, and each white-box attack leaves few of them unchanged."""
    shares = {f"zero gradient of the {loss}": share for loss, share in probe.vanishing().items()}
    shares |= {f"unchanged by {name}": share for name, share in unchanged.items()}
    worst = max(shares, key=lambda sign: shares[sign])
    return shares[worst] <= FEW, f"{worst}: {100 * shares[worst]:.1f} % of the images (at most {100 * FEW:g} %)"


def frozen_noise(probe: Probe, ascent: Descent = ASCENT) -> Measured:
    """G2: with the noise frozen, ascent from the image breaks nearly all of them within half of the pixel range."""
    epsilon = probe.span / 2
    left = float(probe.right_after_frozen(epsilon, ascent).double().mean())
    detail = f"{100 * left:.1f} % right after {ascent.steps} steps at ε = {epsilon:g} (at most {100 * ALMOST_NONE:g} %)"
    return left <= ALMOST_NONE, detail


def ladder(shares: Mapping[float, float]) -> Measured:
    """G3: the accuracy under ascent, given by budget, falls to zero at the largest, which holds every image."""
    largest = max(shares)
    listed = ", ".join(f"{epsilon:g}: {100 * share:.1f} %" for epsilon, share in sorted(shares.items()))
    return shares[largest] <= FEW, f"{listed} (at most {100 * FEW:g} % at ε = {largest:g})"


def longer(draws: int) -> Descent:
    """The attack of G4, for a suite that averages over so many draws."""
    return replace(ASCENT, steps=LONGER, length=2.5 / LONGER, draws=2 * draws, random_start=True)


def convergence(survived: Tensor, after: Tensor, epsilon: float, attack: Descent) -> Measured:
    """G4: twice the steps and twice the draws break no more of the survivors of the suite than the interval allows."""
    before, now = share_of(survived), share_of(after)
    return before.accuracy - now.accuracy <= before.half_width, (
        f"ε = {epsilon:g}: {before} % of {len(survived)} images right after the suite, {100 * now.accuracy:.1f} % "
        f"after {attack.steps} more steps of {attack.draws} draws (at most the half-width less)"
    )


def black_box(white: Mapping[float, Tensor], black: Mapping[float, Tensor]) -> Measured:
    """G5: attacks without the gradient break no more that the white-box attacks miss than the interval allows."""
    if not white or not black:
        return None, f"the suite has no {'black-box' if white else 'white-box'} attack"
    missed = {epsilon: share_of(white[epsilon] & ~black[epsilon]).accuracy for epsilon in white}
    passed = all(missed[epsilon] <= share_of(white[epsilon]).half_width for epsilon in white)
    listed = ", ".join(f"ε = {epsilon:g}: {100 * share:.1f} %" for epsilon, share in missed.items())
    return passed, f"broken without the gradient only: {listed} (at most the half-width of the interval)"


def surrogate_sweep(net: nn.Module, right: Mapping[str, Tensor]) -> Measured:
    """G6: the suite has an attack through every surrogate; the images that are right under it are given by its name."""
    if not spiking_neurons(net):
        return True, "the network has no spikes to differentiate through"
    if missing := [surrogate for surrogate in SURROGATES if surrogate not in right]:
        return None, f"the suite has no attack through {', '.join(missing)}"
    listed = ", ".join(f"{name} {100 * share_of(images).accuracy:.1f} %" for name, images in right.items())
    alone = ""
    if COUNTERFACTUAL in right:
        others = torch.stack([images for name, images in right.items() if name != COUNTERFACTUAL]).all(0)
        broken = others & ~right[COUNTERFACTUAL]
        alone = f"; {int(broken.sum())} of {len(broken)} images broken by the counterfactual gradient alone"
    return True, f"{listed}{alone}; the worst case has them all"


def direction(probe: Probe) -> Measured:
    """G7: the network's own surrogate gradient points where the likelihood-ratio gradient does."""
    if not spiking_neurons(probe.target.net):
        return True, "the network has no spikes: its gradient is exact"
    few, device = probe.only(slice(FEW_IMAGES)), device_of(probe.target.net)
    try:
        cosine, repeatability = alignment(probe.target, few.images.to(device), few.labels.to(device), seed=probe.seed)
    except ValueError as error:
        return None, f"no likelihood-ratio gradient: {first_line(error)}"
    if repeatability < RESOLVED:
        return None, f"the likelihood-ratio gradient is not resolved (repeatability {repeatability:.2f})"
    return cosine >= COSINE_FLOOR, f"cosine {cosine:.2f} to the likelihood-ratio gradient (at least {COSINE_FLOOR:g})"


def canary(probe: Probe) -> Measured:
    """G8: the same network with an input gradient of zero is called out by G1, G2 and G3."""
    blind = replace(probe.only(slice(FEW_IMAGES)), target=masked(probe.target))
    # Without a gradient, more steps lead no further than one.
    ascent = replace(ASCENT, steps=1)
    checks: dict[str, Callable[[], Measured]] = {
        "G1": lambda: gradients(blind, {}),
        "G2": lambda: frozen_noise(blind, ascent),
        "G3": lambda: ladder({blind.span: float(blind.right_after(blind.span, ascent).double().mean())}),
    }
    missed = [name for name, check in checks.items() if guarded(check)[0]]
    if missed:
        return False, f"a copy without gradient passes {', '.join(missed)}"
    return True, "G1, G2, G3 call out a masked copy"
