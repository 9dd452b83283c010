"""Counterfactual credit: what the currents of a neuron did to the loss, from what another draw would have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..noise import EscapeNoise, MembraneNoise
from .packing import unpack
from .recording import over_copies
from .sums import Sums, add

Rows = Tensor
"""``[(1 + shadows) * copies * batch, ...]``: the train that goes on, then its shadows, each laid out copy-first."""


class Control:
    """Control variate λ of a layer: the share of a spike's effect that its probability tells, in place of pairs.

    The estimate of a gradient is C₀ + λ C₁ with E C₁ = 0, for every neuron and row. Its variance is least at
    λ = −Σ C₀C₁ / Σ C₁². The sums are running ones over earlier steps, so that λ is independent of the noise that it is
    used with.

    Args:
        fixed: λ, if it is not to be fitted.
    """

    start, memory = 0.5, 0.98

    def __init__(self, fixed: float | None = None) -> None:
        self.fixed = fixed
        self.sums = torch.zeros(2, dtype=torch.float64)
        self._found = torch.zeros(2, dtype=torch.float64)

    @property
    def value(self) -> Tensor:
        """λ, in [0, 1]; one half before anything is known."""
        if self.fixed is not None:
            # Made there: a copy from the host would wait for the device.
            return torch.full((), self.fixed, dtype=torch.float64, device=self._found.device)
        product, square = self.sums
        return torch.where(square > 0, -product / square, self.start).clamp(0, 1)

    def add(self, without: Tensor, multiplied: Tensor) -> None:
        """Adds C₀ and C₁ of the step that is being computed."""
        found = torch.stack([(without * multiplied).sum(), multiplied.square().sum()]).double()
        self._found = self._found.to(found.device) + found

    def take(self) -> Tensor:
        """Sums since the last call."""
        found, self._found = self._found, torch.zeros_like(self._found)
        return found

    def update(self, found: Tensor) -> None:
        """Lets the running sums know of a step, unless its gradient overflowed: they would never recover."""
        if self.fixed is None:
            before = self.sums.to(found.device)
            # A step that is refused later must not stay in them for good.
            self.sums = torch.where(found.isfinite().all(), self.memory * before + found, before)


@dataclass
class Chain:
    """Sums that the time steps of one train hand back to each other, the last one first.

    Attributes:
        control: how much of the effect of a spike is taken from its probability, λ.
        later: Σ over this and later steps of what the spikes did to the loss minus what those of the shadows would
            have done, halved; ``[shadows, copies * batch, ...]``. And the same for what λ multiplies.
        credit: Σ over time of the part of the gradient without λ, and of what λ multiplies, to fit it by.
        gain: about what a constant current adds to the mean of this step, which weighs the steps in these sums.
    """

    control: Tensor
    gain: Tensor | float = 0.0
    later: list[Tensor | None] = field(default_factory=lambda: [None, None])
    credit: list[Tensor | None] = field(default_factory=lambda: [None, None])

    def add_later(self, index: int, value: Tensor) -> None:
        """Adds to one of the sums over later steps."""
        before = self.later[index]
        self.later[index] = value if before is None else before.add_(value)

    def add_credit(self, index: int, value: Tensor, gain: Tensor | float) -> None:
        """Adds to one of the sums over time."""
        before = self.credit[index]
        self.credit[index] = value * gain if before is None else before.add_(value * gain)

    def step_on(self, leak: Tensor | None) -> Tensor | float:
        """The gain of the next step; without a leak nothing but the current itself is in the mean."""
        self.gain = 1.0 if leak is None else 1.0 + self.gain * leak
        return self.gain


@dataclass(frozen=True)
class Draw:
    """Sample of a neuron in one time step, in all rows.

    Attributes:
        noise: its noise.
        mean: what was sampled around, with its graph: the mean of the membrane potential, or the margin to the
            threshold.
        z: distance of the mean to the threshold in units of σ.
        epsilon: noise on the membrane potential; None for escape noise.
        p: probability of a spike.
        density: its derivative by z.
    """

    noise: MembraneNoise | EscapeNoise
    mean: Tensor
    z: Rows
    epsilon: Rows | None
    p: Rows
    density: Rows


@dataclass(frozen=True)
class Kept:
    """Tensors that one time step keeps for its backward pass, in all rows.

    Attributes:
        noise: what was sampled.
        z: distance of the mean to the threshold in units of σ.
        epsilon: noise on the membrane potential; None for escape noise.
        spikes: as bits, if they are zeros and ones.
        rows: number of rows of the train that goes on.
        has_chances: whether the probability of a spike is known.
        resets_at_once: whether the membrane potential that others see has been reset by this step's spike.
        states: those before the membrane potential.
        mem: the membrane potential, if it has been reset.
        chain: what the steps hand to each other.
        gain: weight of the step where λ is fitted.
    """

    noise: MembraneNoise | EscapeNoise
    z: Rows
    epsilon: Rows | None
    spikes: Tensor
    rows: int
    has_chances: bool
    resets_at_once: bool
    states: tuple[Rows, ...]
    mem: Rows | None
    chain: Chain
    gain: Tensor | float


class Credit(torch.autograd.Function):
    """Spikes and states of the train that goes on; backwards, the counterfactual estimate of ∂E[loss]/∂mean.

    With a = ∂loss/∂s of this step, v = s − λ(s − p) of the train and ṽ of a shadow:

    1. later ← later + ½ a (v − ṽ), and ½ b (w − w̃) where others read a state w, with b = ∂loss/∂w.
    2. The mean of the train gets later · score + λ a ∂p/∂mean, that of the shadow −later · its own score; σ alike.
    3. b goes on to the graph of the state too. For membrane noise, u = mean + σ ε, it goes to the mean and to σ.
    """

    @staticmethod
    def forward(
        ctx: Any, kept: Kept, spikes: Rows, mean: Tensor, sigma: Tensor, link: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """Rows of the train that goes on: spikes, what orders the steps, states."""
        ctx.set_materialize_grads(False)
        ctx.kept, ctx.sigma, ctx.mean = kept, sigma.detach(), (mean.shape, mean.dtype)
        return (spikes[: kept.rows].clone(), link.clone(), *(state[: kept.rows].clone() for state in states))

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, _: Tensor | None, *b: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of mean, σ and states."""
        kept: Kept = ctx.kept
        chain, noise = kept.chain, kept.noise
        z = by_set(kept.z, kept.rows)
        spikes = kept.spikes.to(z.dtype)
        if kept.spikes.dtype == torch.uint8:
            spikes = unpack(kept.spikes, kept.z.shape, kept.z.dtype)
        sigma = ctx.sigma.to(kept.z.dtype)
        p, density = noise.cdf_and_pdf(z)
        direct = None
        if a is not None:
            a = a.to(z.dtype)
            trains = spikes.view_as(z)
            chain.add_later(0, _pairs(a, trains))
            if kept.has_chances:
                chain.add_later(1, _pairs(-a, trains - p))
                direct = a * density[0]
        if kept.resets_at_once:
            _add_states(kept, b, sigma)
        to_mean = to_sigma = None
        if chain.later[0] is not None:
            value = kept.z if kept.epsilon is None else kept.epsilon
            location = location_score(noise, value, spikes, p.view_as(value))
            later = chain.later[0] if chain.later[1] is None else chain.later[0] + chain.control * chain.later[1]
            to_mean = _spread(later, location.view_as(z))
            for index, total in enumerate(chain.later):
                if total is not None:
                    scores = location.view_as(z)
                    credit = (total * (scores[0] - scores[1:])).mean(0)
                    credit = credit.add_(direct) if index and direct is not None else credit
                    chain.add_credit(index, credit, kept.gain)
            if direct is not None:
                to_mean[0].addcmul_(chain.control, direct)
            if ctx.needs_input_grad[3]:
                to_sigma = _spread(later, noise.scale_score(value, location).view_as(z))
                if direct is not None:
                    to_sigma[0].addcmul_(chain.control * -z[0], direct)
                to_sigma = to_sigma / sigma
            to_mean = to_mean / sigma
        if not kept.resets_at_once:
            _add_states(kept, b, sigma)
            if kept.epsilon is not None and b[-1] is not None:
                to_mean = torch.zeros_like(z) if to_mean is None else to_mean
                to_mean[0] += b[-1]
                if ctx.needs_input_grad[3]:
                    to_sigma = torch.zeros_like(z) if to_sigma is None else to_sigma
                    to_sigma[0].addcmul_(b[-1], kept.epsilon[: kept.rows])
        if to_sigma is not None:
            to_sigma = to_sigma.sum((0, 1)).unsqueeze(0).sum_to_size(sigma.shape).to(ctx.sigma.dtype)
        if to_mean is not None:
            to_mean = to_mean.view(ctx.mean[0]).to(ctx.mean[1])
        shadows = len(kept.z) - kept.rows
        to_states = [
            None if each is None else torch.cat([each, each.new_zeros(shadows, *each.shape[1:])]) for each in b
        ]
        return None, None, to_mean, to_sigma, torch.zeros_like(chain.control), *to_states


