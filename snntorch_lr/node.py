"""The likelihood ratio as a backward pass: autograd nodes of one neuron in one time step.

``CounterfactualSpike`` gives spikes a gradient by counterfactual credit, from ∂loss/∂spike, which autograd brings.
``Score`` gives the distribution of spikes a gradient from losses alone, for ``Vanilla``. Both know tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .noise import EscapeNoise, MembraneNoise


class Control:
    """Control variate λ of a layer: it mixes the derivative of a spike's probability with the paired difference.

    The estimate is C₀ + λ C₁ with E C₁ = 0 for every neuron and row, so that its variance is least at
    λ = −Σ C₀C₁ / Σ C₁². The sums are running ones, in a buffer of the noise, over earlier backward passes: λ is
    independent of the noise that it is used with.
    """

    start, memory = 0.5, 0.98

    def __init__(self) -> None:
        self.pending: Tensor | None = None
        # How many backward passes there were.
        self.steps = 0

    def add(self, sums: Tensor) -> None:
        """Adds Σ C₀C₁ and Σ C₁² of time steps in their backward pass; they count from the next presentation on."""
        self.pending = sums if self.pending is None else self.pending + sums

    def value(self, sums: Tensor) -> Tensor:
        """λ in [0, 1] for a new presentation; takes what was added since the last one into the sums, in place."""
        # Where activation checkpointing runs a presentation again, the backward pass is still adding.
        if self.pending is not None and torch._C._current_graph_task_id() == -1:
            news = self.pending.to(sums)
            # The sums would never recover from a gradient that overflowed.
            sums.copy_(torch.where(news.isfinite().all(), self.memory * sums + news, sums))
            self.pending = None
        product, square = sums
        return torch.where(square > 0, -product / square, self.start).clamp(0, 1).nan_to_num(self.start)


@dataclass
class Sample:
    """What a noisy neuron sampled in one time step.

    Shapes are those of the membrane potential inside the neuron: ``[2, batch, ...]`` for the train and its shadow under
    counterfactual credit, ``[batch, ...]`` otherwise.

    Attributes:
        noise: of the neuron.
        margin: what was sampled around, minus the threshold, with its graph.
        sigma: noise level, with its graph.
        z: the margin in units of σ.
        spikes: zeros and ones.
        epsilon: noise on the membrane potential; None for escape noise.
        chance_known: whether the probability of a spike is F(z): not where the membrane potential is quantised after
            its noise.
    """

    noise: MembraneNoise | EscapeNoise
    margin: Tensor
    sigma: Tensor
    z: Tensor
    spikes: Tensor
    epsilon: Tensor | None = None
    chance_known: bool = True

    def save(self, ctx: Any, *others: Tensor) -> None:
        """Keeps for a backward pass what it needs; not the margin, which would keep the graph from being freed."""
        epsilon = () if self.epsilon is None else (self.epsilon,)
        # Others than zeros and ones come from a spike function of the user's own.
        spikes = self.spikes.to(torch.bool) if self.chance_known else self.spikes
        ctx.save_for_backward(self.z, spikes, self.sigma.detach(), *epsilon, *others)
        ctx.noise, ctx.dtypes = self.noise, (self.margin.dtype, self.sigma.dtype)


@dataclass
class Presentation:
    """What the time steps of one train share, from fresh states on.

    Attributes:
        control: λ, a tensor without dimensions.
        discount: γ, how much a later step counts.
        fit: where the sums go that the next λ is fitted by.
    """

    control: Tensor
    discount: float
    fit: Control


@dataclass
class Reads:
    """How states that others may read depend on the spikes.

    Attributes:
        reset_at_once: the membrane potential has been reset by the spike of this very time step.
        differences: by state, train minus shadow; None where the two are equal, and for a membrane potential that is
            not reset at once, which follows from the sample.
    """

    reset_at_once: bool = False
    differences: list[Tensor | None] = field(default_factory=list)


def refuse_double_backward() -> None:
    """Refuses a backward pass that is to be differentiated itself.

    Raises:
        RuntimeError: in such a one.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the likelihood-ratio gradient has no derivative of its own: leave out create_graph=True (a gradient "
            'penalty, a Hessian), or use slr.use_gradient(net, "surrogate") for this loss'
        )


