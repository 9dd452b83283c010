"""Forward passes whose scores are kept until the losses are known, or pushed back in a second pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import version
from ..kernels import memory
from ..noise import EscapeNoise, MembraneNoise, Noise
from ..noisy_neuron import NoisyNeuron
from .fused import Current, Fused
from .packing import pack, unpack
from .recording import Copies, Recording, Step, over_copies, sigma_gradient, weighted

Scores = Callable[[], tuple[Tensor, Tensor]]
"""Scores of the mean (times σ) and of log σ, ``[copies * batch, ...]`` each."""


@dataclass
class Weights:
    """One weight per copy and sample, ``[copies * batch]``: the advantages, divided by the number of losses.

    An object of its own, so that a graph that waits for its weights does not hold the recording that holds the graph:
    such a cycle through autograd's nodes is never collected.
    """

    given: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The weights.

        Raises:
            RuntimeError: if the losses are not known yet.
        """
        if self.given is None:
            raise RuntimeError("scores were asked for before the losses were known")
        return self.given


@dataclass
class Stretch:
    """Time steps in which a neuron got the very same current, whose scores are one sum: no graph is built for them.

    Attributes:
        current: the current.
        filed: whether the score of its first time step was filed by itself.
        states: of the neuron after the last time step, with how often they had been changed in place.
        gains: their derivatives with respect to the current; None where they are zero.
        score: sum of the scores of the current, times σ.
        scale: sum of the scores of log σ.
    """

    current: Current
    filed: bool = False
    states: Sequence[tuple[Tensor, int]] = ()
    gains: tuple[Tensor | None, ...] = ()
    score: Tensor | None = None
    scale: Tensor | None = None

    def left(self, states: Sequence[Any]) -> bool:
        """The states are those after the last time step, unchanged."""
        if len(self.states) != len(states):
            return False
        return all(a is b and version(b) == count for a, (b, count) in zip(states, self.states, strict=True))

    def add(self, score: Tensor, gain: Tensor | None, scale: Callable[[], Tensor]) -> None:
        """Adds the scores of a time step; that of log σ is asked for last, and may overwrite the other."""
        assert self.score is not None
        assert self.scale is not None
        if gain is None:
            self.score.add_(score)
        else:
            self.score.addcmul_(score, gain)
        self.scale.add_(scale())

    def sums(self) -> tuple[Tensor, Tensor]:
        """Both sums."""
        assert self.score is not None
        assert self.scale is not None
        return self.score, self.scale


