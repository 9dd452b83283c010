"""Forward passes of noise copies: recordings, the time steps of their neurons, and spikes kept as one bit each."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._messages import place, warn
from ..kernels import memory
from ..noise import EscapeNoise, MembraneNoise
from ..noise_stream import NoiseStream
from ..noisy_neuron import NoisyNeuron
from ..validate import Checks
from .fused import Current, Fused
from .packing import PackedSpikes


@dataclass(frozen=True)
class Copies:
    """Noise copies of a forward pass: who samples, by which noise.

    Attributes:
        neurons: the neurons that sample, by name.
        stream: the noise, and which copies there are.
        batch: number of samples, or None to take it from the first noisy neuron's input.
        others: snnTorch neurons of the network that do not sample.
        first_samples: how many samples go on behind the first noisy neuron, to look at; None for all of them.
    """

    neurons: Mapping[str, NoisyNeuron]
    stream: NoiseStream
    batch: int | None = None
    others: Collection[nn.Module] = ()
    first_samples: int | None = None


# It takes as long as a few time steps; most presentations are over before.
_STEPS_UNTIL_TIDY = 26

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

    Examples:
        >>> spikes = lif(fc1(images))
        >>> current = fc2(torch.cat([spikes, slr.per_copy(images)], 1))
    """
    recording = _running.get()
    if recording is None or not x.dim():
        return x
    if recording.samples is None:
        recording.samples = len(x)
    if not recording.fits(x):
        raise ValueError(
            f"per_copy takes a tensor with the batch first, here of {recording.samples} samples, but got one of shape "
            f"{tuple(x.shape)}; of [time, batch, ...] give it one time step"
        )
    return recording.repeat(x)


_UNFUSED = frozenset({"update", "sample", "fire", "draw", "draw_spikes", "file_membrane", "file_spikes", "add", "file"})