class CounterfactualSpike(torch.autograd.Function):
    """Spikes of the train; backward, the estimate of ∂E[loss]/∂margin and ∂E[loss]/∂σ by counterfactual credit.

    With a = ∂loss/∂s of this step, v = s − λ(s − p) of the train, ṽ of its shadow, scores q = ∂ log P(s) / ∂margin:

        togo   ← γ togo + ½ a (v − ṽ)        and ½ b (w − w̃) where others read a state w, with b = ∂loss/∂w
        train  ← q togo + λ a ∂p/∂margin,    shadow ← −q̃ togo,    σ alike with its own scores

    The link carries togo from the node of the next time step, in two parts: without λ, and what λ multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sample: Sample,
        presentation: Presentation,
        reads: Reads,
        margin: Tensor,
        sigma: Tensor,
        link: Tensor,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        """From ``[2, batch, ...]``: spikes of the train, the link, and states of the train, ``[batch, ...]``."""
        ctx.set_materialize_grads(False)
        ctx.presentation, ctx.reset_at_once, ctx.chance_known = presentation, reads.reset_at_once, sample.chance_known
        ctx.has_difference = [difference is not None for difference in reads.differences]
        sample.save(ctx, *(difference for difference in reads.differences if difference is not None))
        return (sample.spikes[0].clone(), link.new_zeros(()).expand_as(link), *(state[0].clone() for state in states))

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, later: Tensor | None, *b: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of margin, σ, link and states."""
        refuse_double_backward()
        presentation, noise = ctx.presentation, ctx.noise
        presentation.fit.steps += 1
        z, fired, sigma, *rest = ctx.saved_tensors
        epsilon = rest.pop(0) if isinstance(noise, MembraneNoise) else None
        differences = [rest.pop(0) if has else None for has in ctx.has_difference]
        spikes = fired.to(z.dtype)
        p, density = noise.cdf_and_pdf(z)
        location, scale = _scores(noise, z, p, spikes, epsilon, needs_scale=ctx.needs_input_grad[4])
        togo: list[Tensor | None] = [None, None]
        if later is not None:
            togo = [presentation.discount * later[0], presentation.discount * later[1]]
        direct = None
        if a is not None:
            a = a.to(z.dtype)
            _add(togo, 0, a * (spikes[0] - spikes[1]) / 2)
            if ctx.chance_known:
                residual = spikes - p
                _add(togo, 1, a * (residual[1] - residual[0]) / 2)
                direct = a * density[0]
        if ctx.reset_at_once:
            _add_reads(togo, b, differences)
        control = presentation.control.to(z.dtype)
        to_margin = to_sigma = None
        if togo[0] is not None:
            credit = togo[0] if togo[1] is None else togo[0] + control * togo[1]
            to_margin = torch.stack([location[0] * credit, -location[1] * credit])
            if togo[1] is not None:
                both = location[0] - location[1]
                multiplied = both * togo[1] if direct is None else both * togo[1] + direct
                sums = torch.stack([(both * togo[0] * multiplied).sum(), multiplied.square().sum()])
                presentation.fit.add(sums)
            if scale is not None:
                to_sigma = (scale[0] - scale[1]) * credit
                if direct is not None:
                    to_sigma -= control * z[0] * direct
                to_sigma = to_sigma / sigma
            if direct is not None:
                to_margin[0] += control * direct
            to_margin = to_margin / sigma
        if not ctx.reset_at_once:
            if b[-1] is not None:
                # The membrane potential is what was sampled, or was sampled around.
                sampled = z if epsilon is None else z + epsilon
                differences[-1] = (sampled[0] - sampled[1]) * sigma
            _add_reads(togo, b, differences)
            if epsilon is not None and b[-1] is not None:
                # What was sampled is read as it is: mean + σ ε.
                to_margin = torch.zeros_like(z) if to_margin is None else to_margin
                to_margin[0] += b[-1]
                if ctx.needs_input_grad[4]:
                    read = b[-1] * epsilon[0]
                    to_sigma = read if to_sigma is None else to_sigma + read
        if to_sigma is not None:
            to_sigma = to_sigma.sum(0, keepdim=True).sum_to_size(sigma.shape).to(ctx.dtypes[1])
        to_link = None
        if ctx.needs_input_grad[5] and togo[0] is not None:
            to_link = torch.stack([togo[0], torch.zeros_like(togo[0]) if togo[1] is None else togo[1]])
        to_states = [
            None if gradient is None else torch.stack([gradient, torch.zeros_like(gradient)]) for gradient in b
        ]
        to_margin = None if to_margin is None else to_margin.to(ctx.dtypes[0])
        return None, None, None, to_margin, to_sigma, to_link, *to_states


def _add(togo: list[Tensor | None], index: int, value: Tensor) -> None:
    before = togo[index]
    togo[index] = value if before is None else before + value


def _add_reads(togo: list[Tensor | None], b: tuple[Tensor | None, ...], differences: list[Tensor | None]) -> None:
    """Adds what the states did to the loss, where others read them."""
    for gradient, difference in zip(b, differences, strict=True):
        if gradient is not None and difference is not None:
            _add(togo, 0, gradient.to(difference.dtype) * difference / 2)


def _scores(
    noise: MembraneNoise | EscapeNoise, z: Tensor, p: Tensor, spikes: Tensor, epsilon: Tensor | None, needs_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores of a sample: by the margin, times σ, and by log σ, if that is needed."""
    if isinstance(noise, MembraneNoise):
        assert epsilon is not None
        location = noise.location_score(epsilon)
        return location, noise.scale_score(epsilon, location) if needs_scale else None
    location = noise.location_score(z, p, spikes)
    return location, noise.scale_score(z, location) if needs_scale else None


class Score(torch.autograd.Function):
    """A token without a number; backward, the score of a sample, weighted by what ``weights`` holds by then.

    Args:
        sample: what was sampled, ``[rows, ...]``.
        weights: a list whose first item is one number for each row once the losses are known.
        margin: of the sample, with its graph.
        sigma: with its graph.
    """

    @staticmethod
    def forward(ctx: Any, sample: Sample, weights: list[Tensor], margin: Tensor, sigma: Tensor) -> Tensor:
        """A token, to go back from."""
        sample.save(ctx)
        ctx.weights = weights
        return margin.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of margin and σ."""
        z, fired, sigma, *rest = ctx.saved_tensors
        p = ctx.noise.cdf_and_pdf(z)[0] if isinstance(ctx.noise, EscapeNoise) else z
        epsilon = rest[0] if rest else None
        location, scale = _scores(ctx.noise, z, p, fired.to(z.dtype), epsilon, needs_scale=ctx.needs_input_grad[3])
        weights = ctx.weights[0].to(z.dtype).view(-1, *[1] * (z.dim() - 1))
        to_sigma = None
        if scale is not None:
            scores = scale * weights / sigma
            to_sigma = scores.sum(0, keepdim=True).sum_to_size(sigma.shape).to(ctx.dtypes[1])
        return None, None, (location * weights / sigma).to(ctx.dtypes[0]), to_sigma