class StoringStep(Step):
    """A time step whose scores wait until the losses are known.

    Of each draw the graph of one block remains, with its spikes packed to bits; membrane noise is drawn again in the
    backward pass. Where a neuron with a known update, of which nothing is learned, gets the same current again, one sum
    takes the place of graphs; a derived step whose scores may not be summed before they are weighted sets
    ``sums_scores`` to False.
    """

    recording: Storing
    sums_scores = True
    stretch: Stretch | None = None
    fuses = True

    def take(self, states: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Takes the states of the last step; no graph for what is one sum."""
        super().take(states, named)
        if self.sums_scores and torch.is_grad_enabled():
            self.stretch = self.recording.stretch(self.neuron, self.current, self.states_before)
        self.builds_graph = self.stretch is None

    @property
    def fused(self) -> Fused | None:
        """What a fused step needs to know; a graph is built beside it."""
        return self.recording.fused.get(self.neuron) if self.fuses else None

    @property
    def sums_up(self) -> bool:
        """The scores of this step go into the sum of a stretch."""
        # Most currents never come again: membrane noise that is drawn twice takes less memory than a sum.
        return self.stretch is not None and (self.stretch.filed or isinstance(self.neuron.noise, EscapeNoise))

    @property
    def gain(self) -> Tensor | None:
        """Derivative of what this step of a stretch samples by the current; None if it is one."""
        return None if self.stretch is None or self.neuron.has_unit_gain else self.stretch.gains[-1]

    def update(self, input_: Tensor) -> Any:
        """The next states, before noise; with it in a fused step."""
        neuron, stretch = self.neuron, self.stretch
        if stretch is not None and not neuron.has_unit_gain:
            stretch.gains = neuron.gains_after(stretch.gains)
        if self.fused is None:
            return super().update(input_)
        noise: Any = neuron.noise
        if stretch is not None and self.sums_up:
            self.begin_sum(stretch, noise, input_)
            return self.fuse(self.gain, score=stretch.score, scale=stretch.scale)
        states = self.fuse()
        if stretch is not None:
            mem = states[-1] if isinstance(states, tuple) else states
            self.file_drawn(noise, self.mean(mem), mem)
            stretch.filed = True
        elif torch.is_grad_enabled():
            return self.file_graph(noise, states)
        return states

    def mean(self, like: Tensor) -> Tensor:
        """The mean that a step of a stretch samples around, with the graph of its current alone."""
        raw, gain = self.current.raw, self.gain
        with torch.enable_grad():
            mean: Tensor = raw if gain is None else _Linear.apply(like, raw, gain, None, None)
        return mean

    def file_graph(self, noise: Any, states: Any) -> Any:
        """Files the score of a fused step that is in no stretch; its states, with the graph that snnTorch builds."""
        neuron, drive = self.neuron, self.current.raw
        *syn, mem = states if isinstance(states, tuple) else (states,)
        if syn:
            syn = [_Linear.apply(syn[0], drive, None, neuron.syn, neuron.alpha.clamp(0, 1))]
            drive = syn[0]
        leak, share = neuron.slopes()
        mean = _Linear.apply(mem, drive, share, neuron.mem, leak)
        if isinstance(noise, EscapeNoise):
            spikes = self.decided
            assert spikes is not None
            z = torch.div(mem - neuron.threshold, noise.sigma.detach().to(mem.dtype))
            self.file_spikes(noise, mean, spikes, z)
            mem = mean
        else:
            self.file_drawn(noise, mean, mem)
        return (*syn, mem) if syn else mem

    def file_drawn(self, noise: MembraneNoise, mean: Tensor, like: Tensor) -> None:
        """Files the score of a noisy membrane potential, whose noise is drawn again."""
        self.file(noise, mean, self._again(noise, like, self.recording.draws))

    def sample(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """A noisy membrane potential, whose score is filed."""
        sampled, epsilon, index = self.draw(noise, mean)
        self.file_membrane(noise, mean, epsilon, index)
        return sampled

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Spikes of escape noise, whose score is filed."""
        spikes, z, limit = self.draw_spikes(noise, margin)
        self.file_spikes(noise, margin, spikes, z, limit)
        return spikes

    def file_membrane(self, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int) -> None:
        """Files the score of a noisy membrane potential; ε may be overwritten."""
        stretch = self.stretch
        if stretch is None:
            if torch.is_grad_enabled():
                self.file(noise, mean, self._again(noise, mean, index))
        elif not self.sums_up:
            self.file(noise, self.mean(mean), self._again(noise, mean, index))
            stretch.filed = True
        else:
            self.add(stretch, noise, epsilon, noise.location_score(epsilon))

    def file_spikes(
        self, noise: EscapeNoise, margin: Tensor, spikes: Tensor, z: Tensor, limit: Tensor | None = None
    ) -> None:
        """Files the score of spikes; z and its limit may be overwritten."""
        stretch = self.stretch
        if stretch is not None:
            self.add(stretch, noise, z, noise.location_score(z, spikes, limit))
        elif torch.is_grad_enabled():
            packed = pack(spikes)

            def scores() -> tuple[Tensor, Tensor]:
                fired = unpack(packed, z.shape, z.dtype)
                location = noise.location_score(z, fired)
                return location, noise.scale_score(z, location)

            self.file(noise, margin, scores)

    def _again(self, noise: MembraneNoise, mean: Tensor, index: int) -> Scores:
        """Scores from noise that is drawn again."""
        shape, dtype, device, stream = mean.shape, mean.dtype, mean.device, self.recording.stream

        def scores() -> tuple[Tensor, Tensor]:
            drawn = stream.draw(index, torch.empty(shape, dtype=dtype, device=device), noise)
            location = noise.location_score(drawn)
            return location, noise.scale_score(drawn, location)

        return scores

    def add(self, stretch: Stretch, noise: MembraneNoise | EscapeNoise, value: Tensor, score: Tensor) -> None:
        """Adds a score to the sum of a stretch."""
        self.begin_sum(stretch, noise, score)
        # The score may be the very tensor that it is the score of.
        stretch.add(score, self.gain, lambda: noise.scale_score(value, score, out=value))

    def begin_sum(self, stretch: Stretch, noise: Noise, like: Tensor) -> None:
        """Files the sum of a stretch, which is filed once."""
        if stretch.score is None:
            self.file(noise, self.current.raw, stretch.sums)
            stretch.score, stretch.scale = (memory.zeros_like(like) for _ in range(2))

    def file(self, noise: Noise, mean: Tensor, scores: Scores) -> None:
        """Files scores of a mean and of σ, which are asked for in the backward pass."""
        self.recording.file(noise, mean, scores)

    def end(self, output: Any) -> Any:
        """The return value; states that the current reaches have the graph that was not built."""
        stretch, neuron = self.stretch, self.neuron
        if stretch is None:
            return output
        if isinstance(neuron.noise, MembraneNoise):
            # What was sampled is a constant.
            stretch.gains = (*stretch.gains[:-1], None)
        for name, gain in zip(neuron.state_names, stretch.gains, strict=True):
            if gain is not None and self.current.raw.requires_grad:
                with torch.enable_grad():
                    setattr(neuron, name, _Linear.apply(getattr(neuron, name), self.current.raw, gain, None, None))
        states = [getattr(neuron, name) for name in neuron.state_names]
        stretch.states = [(state, version(state)) for state in states]
        return (output[0], *states) if isinstance(output, tuple) else output


class Storing(Recording):
    """A forward pass that keeps what its scores need until the losses are known.

    Attributes:
        tokens: empty tensors at which the backward pass of the scores begins.
        weights: of the scores, once the losses are known.
    """

    step_type: type[StoringStep] = StoringStep

    def __init__(self, copies: Copies) -> None:
        super().__init__(copies)
        self.tokens: list[Tensor] = []
        self.weights = Weights()
        self._sigmas: dict[Noise, Tensor] = {}
        self._stretches: dict[NoisyNeuron, Stretch] = {}

    def roots(self) -> list[Tensor]:
        """The tokens."""
        return self.tokens

    def stretch(self, neuron: NoisyNeuron, current: Current, states: Sequence[Any]) -> Stretch | None:
        """The sum that a time step belongs to: of a known update whose states depend on one current only."""
        stretch = self._stretches.get(neuron)
        same = stretch is not None and stretch.current is current
        follows = same and stretch is not None and stretch.left(states)
        if not neuron.has_known_graph or (any(state.requires_grad for state in states) and not follows):
            self._stretches.pop(neuron, None)
            return None
        if not same or stretch is None:
            self._stretches[neuron] = stretch = Stretch(current)
        if not follows:
            stretch.gains = (None,) * len(states)
        return stretch

    def file(self, noise: Noise, mean: Tensor, scores: Scores) -> None:
        """Leaves a token, if anything is there to have a gradient."""
        with torch.set_grad_enabled(self.grad):
            if noise not in self._sigmas:
                self._sigmas[noise] = noise.sigma
            sigma = self._sigmas[noise]
            if mean.requires_grad or sigma.requires_grad:
                self.tokens.append(_File.apply(mean, sigma, self.weights, scores))


class _File(torch.autograd.Function):
    """Identity of nothing: an empty token, whose backward pass puts a weighted score on the mean and on σ."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, sigma: Tensor, weights: Weights, scores: Scores) -> Tensor:
        ctx.weights, ctx.scores, ctx.shape = weights, scores, mean.shape
        ctx.sigma = sigma.detach()
        return mean.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        location, scale = ctx.scores()
        weights = ctx.weights.value
        to_mean = over_copies(weighted(location, weights) / ctx.sigma, ctx.shape) if ctx.needs_input_grad[0] else None
        to_sigma = sigma_gradient(scale, weights, ctx.sigma) if ctx.needs_input_grad[1] else None
        return to_mean, to_sigma, None, None


class _Linear(torch.autograd.Function):
    """A state as it is, with derivatives by a current, and by the state before; None for one."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, current: Tensor, share: Tensor | None, before: Any, kept: Tensor | None
    ) -> Tensor:
        ctx.share, ctx.kept, ctx.shape = share, kept, current.shape
        return state.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        to_current = to_before = None
        if ctx.needs_input_grad[1]:
            to_current = over_copies(gradient if ctx.share is None else gradient * ctx.share, ctx.shape)
        if ctx.needs_input_grad[3]:
            to_before = gradient if ctx.kept is None else gradient * ctx.kept
        return None, to_current, None, to_before, None


