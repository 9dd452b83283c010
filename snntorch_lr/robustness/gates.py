"""Checks that an evaluation has to pass before its figures mean robustness: G0 to G9.

A stochastic or non-differentiable network looks robust when the gradient that attacks it is bad. Each gate looks for
one sign of that, on images that the network has right. What could not be checked has not passed.

Source: Athalye, Carlini & Wagner (2018), "Obfuscated Gradients Give a False Sense of Security"; Carlini et al. (2019),
"On Evaluating Adversarial Robustness".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import first_line
from ..network import spiking_neurons
from ..philox import mix
from .attacks import LOSSES, Budget
from .gradient_attacks import COUNTERFACTUAL, Descent
from .input_gradient import alignment
from .scoring import ROWS, batch_size, logits_of, pieces, score, seeded, share_of
from .surrogates import SURROGATES
from .view import AttackableView, Target, device_of

FEW = 0.01
"""Fraction of images that a gate lets pass as exceptions."""
ALMOST_NONE = 0.05
"""The same where the attack is not given every advantage."""
LADDER = (0.25, 0.5, 1.0)
"""Budgets, as fractions of the one that holds every image, where robustness has to end."""
ASCENT = Descent(loss="margin", steps=20, length=0.125, random_start=False)
"""From the image itself: a network without gradient stays there, while a random start could break it by chance."""
CURVE_STEPS = (1, 2, 5, 10, 20, 40)
"""Steps of plain ascent, for the curve of the report."""
LONGER = 80
"""Twice the steps of the longest attack that averages over noise."""
FEW_IMAGES = 16
"""Images for checks that are slow or need no more."""
COSINE_FLOOR = 0.6
RESOLVED = 0.2


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
    """Verdict of the gates on a headline, in a few words; without gates no claim passes.

    Examples:
        >>> verdict([Gate("G1 gradients", True, ""), Gate("G6 surrogates", None, "")])
        'masking not ruled out (G6 not run)'
    """
    failed = [gate.name for gate in gates if gate.passed is False]
    missing = [gate.name for gate in gates if gate.passed is None]
    if failed:
        return f"MASKING SUSPECTED ({', '.join(name.split()[0] for name in failed)} failed)"
    if missing or not gates:
        return f"masking not ruled out ({', '.join(name.split()[0] for name in missing) or 'gates'} not run)"
    return "all gates passed"


def mark(gates: Sequence[Gate]) -> str:
    """Sign behind a worst case: `` !`` if a gate failed, `` ?`` if one was not run, else nothing."""
    passed = {gate.passed for gate in gates} or {None}
    return " !" if False in passed else " ?" if None in passed else ""


def guarded(name: str, check: Callable[[], Gate]) -> Gate:
    """A gate; one whose check cannot run has failed, and says why."""
    try:
        return check()
    except Exception as error:
        return Gate(name, False, f"could not be checked: {type(error).__name__}: {first_line(error)}")


class _FrozenView(AttackableView):
    """A view whose noise is the same in each call."""

    def forward(self, images: Tensor) -> Tensor:
        self._generator.manual_seed(self._generator.initial_seed())
        with seeded(self._generator.initial_seed()):
            return super().forward(images)


@dataclass(frozen=True)
class FrozenTarget(Target):
    """A target whose views make the same single noise draw in each call."""

    def view(self, *, seed: int = 0, **_: Any) -> AttackableView:
        """The network with its noise frozen by the seed."""
        return _FrozenView(self.net, self.forward, 1, self.noise, seed, self.scale)


@dataclass(frozen=True)
class Probe:
    """Images that a network has right, for attacks of the gates; settings as in ``score`` and ``Protocol``."""

    target: Target
    images: Tensor
    labels: Tensor
    norm: str = "linf"
    votes: int = 32
    seed: int = 0
    rows: int = ROWS

    @property
    def span(self) -> float:
        """Size of the smallest budget that holds every image: there, nothing can be robust."""
        return 1.0 if self.norm == "linf" else math.sqrt(self.images[0].numel())

    def only(self, chosen: Tensor | slice) -> Probe:
        """The same with some of the images."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def right_after(self, epsilon: float, descent: Descent) -> Tensor:
        """Correct predictions after an attack with fresh noise, Boolean, ``[n]``."""
        right = [torch.zeros(0, dtype=torch.bool)]
        for seed, x, y in self._pieces(descent.draws):
            with seeded(seed):
                adversarial = descent(self.target, x, y, Budget(epsilon, self.norm), seed)
            right.append(score(self.target, adversarial, y, self.votes, mix(seed, 1), self.rows).right)
        return torch.cat(right)

    def right_after_frozen(self, epsilon: float, descent: Descent) -> Tensor:
        """Correct predictions after an attack on a single noise draw, which is also the draw that judges it."""
        right = [torch.zeros(0, dtype=torch.bool)]
        target = FrozenTarget(self.target.net, self.target.forward, self.target.noise, scale=self.target.scale)
        for x, y in pieces(self.target, self.images, self.labels, self.rows):
            adversarial = descent(target, x, y, Budget(epsilon, self.norm), self.seed)
            with torch.no_grad():
                right.append((target.view(seed=self.seed)(adversarial).argmax(1) == y).cpu())
        return torch.cat(right)

    def curve(self, runs: Sequence[tuple[float, Descent]]) -> list[Tensor]:
        """Right images after each of some attacks of growing budget or length, each on those that are still right."""
        still = torch.ones(len(self.images), dtype=torch.bool)
        after = []
        for epsilon, descent in runs:
            still[still.clone()] = self.only(still).right_after(epsilon, descent)
            after.append(still.clone())
        return after

    def vanishing(self, loss: str) -> float:
        """Fraction of the images at which the gradient of a loss, ``"margin"`` or ``"cross-entropy"``, is zero."""
        zeros = 0
        for seed, x, y in self._pieces():
            x = x.clone().requires_grad_()
            with seeded(seed):
                total = LOSSES[loss](self.target.view(seed=seed)(x), y).sum()
            gradient = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
            zeros += len(x) if gradient is None else int((gradient.flatten(1) == 0).all(1).sum())
        return zeros / len(self.images)

    def _pieces(self, draws: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        size = batch_size(self.target, self.rows, draws)
        for index, (x, y) in enumerate(pieces(self.target, self.images, self.labels, size)):
            yield mix(self.seed, index), x, y


def forward_pass(target: Target, images: Tensor) -> Gate:
    """G0: logits are a function of images and noise alone, and torch's global random state is left to the caller."""
    name, images = "G0 forward pass", images.to(device_of(target.net))
    first = logits_of(target, images, 1)
    logits_of(target, images.flip(0), 2)
    if not torch.equal(logits_of(target, images, 1), first):
        return Gate(name, False, "the same images and noise give other logits: a state is not reset between calls")
    states = []
    for seed in 1, 2:
        with seeded(seed), torch.no_grad():
            target.view(draws=1, seed=0)(images)
            states.append(torch.get_rng_state())
    if torch.equal(*states):
        return Gate(name, False, "the network sets torch's global seed: its noise is the same in each call")
    return Gate(name, True, "logits depend on images and noise alone; torch's seed is left alone")


def gradients(probe: Probe, unchanged: Mapping[str, float]) -> Gate:
    """G1: the network's own gradient is zero at few images, and each white-box attack leaves few of them unchanged."""
    found = {f"zero gradient of the {loss}": probe.vanishing(loss) for loss in ("margin", "cross-entropy")}
    found |= {f"unchanged by {name}": share for name, share in unchanged.items()}
    worst = max(found, key=lambda key: found[key])
    detail = f"{worst}: {100 * found[worst]:.1f} % of the images (at most {100 * FEW:g} %)"
    return Gate("G1 gradients", found[worst] <= FEW, detail)


def frozen_noise(probe: Probe, ascent: Descent = ASCENT) -> Gate:
    """G2: with the noise frozen, ascent from the image breaks nearly all of them within half of the pixel range."""
    epsilon = probe.span / 2
    left = float(probe.right_after_frozen(epsilon, ascent).double().mean())
    detail = f"{100 * left:.1f} % right after {ascent.steps} steps at ε = {epsilon:g} (at most {100 * ALMOST_NONE:g} %)"
    return Gate("G2 frozen noise", left <= ALMOST_NONE, detail)


def ladder(shares: Mapping[float, float]) -> Gate:
    """G3: the accuracy under ascent, given by budget, falls to zero at the largest, which holds every image."""
    largest = max(shares)
    listed = ", ".join(f"{epsilon:g}: {100 * share:.1f} %" for epsilon, share in sorted(shares.items()))
    return Gate("G3 ladder", shares[largest] <= FEW, f"{listed} (at most {100 * FEW:g} % at ε = {largest:g})")


def longer(draws: int) -> Descent:
    """The attack of G4, for a suite that averages over so many draws."""
    return replace(ASCENT, steps=LONGER, length=2.5 / LONGER, draws=2 * draws, random_start=True)


def convergence(survived: Tensor, after: Tensor, epsilon: float, attack: Descent) -> Gate:
    """G4: twice the steps and twice the draws break no more of the survivors of the suite than the interval allows."""
    before, now = share_of(survived), share_of(after)
    detail = (
        f"ε = {epsilon:g}: {before} % of {len(survived)} images right after the suite, {100 * now.accuracy:.1f} % "
        f"after {attack.steps} more steps of {attack.draws} draws (at most the half-width less)"
    )
    return Gate("G4 convergence", before.accuracy - now.accuracy <= before.half_width, detail)


def black_box(white: Mapping[float, Tensor], black: Mapping[float, Tensor]) -> Gate:
    """G5: attacks without the gradient break no more images that the white-box attacks miss than the interval allows.

    Both are images that are right under all of these attacks together, by budget, Boolean, ``[images]``.
    """
    name = "G5 black box"
    if not white or not black:
        return Gate(name, None, f"the suite has no {'black-box' if white else 'white-box'} attack")
    missed = {epsilon: share_of(white[epsilon] & ~black[epsilon]).accuracy for epsilon in white}
    passed = all(missed[epsilon] <= share_of(white[epsilon]).half_width for epsilon in white)
    listed = ", ".join(f"ε = {epsilon:g}: {100 * share:.1f} %" for epsilon, share in missed.items())
    return Gate(name, passed, f"broken without the gradient only: {listed} (at most the half-width of the interval)")


def sweep(net: nn.Module, right: Mapping[str, Tensor]) -> Gate:
    """G6: the suite has an attack through every surrogate; the images that are right under it are given by its name."""
    name = "G6 surrogates"
    if not any(True for _ in spiking_neurons(net)):
        return Gate(name, True, "the network has no spikes to differentiate through")
    if missing := [surrogate for surrogate in SURROGATES if surrogate not in right]:
        return Gate(name, None, f"the suite has no attack through {', '.join(missing)}")
    listed = ", ".join(f"{surrogate} {100 * share_of(each).accuracy:.1f} %" for surrogate, each in right.items())
    alone = ""
    if COUNTERFACTUAL in right:
        others = torch.stack([each for surrogate, each in right.items() if surrogate != COUNTERFACTUAL]).all(0)
        broken = others & ~right[COUNTERFACTUAL]
        alone = f"; {int(broken.sum())} of {len(broken)} images broken by the counterfactual gradient alone"
    return Gate(name, True, f"{listed}{alone}; the worst case has them all")


def direction(probe: Probe) -> Gate:
    """G7: the network's own surrogate gradient points where the likelihood-ratio gradient does."""
    name = "G7 direction"
    if not any(True for _ in spiking_neurons(probe.target.net)):
        return Gate(name, True, "the network has no spikes: its gradient is exact")
    few, device = probe.only(slice(FEW_IMAGES)), device_of(probe.target.net)
    try:
        cosine, repeatability = alignment(probe.target, few.images.to(device), few.labels.to(device), seed=probe.seed)
    except ValueError as error:
        return Gate(name, None, f"no likelihood-ratio gradient: {first_line(error)}")
    if repeatability < RESOLVED:
        return Gate(name, None, f"the likelihood-ratio gradient is not resolved (repeatability {repeatability:.2f})")
    detail = f"cosine {cosine:.2f} to the likelihood-ratio gradient (at least {COSINE_FLOOR:g})"
    return Gate(name, cosine >= COSINE_FLOOR, detail)


def canary(probe: Probe) -> Gate:
    """G8: the same network with an input gradient of zero is called out by G1, G2 and G3."""
    forward = probe.target.forward

    def masked(net: nn.Module, images: Tensor) -> Tensor:
        return net(images.detach()) if forward is None else forward(net, images.detach())

    blind = replace(probe.only(slice(FEW_IMAGES)), target=replace(probe.target, forward=masked))
    # No number of steps leads away without a gradient.
    ascent = replace(ASCENT, steps=2)
    tripped = [
        guarded("G1", lambda: gradients(blind, {})),
        guarded("G2", lambda: frozen_noise(blind, ascent)),
        guarded("G3", lambda: ladder({blind.span: float(blind.right_after(blind.span, ascent).double().mean())})),
    ]
    missed = [gate.name for gate in tripped if gate.passed]
    detail = "a copy without gradient passes " + ", ".join(missed) if missed else "G1, G2, G3 call out a masked copy"
    return Gate("G8 canary", not missed, detail)


def assertions(failures: Mapping[str, str]) -> Gate:
    """G9: every adversarial image was within its budget, in [0, 1] and finite; failures are given by attack."""
    if failures:
        return Gate("G9 budget", False, "; ".join(f"{name}: {message}" for name, message in failures.items()))
    return Gate("G9 budget", True, "budget, range and finiteness asserted for every adversarial image")
