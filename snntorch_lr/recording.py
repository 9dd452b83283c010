"""The contexts in which noisy neurons expand to copies, sample, and file their scores."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .graph import version
from .noise import EscapeNoise, MembraneNoise
from .noisy import NoisyNeuron
from .packing import PackedSpikes
from .stream import NoiseStream


@dataclass(frozen=True)
class Current:
    """The input of a neuron in a time step, as it came and repeated for the copies."""

    raw: Tensor
    expanded: Tensor
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", version(self.raw))

    def still_is(self, x: Tensor) -> bool:
        """Whether this is the very tensor, with the same numbers."""
        return self.raw is x and version(x) == self.count


@dataclass(frozen=True)
class Copies:
    """What a forward pass of noise copies is run with.

    Attributes:
        neurons: the neurons that sample, by name.
        stream: the noise, and which copies there are.
        batch: number of samples, or None to take it from the first noisy neuron's input.
        others: snnTorch neurons of the network that do not sample.
    """

    neurons: Mapping[str, NoisyNeuron]
    stream: NoiseStream
    batch: int | None = None
    others: Collection[nn.Module] = ()


_running: ContextVar[Recording | None] = ContextVar("snntorch_lr_recording", default=None)


def per_copy(x: Tensor) -> Tensor:
    """A tensor repeated for the noise copies, to go with what comes after the first noisy neuron; for ``loss_fn``.

    For skip connections around a noisy neuron, ``torch.cat`` with its spikes, and losses that compare with the inputs.
    Targets arrive repeated already. Outside an estimator, and for what has been repeated, it is the identity. What goes
    around a noisy neuron into another one must not change over time under ``Approximate``, nor under ``Counterfactual``
    unless ``over_time="exact"``: they take it from the first time step.

    Args:
        x: ``[batch, ...]``, or without dimensions.

    Returns:
        ``[copies * batch, ...]``.

    Raises:
        ValueError: if the first dimension is not the batch.

    Example:
        >>> spikes = lif(fc1(images))
        >>> current = fc2(torch.cat([spikes, slr.per_copy(images)], 1))
    """
    recording = _running.get()
    if recording is None or not x.dim():
        return x
    if recording.batch is None:
        recording.batch = len(x)
    if not recording.fits(x):
        raise ValueError(
            f"per_copy takes a tensor with the batch first, here of {recording.batch} samples, but got one of shape "
            f"{tuple(x.shape)}; of [time, batch, ...] give it one time step"
        )
    return recording.repeat(x)


class Recording:
    """One forward pass of noise copies: expands inputs, and samples without a graph or a score.

    While it is entered as a context, the given neurons sample for it. Copies are laid out copy-first: row
    ``k * batch + b`` of every tensor belongs to copy k of sample b.

    Args:
        copies: who samples, and what.

    Attributes:
        fed_by_copies: neurons whose first input had been expanded before it came: spikes of other ones are in it.
        half: whether any input was in float16.
        grad: whether the forward pass runs with gradients.
        step: a neuron's time step; compiled code leaves its graph there, which could not follow scores being filed.
    """

    def __init__(self, copies: Copies) -> None:
        self.neurons = copies.neurons
        self.others = copies.others
        self.stream = copies.stream
        self.copies = copies.stream.last - copies.stream.first
        self.batch = copies.batch
        self.grad = True
        self.step = NoisyNeuron.step
        self._handles: list[RemovableHandle] = []
        self._token: Token[Recording | None] | None = None
        self.spikes = PackedSpikes()
        self._draws = 0
        self._started: set[NoisyNeuron] = set()
        self._received: dict[NoisyNeuron, Current] = {}
        self.fed_by_copies: set[NoisyNeuron] = set()
        self.half = False

    def __enter__(self) -> Recording:
        self.grad = torch.is_grad_enabled()
        # Where nothing was compiled, the compiler is not worth being imported: it takes seconds and much memory.
        if "torch._dynamo" in sys.modules:
            self.step = torch.compiler.disable(NoisyNeuron.step)  # type: ignore[no-untyped-call]
        for neuron in self.neurons.values():
            neuron._recording = self
        for other in self.others:
            self._handles.append(other.register_forward_pre_hook(self._expand_states, with_kwargs=True))
        self._token = _running.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _running.reset(self._token)
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

    @property
    def ran(self) -> bool:
        """Whether any neuron was called."""
        return bool(self._started)

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
        return self.repeat(x)

    def repeat(self, x: Tensor) -> Tensor:
        """As ``expand``, for a tensor that fits."""
        return x if x.shape[0] == self.rows else x.unsqueeze(0).expand(self.copies, *x.shape).flatten(0, 1)

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

    @property
    def rows(self) -> int:
        """Rows of every tensor after the first noisy neuron."""
        return self.copies * (self.batch or 0)

    def receive_states(
        self, neuron: NoisyNeuron, states: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The states of one time step, as the user gave them, as the neuron is to see them."""
        expanded = tuple(self.expand_state(state, neuron) for state in states)
        return expanded, {name: self.expand_state(state, neuron) for name, state in named.items()}

    def receive(self, neuron: NoisyNeuron, x: Tensor) -> Tensor:
        """The input of one time step as the neuron is to see it; expanded once if it is the same again."""
        last = self._received.get(neuron)
        if last is None and self.batch is not None and len(x) > self.batch:
            self.fed_by_copies.add(neuron)
        if last is None or not last.still_is(x):
            self._received[neuron] = last = Current(x, self.expand(x, neuron))
            self.half |= x.dtype == torch.float16
        return last.expanded

    def builds_graph(self, neuron: NoisyNeuron, mem: Tensor) -> bool:
        """Whether the neuron's own computations are to carry a graph in this step.

        Args:
            neuron: who asks, after ``receive``.
            mem: its membrane potential before the step.
        """
        return True

    def attach(self, neuron: NoisyNeuron, mem: Tensor) -> Tensor:
        """The membrane potential after the step as others are to see it."""
        return mem

    def roots(self) -> Collection[Tensor]:
        """Tensors behind which is all that was sampled from, if a graph of it is kept."""
        return ()

    def begin_step(self, neuron: NoisyNeuron, input_: Tensor) -> None:
        """Called before the neuron updates its states."""

    def end_step(self, neuron: NoisyNeuron, spikes: Tensor) -> None:
        """Called after the neuron has fired and reset."""

    def leave(self, neuron: NoisyNeuron, output: Any) -> Any:
        """What a step returns to others, from what snnTorch's update returned."""
        self.end_step(neuron, output[0] if isinstance(output, tuple) else output)
        attached = self.attach(neuron, neuron.mem)
        if attached is neuron.mem:
            return output
        neuron.mem = attached
        return (*output[:-1], attached) if isinstance(output, tuple) else output

    def emit(self, neuron: NoisyNeuron, spikes: Tensor) -> Tensor:
        """What goes on to the next layer in place of the spikes."""
        return spikes

    def draw(self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """Samples mean + σ ε without a graph, and files the draw."""
        index = self._next()
        constant = mean.detach()
        epsilon = self.stream.draw(index, constant, noise.shape)
        # Without a graph nobody else holds the mean.
        out = None if mean.requires_grad else constant
        sampled = torch.addcmul(constant, noise.sigma.detach().to(constant.dtype), epsilon, out=out)
        self.file_membrane(neuron, noise, mean, epsilon, index)
        return sampled

    def fire(self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Samples spikes given the distance to the threshold, without a graph, and files the draw."""
        index = self._next()
        sigma = noise.sigma.detach().to(margin.dtype)
        z = torch.div(margin.detach(), sigma, out=None if margin.requires_grad else margin)
        limit = noise.limit(z)
        spikes = noise.fires(limit, self.stream.draw(index, z, noise.shape))
        self.file_escape(neuron, noise, margin, z, limit, spikes)
        return spikes

    def _next(self) -> int:
        self._draws += 1
        return self._draws

    def file_membrane(
        self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor, epsilon: Tensor, index: int
    ) -> None:
        """Keeps what the score of a noisy membrane needs, and may overwrite ε; nothing here."""

    def file_escape(
        self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor, z: Tensor, limit: Tensor, spikes: Tensor
    ) -> None:
        """Keeps what the score of a sampled spike needs, and may overwrite z and its limit; nothing here."""


def explain(error: Exception, recording: Recording) -> None:
    """Adds to an error of ``loss_fn`` how many rows there are: most are about shapes. Python 3.10 has no notes."""
    if hasattr(error, "add_note"):
        error.add_note(
            f"snntorch_lr runs loss_fn with {recording.copies} noise copies of {recording.batch} samples: from the "
            f"first noisy neuron on, tensors have {recording.rows} rows, and so have the targets. If shapes do not go "
            "together, write flatten(1) for view(batch_size, -1), begin accumulators with torch.zeros(()), and wrap "
            "inputs that are used behind a noisy neuron in snntorch_lr.per_copy(x). If there are fewer rows: does "
            "loss_fn run the very network that the estimator was made for, or attach was called with?"
        )