class ReplayingStep(StoringStep):
    """A time step whose scores are pushed back while the neuron fires."""

    recording: Replaying
    fuses = True

    def enter(self) -> Tensor:
        """A leaf in place of the current."""
        return self.recording.leaf(self.neuron, self.current)

    @property
    def sums_up(self) -> bool:
        """The scores of this step go into the sum of a stretch."""
        return self.stretch is not None

    def file_drawn(self, noise: MembraneNoise, mean: Tensor, like: Tensor) -> None:
        """Pushes the score of a noisy membrane potential back at once, if no graph through time is to remain."""
        if not self.neuron.is_markov:
            super().file_drawn(noise, mean, like)
            return
        self.recording.push_back(noise, mean, self.recording.stream.draw(self.recording.draws, like, noise))

    def file_membrane(self, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int) -> None:
        """Pushes the score of a noisy membrane potential back at once, or when a graph through time is complete."""
        if self.stretch is not None:
            self.add(self.stretch, noise, epsilon, noise.location_score(epsilon))
        elif self.neuron.is_markov and torch.is_grad_enabled():
            self.recording.push_back(noise, mean, epsilon)
        else:
            super().file_membrane(noise, mean, epsilon, index)

    def begin_sum(self, stretch: Stretch, noise: Noise, like: Tensor) -> None:
        """Files the sum of a stretch, which is pushed back when another current comes."""
        before = len(self.recording.tokens)
        super().begin_sum(stretch, noise, like)
        if len(self.recording.tokens) > before:
            self.recording.summed[self.neuron] = self.recording.tokens.pop()


