"""Forward passes in which every noisy neuron runs shadows: spike trains that its currents could have caused as well."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.weak import WeakIdKeyDictionary

from ..graph import ancestors, same_numbers, version
from ..kernels import memory
from ..noise import EscapeNoise, MembraneNoise, Noise
from ..noise_stream import NoiseStream, mix, resolved
from ..noisy_neuron import NoisyNeuron
from .credit import Chain, Control, Credit, CreditSums, Draw, Kept, Rows
from .fused import Ahead, Current, Plan
from .packing import pack
from .recording import Copies, Recording, Step
from .sums import CHANGED_CURRENT


@dataclass(frozen=True)
class Continuation:
    """The state that a neuron continues from, and how others see it.

    Attributes:
        full: states by name, in all rows.
        fired: spikes of the last step, which reset the membrane potential.
        link: orders the backward passes of the steps; None where there is no graph.
        chain: what these hand to each other.
        visible: the same states in the rows of the train that goes on, with how often they had been changed; weakly,
            because who remembers this by its membrane potential would keep both for good.
    """

    full: Mapping[str, Rows]
    fired: tuple[Tensor, Tensor, int] | None
    link: Tensor | None = None
    chain: Chain | None = None
    visible: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    def holds(self, name: str, state: Any) -> bool:
        """A state is the one that was given out, unchanged."""
        reference, count = self.visible[name]
        given = reference()
        if given is None or not isinstance(state, Tensor):
            return False
        return same_numbers(state, given) and version(given) == count


class ShadowedStep(Step):
    """A time step of a neuron and its shadows: ``1 + shadows`` times as many rows inside as outside."""

    recording: Shadowed
    fuses = True

    def __init__(self, recording: Shadowed, neuron: NoisyNeuron, current: Current) -> None:
        super().__init__(recording, neuron, current)
        self.timed = self.builds_graph = recording.is_timed(neuron)
        self.before: Continuation | None = None
        self.drawn: Draw | None = None
        self.spikes: Rows | None = None
        if not self.timed:
            self.sums = recording.sums_of(neuron, current.raw)

    def enter(self) -> Tensor:
        """The current; without its graph if the neuron is not timed."""
        x = super().enter()
        if not self.timed:
            return x.detach()
        if self.recording.keeps_steps:
            self.recording.entered.setdefault(self.neuron, []).append(x)
        return x

    def take(self, states: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Takes the states of the last step in all rows; the step that gave them out is continued."""
        neuron, recording = self.neuron, self.recording
        held = not states and not named
        given = {name: getattr(neuron, name) for name in neuron.all_states}
        passed = dict(zip(neuron.all_states, states, strict=False)) | named
        given |= {name: state for name, state in passed.items() if state is not None}
        self.before = recording.continued(neuron, given)
        neuron.fired = None if self.before is None else self.before.fired
        full = {name: self._resume(name, state, held) for name, state in given.items()}
        for name, state in full.items():
            setattr(neuron, name, state)
        self.named_states = {name: full[name] for name, state in passed.items() if state is not None}

    def _resume(self, name: str, state: Any, held: bool) -> Any:
        before = self.before
        if before is not None and before.holds(name, state) and (name != "spk" or self.neuron.recurrent_block is None):
            return before.full[name]
        if held and not (isinstance(state, Tensor) and state.dim() and self.recording.fits(state)):
            # snnTorch makes new ones.
            return state
        return self.recording.expand_state(state, self.neuron)

    def update(self, input_: Tensor) -> Any:
        """The next states, and their derivatives if the neuron is not timed."""
        if self.timed:
            return super().update(input_)
        if self.fused is None:
            self._receive()
            self.sums.begin_step(self.neuron, input_)
            return super().update(input_)
        recording, ahead = self.recording, self.recording.ahead_of(self.neuron)
        size = 2 * recording.rows * input_[0].numel() * input_.element_size()
        count = ahead.ask(self.neuron, self.current, recording.draws + 1, size)
        return self.advance(input_, count, ahead.stride)

    def _receive(self) -> None:
        # The current has a graph, other than all that is computed from it here.
        with torch.set_grad_enabled(self.recording.grad):
            self.sums.receive(self.current.raw)

    @torch.no_grad()
    def advance(self, input_: Tensor, count: int, stride: int) -> Any:
        """Fused time steps with the same current, and what they add to the sums."""
        sums, neuron, rows = self.sums, self.neuron, self.recording.rows
        assert neuron.noise is not None
        gains, weights, slopes = [], [], neuron.slopes() if count > 1 else None
        for step in range(count):
            self._receive()
            if step:
                sums.steps += 1
                sums.derived = {name: neuron.gains_after(tangents, slopes) for name, tangents in sums.tangents.items()}
            else:
                sums.begin_step(neuron, input_)
            gains.append(sums.gain)
            weights.append(sums.weigh())
            sums.end_step(neuron, None)
        gain = gains[0]
        if gain is not None and count > 1:
            row = (1, *input_.shape[1:])
            gain = torch.cat([each.to(input_.dtype).expand(row) for each in gains if each is not None])
        own = input_[:rows]
        sums.make(("score", "fired", "expected"), input_)
        if None not in sums.pull:
            sums.pull[None] = memory.zeros_like(own)
        if neuron.noise.log_sigma.requires_grad:
            sums.make(("scale",), input_)
            sums.make(("pull_scale",), own)
        seen = [memory.empty_like(own.unsqueeze(0).expand(count, *own.shape)) for _ in range(2)]
        # Each step's own: what is done to one of them in place is nothing to the others.
        self.seen = [(spikes.data, mem.data) for spikes, mem in zip(*seen, strict=True)]
        return self.fuse(
            gain, tuple(weights), stride, score=sums.score, scale=sums.scale, fired=sums.fired, expected=sums.expected,
            pull=sums.pull[None], pull_scale=sums.pull_scale, seen_spikes=seen[0], seen_mem=seen[1],
        )  # fmt: skip

    def sample(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """u = μ + σ ε in all rows."""
        neuron = self.neuron
        sigma = noise.sigma.detach().to(mean.dtype)
        threshold = 0.0 if neuron.threshold.requires_grad else neuron.threshold
        z = ((mean.detach() - threshold) / sigma).to(resolved(mean.dtype))
        epsilon = self.recording.noise(z, noise)
        self.drawn = Draw(noise, mean, z, epsilon, *noise.cdf_and_pdf(z))
        return torch.addcmul(mean.detach(), sigma, epsilon.to(mean.dtype))

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Spikes of escape noise in all rows."""
        z = (margin.detach() / noise.sigma.detach().to(margin.dtype)).to(resolved(margin.dtype))
        self.drawn = drawn = Draw(noise, margin, z, None, *noise.cdf_and_pdf(z))
        return noise.fires_by(drawn.p, self.recording.noise(z, noise)).to(margin.dtype)

    def emit(self, spikes: Tensor) -> Tensor:
        """The spikes in all rows, for the neuron's own reset; ``end`` gives others theirs."""
        self.spikes = spikes
        return spikes

    def end(self, output: Any) -> Any:
        """The rows of the train that goes on, with the graph that credit comes back through."""
        neuron, drawn, spikes = self.neuron, self.drawn, self.spikes
        assert spikes is not None
        full = {name: getattr(neuron, name) for name in neuron.all_states}
        fired = neuron.fired
        as_tuple = isinstance(output, tuple)
        if self.timed:
            assert drawn is not None
            emitted, states, link, chain = self._keep(drawn, spikes, full)
            return self.recording.give_out(neuron, emitted, states, Continuation(full, fired, link, chain), as_tuple)
        if drawn is None:
            return self.recording.wait(neuron, self, full)
        rows, bits = self.recording.rows, self.recording.emits_bits[neuron]
        self.sums.add(drawn, spikes, rows, neuron.fires_above_threshold)
        self.sums.end_step(neuron, spikes if bits else spikes * neuron.graded_spikes_factor.detach())
        own = {name: memory.clone(full[name][:rows]) for name in neuron.state_names}
        return self.recording.read(neuron, memory.clone(spikes[:rows]), own, Continuation(full, fired), as_tuple)

    def _keep(
        self, drawn: Draw, spikes: Rows, full: Mapping[str, Rows]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Chain]:
        """A node of the graph that turns what the spikes did to the loss into what the currents did."""
        neuron, recording, before = self.neuron, self.recording, self.before
        if before is None or before.chain is None or before.link is None:
            chain, link = recording.new_chain(neuron, drawn.z), drawn.z.new_zeros(())
        else:
            chain, link = before.chain, before.link
        at_once = not getattr(neuron, "reset_delay", True)
        kept = Kept(
            noise=drawn.noise,
            z=drawn.z,
            epsilon=drawn.epsilon,
            spikes=pack(spikes) if drawn.epsilon is None or neuron.is_step_function else spikes,
            rows=recording.rows,
            has_chances=neuron.fires_above_threshold,
            resets_at_once=at_once,
            states=tuple(full[name].detach() for name in neuron.state_names[:-1]),
            mem=full["mem"].detach() if at_once else None,
            chain=chain,
            gain=chain.step_on(neuron.beta.detach().clamp(0, 1).mean() if drawn.epsilon is None else None),
        )
        with torch.set_grad_enabled(recording.grad):
            sigma = recording.sigma(drawn.noise)
            tensors = [full[name] for name in neuron.state_names]
            emitted, link, *given = Credit.apply(kept, spikes, drawn.mean, sigma, link, *tensors)
        if emitted.grad_fn is not None:
            recording.nodes[emitted.grad_fn] = neuron
            if recording.keeps_steps:
                recording.emitted.setdefault(neuron, []).append(emitted)
                # A block may change in place what it is given.
                emitted = emitted.clone()
        return emitted, dict(zip(neuron.state_names, given, strict=True)), link, chain


class Shadowed(Recording):
    """A forward pass in which the currents of each neuron drive shadows too: trains with noise of their own.

    Spikes of shadows go nowhere. Inside a neuron, tensors have ``1 + shadows`` times as many rows as outside.

    Args:
        copies: who samples, and what.
        shadows: number of shadows of each train.
        controls: λ of each neuron.
        timed: the neurons of which every time step is kept; of the others only sums. None for all of them.
        internal: the neurons that spikes of other ones feed.
        profiles: how what a spike, and a current, does to the loss changes over time, for neurons that are not timed
            and have something to learn, in front of them or of their own.
        plans: what the last pass tells about neurons that are not timed.

    Attributes:
        sums: what the neurons that are not timed added up.
        chains: what there is to fit λ by after the backward pass, by neuron.
        readers: leaves that collect ∂loss/∂spike of the neurons that are not timed.
        nodes: of the graph, and whose steps they are.
        keeps_steps: whether to fill the next two; False until it is set.
        emitted: spikes of each step of the timed neurons.
        entered: their currents, in all rows.
        given: neurons that started from a state with a graph, such as one that is learned.
    """

    step_type = ShadowedStep

    def __init__(
        self,
        copies: Copies,
        shadows: int,
        controls: Mapping[NoisyNeuron, Control],
        timed: Collection[NoisyNeuron] | None = None,
        internal: Collection[NoisyNeuron] = (),
        profiles: Mapping[NoisyNeuron, tuple[Sequence[float], Sequence[float]]] | None = None,
        plans: Mapping[NoisyNeuron, Plan] | None = None,
    ) -> None:
        super().__init__(copies)
        self.sets = 1 + shadows
        self.sums: dict[NoisyNeuron, CreditSums] = {}
        self.chains: dict[NoisyNeuron, list[Chain]] = {}
        self.readers: dict[NoisyNeuron, Tensor] = {}
        self.nodes: dict[Node, NoisyNeuron] = {}
        self.emitted: dict[NoisyNeuron, list[Tensor]] = {}
        self.entered: dict[NoisyNeuron, list[Tensor]] = {}
        self.timed = timed
        self.keeps_steps = False
        self._controls = controls
        self._internal = internal
        self._profiles = profiles or {}
        # A derived step may do more than is known here.
        self._is_known = self.step_type is ShadowedStep
        self._plans = plans if plans and self._is_known else {}
        self._ahead: dict[NoisyNeuron, Ahead] = {}
        self.given: set[NoisyNeuron] = set()
        stream = copies.stream
        self._streams = [
            NoiseStream(mix(stream.seed, index), stream.copies, stream.first, stream.last) for index in range(self.sets)
        ]
        self._sigmas: dict[Noise, Tensor] = {}
        self._states: Any = WeakIdKeyDictionary()
        self._last: dict[NoisyNeuron, Continuation] = {}
        self._given: dict[NoisyNeuron, Mapping[str, Tensor]] = {}

    @property
    def steps(self) -> int:
        """Number of time steps of the neurons that are not timed."""
        return max((sums.steps for sums in self.sums.values()), default=1)

    @property
    def tokens(self) -> dict[NoisyNeuron, Tensor]:
        """For each neuron, a tensor behind which is all that it was computed by."""
        return {neuron: state.link for neuron, state in self._last.items() if state.link is not None}

    def roots(self) -> list[Tensor]:
        """The tokens of all neurons."""
        return list(self.tokens.values())

    def run(self, neuron: NoisyNeuron, input_: Tensor, *states: Any, **named: Any) -> Any:
        """A neuron's time step: one that waits, one of a fused neuron that only goes on, or one through snnTorch."""
        # ``SpikePooling`` looks at every function of torch; a neuron calls most of them, and pools nothing.
        with torch._C.DisableTorchFunction():
            ahead = self._ahead.get(neuron)
            if ahead is not None and self._is_known:
                goes_on = self._goes_on(neuron, input_, states, named)
                if goes_on and ahead.is_next(input_, self.draws + 1):
                    self.draws = ahead.next_draw
                    self.numbers += math.prod(input_.shape[1:])
                    return self._next(neuron, ahead)
                if ahead.waiting:
                    self._turn_back(neuron, ahead)
                if goes_on:
                    return self._go_on(neuron, input_)
            return super().run(neuron, input_, *states, **named)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for neuron, ahead in self._ahead.items():
                if ahead.waiting:
                    self._turn_back(neuron, ahead)
        super().__exit__(kind, error, trace)

    def ahead_of(self, neuron: NoisyNeuron) -> Ahead:
        """What is computed ahead of a neuron's time."""
        if neuron not in self._ahead:
            self._ahead[neuron] = Ahead(self._plans.get(neuron, Plan()))
        return self._ahead[neuron]

    @property
    def plans(self) -> dict[NoisyNeuron, Plan]:
        """For the next pass."""
        return {neuron: ahead.found for neuron, ahead in self._ahead.items()}

    def wait(self, neuron: NoisyNeuron, step: ShadowedStep, states: Mapping[str, Rows]) -> Any:
        """Keeps time steps that were computed at once until they are asked for; the output of the first one."""
        ahead, spikes = self.ahead_of(neuron), step.decided
        assert spikes is not None
        ahead.waiting.extend(step.seen)
        ahead.full = states, (states["mem"], spikes, version(spikes))
        return self._next(neuron, ahead)

    def _next(self, neuron: NoisyNeuron, ahead: Ahead) -> Any:
        """The output of a time step that waits."""
        ahead.steps += 1
        spikes, mem = ahead.waiting.popleft()
        full, fired = ({}, None) if ahead.waiting else ahead.full
        states = {name: memory.clone(full[name][: self.rows]) for name in neuron.state_names[:-1]} | {"mem": mem}
        as_tuple = not neuron.init_hidden or neuron.output
        return self.read(neuron, spikes, states, Continuation(full, fired), as_tuple)

    def _goes_on(self, neuron: NoisyNeuron, x: Tensor, states: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        """A fused neuron gets another current, and nothing else is new."""
        given = dict(zip(neuron.state_names, states, strict=False)) | dict(named)
        last = self._last.get(neuron)
        return (
            last is not None
            and all(last.holds(n, getattr(neuron, n) if given.get(n) is None else given[n]) for n in neuron.state_names)
            and len(x) in (self.samples, self.rows)
            and self.fused[neuron].suits(neuron, x)
            and neuron.noise is not None
            and neuron.noise.active
            and torch._C._current_graph_task_id() == -1
        )

    def _go_on(self, neuron: NoisyNeuron, x: Tensor) -> Any:
        """A fused time step from the last states: what snnTorch's forward would do for it is known."""
        last = self._last[neuron]
        current = self._received[neuron] = self._received[neuron].then(x)
        for name, state in last.full.items():
            setattr(neuron, name, state)
        assert last.fired is not None
        neuron.reset = last.fired[1]
        self.numbers += math.prod(x.shape[1:])
        step = self.step_type(self, neuron, current)
        states = step.update(self.fused[neuron].shaped(x, self.rows * self.sets))
        states = states if isinstance(states, tuple) else (states,)
        return self.wait(neuron, step, dict(zip(neuron.state_names, states, strict=True)))

    def _turn_back(self, neuron: NoisyNeuron, ahead: Ahead) -> None:
        """Leaves a neuron as if no time step had been computed but those that were asked for."""
        assert ahead.current is not None
        assert ahead.start is not None
        if not ahead.current.still_is(ahead.current.raw):
            raise ValueError(CHANGED_CURRENT)
        ahead.give_up()
        del self.sums[neuron]
        draws, self.draws = self.draws, ahead.next_draw - ahead.steps * ahead.stride - 1
        now = neuron.mem, neuron.reset
        neuron.mem, neuron.reset = ahead.start
        step = self.step_type(self, neuron, ahead.current)
        fused = self.fused[neuron]
        mem = step.advance(fused.shaped(ahead.current.raw, self.rows * self.sets), ahead.steps, ahead.stride)
        neuron.mem, neuron.reset = now
        self.draws = draws
        last = self._last[neuron]
        assert step.decided is not None
        self._last[neuron] = replace(last, full={"mem": mem}, fired=(mem, step.decided, version(step.decided)))

    @property
    def streams(self) -> Sequence[NoiseStream]:
        """A stream for each set of rows."""
        return self._streams

    def is_timed(self, neuron: NoisyNeuron) -> bool:
        """Every time step of the neuron is kept."""
        return self.timed is None or neuron in self.timed

    def _check_source(self, neuron: NoisyNeuron, x: Tensor) -> None:
        """Refuses a current of spikes where none had come from: what goes back to these would be lost."""
        readers = {id(reader) for reader in self.readers.values()}
        if neuron not in self._internal and any(
            node in self.nodes or id(getattr(node, "variable", None)) in readers for node in ancestors([x])
        ):
            raise ValueError(
                f"spikes of a noisy neuron feed {self.name(neuron)} now, which they did not in the first call: make a "
                'new estimator after such a change, or use over_time="exact"'
            )

    def expand(self, x: Tensor, neuron: NoisyNeuron) -> Rows:
        """Repeats a batch for every row; what is expanded for the copies, for the shadows.

        Raises:
            ValueError: if the first dimension is neither.
        """
        copied = super().expand(x, neuron)
        return copied.unsqueeze(0).expand(self.sets, *copied.shape).flatten(0, 1)

    def sums_of(self, neuron: NoisyNeuron, x: Tensor) -> CreditSums:
        """The sums of a neuron that is not timed; its first current is checked."""
        if neuron not in self.sums:
            spikes, currents = self._profiles.get(neuron, ((1.0,), (1.0,)))
            internal = neuron in self._internal
            self.sums[neuron] = CreditSums(internal=internal, profile=spikes, current_profile=currents)
            self._check_source(neuron, x)
        return self.sums[neuron]

    def continued(self, neuron: NoisyNeuron, given: Mapping[str, Any]) -> Continuation | None:
        """The step that gave out the states of a neuron; None if it starts.

        Raises:
            ValueError: if sums over time would be of two presentations.
        """
        mem = given["mem"]
        known: Continuation | None = self._states.get(mem) if isinstance(mem, Tensor) else None
        if known is None or not known.holds("mem", mem):
            last = self._last.get(neuron)
            known = last if last is not None and last.holds("mem", mem) else None
        if known is None and not self.is_timed(neuron) and self.sums[neuron].steps:
            raise ValueError(
                f"{self.name(neuron)} did not go on from the state that it had returned; sums over time need one "
                'presentation in each call of loss_fn, and states that are handed on unchanged. Use over_time="exact"'
            )
        if known is None and any(isinstance(state, Tensor) and state.requires_grad for state in given.values()):
            self.given.add(neuron)
        return known

    def read(
        self, neuron: NoisyNeuron, spikes: Tensor, states: dict[str, Tensor], after: Continuation, as_tuple: bool
    ) -> Any:
        """Gives out spikes with a leaf that collects what they do to the loss, and states that may not be read.

        Args:
            neuron: one that is not timed.
            spikes: of the train that goes on; nobody else's, as the next.
            states: of the train that goes on.
            after: what the neuron continues from.
            as_tuple: the neuron returns its states.
        """
        reader = self.reader(neuron, spikes)
        with torch.set_grad_enabled(self.grad):
            emitted = _Emit.apply(reader, (spikes,))
            if not neuron.init_hidden or neuron.output:
                where = self.name(neuron)
                states = {name: _Unread.apply(reader, (state,), where) for name, state in states.items()}
        return self.give_out(neuron, emitted, states, after, as_tuple)

    def give_out(
        self, neuron: NoisyNeuron, emitted: Tensor, states: dict[str, Tensor], after: Continuation, as_tuple: bool
    ) -> Any:
        """Gives out spikes and states, and remembers what the neuron continues from."""
        bits = self.emits_bits[neuron]
        if bits:
            self.spikes.announce(emitted)
        else:
            with torch.set_grad_enabled(self.grad):
                emitted = emitted * neuron.graded_spikes_factor
        if "spk" in neuron.all_states:
            states["spk"] = emitted
        after.visible.update({name: (weakref.ref(state), version(state)) for name, state in states.items()})
        self._last[neuron] = after
        if self.is_timed(neuron):
            self._states[states["mem"]] = after
        self._given[neuron] = states
        for name, state in states.items():
            setattr(neuron, name, state)
        if after.fired is not None:
            kept = after.fired[1][: self.rows]
            neuron.fired = (states["mem"], kept, version(kept))
        return (emitted, *(states[name] for name in neuron.state_names)) if as_tuple else emitted

    def new_chain(self, neuron: NoisyNeuron, like: Tensor) -> Chain:
        """A chain for a train that starts."""
        chain = Chain(self._controls[neuron].value.to(like))
        self.chains.setdefault(neuron, []).append(chain)
        return chain

    def reader(self, neuron: NoisyNeuron, spikes: Tensor) -> Tensor:
        """The leaf that collects ∂loss/∂spike of a neuron that is not timed."""
        if neuron not in self.readers:
            self.readers[neuron] = torch.zeros_like(spikes).requires_grad_(neuron in self._profiles)
        return self.readers[neuron]

    def sigma(self, noise: Noise) -> Tensor:
        """The noise level, one tensor for all time steps."""
        if noise not in self._sigmas:
            self._sigmas[noise] = noise.sigma
        return self._sigmas[noise]

    def noise(self, like: Rows, noise: MembraneNoise | EscapeNoise) -> Rows:
        """Noise for all rows, from a stream of its own for each set of shadows."""
        index = self.next_draw()
        parts = like.view(self.sets, -1, *like.shape[1:])
        return torch.cat([stream.draw(index, part, noise) for stream, part in zip(self._streams, parts, strict=True)])


class _Emit(torch.autograd.Function):
    """Spikes as they are, whose gradient a leaf collects; in a tuple, so that they are no view of an input."""

    @staticmethod
    def forward(ctx: Any, reader: Tensor, spikes: tuple[Tensor]) -> Tensor:
        return spikes[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Unread(torch.autograd.Function):
    """A state as it is, which the loss did not depend on when the network was looked at."""

    @staticmethod
    def forward(ctx: Any, reader: Tensor, state: tuple[Tensor], where: str) -> Tensor:
        ctx.where = where
        return state[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            f"the loss depends on a state of {ctx.where} now, which it did not in the first call: make a new estimator "
            'after such a change, or use over_time="exact"'
        )
