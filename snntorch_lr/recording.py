"""The contexts in which noisy neurons expand to copies, sample, and file their scores."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .noise import EscapeNoise, MembraneNoise, Noise
from .noisy import NoisyNeuron
from .packing import PackedSpikes, pack, unpack
from .stream import NoiseStream


class Recording:
    """One forward pass of noise copies: expands inputs, and samples without a graph or a score.

    While it is entered as a context, the given neurons sample for it. Copies are laid out copy-first: row
    ``k * batch + b`` of every tensor belongs to copy k of sample b.

    Args:
        neurons: the neurons that sample, by name.
        stream: the noise, and which copies there are.
        batch: number of samples, or None to take it from the first noisy neuron's input.
        others: snnTorch neurons of the network that do not sample.

    Attributes:
        keeps_graph: whether the neuron's own computations are to carry a graph.
        grad: whether the forward pass runs with gradients.
        step: a neuron's time step; compiled code leaves its graph there, which could not follow scores being filed.
    """

    keeps_graph = True

    def __init__(
        self,
        neurons: Mapping[str, NoisyNeuron],
        stream: NoiseStream,
        batch: int | None = None,
        others: Iterable[nn.Module] = (),
    ) -> None:
        self.neurons = neurons
        self.others = others
        self.grad = True
        self.step = NoisyNeuron.step
        self._handles: list[RemovableHandle] = []
        self.stream = stream
        self.copies = stream.last - stream.first
        self.batch = batch
        self.spikes = PackedSpikes()
        self._draws = 0
        self._started: set[NoisyNeuron] = set()

    def __enter__(self) -> Recording:
        self.grad = torch.is_grad_enabled()
        # Where nothing was compiled, the compiler is not worth being imported: it takes seconds and much memory.
        if "torch._dynamo" in sys.modules:
            self.step = torch.compiler.disable(NoisyNeuron.step)  # type: ignore[no-untyped-call]
        for neuron in self.neurons.values():
            neuron._recording = self
        for other in self.others:
            self._handles.append(other.register_forward_pre_hook(self._expand_states, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for neuron in self.neurons.values():
            del neuron._recording
        while self._handles:
            self._handles.pop().remove()

    def _expand_states(
        self, neuron: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """States that a user gives to a neuron without noise: snnTorch would silently replace them by zeros."""
        rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else None

        def expand(state: Any) -> Any:
            short = isinstance(state, Tensor) and state.dim() and len(state) == self.batch
            return state.repeat(self.copies, *[1] * (state.dim() - 1)) if short else state

        if self.batch is None or rows != self.copies * self.batch or rows == self.batch:
            return args, kwargs
        return (args[0], *map(expand, args[1:])), {key: expand(value) for key, value in kwargs.items()}

    def name(self, neuron: NoisyNeuron) -> str:
        """How errors call a neuron: its place in the network and its class."""
        place = next((name for name, known in self.neurons.items() if known is neuron), "")
        return f"{place} ({type(neuron).__name__})" if place else type(neuron).__name__

    def starts(self, neuron: NoisyNeuron) -> bool:
        """Whether this is the neuron's first time step in this forward pass; says so once."""
        first = neuron not in self._started
        self._started.add(neuron)
        return first

    def fits(self, x: Tensor) -> bool:
        """Whether the first dimension is the batch, or the copies of it."""
        return self.batch is not None and x.shape[0] in (self.batch, self.copies * self.batch)

    def expand(self, x: Tensor, neuron: NoisyNeuron) -> Tensor:
        """Repeats a batch for every copy; leaves what is expanded already as it is.

        Args:
            x: input or state of a noisy neuron, ``[batch, ...]`` or ``[copies * batch, ...]``.
            neuron: who asks.

        Raises:
            ValueError: if the first dimension is neither.
        """
        if self.batch is None and x.dim():
            self.batch = x.shape[0]
        if self.batch is None or not x.dim() or not self.fits(x):
            raise ValueError(
                f"{self.name(neuron)} got an input of shape {tuple(x.shape)}, but there are {self.batch} targets: a "
                "noisy neuron takes one time step with the batch first, and so are targets"
            )
        if x.shape[0] == self.copies * self.batch:
            return x
        return x.unsqueeze(0).expand(self.copies, *x.shape).flatten(0, 1)

    def expand_state(self, state: Any, neuron: NoisyNeuron) -> Any:
        """A state that the user gives, for every copy.

        Raises:
            ValueError: if it holds numbers that snnTorch would silently replace by zeros.
        """
        if not isinstance(state, Tensor) or state.dim() == 0:
            return state
        if self.fits(state):
            return self.expand(state, neuron)
        if state.numel() and bool(state.any()):
            raise ValueError(
                f"{self.name(neuron)} got a state of shape {tuple(state.shape)}, which does not fit its input; "
                "snnTorch would silently replace it by zeros. Start each forward pass from reset_mem() or reset(net)"
            )
        return state

    def receive(self, neuron: NoisyNeuron, x: Tensor) -> Tensor:
        """The input of one time step as the neuron is to see it."""
        return self.expand(x, neuron)

    def begin_step(self, neuron: NoisyNeuron, input_: Tensor) -> None:
        """Called before the neuron updates its states."""

    def end_step(self, neuron: NoisyNeuron, spikes: Tensor) -> None:
        """Called after the neuron has fired and reset."""

    def emit(self, neuron: NoisyNeuron, spikes: Tensor) -> Tensor:
        """What goes on to the next layer in place of the spikes."""
        return spikes

    def draw(self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """Samples mean + σ ε without a graph, and files the draw."""
        index = self._next()
        constant = mean.detach()
        epsilon = self.stream.draw(index, constant, noise.shape)
        self.file_membrane(neuron, noise, mean, epsilon, index)
        return torch.addcmul(constant, noise.sigma.detach().to(constant.dtype), epsilon)

    def fire(self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Samples spikes given the distance to the threshold, without a graph, and files the draw."""
        index = self._next()
        z = margin.detach() / noise.sigma.detach().to(margin.dtype)
        spikes = noise.fires(z, self.stream.draw(index, z, noise.shape)).to(z.dtype)
        self.file_escape(neuron, noise, margin, z, spikes)
        return spikes

    def _next(self) -> int:
        self._draws += 1
        return self._draws

    def file_membrane(
        self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int
    ) -> None:
        """Keeps what the score of a noisy membrane needs; nothing here."""

    def file_escape(self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor, z: Tensor, spikes: Tensor) -> None:
        """Keeps what the score of a sampled spike needs; nothing here."""


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


class Storing(Recording):
    """A forward pass that keeps what its scores need until the losses are known.

    Of each draw the graph of one block remains, with its spikes packed to bits; membrane noise is drawn again in the
    backward pass. ``tokens`` are empty tensors at which that backward pass begins.
    """

    def __init__(
        self,
        neurons: Mapping[str, NoisyNeuron],
        stream: NoiseStream,
        batch: int | None = None,
        others: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__(neurons, stream, batch, others)
        self.tokens: list[Tensor] = []
        self.weights = Weights()
        self._sigmas: dict[Noise, Tensor] = {}

    def file_membrane(
        self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int
    ) -> None:
        """Files a token whose backward pass is the score of a noisy membrane."""
        if not torch.is_grad_enabled():
            return
        sigma = self._sigma(noise)
        if mean.requires_grad or sigma.requires_grad:
            shape, dtype, device, stream = mean.shape, mean.dtype, mean.device, self.stream

            def scores() -> tuple[Tensor, Tensor]:
                like = torch.empty(shape, dtype=dtype, device=device)
                drawn = stream.draw(index, like, noise.shape)
                return noise.location_score(drawn), noise.scale_score(drawn)

            self.tokens.append(_File.apply(mean, sigma, self.weights, scores))

    def file_escape(self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor, z: Tensor, spikes: Tensor) -> None:
        """Files a token whose backward pass is the score of a sampled spike."""
        if not torch.is_grad_enabled():
            return
        sigma = self._sigma(noise)
        if margin.requires_grad or sigma.requires_grad:
            packed = pack(spikes)

            def scores() -> tuple[Tensor, Tensor]:
                fired = unpack(packed, z.shape, z.dtype)
                location = noise.location_score(z, fired)
                return location, -z * location

            self.tokens.append(_File.apply(margin, sigma, self.weights, scores))

    def _sigma(self, noise: Noise) -> Tensor:
        if noise not in self._sigmas:
            self._sigmas[noise] = noise.sigma
        return self._sigmas[noise]


class _File(torch.autograd.Function):
    """Identity of nothing: an empty token, whose backward pass puts a weighted score on the mean and on σ."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, sigma: Tensor, weights: Weights, scores: Any) -> Tensor:
        ctx.weights, ctx.scores = weights, scores
        ctx.sigma = sigma.detach()
        return mean.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        location, scale = ctx.scores()
        to_mean = weighted(location, ctx.weights.value) / ctx.sigma if ctx.needs_input_grad[0] else None
        to_sigma = sigma_gradient(scale, ctx.weights.value, ctx.sigma) if ctx.needs_input_grad[1] else None
        return to_mean, to_sigma, None, None


class Replaying(Storing):
    """A forward pass whose losses are known already: membrane scores are pushed back while the neurons fire.

    Nothing of a time step remains, so that memory does not grow with the number of steps. Neurons whose state carries
    a graph through time (``Synaptic``, ``Alpha``, ``RSynaptic``, ``SLSTM``, ``SConv2dLSTM``, and escape noise) are
    stored as in ``Storing``.
    """

    def __init__(
        self,
        neurons: Mapping[str, NoisyNeuron],
        stream: NoiseStream,
        batch: int | None,
        weights: Tensor,
        others: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__(neurons, stream, batch, others)
        self.weights.given = weights
        self._sources: dict[NoisyNeuron, tuple[Tensor, Tensor | None]] = {}
        self._leaves: dict[NoisyNeuron, Tensor] = {}
        self._sigma_gradients: dict[Noise, Tensor] = {}

    def receive(self, neuron: NoisyNeuron, x: Tensor) -> Tensor:
        """A leaf in place of the input; what it collects goes on to the input when the next one comes."""
        expanded = self.expand(x, neuron)
        if not (neuron.is_markov and expanded.requires_grad and torch.is_grad_enabled()):
            return expanded
        self._collect(neuron)
        source = self._sources.get(neuron)
        if source is None or source[0] is not x:
            self._flush(neuron)
            self._sources[neuron] = (x, None)
        leaf = expanded.detach().requires_grad_()
        self._leaves[neuron] = leaf
        return leaf

    def file_membrane(
        self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int
    ) -> None:
        """Pushes the score of a noisy membrane back at once."""
        if not neuron.is_markov or not torch.is_grad_enabled():
            super().file_membrane(neuron, noise, mean, epsilon, index)
            return
        sigma = noise.sigma.detach()
        if mean.requires_grad:
            gradient = weighted(noise.location_score(epsilon), self.weights.value) / sigma
            # Parameters of the neuron may be in the graph of a state that the user gave, and that is used again.
            torch.autograd.backward(mean, gradient.to(mean.dtype), retain_graph=True)
        if noise.log_sigma.requires_grad:
            gradient = sigma_gradient(noise.scale_score(epsilon), self.weights.value, sigma)
            self._sigma_gradients[noise] = self._sigma_gradients.get(noise, torch.zeros_like(sigma)) + gradient

    def finish(self) -> None:
        """Pushes back what is left at the end of the forward pass."""
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
        gradient = leaf.grad
        if source.shape[0] != gradient.shape[0]:
            gradient = gradient.view(self.copies, *source.shape).sum(0)
        self._sources[neuron] = (source, gradient if total is None else total.add_(gradient))

    def _flush(self, neuron: NoisyNeuron) -> None:
        source, total = self._sources.pop(neuron, (None, None))
        if source is not None and total is not None:
            # A branch that feeds several neurons gets a backward pass from each.
            torch.autograd.backward(source, total, retain_graph=True)


def weighted(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores times one weight per row."""
    return scores * weights.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1))


def sigma_gradient(scale: Tensor, weights: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of σ from the scores of log σ: weighted, summed over rows, and reduced to the shape of σ."""
    total = (weights.to(scale.dtype) @ scale.flatten(1)).view(1, *scale.shape[1:])
    return (total / sigma).sum_to_size(sigma.shape).to(sigma.dtype)