class Replaying(Storing):
    """A forward pass whose losses are known already: scores are pushed back while the neurons fire.

    Nothing of a time step remains, so that memory does not grow with the number of steps. Neurons whose state carries
    a graph through time (``Alpha``, ``RSynaptic``, ``SLSTM``, ``SConv2dLSTM``, and ``Synaptic`` and escape noise with
    a current that changes) are stored as in ``Storing``.

    Args:
        copies: who samples, and what.
        weights: of the scores, one per copy and sample.

    Attributes:
        summed: tokens of sums that are not pushed back yet.
    """

    step_type = ReplayingStep

    def __init__(self, copies: Copies, weights: Tensor) -> None:
        super().__init__(copies)
        self.weights.given = weights
        self.summed: dict[NoisyNeuron, Tensor] = {}
        self._sources: dict[NoisyNeuron, tuple[Tensor, Tensor | None]] = {}
        self._leaves: dict[NoisyNeuron, Tensor] = {}
        self._sigma_gradients: dict[Noise, Tensor] = {}

    def leaf(self, neuron: NoisyNeuron, current: Current) -> Tensor:
        """A leaf in place of the input; what it collects goes on to the input when the next one comes."""
        expanded, x = self.expanded(current, neuron), current.raw
        if neuron.has_known_graph or not (neuron.is_markov and expanded.requires_grad and torch.is_grad_enabled()):
            return expanded
        self._collect(neuron)
        source = self._sources.get(neuron)
        if source is None or source[0] is not x:
            self._flush(neuron)
            self._sources[neuron] = (x, None)
        leaf = expanded.detach().requires_grad_()
        self._leaves[neuron] = leaf
        return leaf

    def stretch(self, neuron: NoisyNeuron, current: Current, states: Sequence[Any]) -> Stretch | None:
        """As in ``Storing``; what was summed for another current is pushed back."""
        before = self._stretches.get(neuron)
        stretch = super().stretch(neuron, current, states)
        if before is not self._stretches.get(neuron) and neuron in self.summed:
            token = self.summed.pop(neuron)
            # The graph is used again: σ is in that of each time step, and a branch may feed several neurons.
            torch.autograd.backward(token, token, retain_graph=True)
        return stretch

    def push_back(self, noise: MembraneNoise, mean: Tensor, epsilon: Tensor) -> None:
        """One backward pass from the mean of a noisy membrane potential; the gradient of σ is added up."""
        location = noise.location_score(epsilon)
        if mean.requires_grad:
            gradient = weighted(location, self.weights.value) / noise.sigma.detach()
            # Parameters of the neuron may be in the graph of a state that the user gave, and that is used again.
            torch.autograd.backward(mean, gradient.to(mean.dtype), retain_graph=True)
        if noise.log_sigma.requires_grad:
            sigma = noise.sigma.detach()
            gradient = sigma_gradient(noise.scale_score(epsilon, location), self.weights.value, sigma)
            self._sigma_gradients[noise] = self._sigma_gradients.get(noise, torch.zeros_like(sigma)) + gradient

    def finish(self) -> None:
        """Pushes back what is left at the end of the forward pass."""
        self.tokens += self.summed.values()
        for neuron in list(self._sources):
            self._collect(neuron)
            self._flush(neuron)
        for noise, gradient in self._sigma_gradients.items():
            torch.autograd.backward(noise.sigma, gradient)

    def _collect(self, neuron: NoisyNeuron) -> None:
        """Adds what the last time step's leaf got to what its source is to get."""
        leaf = self._leaves.pop(neuron, None)
        if leaf is None or leaf.grad is None:
            return
        source, total = self._sources[neuron]
        gradient = over_copies(leaf.grad, source.shape)
        self._sources[neuron] = (source, gradient if total is None else total.add_(gradient))

    def _flush(self, neuron: NoisyNeuron) -> None:
        source, total = self._sources.pop(neuron, (None, None))
        if source is not None and total is not None:
            torch.autograd.backward(source, total, retain_graph=True)


def push(losses: Tensor, count: int, recording: Storing) -> None:
    """One backward pass from the losses and from everything that was filed."""
    if isinstance(recording, Replaying):
        recording.finish()
    roots, gradients = list(recording.tokens), list(recording.tokens)
    if losses.requires_grad:
        roots.append(losses)
        gradients.append(torch.full_like(losses, 1 / count))
    if roots:
        torch.autograd.backward(roots, gradients)
