"""Approximate gradients: one backward pass of each block, at the mean of its inputs over time.

In ``rollout`` neurons have counterfactual credit. ``Approximate`` has the likelihood ratio from losses alone, with sums
over time in place of trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from .._messages import place
from ..baselines import Baseline
from ..blocks import SPIKES, WORTH_KEEPING_AS_BITS, Emitted
from ..graph import ancestors, version
from ..network import Buffers, RandomState, noisy_neurons
from ..node import Sample, refuse_double_backward
from ..noise import MembraneNoise
from ..noisy_neuron import NoisyNeuron
from ..validate import check_losses
from .base import LossFn, SamplerOfOnePass, sampling
from .counterfactual import CounterfactualCredit
from .vanilla import RowLosses, weigh

# Torch gives them no types.
_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], forward_ad.UnpackedDualTensor] = forward_ad.unpack_dual
_USE = 'use estimator="counterfactual", or "vanilla"'
# Relative difference of currents that rounding explains.
_ROUNDING = 1e-4


class MeanInputCredit(CounterfactualCredit):
    """Counterfactual credit in neurons between which ``rollout`` runs each block backward at its mean input."""

    def step(self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """A time step outside of ``rollout``, which only passes without a graph may have.

        Raises:
            RuntimeError: in others, where autograd would run each block backward in each time step.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                f'{type(neuron).__name__}: with the gradient "approximate" layers between neurons go back once, at '
                "their mean input, which a loop over time of your own cannot do: run the network by slr.rollout(net, "
                "inputs, num_steps), hand the loop to optimizer.step(slr.closure(loss_fn, inputs, targets)), or choose "
                'slr.use_gradient(net, "counterfactual")'
            )
        return super().step(neuron, input_, states)


@contextmanager
def in_rollout(net: nn.Module) -> Iterator[bool]:
    """Context of a ``rollout``: whether its blocks go back at their mean input; neurons have their credit then."""
    at_mean = False
    with ExitStack() as stack:
        for name, neuron in noisy_neurons(net).items():
            credit = neuron.sampler
            if isinstance(credit, MeanInputCredit):
                assert neuron.noise is not None
                at_mean = at_mean or (neuron.noise.active and torch.is_grad_enabled())
                of_steps = CounterfactualCredit(credit.discount, credit.control)
                stack.enter_context(sampling({name: neuron}, of_steps))
        yield at_mean


