"""Time steps of a noisy neuron in one kernel forward and one backward, for one time step or many of them.

A *chain* is what the time steps of one presentation share; its *states* hang on the membrane potentials that are handed
out. With a shadow the chain has counterfactual credit; with scores alone it is a part of ``Vanilla``; and without a
graph it is noise, whoever samples it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..blocks import SPIKES, WORTH_KEEPING_AS_BITS, Emitted
from ..graph import version
from ..kernels import kinds, memory
from ..node import Presentation, refuse_double_backward
from ..noise import EscapeNoise
from ..noisy_neuron import CARRIED, NoisyNeuron
from ..philox import new_keys

# λ is one number for a layer: so many rows of a batch are enough to fit it by.
_FIT_ROWS = 16


_Watched = tuple[dict[str, Any], str, Any, tuple[int, bool] | None]


@dataclass(frozen=True, eq=False)
class Plan:
    """What the kernels are told about a neuron in one presentation, as long as nothing about it changes.

    Attributes:
        module: the kernels of the device.
        steps: the time steps of the neuron, by these.
        escapes: the neuron has escape noise.
        mechanism: of the reset.
        levels: noise levels, in the shape of a row.
        has_syn: there is a synaptic current.
        apart: train and shadow decay differently: the reset multiplies.
        plain: spikes are handed out as zeros and ones.
        made_of: what leak, share and alpha were made of, and its versions.
        watched: what the plan follows from: where it is looked up, under which name, what was there, and of a tensor
            its version, and whether it is learned.
    """

    module: Any
    steps: Any
    escapes: bool
    mechanism: int
    levels: Tensor
    has_syn: bool
    apart: bool
    plain: bool
    made_of: tuple[tuple[Tensor, int], ...]
    watched: tuple[_Watched, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, neuron: NoisyNeuron, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Plan | None:
        """The plan for a neuron and currents ``[batch, ...]``; None if its time steps cannot be fused."""
        noise, rule, row = neuron.noise, neuron.fused_update(), shape[1:]
        assert noise is not None
        module = kernels.fused_on(device, dtype)
        if rule is None or noise.kind is None or module is None or not shape.numel():
            return None

        def spread(value: Tensor) -> Tensor:
            return value.detach().to(dtype).expand(row).contiguous()

        leak, share, alpha = (None if vector is None else spread(vector) for vector in rule.vectors())
        levels, threshold = spread(noise.sigma), spread(neuron.threshold)
        return cls(
            module,
            module.TimeSteps(noise.kind, rule.mechanism, leak, share, alpha, threshold, levels),
            isinstance(noise, EscapeNoise),
            rule.mechanism,
            levels,
            alpha is not None,
            rule.mechanism in (kinds.ZERO, kinds.ERASE),
            neuron.emits_zeros_and_ones(),
            tuple((constant, version(constant)) for constant in rule.constants),
            tuple(_watch(neuron, _SETTINGS)) + tuple(_watch(noise, ("log_sigma", "annealed"))),
        )

    def is_current(self) -> bool:
        """Nothing that the plan follows from was changed; asked in every time step."""
        if kernels.fused_on(self.levels.device, self.levels.dtype) is not self.module:
            return False
        for place, name, value, mark in self.watched:
            if mark is not None and (version(value), value.requires_grad) != mark:
                return False
            if place.get(name) is not value:
                return False
        return True

    def fits(self, other: Plan) -> bool:
        """Time steps of this plan may follow those of another one: what decays between them decays alike."""
        pairs = zip(self.made_of, other.made_of, strict=True)
        same = (first[0] is second[0] and first[1] == second[1] for first, second in pairs)
        return self.escapes == other.escapes and self.apart == other.apart and all(same)


_SETTINGS = (
    "alpha", "beta", "R", "C", "time_step", "threshold", "noise", "spike_grad", "inhibition", "state_quant",
    "reset_delay", "graded_spikes_factor", "_reset_mechanism", "_snn_state_function",
)  # fmt: skip


def _watch(module: torch.nn.Module, names: Sequence[str]) -> Iterator[_Watched]:
    for name in names:
        for place in (module._parameters, module._buffers, module._modules, module.__dict__):
            if name in place:
                value: Any = place[name]
                yield place, name, value, (version(value), value.requires_grad) if isinstance(value, Tensor) else None


class Chain:
    """What the time steps of one presentation share.

    Args:
        plan: of the neuron.
        neuron: see there.
        sigma: noise level, with its graph.
        presentation: of counterfactual credit; None without a shadow.
        weights: of the scores of each row, a list that holds them in the backward pass of ``Vanilla``; None otherwise.

    Attributes:
        neuron: a weak reference.
        sampler: of the neuron; a weak reference, for what it has seen may refer to the chain.
        sets: 2 with a shadow, otherwise 1.
        learns: there is a graph.
        traces: how many gradients of membrane potentials go on from a step to the one before it.
        settings: λ and γ, for the kernels.
        zero: a tensor of no dimension.
    """

    __slots__ = (
        "_sums", "_task", "learns", "neuron", "plan", "presentation", "sampler", "sets", "settings", "sigma", "traces",
        "weights", "zero",
    )  # fmt: skip

    def __init__(
        self,
        plan: Plan,
        neuron: NoisyNeuron,
        sigma: Tensor,
        presentation: Presentation | None = None,
        weights: list[Tensor] | None = None,
    ) -> None:
        self.plan, self.sigma, self.presentation, self.weights = plan, sigma, presentation, weights
        self.neuron = weakref.ref(neuron)
        self.sampler: Callable[[], Any] = weakref.ref(neuron.sampler)
        self.sets = 1 if presentation is None else 2
        self.learns = presentation is not None or weights is not None
        self.traces = 0 if not plan.escapes else 2 if plan.apart and self.sets == 2 else 1
        self.zero = plan.levels.new_zeros(())
        self.settings: Tensor | None = None
        if presentation is not None:
            discount = self.zero.new_full((), presentation.discount)
            self.settings = torch.stack([presentation.control.to(self.zero.dtype), discount])
        self._task = -1
        self._sums: tuple[Tensor, Tensor] | None = None

    def follow(self, plan: Plan, neuron: NoisyNeuron) -> Chain:
        """The same after something was changed between two time steps, which goes for the next ones."""
        return Chain(plan, neuron, _sigma(neuron, self.zero.dtype), self.presentation, self.weights)

    @property
    def channels(self) -> int:
        """Numbers of each neuron that the link carries back: togo, what λ multiplies in it, and traces."""
        return 2 * (self.sets - 1) + self.traces + self.plan.has_syn

    def sums(self, rows: int) -> tuple[Tensor, Tensor]:
        """What all time steps of a backward pass add to: the gradient of σ, and the sums that λ is fitted by."""
        task = torch._C._current_graph_task_id()
        if self._sums is None or self._task != task:
            self._sums, self._task = self.plan.steps.sums_of(rows), task
        return self._sums

    def end(self, learns_sigma: bool) -> Tensor | None:
        """Closes a backward pass, in its first time step, which comes last; the gradient of σ, if that is learned."""
        assert self._sums is not None
        (to_sigma, fit), self._sums = self._sums, None
        if self.presentation is not None:
            self.presentation.fit.add(fit.sum(0))
        if not learns_sigma:
            return None
        levels = self.plan.levels
        return (to_sigma.sum(0).view(1, *levels.shape) / levels).sum_to_size(self.sigma.shape)


def _sigma(neuron: NoisyNeuron, dtype: torch.dtype) -> Tensor:
    assert neuron.noise is not None
    return neuron.noise.sigma.to(dtype)


class Run:
    """Time steps that follow each other with one and the same current: they add up its gradient among themselves.

    Attributes:
        input: the current.
        version: of it.
        length: number of calls so far.
    """

    __slots__ = ("_buffer", "_task", "input", "length", "version")

    def __init__(self, current: Tensor) -> None:
        self.input, self.version = weakref.ref(current), version(current)
        self.length = 1
        self._buffer: Tensor | None = None
        self._task = -1

    def goes_on(self, current: Tensor) -> bool:
        """A current is the same."""
        return self.input() is current and self.version == version(current)

    def take(self) -> Tensor | None:
        """What the later ones have added up in this backward pass; None if this is the last one."""
        task = torch._C._current_graph_task_id()
        buffer, self._buffer = self._buffer, None
        return buffer if task == self._task else None

    def hand_on(self, buffer: Tensor) -> None:
        """Leaves it to the call before this one."""
        self._buffer, self._task = buffer, torch._C._current_graph_task_id()


class State:
    """The state of a neuron between two fused time steps; it hangs on the membrane potential.

    Attributes:
        chain: of the presentation.
        starts: the next time step is the first one of the chain.
        mem: membrane potential of the train, ``[batch, ...]``, without a graph, as all others.
        shadow: that of the shadow; None without one.
        syn: synaptic current; None without one.
        code: of the last step, ``[sets, batch, ...]``, whose lowest bits are spikes; None before the first step.
        fired: the spikes before the first step, in place of it; None for none.
        link: carries credit from a step to the one before it.
        bytes: of the spikes of this presentation so far.
        run: of calls with the last current.
    """

    __slots__ = ("bytes", "chain", "code", "fired", "link", "mem", "run", "shadow", "starts", "syn")

    def __init__(
        self, chain: Chain, starts: bool, mem: Tensor, shadow: Tensor | None, syn: Tensor | None, code: Tensor | None,
        fired: Tensor | None, link: Tensor, bytes_: int = 0, run: Run | None = None,
    ) -> None:  # fmt: skip
        self.chain, self.starts, self.mem, self.shadow, self.syn = chain, starts, mem, shadow, syn
        self.code, self.fired, self.link, self.bytes, self.run = code, fired, link, bytes_, run

    @classmethod
    def before(cls, chain: Chain, states: Mapping[str, Tensor], fired: Tensor | None) -> State:
        """The state in which a chain begins.

        Args:
            chain: that begins.
            states: states of the train, ``[batch, ...]``.
            fired: spikes that are to reset it, ``[sets, batch, ...]``; None if there are none.
        """
        memory.pool.count_presentation()
        mem = states["mem"].detach().contiguous()
        syn = states["syn"].detach().contiguous() if "syn" in states else None
        fired = None if fired is None else fired.to(mem.dtype).contiguous()
        link = chain.zero.expand(chain.channels, *mem.shape)
        return cls(chain, True, mem, mem if chain.sets == 2 else None, syn, None, fired, link)

    def next(self, neuron: NoisyNeuron, input_: Tensor, mem: Tensor, syn: Tensor | None) -> State | None:
        """The state to go on from, if time steps go on from the membrane potential that it hangs on; None otherwise.

        Args:
            neuron: whose state it is.
            input_: current of the time step.
            mem: membrane potential.
            syn: synaptic current, if there is one.
        """
        chain, carried = self.chain, getattr(mem, CARRIED)
        shared = input_.shape == mem.shape and input_.dtype == mem.dtype
        if carried.version != version(mem) or carried.attached != (mem.grad_fn is not None) or not shared:
            return None
        if syn is not None and not carried.holds("syn", syn):
            return None
        if chain.neuron() is not neuron or chain.sampler() is not neuron.sampler:
            return None
        if chain.learns != torch.is_grad_enabled():
            return None
        if chain.plan.is_current():
            return self
        plan = Plan.of(neuron, mem.shape, mem.dtype, mem.device)
        if plan is None or not plan.fits(chain.plan):
            return None
        return State(
            chain.follow(plan, neuron), True, self.mem, self.shadow, self.syn, self.code, self.fired, self.link,
            self.bytes,
        )  # fmt: skip

    def step(self, neuron: NoisyNeuron, current: Tensor) -> tuple[Tensor, ...]:
        """A time step: spikes and new states, in the order of ``neuron.state_names``, which the neuron holds then."""
        after, spikes, mem, syn = advance(self, neuron, current)
        return after.hang(neuron, spikes, mem, syn)

    def hang(self, neuron: NoisyNeuron, spikes: Tensor, mem: Tensor, syn: Tensor | None) -> tuple[Tensor, ...]:
        """Hangs it on a membrane potential, which the neuron holds from now on."""
        neuron.hold("mem", mem)
        if syn is None:
            neuron.carry(self.code, state=self)
            return spikes, mem
        neuron.hold("syn", syn)
        neuron.carry(self.code, others={"syn": weakref.ref(syn)}, state=self)
        return spikes, syn, mem


class FusedSpikes(torch.autograd.Function):
    """Spikes of a train in one or more time steps; backward, what the chain says.

    As ``CounterfactualSpike`` or ``Score``, with the neuron's own update inside. Of each number a step keeps z and the
    spike in two bytes, and as much for membrane noise; the link carries the gradient of the states back, too.
    """

    @staticmethod
    def forward(
        ctx: Any, state: State, keys: Tensor, lead: tuple[int, ...], seen: tuple[int, ...], kept: list[Any], run: Run,
        current: Tensor, link: Tensor, sigma: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Spikes, the link, membrane potentials and synaptic currents.

        Args:
            ctx: of autograd.
            state: before.
            keys: of the noise, ``[steps]``.
            lead: dimensions of the spikes in front of ``[batch, ...]``: none, or the steps.
            seen: the same of states that are handed out.
            kept: filled with the membrane potential of the shadow, and the code of all steps.
            run: of calls with this current.
            current: ``[batch, ...]`` or ``[steps, batch, ...]``.
            link: of the state.
            sigma: noise level, with its graph, in the first step of the chain; None in later ones.
        """
        chain, like = state.chain, state.mem
        plan, shape, dtype, device = chain.plan, like.shape, like.dtype, like.device
        sets, steps = chain.sets, len(keys)
        current = current.contiguous()
        currents = current.numel() // like.numel()
        code = memory.empty((steps, sets, *shape), plan.module.CODES[dtype], device)
        noise_code = memory.empty(code.shape, code.dtype, device) if chain.learns and not plan.escapes else None
        spikes, mem = memory.empty((*lead, *shape), dtype, device), memory.empty((*seen, *shape), dtype, device)
        syn = memory.empty(mem.shape, dtype, device) if plan.has_syn else None
        shadow = memory.empty(shape, dtype, device) if sets == 2 else None
        plan.steps.forward(
            shape[0], sets, steps, currents, steps if seen else 1, keys, current, like, state.shadow, state.syn,
            state.fired, state.code, shadow, spikes, mem, syn, code, noise_code,
        )  # fmt: skip
        kept += shadow, code
        if chain.learns:
            before = (state.code, state.fired) if plan.mechanism == kinds.ERASE else (None, None)
            ctx.save_for_backward(code, noise_code, *before)
            ctx.set_materialize_grads(False)
            ctx.chain, ctx.starts, ctx.sizes = chain, sigma is not None, (current.shape, seen)
            ctx.run, ctx.is_first = run, run.length == 1
            if sets == 1:
                # Samples have a score, and no derivative: the membrane potential too, if it has the noise on it.
                ctx.mark_non_differentiable(spikes, *(() if plan.escapes else (mem,)))
        carried = chain.zero.expand(link.shape)
        return (spikes, carried, mem) if syn is None else (spikes, carried, mem, syn)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, later: Tensor | None, *states: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of current, link and σ."""
        refuse_double_backward()
        chain, (size, seen) = ctx.chain, ctx.sizes
        plan, sets, presentation = chain.plan, chain.sets, chain.presentation
        code, noise_code, code_before, fired_before = ctx.saved_tensors
        steps, shape, like = len(code), code.shape[2:], plan.levels
        if later is None:
            later = memory.empty((chain.channels, *shape), like.dtype, like.device).zero_()
        # Of a link, which nothing else uses: what it held is not needed again.
        held = later.contiguous()
        if presentation is not None:
            presentation.fit.steps += 1
            togo, parted = held[0], held[1]
        else:
            togo, parted = chain.weights[0].to(like.dtype).contiguous(), None
        added = to_current = None
        if ctx.needs_input_grad[6]:
            added = ctx.run.take()
            to_current = memory.empty(size, like.dtype, like.device) if added is None else added
        b, b_syn, *_ = (*states, None)
        if steps > 1:
            b, b_syn = _of_all_steps(b, steps, seen), _of_all_steps(b_syn, steps, seen)
        traces, start = chain.traces, 2 * (sets - 1)
        plan.steps.backward(
            shape[0], sets, steps, 1 if to_current is None else to_current.numel() // shape.numel(),
            None if a is None else a.contiguous(), None if b is None else b.contiguous(),
            None if b_syn is None else b_syn.contiguous(), code, noise_code, fired_before, code_before,
            chain.settings, togo, parted, min(shape[0], _FIT_ROWS) if sets == 2 else 0,
            held[start] if traces else None, traces, held[start + traces] if plan.has_syn else None, to_current,
            added is not None, chain.sums(shape[0]),
        )  # fmt: skip
        if to_current is not None and not ctx.is_first:
            ctx.run.hand_on(to_current)
            to_current = None
        goes_on = ctx.needs_input_grad[7]
        to_sigma = chain.end(ctx.needs_input_grad[8]) if ctx.starts else None
        return None, None, None, None, None, None, to_current, held if goes_on else None, to_sigma


def _of_all_steps(gradient: Tensor | None, steps: int, seen: tuple[int, ...]) -> Tensor | None:
    """The gradient of the states of all steps, of which the last one alone may have been handed out."""
    if gradient is None or seen:
        return gradient
    return torch.cat([gradient.new_zeros(steps - 1, *gradient.shape), gradient.unsqueeze(0)])


def advance(
    state: State, neuron: NoisyNeuron, current: Tensor, steps: int | None = None, all_states: bool = False
) -> tuple[State, Tensor, Tensor, Tensor | None]:
    """Time steps of a neuron.

    Args:
        state: before.
        neuron: whose noise it is.
        current: ``[batch, ...]``, the same in all steps, or ``[steps, batch, ...]``.
        steps: number of time steps; None for one, whose outputs have no dimension for it.
        all_states: hand out the states of all steps; otherwise those of the last one.

    Returns:
        The state after; and spikes, membrane potentials, and synaptic currents, if there are any.
    """
    chain = state.chain
    assert neuron.noise is not None
    keys = new_keys(1 if steps is None else steps, neuron.noise.generator, current.device)
    lead = () if steps is None else (steps,)
    kept: list[Any] = []
    run = state.run
    if run is not None and run.goes_on(current):
        run.length += 1
    else:
        run = Run(current)
    seen = lead if all_states else ()
    # A step without a link that has a graph is the first one that a backward pass can reach.
    starts = state.starts or not state.link.requires_grad
    spikes, link, mem, *syns = FusedSpikes.apply(
        state, keys, lead, seen, kept, run, current, state.link, chain.sigma if starts else None
    )
    shadow, code = kept
    syn = syns[0] if syns else None
    last, last_syn = mem.detach(), None if syn is None else syn.detach()
    if seen:
        last, last_syn = last[-1], None if last_syn is None else last_syn[-1]
    size = state.bytes + spikes.numel() * spikes.element_size()
    after = State(chain, False, last, shadow, last_syn, code[-1], None, link, size, run)
    if chain.weights is not None:
        chain.sampler().replace(state.link, link)
    if not chain.plan.plain:
        return after, neuron.graded(spikes), mem, syn
    if lead or size >= WORTH_KEEPING_AS_BITS:
        setattr(spikes, SPIKES, Emitted(code[:, 0] if lead else code[0, 0], version(spikes), size))
    return after, spikes, mem, syn


def going_on(neuron: NoisyNeuron, input_: Tensor, states: Mapping[str, Tensor]) -> State | None:
    """The state from which fused time steps go on; None if they do not, or a presentation begins."""
    carried = getattr(states["mem"], CARRIED, None)
    if carried is None or carried.state is None:
        return None
    state: State | None = carried.state.next(neuron, input_, states["mem"], states.get("syn"))
    return state


def planned(neuron: NoisyNeuron, input_: Tensor, states: Mapping[str, Tensor]) -> Plan | None:
    """How the time steps of a presentation that begins are fused; None if they are not."""
    if any(state.requires_grad or state.dtype != input_.dtype for state in states.values()):
        return None
    return Plan.of(neuron, input_.shape, input_.dtype, input_.device)


def begin(
    plan: Plan, neuron: NoisyNeuron, states: Mapping[str, Tensor], fired: Tensor | None,
    presentation: Presentation | None = None, weights: list[Tensor] | None = None,
) -> State:  # fmt: skip
    """The state in which the time steps of a presentation begin.

    Args:
        plan: of the neuron.
        neuron: see there.
        states: states of the train, ``[batch, ...]``.
        fired: spikes that are to reset it, alike; None to compare the membrane potential with the threshold.
        presentation: of counterfactual credit; None without a shadow.
        weights: of the rows, of ``Vanilla``.
    """
    if fired is None:
        # By the threshold, as in snnTorch.
        fired = neuron.mem_reset(states["mem"].detach())
    chain = Chain(plan, neuron, _sigma(neuron, states["mem"].dtype), presentation, weights)
    return State.before(chain, states, fired.expand(chain.sets, *fired.shape))