class Step:
    """One time step of one noisy neuron in a recording: samples without a graph or a score.

    An estimator with scores of its own derives a step, and a recording whose ``step_type`` it is. A derived step that
    samples or files in its own way is computed by torch, unless it sets ``fuses``.

    Args:
        recording: the forward pass.
        neuron: who takes the step.
        current: its input.

    Attributes:
        input: the current for all rows; of a fused step only its shape.
        states: those of the last step, as they were given by position, for all rows; and by name.
        builds_graph: the neuron's own update is to carry a graph.
        decided: spikes that were sampled together with the update.
    """

    builds_graph = True
    fuses = True
    input: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "fuses" not in vars(cls) and not _UNFUSED.isdisjoint(vars(cls)):
            cls.fuses = False

    def __init__(self, recording: Recording, neuron: NoisyNeuron, current: Current) -> None:
        self.recording = recording
        self.neuron = neuron
        self.current = current
        self.states: tuple[Any, ...] = ()
        self.named_states: dict[str, Any] = {}
        self.decided: Tensor | None = None

    def take(self, states: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Takes the states of the last step, as the user gave them."""
        expand, neuron = self.recording.expand_state, self.neuron
        self.states = tuple(expand(state, neuron) for state in states)
        self.named_states = {name: expand(state, neuron) for name, state in named.items()}

    @property
    def states_before(self) -> list[Any]:
        """The states before the step, in the order of the neuron's ``state_names``."""
        given = dict(zip(self.neuron.all_states, self.states, strict=False)) | self.named_states
        return [
            getattr(self.neuron, name) if given.get(name) is None else given[name] for name in self.neuron.state_names
        ]

    def enter(self) -> Tensor:
        """The current for all rows, as the neuron is to get it; asked for once, after ``take``."""
        return self.recording.expanded(self.current, self.neuron)

    def update(self, input_: Tensor) -> Any:
        """The next states, before noise; with it in a fused step, which decides about the spikes too."""
        return self.neuron.update(input_) if self.fused is None else self.fuse()

    @property
    def fused(self) -> Fused | None:
        """What a fused step needs to know; None where there is none."""
        if not self.fuses or (self.builds_graph and self.recording.grad):
            return None
        return self.recording.fused.get(self.neuron)

    def fuse(
        self, gain: Tensor | None = None, weights: tuple[float, ...] = (1.0,), stride: int = 0, **tensors: Tensor | None
    ) -> Any:
        """Fused time steps with the same current: the next states as snnTorch returns them, without a graph.

        Args:
            gain: derivative of what is sampled by a constant current; None if it is one.
            weights: of the steps in the sums of spikes.
            stride: from the number of a step's draw to that of the next.
            tensors: what is added up or filled, by the names of ``kernels.numba_steps._step``; None for what is not
                wanted.
        """
        fused, neuron, recording = self.fused, self.neuron, self.recording
        assert fused is not None
        states = [getattr(neuron, name) for name in neuron.state_names]
        raw, reset, *syn, mem = (
            each.detach().to(fused.dtype) for each in (recording.own(self.current.raw), neuron.reset, *states)
        )
        spikes, *new_syn, new = (memory.empty_like(mem) for _ in range(1 + len(states)))
        self.decided = spikes
        if gain is not None and gain.shape[1:] != mem.shape[1:]:
            gain = gain.to(mem.dtype).expand(1, *mem.shape[1:])
        fused.kernels.step(
            new, spikes, fused.keys, recording.batch, recording.copies, recording.stream.first, recording.stream.half,
            recording.next_draw(), stride, fused.kind, fused.mechanism, current=raw, reset=reset, mem=mem,
            syn=syn[0] if syn else None, new_syn=new_syn[0] if syn else None, leak=fused.leak, share=fused.share,
            alpha=fused.alpha, threshold=fused.threshold, sigma=fused.sigma, gain=gain, weights=fused.weights(weights),
            **tensors,
        )  # fmt: skip
        return (*new_syn, new) if syn else new

    def sample(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """A noisy membrane potential without a graph."""
        return self.draw(noise, mean)[0]

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Spikes of escape noise without a graph."""
        return self.draw_spikes(noise, margin)[0]

    def draw(self, noise: MembraneNoise, mean: Tensor) -> tuple[Tensor, Tensor, int]:
        """The sample u = μ + σ ε, its noise ε, and the number of the draw."""
        recording = self.recording
        index = recording.next_draw()
        constant = mean.detach()
        epsilon = recording.stream.draw(index, constant, noise)
        # Without a graph nobody else holds the mean.
        out = None if mean.requires_grad else constant
        return torch.addcmul(constant, noise.sigma.detach().to(constant.dtype), epsilon, out=out), epsilon, index

    def draw_spikes(self, noise: EscapeNoise, margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes, their margin in units of σ, and the limit that the noise was compared with."""
        recording = self.recording
        index = recording.next_draw()
        sigma = noise.sigma.detach().to(margin.dtype)
        z = torch.div(margin.detach(), sigma, out=None if margin.requires_grad else margin)
        limit = noise.limit(z)
        return noise.fires(limit, recording.stream.draw(index, z, noise)), z, limit

    def emit(self, spikes: Tensor) -> Tensor:
        """The spikes for the next layer."""
        return spikes

    def grade(self, spikes: Tensor) -> Tensor:
        """Emitted spikes times ``graded_spikes_factor``; zeros and ones are kept as bits from here on."""
        if not self.recording.emits_bits[self.neuron]:
            with torch.set_grad_enabled(self.recording.grad):
                graded: Tensor = spikes * self.neuron.graded_spikes_factor
            return graded
        self.recording.spikes.announce(spikes)
        return spikes

    def end(self, output: Any) -> Any:
        """The return value of the neuron, from that of snnTorch's forward."""
        return output


class Recording:
    """One forward pass of noise copies: expands inputs, and gives each time step of a neuron its ``Step``.

    While it is entered as a context, the given neurons sample for it. Copies are laid out copy-first: row
    ``k * batch + b`` of every tensor belongs to copy k of sample b.

    Args:
        copies: who samples, and what.

    Attributes:
        step_type: class of the time steps.
        fed_by_copies: neurons whose first input had been expanded before it came: spikes of other ones are in it.
        emits_bits: neurons that were called, and whether their spikes are zeros and ones.
        half: any input was in float16.
        checks: of states, to be read when the pass is over.
        fused: constants of the neurons whose time steps are fused.
        draws: how often noise was drawn.
        numbers: how many numbers that were, for each row.
        samples: number of samples of the inputs.
        grad: the forward pass runs with gradients.
        run_apart: ``run`` for compiled code, which leaves its graph there: that could not follow scores being filed.
            It is given the recording, which would be part of a cycle otherwise.
    """

    step_type: type[Step] = Step

    def __init__(self, copies: Copies) -> None:
        self.neurons = copies.neurons
        self.others = copies.others
        self.stream = copies.stream
        self.copies = copies.stream.last - copies.stream.first
        self.samples = copies.batch
        self._first_samples = copies.first_samples
        self.grad = True
        self.run_apart: Callable[..., Any] = _run
        self._handles: list[RemovableHandle] = []
        self._token: Token[Recording | None] | None = None
        self.spikes = PackedSpikes()
        self.draws = self._tidied = 0
        self.numbers = 0
        self.emits_bits: dict[NoisyNeuron, bool] = {}
        self.fused: dict[NoisyNeuron, Fused] = {}
        self._received: dict[NoisyNeuron, Current] = {}
        self.fed_by_copies: set[NoisyNeuron] = set()
        self.half = False
        self.checks = Checks()

    def __enter__(self) -> Recording:
        self.grad = torch.is_grad_enabled()
        # Where nothing was compiled, the compiler is not worth being imported: it takes seconds and much memory.
        if "torch._dynamo" in sys.modules:
            self.run_apart = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
        for neuron in self.neurons.values():
            neuron.sampler = self
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
            del neuron.sampler
        while self._handles:
            self._handles.pop().remove()

    def run(self, neuron: NoisyNeuron, input_: Tensor, *states: Any, **named: Any) -> Any:
        """A neuron's time step."""
        return neuron.noisy_step(input_, *states, **named)

    def begin(self, neuron: NoisyNeuron, input_: Tensor, states: tuple[Any, ...], named: dict[str, Any]) -> Step:
        """The time step of a neuron that got an input, and states if the user keeps them."""
        current = self._received.get(neuron)
        first = neuron not in self.emits_bits
        if first and self.samples is not None and len(input_) == self.rows != self.samples:
            self.fed_by_copies.add(neuron)
        following = Current(input_) if current is None else current.then(input_)
        if following is not current:
            self.check(input_, neuron)
            self._received[neuron] = current = following
            self.half |= input_.dtype == torch.float16
        if first:
            self.emits_bits[neuron] = neuron.emits_zeros_and_ones()
            if not states and not named:
                self._warn_about_left_over_state(neuron)
        known = self.fused.get(neuron)
        if first or (known is not None and not known.suits(neuron, input_)):
            self.fused.pop(neuron, None)
            if self.step_type.fuses and Fused.can_be(neuron, input_):
                self.fused[neuron] = Fused.of(neuron, input_, self.streams)
        self.numbers += math.prod(input_.shape[1:])
        step = self.step_type(self, neuron, current)
        step.take(states, named)
        fused = step.fused
        step.input = step.enter() if fused is None else fused.shaped(input_, self.rows * len(self.streams))
        return step

    @property
    def streams(self) -> Sequence[NoiseStream]:
        """Where the noise comes from, one for each set of rows."""
        return [self.stream]

    def expanded(self, current: Current, neuron: NoisyNeuron) -> Tensor:
        """A current for all rows."""
        if current.repeated is None:
            current.repeated = self.expand(current.raw, neuron)
        return current.repeated

    def _warn_about_left_over_state(self, neuron: NoisyNeuron) -> None:
        if neuron.mem.dim() and len(neuron.mem) == self.rows:
            where = self.name(neuron)
            self.checks.file(
                ~neuron.mem.any(),
                lambda: warn(
                    f"{where} starts from the membrane potential that an earlier forward pass left; call "
                    "snntorch_lr.reset(net) at the start of the forward pass"
                ),
            )

    def _expand_states(
        self, neuron: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """States that a user gives to a neuron without noise: snnTorch would silently replace them by zeros."""
        rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else None

        def expand(state: Any) -> Any:
            short = isinstance(state, Tensor) and state.dim() and len(state) == self.samples
            return self.own(state).repeat(self.copies, *[1] * (state.dim() - 1)) if short else state

        if self.samples is None or rows != self.rows or rows == self.samples:
            return args, kwargs
        return (args[0], *map(expand, args[1:])), {key: expand(value) for key, value in kwargs.items()}

    def name(self, neuron: NoisyNeuron) -> str:
        """Name of a neuron in errors: its place in the network and its class."""
        return place(next((name for name, known in self.neurons.items() if known is neuron), ""), neuron)

    def fits(self, x: Tensor) -> bool:
        """The first dimension is the batch, or the copies of it."""
        return self.samples is not None and x.shape[0] in (self.samples, self.rows)

    def expand(self, x: Tensor, neuron: NoisyNeuron) -> Tensor:
        """Repeats a batch for every copy; leaves what is expanded already as it is.

        Args:
            x: input or state of a noisy neuron, ``[batch, ...]`` or ``[copies * batch, ...]``.
            neuron: who asks.

        Raises:
            ValueError: if the first dimension is neither.
        """
        self.check(x, neuron)
        return self.repeat(x)

    def check(self, x: Tensor, neuron: NoisyNeuron) -> None:
        """Refuses an input or state that ``expand`` cannot repeat.

        Raises:
            ValueError: if the first dimension is neither the batch nor the copies of it.
        """
        if self.samples is None and x.dim():
            self.samples = x.shape[0]
        if self.samples is None or not x.dim() or not self.fits(x):
            raise ValueError(
                f"{self.name(neuron)} got an input of shape {tuple(x.shape)}, but there are {self.samples} targets: a "
                "noisy neuron takes one time step with the batch first, and so are targets"
            )

    def repeat(self, x: Tensor) -> Tensor:
        """As ``expand``, for a tensor that fits."""
        own = self.own(x)
        return x if own is x and len(x) == self.rows else own.unsqueeze(0).expand(self.copies, *own.shape).flatten(0, 1)

    def own(self, x: Tensor) -> Tensor:
        """The samples that go on, of a tensor that is not repeated for the copies."""
        # A copy, so that who keeps it does not keep the others.
        return x if len(x) == self.rows or self.batch in (None, len(x)) else x[: self.batch].clone()

    def expand_state(self, state: Any, neuron: NoisyNeuron) -> Any:
        """A state that the user gives, for every copy; one that snnTorch would silently replace is to be refused."""
        if not isinstance(state, Tensor) or state.dim() == 0:
            return state
        if self.fits(state):
            return self.expand(state, neuron)
        if state.numel():
            message = (
                f"{self.name(neuron)} got a state of shape {tuple(state.shape)}, which does not fit its input; "
                "snnTorch would silently replace it by zeros. Start each forward pass from reset_mem() or reset(net)"
            )
            self.checks.file(~state.any(), lambda: message)
        return state

    @property
    def batch(self) -> int | None:
        """Number of samples that go on behind the first noisy neuron."""
        if self.samples is None or self._first_samples is None:
            return self.samples
        count = min(self.samples, self._first_samples)
        # So that rows can be told from samples.
        return count - 1 if 1 < count < self.samples == count * self.copies else count

    @property
    def rows(self) -> int:
        """Rows of every tensor after the first noisy neuron."""
        return self.copies * (self.batch or 0)

    def next_draw(self) -> int:
        """Number of the next draw, from one on."""
        self.draws += 1
        if self.draws - self._tidied >= _STEPS_UNTIL_TIDY * len(self.neurons):
            self._tidied = self.draws
            memory.tidy()
        return self.draws

    def roots(self) -> Collection[Tensor]:
        """Tensors behind which is all that was sampled from, if a graph of it is kept."""
        return ()


def _run(recording: Recording, *given: Any, **named: Any) -> Any:
    return recording.run(*given, **named)


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