def by_set(value: Rows, rows: int) -> Tensor:
    """The train that goes on and its shadows apart, ``[1 + shadows, copies * batch, ...]``."""
    return value.view(-1, rows, *value.shape[1:])


def location_score(noise: MembraneNoise | EscapeNoise, value: Rows, spikes: Rows, p: Rows) -> Rows:
    """Score of the mean times σ, from ε of membrane noise, or from z of escape noise and the spikes."""
    if isinstance(noise, MembraneNoise):
        return noise.location_score(value)
    return noise.location_score_by(p, value, spikes)


def _pairs(weight: Tensor, values: Tensor) -> Tensor:
    """½ weight · (value of the train − value of the shadow), ``[shadows, copies * batch, ...]``."""
    return (values[0] - values[1:]).mul_(weight / 2)


def _spread(later: Tensor, scores: Tensor) -> Tensor:
    """Gradients of the means: the train's score for every shadow, and each shadow's own, negated."""
    shared = later / len(later)
    return torch.cat([(shared.sum(0) * scores[0]).unsqueeze(0), (-shared * scores[1:])])


def _add_states(kept: Kept, b: tuple[Tensor | None, ...], sigma: Tensor) -> None:
    """Adds what the states did to the loss, where others read them."""
    for gradient, state in zip(b, (*kept.states, kept.mem), strict=True):
        if gradient is None:
            continue
        # The membrane potential before a reset differs from that of a shadow as its distance to the threshold does.
        values = kept.z * sigma if state is None else state
        kept.chain.add_later(0, _pairs(gradient.to(values.dtype), by_set(values, kept.rows)))