class BlockAtMeanInput(nn.Sequential):
    """Modules between two neurons, over time steps ``[time, batch, ...]``; their backward pass is at the mean input.

    Each module has to treat every row alone. Parameters get the gradient that the mean input and the sum over time of
    the gradients of the outputs give; the input of a time step gets what the derivative at the mean input makes of the
    gradient of the output of that step. So no module keeps its inputs of each time step.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """What the modules return in each time step."""
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        output: Tensor = _AtMeanInput.apply(inputs, super().forward, *learned)
        return output


class ExactBlock(nn.Sequential):
    """Modules in front of the first neuron, over time steps; what they compute in between is computed again."""

    def forward(self, inputs: Tensor) -> Tensor:
        """What the modules return in each time step."""
        rows = inputs.flatten(0, 1)
        outputs: Tensor
        if len(self) == 1:
            # It keeps its inputs, and nothing else.
            outputs = self[0](rows)
        else:
            outputs = checkpoint(super().forward, rows, use_reentrant=False, preserve_rng_state=False)
        return outputs.view(*inputs.shape[:2], *outputs.shape[1:])


class _AtMeanInput(torch.autograd.Function):
    """A function of rows over time steps; backward, its derivative at the mean over time."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, function: Callable[[Tensor], Tensor], *learned: Tensor) -> Tensor:
        # Before the time steps: autocast of older versions keeps what it cast without a graph, and then learns nothing.
        with torch.enable_grad():
            ctx.mean = inputs.detach().mean(0).requires_grad_(ctx.needs_input_grad[0])
            ctx.output = function(ctx.mean)
        ctx.learned = learned
        rows = function(inputs.flatten(0, 1))
        return rows.view(*inputs.shape[:2], *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (gradient,) = grads
        to_learned: tuple[Tensor, ...] = ()
        if ctx.learned:
            to_learned = torch.autograd.grad(ctx.output, ctx.learned, gradient.sum(0), retain_graph=True)
        to_inputs = None
        if ctx.needs_input_grad[0]:
            of_steps = [torch.autograd.grad(ctx.output, ctx.mean, step, retain_graph=True)[0] for step in gradient]
            to_inputs = torch.stack(of_steps)
        return to_inputs, None, *to_learned


class Approximate(RowLosses):
    """The likelihood ratio with scores and presynaptic rates averaged over time separately.

    Where ``Vanilla`` sums Σ_t score_t · ∂block(x_t)/∂θ, this estimator computes (Σ_t score_t) · ∂block(x̄)/∂θ with the
    mean rate x̄ = 1/T Σ_t x_t of each copy: the temporal covariance between score and presynaptic activity is dropped.
    It needs running sums only, and one evaluation and one backward pass of each block in place of T.

    Nothing is dropped where the input of a block does not change over time, such as an image as constant current, and
    in the gradients of noise levels, leaks, thresholds and other element-wise parameters, which are summed exactly.
    Elsewhere there is a bias: measure yours with ``gradient_report``.

    ``loss_fn`` is called twice, the second time for two time steps, and a few times more in the first call, which
    looks for what sums over time cannot say: a memory between layers (delays, convolutions over time, spikes that come
    back), losses of membrane potentials. Those are refused. That both calls compute the same is not checked: draw
    random numbers from the global generators of torch, NumPy or Python, which are put back.

    In a plain loop (``attach`` without ``closure``, ``use_gradient``) none of this takes part: ``rollout`` has
    counterfactual credit in the neurons, one copy, any loss with a derivative, and the same mean inputs in its blocks.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample. Only what comes after the first noisy neuron is computed K times.
        baseline: ``"leave-one-out"``, ``"batch-mean"``, ``"none"``, or a function of the losses ``[copies, batch]``.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, a neuron mixes others (LSTM cells, inhibition, all-to-all
            recurrence), or arguments do not go together.

    Examples:
        >>> estimator = slr.Approximate(net, copies=16)
        >>> loss = estimator.backward(loss_fn, images, labels)

    Source: arXiv 2302.10802 announces an approximation that "reduces memory and improves computational efficiency",
    whose formula we do not have. This construction is ours and is not claimed to be theirs.
    """

    def __init__(
        self,
        net: nn.Module,
        copies: int = 16,
        baseline: str | Baseline = "leave-one-out",
        seed: int | None = None,
    ) -> None:
        super().__init__(net, copies, baseline, seed)
        self.sampler = MeanInputCredit()
        self._internal: Collection[NoisyNeuron] = ()
        for error in mixing_neurons(net):
            raise ValueError(error)

    def estimate(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Adds the gradient into ``.grad``."""
        self.check(neurons, loss_fn, inputs, targets)
        before = RandomState.capture()
        summing = _Summing(self._internal)
        with self.first_call(neurons) as first:
            returned, copies = self.run(neurons, summing, loss_fn, inputs, targets)
            losses = check_losses(returned, self.copies, copies.batch or 0, self.net)
            if first is not None:
                first.warn_about_noise_free({node._sequence_nr() for node in ancestors([losses])})
        if first is not None:
            self._look(neurons, loss_fn, inputs, targets)
        weights = weigh(losses, self.copies, self.baseline, first=first is not None) / len(losses)
        currents: Mapping[NoisyNeuron, Tensor] = {}
        if self._internal:
            after, statistics = RandomState.capture(), Buffers(self.net, statistics_only=True)
            before.restore()
            rates = _Rates({neuron: sums.fired / sums.steps for neuron, sums in summing.sums.items()}, neurons, steps=2)
            try:
                with suppress(_SeenEnoughError):
                    self.run(neurons, rates, loss_fn, inputs, targets)
            finally:
                after.restore()
                statistics.restore()
            currents = {neuron: rate for neuron, rate in rates.currents.items() if neuron in self._internal}
        roots = [(losses, torch.full_like(losses, 1 / len(losses)))]
        for neuron, sums in summing.sums.items():
            roots += sums.roots(neuron, currents.get(neuron), weights)
        roots = [(tensor, gradient) for tensor, gradient in roots if tensor.requires_grad]
        if not roots:
            raise ValueError("there is nothing to learn: all parameters that loss_fn uses are frozen")
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
        return losses.detach().mean()

    def _look(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        """Finds which neurons others feed, by passes at made-up rates, without a graph.

        Raises:
            ValueError: if there is a memory between layers, or the loss reads a membrane potential.
        """

        def look(rate: float, mem: float) -> tuple[_Rates, Tensor]:
            made = _Rates({}, neurons, rate=rate, mem=mem)
            with self.aside():
                returned, copies = self.run(neurons, made, loss_fn, inputs, targets)
                return made, check_losses(returned, self.copies, copies.batch or 0, self.net)

        low, losses = look(0.3, 0.0)
        high, _ = look(0.6, 0.0)
        self._internal = [neuron for neuron in low.currents if _differ(low.currents[neuron], high.currents[neuron])]
        changing = [n for n in low.changing if n in self._internal or _differ(low.total[n], high.total[n])]
        if changing:
            raise ValueError(_memory(changing, neurons))
        _, read = look(0.3, 1.0)
        if _differ(losses, read):
            raise ValueError(
                "the loss reads the membrane potential of a noisy neuron, whose gradient through time sums do not "
                f"have: read a neuron without noise and with reset_mechanism='none', or {_USE}"
            )


def mixing_neurons(net: nn.Module) -> Iterator[str]:
    """What is wrong with each neuron that sums over time cannot be kept for."""
    for name, neuron in noisy_neurons(net).items():
        reason = None
        if not neuron.is_elementwise:
            reason = "an LSTM cell mixes its neurons"
        elif neuron.inhibition:
            reason = "inhibition lets only one neuron of a layer fire"
        elif neuron.mixes_spikes:
            reason = "all-to-all recurrence is a memory between neurons"
        elif neuron.state_quant:
            reason = "a quantised state has no derivative by forward-mode differentiation"
        elif unknown := _unknown_parameters(neuron):
            reason = f"its {', '.join(unknown)} is learned"
        if reason is not None:
            yield f"{place(name, neuron)}: {reason}, of which sums over time do not know; {_USE}"


def _memory(changing: Collection[NoisyNeuron], neurons: Mapping[str, NoisyNeuron]) -> str:
    names = ", ".join(place(name, neuron) for name, neuron in neurons.items() if neuron in changing)
    return (
        f"what enters {names} changes from one time step to the next although the rates before it do not: there is a "
        "memory between layers (a delay, a convolution over time, spikes that come back), dropout, or a second input "
        f"that changes, of which sums over time do not know; {_USE}"
    )


def _differ(first: Tensor, second: Tensor) -> bool:
    scale = max(float(first.abs().max()), float(second.abs().max())) if first.numel() else 0.0
    return first.shape != second.shape or float((first - second).abs().max()) > _ROUNDING * scale


class _SeenEnoughError(Exception):
    """All that a pass at mean rates is for has been seen."""


class _Rates(SamplerOfOnePass):
    """Sampler of a pass in which neurons emit constant rates, and their currents are looked at.

    Args:
        rates: by neuron; empty for one made-up rate.
        neurons: all noisy ones.
        steps: after so many time steps of all neurons the pass ends; None for all of them.
        rate: made-up rate.
        mem: made-up membrane potential.

    Attributes:
        currents: of the first time step, with their graph.
        total: the sum of the currents over time, without.
        changing: neurons whose current changed.
    """

    def __init__(
        self,
        rates: Mapping[NoisyNeuron, Tensor],
        neurons: Mapping[str, NoisyNeuron],
        steps: int | None = None,
        rate: float = 0.0,
        mem: float = 0.0,
    ) -> None:
        self._rates, self._neurons, self._steps, self._rate, self._mem = rates, neurons, steps, rate, mem
        self.currents: dict[NoisyNeuron, Tensor] = {}
        self.total: dict[NoisyNeuron, Tensor] = {}
        self.changing: dict[NoisyNeuron, None] = {}
        self._seen: dict[NoisyNeuron, int] = {}

    def step(self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """A time step of a neuron; see ``snntorch_lr.noisy_neuron.Sampler``."""
        current = input_.detach()
        if neuron not in self.currents:
            self.currents[neuron] = input_
            self.total[neuron] = current
        else:
            self.total[neuron] = self.total[neuron] + current
            if neuron not in self.changing and _differ(self.currents[neuron].detach(), current):
                self.changing[neuron] = None
        self._seen[neuron] = self._seen.get(neuron, 0) + 1
        all_seen = len(self._seen) == len(self._neurons)
        if self._steps is not None and all_seen and min(self._seen.values()) >= self._steps:
            raise _SeenEnoughError
        rate = self._rates[neuron] if self._rates else torch.full_like(current, self._rate)
        spikes = neuron.graded(rate)
        new = {name: torch.full_like(current, self._mem) for name in neuron.state_names}
        for name, state in new.items():
            setattr(neuron, name, state)
        if "spk" in states:
            neuron.spk = spikes
        return (spikes, *new.values())


@cache
def _start_forward_mode() -> None:
    """Has torch import what it needs for forward-mode differentiation, without its warning that it uses torch.jit."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        _make_dual(torch.zeros(()), torch.zeros(()))


@dataclass
class _Sums:
    """Running sums of a neuron over time.

    Attributes:
        parameters: element-wise ones that are learned, by name, with the module in which they are looked up.
        steps: number of time steps.
        fired: Σ_t spikes.
        current: Σ_t current with its graph, where no noisy neuron feeds it; otherwise None.
        scores: Σ_t score of the margin, times σ, times the derivative of the margin by a parameter; under None by a
            current that never changes.
        scale: Σ_t score of log σ; None if σ is not learned.
        tangents: derivatives of the states, by parameter and state.
        sigma: noise level, with its graph.
    """

    parameters: Mapping[str, tuple[nn.Module, Tensor]]
    steps: int = 0
    fired: Tensor = field(default_factory=lambda: torch.zeros(()))
    current: Tensor | None = None
    scores: dict[str | None, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None
    tangents: dict[str | None, dict[str, Tensor]] = field(default_factory=dict)
    sigma: Tensor = field(default_factory=lambda: torch.ones(()))

    def roots(self, neuron: NoisyNeuron, current: Tensor | None, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Tensors to go back from, and their gradients.

        Args:
            neuron: of which these are the sums.
            current: at mean rates, with its graph; None to take the mean current.
            weights: of the rows.
        """
        weight = weights.view(-1, *[1] * (self.fired.dim() - 1))
        if current is None:
            current = self.current if self.current is None else self.current / self.steps
        sigma = self.sigma.detach()
        roots = []
        if current is not None:
            roots.append((current, (self.scores[None] * weight / sigma).to(current.dtype)))
        if self.scale is not None:
            roots.append((self.sigma, _summed(self.scale * weight / sigma, self.sigma)))
        for name, (_, parameter) in self.parameters.items():
            roots.append((parameter, _summed(self.scores[name] * weight / sigma, parameter)))
        return roots


def _summed(value: Tensor, like: Tensor) -> Tensor:
    return value.sum(0, keepdim=True).sum_to_size(like.shape).to(like.dtype)


class _Summing(SamplerOfOnePass):
    """Sampler of a pass that keeps sums over time.

    Args:
        internal: neurons that other noisy neurons feed, whose currents are had at mean rates.
    """

    def __init__(self, internal: Collection[NoisyNeuron]) -> None:
        self._internal = internal
        self.sums: dict[NoisyNeuron, _Sums] = {}

    def step(self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """A time step of a neuron; see ``snntorch_lr.noisy_neuron.Sampler``."""
        if neuron not in self.sums:
            self.sums[neuron] = _Sums(dict(_elementwise(neuron)))
        sums = self.sums[neuron]
        if neuron not in self._internal:
            sums.current = input_ if sums.current is None else sums.current + input_
        assert neuron.noise is not None
        sums.sigma = neuron.noise.sigma.to(input_.dtype)
        with torch.no_grad():
            sample, outputs = self._derive(neuron, input_.detach(), states, sums)
            spikes = sample.spikes
            sums.fired = sums.fired + spikes
            sums.steps += 1
        emitted = neuron.graded(spikes.clone())
        size = sums.steps * spikes.numel() * spikes.element_size()
        if size >= WORTH_KEEPING_AS_BITS and neuron.emits_zeros_and_ones():
            # A readout in the loop keeps them in each time step.
            setattr(emitted, SPIKES, Emitted(spikes.to(torch.int8), version(emitted), size))
        return (emitted, *outputs)

    def _derive(
        self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor], sums: _Sums
    ) -> tuple[Sample, list[Tensor]]:
        """A time step, and the derivatives of what it samples around by current and parameters."""
        _start_forward_mode()
        fired = neuron.train_resets(states["mem"])
        if fired is None:
            # Surrogates do not know forward mode.
            fired = neuron.mem_reset(states["mem"].detach())
        sample: Sample | None = None
        outputs: list[Tensor] = []
        for direction in (None, *sums.parameters):
            tangents = sums.tangents.get(direction, {})
            with forward_ad.dual_level(), _dual(sums.parameters, direction):
                dual = {
                    name: _make_dual(state.detach(), tangents[name]) if name in tangents else state.detach()
                    for name, state in states.items()
                }
                current = _make_dual(input_, torch.ones_like(input_)) if direction is None else input_
                run = neuron.sample(current, dual, fired, told=sample)
                margin = _unpack_dual(run.margin).tangent
                new = {name: _unpack_dual(getattr(neuron, name)) for name in neuron.state_names}
            if sample is None:
                sample = Sample(
                    run.noise, _primal(run.margin), _primal(run.sigma), _primal(run.z), run.spikes, run.epsilon
                )
                # Not as views, which snnTorch could not detach in place.
                outputs = [state.primal.detach() for state in new.values()]
                location, scale = self._scores(sample)
                if sums.sigma.requires_grad:
                    sums.scale = scale if sums.scale is None else sums.scale + scale
            sums.tangents[direction] = {name: s.tangent for name, s in new.items() if s.tangent is not None}
            score = location * 0 if margin is None else location * margin
            sums.scores[direction] = sums.scores[direction] + score if direction in sums.scores else score
        assert sample is not None
        for name, state in zip(neuron.state_names, outputs, strict=True):
            setattr(neuron, name, state)
        if "spk" in states:
            neuron.spk = neuron.graded(sample.spikes)
        neuron.carry(sample.spikes)
        return sample, outputs

    @staticmethod
    def _scores(sample: Sample) -> tuple[Tensor, Tensor]:
        noise = sample.noise
        if isinstance(noise, MembraneNoise):
            assert sample.epsilon is not None
            location = noise.location_score(sample.epsilon)
            return location, noise.scale_score(sample.epsilon, location)
        p, _ = noise.cdf_and_pdf(sample.z)
        location = noise.location_score(sample.z, p, sample.spikes.to(sample.z.dtype))
        return location, noise.scale_score(sample.z, location)


def _primal(x: Tensor) -> Tensor:
    return _unpack_dual(x).primal.detach()


@contextmanager
def _dual(parameters: Mapping[str, tuple[nn.Module, Tensor]], name: str | None) -> Iterator[None]:
    """Context in which a parameter carries a tangent of one; None for none."""
    if name is None:
        yield
        return
    module, value = parameters[name]
    # Found before the parameter of the same name.
    module.__dict__[name] = _make_dual(value.detach(), torch.ones_like(value))
    try:
        yield
    finally:
        del module.__dict__[name]


def _unknown_parameters(neuron: NoisyNeuron) -> list[str]:
    """Names of learned parameters that sums over time have no derivative of."""
    assert neuron.noise is not None
    known = {parameter for _, (_, parameter) in _elementwise(neuron)} | {*neuron.noise.parameters()}
    known |= {neuron.graded_spikes_factor, *getattr(neuron, "recurrent", nn.Identity()).parameters()}
    return [name for name, parameter in neuron.named_parameters() if parameter.requires_grad and parameter not in known]


def _elementwise(neuron: NoisyNeuron) -> Iterator[tuple[str, tuple[nn.Module, Tensor]]]:
    """Learned parameters that act on each neuron alone."""
    own: Any = neuron
    inner = getattr(neuron, "recurrent", own)
    for module, name in (own, "alpha"), (own, "beta"), (own, "threshold"), (inner, "V"):
        value = getattr(module, name, None)
        if isinstance(value, nn.Parameter) and value.requires_grad:
            yield name, (module, value)
