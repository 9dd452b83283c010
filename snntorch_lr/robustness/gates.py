"""Gates, the checks that an evaluation has to pass before its figures mean robustness: G0 to G10.

A stochastic or non-differentiable network looks robust when the gradient that attacks it is bad. Each gate looks for
one sign of that, on images that the network has right. What could not be checked has not passed.

Source: Athalye, Carlini & Wagner (2018), "Obfuscated Gradients Give a False Sense of Security"; Carlini et al. (2019),
"On Evaluating Adversarial Robustness".
"""

from __future__ import annotations

import math
import time
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
from .scoring import LOSSES, ROWS, Share, batch_size, count_votes, pieces, seeded, share_of
from .view import Target, device_of, plain

FEW, ALMOST_NONE = 0.01, 0.05
"""Fraction of images that a gate lets pass as exceptions; the second where the attack has not every advantage."""
LADDER = (0.25, 0.5, 1.0)
"""Budgets, as fractions of the one that holds every image, where robustness has to end."""
ASCENT = Descent(loss="margin", steps=20, length=0.125, random_start=False)
"""From the image itself: a network without gradient stays there, while a random start could break it by chance."""
LONGER = {True: 40, False: 200}
"""Steps of G4 with and without noise: twice those of attacks that average over draws, and of the longest."""
FEW_IMAGES = 16
"""Images for checks that are slow or need no more."""
SURROGATES = ("training", "gaussian", "rga", "assg")
"""The derivatives of a spike that a suite has to attack through."""
COSINE_FLOOR = 0.6
RESOLVED = 0.2
LEAST_IMAGES, WIDEST = 200, 0.05
"""Images that a claim needs, and the largest tolerance that its gates may have."""

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

    def right_after(self, epsilon: float, descent: Descent, until_wrong: bool = False) -> Tensor:
        """Correct predictions after an attack with fresh noise, Boolean, ``[n]``; each of its candidates counts.

        ``until_wrong`` stops at images that were wrong on the way, which may have been by luck where there is noise.
        """
        right = [torch.zeros(0, dtype=torch.bool)]
        budget, votes = Budget(epsilon, self.norm), self.votes if self.random else 1
        for seed, x, y in self._pieces(descent.draws):
            with seeded(seed):
                candidates = descent.candidates(self.target, x, y, budget, seed, until_wrong or not self.random)
            labels = y.repeat(len(candidates))
            scores = count_votes(self.target, torch.cat(candidates), labels, votes, mix(seed, 1), self.rows)
            right.append(scores.right.view(len(candidates), -1).all(0))
        return torch.cat(right)

    def right_after_frozen(self, epsilon: float, descent: Descent) -> Tensor:
        """Correct predictions after an attack on a single noise draw, which is also the draw that judges it."""
        right = [torch.zeros(0, dtype=torch.bool)]
        target, budget = frozen(self.target, self.seed), Budget(epsilon, self.norm)
        for x, y in pieces(self.target, self.images, self.labels, self.rows):
            candidates = descent.candidates(target, x, y, budget, self.seed)
            # One by one, and always all images: the draw of another batch would be another one.
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