@dataclass
class CreditSums(Sums):
    """Sums over time for the counterfactual estimate; scores, own scores and scale are in all rows.

    What a spike does to the loss is taken to be a product of a number for each neuron and row, and the profile κ_t; and
    what a current does, of such a number and the profile of the currents.

    Attributes:
        profile: κ_t, with mean one; its last number holds for later steps too.
        current_profile: the same of the currents.
        total: Σ_t κ_t.
        total_current: the sum of the profile of the currents.
        fired: Σ_t κ_t s_t, in all rows.
        expected: Σ_t κ_t p_t, in all rows; None where the probability of a spike is not known.
        pull: Σ_t κ_t ∂p_t/∂(what is sampled) · ∂(what is sampled)/∂(parameter), times σ, of the train that goes on;
            under None for the input current.
        pull_scale: Σ_t κ_t ∂p_t/∂ log σ.
    """

    profile: Sequence[float] = (1.0,)
    current_profile: Sequence[float] = (1.0,)
    total: float = 0.0
    total_current: float = 0.0
    fired: Tensor | None = None
    expected: Tensor | None = None
    pull: dict[str | None, Tensor] = field(default_factory=dict)
    pull_scale: Tensor | None = None

    def receive(self, x: Tensor, weight: float = 1.0) -> None:
        """Adds a current, weighted by its profile; called before the step is counted."""
        weight *= self.current_profile[min(self.steps, len(self.current_profile) - 1)]
        self.total_current += weight
        super().receive(x, weight)

    def weigh(self) -> float:
        """The weight of the spikes of a time step, which is counted already; it is added to the total."""
        weight = self.profile[min(self.steps, len(self.profile)) - 1]
        self.total += weight
        return weight

    def add(self, drawn: Draw, spikes: Rows, rows: int, has_chances: bool) -> None:
        """Adds a time step."""
        noise, z = drawn.noise, drawn.z
        weight = self.weigh()
        self.fired = add(self.fired, spikes, weight)
        if has_chances:
            self.expected = add(self.expected, drawn.p, weight)
            direct = drawn.density[:rows]
            tangents = dict(self.sampled_tangents(z))
            if None not in tangents:
                self.pull[None] = add(self.pull.get(None), direct, weight)
            for name, tangent in tangents.items():
                if tangent is not None:
                    part = tangent[:rows] if tangent.dim() == z.dim() and len(tangent) == len(z) else tangent
                    self.pull[name] = add(self.pull.get(name), direct * part, weight)
            if noise.log_sigma.requires_grad:
                self.pull_scale = add(self.pull_scale, -z[:rows] * direct, weight)
        value = z if drawn.epsilon is None else drawn.epsilon
        self.file(noise, value, location_score(noise, value, spikes.to(z.dtype), drawn.p))


