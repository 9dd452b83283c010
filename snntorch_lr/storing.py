"""Forward passes that file scores: kept until the losses are known, or pushed back at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .graph import version
from .noise import EscapeNoise, MembraneNoise, Noise
from .noisy import NoisyNeuron
from .packing import pack, unpack
from .recording import Copies, Current, Recording

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
    """Time steps in which a Leaky got the very same current, whose scores are one sum: no graph is built for them.

    Attributes:
        current: the current.
        filed: whether the score of its first time step was filed by itself.
        mem: membrane potential after the last time step.
        count: how often it had been changed in place.
        gain: its derivative with respect to the current; None for membrane noise, and before the first time step.
        score: sum of the scores of the current, times σ.
        scale: sum of the scores of log σ.
    """

    current: Current
    filed: bool = False
    mem: Tensor | None = None
    count: int = 0
    gain: Tensor | None = None
    score: Tensor | None = None
    scale: Tensor | None = None

    def add(self, score: Tensor, scale: Callable[[], Tensor]) -> None:
        """Adds the scores of a time step; that of log σ is asked for last, and may overwrite the other."""
        if self.score is None or self.scale is None:
            self.score, self.scale = torch.zeros_like(score), torch.zeros_like(score)
        if self.gain is None:
            self.score.add_(score)
        else:
            self.score.addcmul_(score, self.gain)
        self.scale.add_(scale())

    def sums(self) -> tuple[Tensor, Tensor]:
        """Both sums."""
        assert self.score is not None
        assert self.scale is not None
        return self.score, self.scale


class Storing(Recording):
    """A forward pass that keeps what its scores need until the losses are known.

    Of each draw the graph of one block remains, with its spikes packed to bits; membrane noise is drawn again in the
    backward pass. ``tokens`` are empty tensors at which that backward pass begins.
    """

    def __init__(self, copies: Copies) -> None:
        super().__init__(copies)
        self.tokens: list[Tensor] = []
        self.weights = Weights()
        self._sigmas: dict[Noise, Tensor] = {}
        self._stretches: dict[NoisyNeuron, Stretch] = {}
        self._now: Stretch | None = None

    def roots(self) -> list[Tensor]:
        """The tokens."""
        return self.tokens

    def receive(self, neuron: NoisyNeuron, x: Tensor) -> Tensor:
        """The input of one time step as the neuron is to see it."""
        self._now = None
        return super().receive(neuron, x)

    def builds_graph(self, neuron: NoisyNeuron, mem: Tensor) -> bool:
        """No graph for a Leaky of which nothing is learned, as long as its membrane depends on one current only."""
        current = self._received[neuron]
        stretch = self._stretches.get(neuron)
        same = stretch is not None and stretch.current is current
        follows = same and stretch is not None and mem is stretch.mem and version(mem) == stretch.count
        if not neuron.leaks_only or (mem.requires_grad and not follows):
            self._stretches.pop(neuron, None)
            return True
        if not same or stretch is None:
            self._stretches[neuron] = stretch = Stretch(current)
        if not follows:
            stretch.gain = None
        self._now = stretch
        return False

    def attach(self, neuron: NoisyNeuron, mem: Tensor) -> Tensor:
        """With escape noise, the membrane potential with the graph that was not built."""
        stretch = self._now
        if stretch is None:
            return mem
        if stretch.gain is not None and stretch.current.raw.requires_grad:
            with torch.enable_grad():
                mem = _Attach.apply(mem, stretch.current.raw, stretch.gain)
        stretch.mem, stretch.count = mem, version(mem)
        return mem

    def file_membrane(
        self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int
    ) -> None:
        """Files the score of a noisy membrane."""
        stretch = self._now
        if stretch is None:
            if torch.is_grad_enabled():
                self._file(noise, mean, self._again(noise, mean, index))
        elif not stretch.filed:
            # Most currents never come again: noise that is drawn twice takes less memory than a sum.
            self._file(noise, stretch.current.raw, self._again(noise, mean, index))
            stretch.filed = True
        else:
            self._add(neuron, stretch, noise, epsilon, noise.location_score(epsilon))

    def file_escape(
        self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor, z: Tensor, limit: Tensor, spikes: Tensor
    ) -> None:
        """Files the score of a sampled spike."""
        stretch = self._now
        if stretch is not None:
            stretch.gain = neuron.gain_after(stretch.gain)
            self._add(neuron, stretch, noise, z, noise.location_score(z, spikes, limit))
        elif torch.is_grad_enabled():
            packed = pack(spikes)

            def scores() -> tuple[Tensor, Tensor]:
                fired = unpack(packed, z.shape, z.dtype)
                location = noise.location_score(z, fired)
                return location, noise.scale_score(z, location)

            self._file(noise, margin, scores)

    def _again(self, noise: MembraneNoise, mean: Tensor, index: int) -> Scores:
        """Scores from noise that is drawn again."""
        shape, dtype, device, stream = mean.shape, mean.dtype, mean.device, self.stream

        def scores() -> tuple[Tensor, Tensor]:
            drawn = stream.draw(index, torch.empty(shape, dtype=dtype, device=device), noise.shape)
            location = noise.location_score(drawn)
            return location, noise.scale_score(drawn, location)

        return scores

    def _add(
        self, neuron: NoisyNeuron, stretch: Stretch, noise: MembraneNoise | EscapeNoise, value: Tensor, score: Tensor
    ) -> None:
        if stretch.score is None:
            self._file(noise, stretch.current.raw, stretch.sums)
        # The score may be the very tensor that it is the score of.
        stretch.add(score, lambda: noise.scale_score(value, score, out=value))

    def _file(self, noise: Noise, mean: Tensor, scores: Scores, weights: Weights | None = None) -> None:
        """Leaves a token, if anything is there to have a gradient."""
        with torch.set_grad_enabled(self.grad):
            if noise not in self._sigmas:
                self._sigmas[noise] = noise.sigma
            sigma = self._sigmas[noise]
            if mean.requires_grad or sigma.requires_grad:
                self.tokens.append(_File.apply(mean, sigma, weights or self.weights, scores))


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


class _Attach(torch.autograd.Function):
    """A membrane potential as it is, whose derivative with respect to the current is the gain."""

    @staticmethod
    def forward(ctx: Any, mem: Tensor, current: Tensor, gain: Tensor) -> Tensor:
        ctx.gain, ctx.shape = gain, current.shape
        return mem.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, over_copies(gradient * ctx.gain, ctx.shape), None


class Replaying(Storing):
    """A forward pass whose losses are known already: scores are pushed back while the neurons fire.

    Nothing of a time step remains, so that memory does not grow with the number of steps. Neurons whose state carries
    a graph through time (``Synaptic``, ``Alpha``, ``RSynaptic``, ``SLSTM``, ``SConv2dLSTM``, and escape noise with a
    current that changes) are stored as in ``Storing``.
    """

    def __init__(self, copies: Copies, weights: Tensor) -> None:
        super().__init__(copies)
        self.weights.given = weights
        self._summed: dict[NoisyNeuron, Tensor] = {}
        self._sources: dict[NoisyNeuron, tuple[Tensor, Tensor | None]] = {}
        self._leaves: dict[NoisyNeuron, Tensor] = {}
        self._sigma_gradients: dict[Noise, Tensor] = {}

    def receive(self, neuron: NoisyNeuron, x: Tensor) -> Tensor:
        """A leaf in place of the input; what it collects goes on to the input when the next one comes."""
        expanded = super().receive(neuron, x)
        if neuron.leaks_only or not (neuron.is_markov and expanded.requires_grad and torch.is_grad_enabled()):
            return expanded
        self._collect(neuron)
        source = self._sources.get(neuron)
        if source is None or source[0] is not x:
            self._flush(neuron)
            self._sources[neuron] = (x, None)
        leaf = expanded.detach().requires_grad_()
        self._leaves[neuron] = leaf
        return leaf

    def builds_graph(self, neuron: NoisyNeuron, mem: Tensor) -> bool:
        """As in ``Storing``; what was summed for another current is pushed back."""
        before = self._stretches.get(neuron)
        builds = super().builds_graph(neuron, mem)
        if before is not self._stretches.get(neuron) and neuron in self._summed:
            token = self._summed.pop(neuron)
            # The graph is used again: σ is in that of each time step, and a branch may feed several neurons.
            torch.autograd.backward(token, token, retain_graph=True)
        return builds

    def file_membrane(
        self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int
    ) -> None:
        """Pushes the score of a noisy membrane back at once."""
        if self._now is not None:
            self._add(neuron, self._now, noise, epsilon, noise.location_score(epsilon))
            return
        if not neuron.is_markov or not torch.is_grad_enabled():
            super().file_membrane(neuron, noise, mean, epsilon, index)
            return
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
        self.tokens += self._summed.values()
        for neuron in list(self._sources):
            self._collect(neuron)
            self._flush(neuron)
        for noise, gradient in self._sigma_gradients.items():
            torch.autograd.backward(noise.sigma, gradient)

    def _add(
        self, neuron: NoisyNeuron, stretch: Stretch, noise: MembraneNoise | EscapeNoise, value: Tensor, score: Tensor
    ) -> None:
        before = len(self.tokens)
        super()._add(neuron, stretch, noise, value, score)
        if len(self.tokens) > before:
            self._summed[neuron] = self.tokens.pop()

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


def weighted(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores times one weight per row."""
    return scores * weights.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1))


def over_copies(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sums a gradient over the copies, if it is for a tensor that was not repeated for them."""
    return gradient if gradient.shape == shape else gradient.reshape(-1, *shape).sum(0)


def sigma_gradient(scale: Tensor, weights: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of σ from the scores of log σ: weighted, summed over rows, and reduced to the shape of σ."""
    total = (weights.to(scale.dtype) @ scale.reshape(len(scale), -1)).view(1, *scale.shape[1:])
    return (total / sigma).sum_to_size(sigma.shape).to(sigma.dtype)