def judge(probe: Probe, row: Row, epsilons: Sequence[float], chosen: Tensor, may_attack: bool) -> GateFindings:
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
        for rung in (part * probe.span for part in LADDER):
            right[right.clone()] = probe.only(right).right_after(rung, ASCENT, until_wrong=True)
            if rung == probe.span and probe.random:
                right[right.clone()] = probe.only(right).right_after(rung, ASCENT)
            findings.ladder[rung] = float(right.double().mean())
            record(rung, right)
        return ladder(findings.ladder)

    def converge() -> Measured:
        right, longest = row.worst(middle), longer(probe.target)
        survivors = right[chosen].nonzero()[: max(4, len(chosen) // 4), 0]
        after = probe.only(survivors).right_after(middle, longest)
        still = torch.ones(len(chosen), dtype=torch.bool)
        still[survivors] = after
        record(middle, still)
        return convergence(after, share_of(right), middle, longest)

    def under(names: Sequence[str]) -> dict[float, Tensor]:
        return {e: row.under(names, e) for e in epsilons if names}

    attacking: dict[str, Callable[[], Measured]] = {
        "G0 forward pass": lambda: forward_pass(probe.target, probe.images),
        "G1 gradients": lambda: gradients(probe, {name: row.unchanged[name] for name in white}),
        "G3 ladder": climb,
        "G2 frozen noise": lambda: frozen_noise(probe, findings.ladder),
        "G4 convergence": converge,
        "G7 direction": lambda: direction(probe),
        "G8 canary": lambda: canary(probe),
    }
    measured = {
        name: guarded(check) if may_attack else (None, "left out by gates=False") for name, check in attacking.items()
    }
    measured["G5 black box"] = black_box(under(white), under(others))
    by_surrogate = {name: right[middle] for name, right in row.by_surrogate().items()}
    measured["G6 surrogates"] = surrogate_sweep(probe.target.net, row.clean, by_surrogate)
    failed = "; ".join(f"{name}: {message}" for name, message in row.failures.items())
    asserted = "budget, range and finiteness asserted for every adversarial image"
    late = f"left out by limit=: {', '.join(row.left_out)}" if row.left_out else ""
    measured["G9 budget"] = (False if failed else None if late else True, failed or late or asserted)
    measured["G10 images"] = enough(row, white, epsilons)
    order = sorted(measured, key=lambda name: int(name.split()[0][1:]))
    return replace(findings, gates=tuple(Gate(name, *measured[name]) for name in order))


class TimeIsUpError(Exception):
    """The time that an evaluation may take has passed."""


def until(target: Target, deadline: float) -> Target:
    """The same network, whose passes raise ``TimeIsUpError`` after the deadline."""

    def forward(net: nn.Module, images: Tensor) -> Any:
        if time.monotonic() > deadline:
            raise TimeIsUpError
        return (target.forward or plain)(net, images)

    return replace(target, forward=forward) if deadline < math.inf else target


def guarded(check: Callable[[], Measured]) -> Measured:
    """Result of a check; one that cannot run has failed, and says why."""
    try:
        return check()
    except TimeIsUpError:
        return None, "left out by limit="
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


def frozen_noise(probe: Probe, rungs: Mapping[float, float], ascent: Descent | None = None) -> Measured:
    """G2: with the noise frozen, ascent from the image breaks nearly all of them within half of the pixel range.

    Where nothing is random, that is a rung of the ladder.
    """
    epsilon, ascent = probe.span / 2, ascent or ASCENT
    if probe.random or epsilon not in rungs:
        left = float(probe.right_after_frozen(epsilon, ascent).double().mean())
    else:
        left = rungs[epsilon]
    detail = f"{100 * left:.1f} % right after {ascent.steps} steps at ε = {epsilon:g} (at most {100 * ALMOST_NONE:g} %)"
    return left <= ALMOST_NONE, detail


def ladder(shares: Mapping[float, float]) -> Measured:
    """G3: the accuracy under ascent, given by budget, falls to zero at the largest, which holds every image."""
    largest = max(shares)
    listed = ", ".join(f"{epsilon:g}: {100 * share:.1f} %" for epsilon, share in sorted(shares.items()))
    return shares[largest] <= FEW, f"{listed} (at most {100 * FEW:g} % at ε = {largest:g})"


def longer(target: Target) -> Descent:
    """The attack of G4, for a suite on this target."""
    steps, draws = LONGER[target.noise], 2 * target.draws if target.noise else 1
    return Descent("assg", "margin", steps, draws, length=5 / steps)


def convergence(after: Tensor, worst: Share, epsilon: float, attack: Descent) -> Measured:
    """G4: twice the steps and twice the draws break no more than the interval allows, by survivors of the suite."""
    broken = float((~after).double().mean()) * worst.accuracy if len(after) else 0.0
    return broken <= worst.half_width, (
        f"ε = {epsilon:g}: {attack.steps} more steps of {attack.draws} draws break {int((~after).sum())} of "
        f"{len(after)} survivors, {100 * broken:.1f} points (at most {100 * worst.half_width:.1f}, the half-width of "
        "the worst case)"
    )


def black_box(white: Mapping[float, Tensor], black: Mapping[float, Tensor]) -> Measured:
    """G5: attacks without the gradient break no more that the white-box attacks miss than the interval allows."""
    if not white or not black:
        return None, f"the suite has no {'black-box' if white else 'white-box'} attack"
    missed = {epsilon: share_of(white[epsilon] & ~black[epsilon]).accuracy for epsilon in white}
    passed = all(missed[epsilon] <= share_of(white[epsilon]).half_width for epsilon in white)
    listed = ", ".join(f"ε = {epsilon:g}: {100 * share:.1f} %" for epsilon, share in missed.items())
    return passed, f"broken without the gradient only: {listed} (at most the half-width of the interval)"


def surrogate_sweep(net: nn.Module, clean: Tensor, right: Mapping[str, Tensor]) -> Measured:
    """G6: the suite has an attack through every surrogate; the images that are right under it are given by its name."""
    if not spiking_neurons(net):
        return True, "the network has no spikes to differentiate through"
    if missing := [surrogate for surrogate in SURROGATES if surrogate not in right]:
        return None, f"the suite has no attack through {', '.join(missing)}"
    broken = {name: int((clean & ~images).sum()) for name, images in right.items()}
    listed = ", ".join(f"{name} {count}" for name, count in broken.items())
    alone = ""
    if COUNTERFACTUAL in right:
        others = torch.stack([images for name, images in right.items() if name != COUNTERFACTUAL]).all(0)
        alone = f"; by the counterfactual gradient alone {int((others & ~right[COUNTERFACTUAL]).sum())}"
    return True, f"images broken through {listed}{alone}; the worst case has them all"


def enough(row: Row, white: Sequence[str], epsilons: Sequence[float]) -> Measured:
    """G10: there are images enough for a claim, and the half-widths that G4 and G5 allow are small enough."""
    count = len(row.clean)
    widest = max(share_of(right).half_width for e in epsilons for right in (row.under(white, e), row.worst(e)))
    return True if count >= LEAST_IMAGES and widest <= WIDEST else None, (
        f"{count} images (at least {LEAST_IMAGES}), G4 and G5 allow up to {100 * widest:.1f} points "
        f"(at most {100 * WIDEST:g})"
    )


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
        "G2": lambda: frozen_noise(blind, {}, ascent),
        "G3": lambda: ladder({blind.span: float(blind.right_after(blind.span, ascent).double().mean())}),
    }
    missed = [name for name, check in checks.items() if check()[0]]
    if missed:
        return False, f"a copy without gradient passes {', '.join(missed)}"
    return True, "G1, G2, G3 call out a masked copy"