class Rate(torch.autograd.Function):
    """Mean rate of the train that goes on, weighted by its profile; backwards, the estimate of ∂E[loss]/∂(current)."""

    @staticmethod
    def forward(
        ctx: Any, sums: CreditSums, rows: int, control: Control, current: Tensor, sigma: Tensor, *parameters: Tensor
    ) -> Tensor:
        """The rate, ``[copies * batch, ...]``."""
        ctx.sums, ctx.control, ctx.shape, ctx.sigma = sums, control, current.shape, sigma.detach()
        ctx.shapes = [parameter.shape for parameter in parameters]
        assert sums.fired is not None
        return sums.fired[:rows] / sums.total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the mean current, σ and the element-wise parameters."""
        sums: CreditSums = ctx.sums
        assert sums.fired is not None
        assert sums.score is not None
        rows, sigma = len(gradient), ctx.sigma
        a = gradient / sums.total

        def differences(values: Rows) -> Tensor:
            parts = by_set(values, rows)
            return parts[0] - parts[1:]

        def over_shadows(values: Tensor) -> Tensor:
            return values[0] if len(values) == 1 else values.mean(0)

        pairs = differences(sums.fired).mul_(a / 2)
        control = ctx.control.value.to(pairs)
        to_current = to_sigma = None
        if sums.expected is None:
            total = over_shadows(pairs * differences(sums.score))
        else:
            controlled = differences(sums.expected).mul_(a / 2).sub_(pairs)
            score = differences(sums.score)
            total, multiplied = over_shadows(pairs * score), over_shadows(score.mul_(controlled))
            multiplied = multiplied.addcmul_(a, sums.pull[None])
            ctx.control.add(total, multiplied)
            total = total.addcmul_(control, multiplied)
            pairs = pairs.addcmul_(control, controlled)

        def estimate(scores: Tensor, pull: Tensor | None) -> Tensor:
            found = over_shadows(differences(scores).mul_(pairs))
            return found if pull is None else found.addcmul_(control * a, pull)

        if ctx.needs_input_grad[3]:
            to_current = over_copies(total / sigma, ctx.shape)
        if ctx.needs_input_grad[4] and sums.scale is not None:
            total = estimate(sums.scale, sums.pull_scale).sum(0, keepdim=True)
            to_sigma = (total / sigma).sum_to_size(sigma.shape)
        to_parameters = []
        for index, (name, own) in enumerate(sums.own.items()):
            total = (estimate(own, sums.pull.get(name)) / sigma).sum(0, keepdim=True)
            to_parameters.append(total.sum_to_size(ctx.shapes[index]))
        return None, None, None, to_current, to_sigma, *to_parameters
