"""All gates of one network, and the curves that they are read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import gates
from .gates import Gate, guarded
from .probes import Probe

CURVE_STEPS = (1, 2, 5, 10, 20, 40)


@dataclass(frozen=True)
class Evidence:
    """What the attacks found of one network.

    Attributes:
        probe: the network, and images that it has right.
        rows: which of all images these are, ``[n]``.
        clean: what is right of all images, Boolean, ``[images]``.
        white: what all white-box attacks together leave right, by budget.
        others: the same for black-box and transfer attacks.
        surrogates: what the attacks through each surrogate leave right, by surrogate and budget.
        unchanged: fraction of the images that each white-box attack gave back as they were.
        failures: messages of the attacks that failed, by name.
    """

    probe: Probe
    rows: Tensor
    clean: Tensor
    white: Mapping[float, Tensor]
    others: Mapping[float, Tensor]
    surrogates: Mapping[str, Mapping[float, Tensor]]
    unchanged: Mapping[str, float]
    failures: Mapping[str, str]

    def worst(self, epsilon: float) -> Tensor:
        """What is right under all attacks of a budget, Boolean, ``[images]``."""
        return torch.stack([self.clean, *(part[epsilon] for part in (self.white, self.others) if part)]).all(0)


@dataclass(frozen=True)
class Findings:
    """What was found of one network.

    Attributes:
        gates: G0 to G9.
        epsilon: the budget of the curve of steps and of G4: where the worst case is nearest to half.
        ladder: fraction of the probed images that is right after ascent from the image, by budget.
        steps: the same by number of steps.
    """

    gates: tuple[Gate, ...] = ()
    epsilon: float = 0.0
    ladder: Mapping[float, float] = field(default_factory=dict)
    steps: Mapping[int, float] = field(default_factory=dict)


def judge(evidence: Evidence, epsilons: tuple[float, ...]) -> Findings:
    """Measures what the gates need, and passes each of them or not."""
    probe = evidence.probe
    if not len(probe.images):
        return Findings((Gate("G0 forward pass", None, "no image is right clean: there is nothing to attack"),))
    middle = min(epsilons, key=lambda e: abs(float(evidence.worst(e).double().mean()) - 0.5))
    rungs = sorted({*epsilons, *(share * probe.span for share in gates.LADDER)})
    ladder: dict[float, float] = {}
    steps: dict[int, float] = {}

    def climb() -> Gate:
        ladder.update(zip(rungs, probe.curve([(rung, gates.ASCENT) for rung in rungs]), strict=True))
        return gates.ladder(ladder)

    def converge() -> Gate:
        runs = [(middle, replace(gates.ASCENT, steps=count, length=2.5 / max(count, 2.5))) for count in CURVE_STEPS]
        steps.update(zip(CURVE_STEPS, probe.curve(runs), strict=True))
        return gates.convergence(probe, evidence.worst(middle)[evidence.rows], middle)

    judged = (
        guarded("G0 forward pass", lambda: gates.forward_pass(probe.target, probe.images)),
        guarded("G1 gradients", lambda: gates.gradients(probe, evidence.unchanged)),
        guarded("G2 frozen noise", lambda: gates.frozen_noise(probe)),
        guarded("G3 ladder", climb),
        guarded("G4 convergence", converge),
        gates.black_box(evidence.white, evidence.others),
        gates.sweep(probe.target.net, {name: right[middle] for name, right in evidence.surrogates.items()}),
        guarded("G7 direction", lambda: gates.direction(probe)),
        gates.canary(probe),
        gates.assertions(evidence.failures),
    )
    return Findings(judged, middle, ladder, steps)
