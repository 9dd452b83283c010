"""Counterfactual credit in one kernel forward and one backward, for one time step or many of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..blocks import SPIKES, Emitted
from ..graph import version
from ..kernels import kinds, memory
from ..node import Presentation, refuse_double_backward
from ..noise import EscapeNoise
from ..noisy_neuron import NoisyNeuron
from ..philox import new_key

# λ is one number for a layer: so many rows of a batch are enough to fit it by.
_FIT_ROWS = 16


@dataclass(frozen=True)
class Plan:
    """What the kernels are told about a neuron in one presentation.

    Attributes:
        module: the kernels of the device.
        kind: of the noise.
        mechanism: of the reset.
        leak: what remains of the membrane potential, in the shape of one row.
        share: what the current adds to it, alike.
        alpha: what remains of the synaptic current; None without one.
        threshold: alike.
        levels: noise levels, alike.
        traces: how many gradients of membrane potentials go on from a step to the one before it.
        made_of: what leak, share and alpha were made of, and its versions.
        watched: what the plan follows from: where it is looked up, under which name, and what was there.
    """

    module: Any
    kind: int
    mechanism: int
    leak: Tensor
    share: Tensor
    alpha: Tensor | None
    threshold: Tensor
    levels: Tensor
    traces: int
    made_of: tuple[tuple[Tensor, int], ...]
    watched: tuple[tuple[dict[str, Any], str, Any, int | None], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, neuron: NoisyNeuron, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Plan | None:
        """The plan for a neuron and currents ``[batch, ...]``; None if its time steps cannot be fused."""
        noise, rule, row = neuron.noise, neuron.fused_update(), shape[1:]
        assert noise is not None
        module = kernels.fused_on(device, dtype)
        if rule is None or noise.kind is None or module is None or not shape.numel():
            return None
        held: Plan | None = neuron.__dict__.get("_plan")
        if held is not None and held.leak.shape == row and held.leak.dtype == dtype and held.is_current():
            return held

        def spread(value: Tensor) -> Tensor:
            return value.detach().to(dtype).expand(row).contiguous()

        leak, share, alpha = rule.vectors()
        escapes, clears = isinstance(noise, EscapeNoise), rule.mechanism in (kinds.ZERO, kinds.ERASE)
        plan = cls(
            module,
            noise.kind,
            rule.mechanism,
            spread(leak),
            spread(share),
            None if alpha is None else spread(alpha),
            spread(neuron.threshold),
            spread(noise.sigma),
            (2 if clears else 1) if escapes else 0,
            tuple((each, version(each)) for each in rule.constants),
            tuple(_watch(neuron, _SETTINGS)) + tuple(_watch(noise, ("log_sigma", "annealed"))),
        )
        neuron.__dict__["_plan"] = plan
        return plan

    def is_current(self) -> bool:
        """Nothing that the plan follows from was changed; asked in every time step."""
        if kernels.fused_on(self.leak.device, self.leak.dtype) is not self.module:
            return False
        for place, name, value, mark in self.watched:
            if place.get(name) is not value or (mark is not None and _mark(place[name]) != mark):
                return False
        return True

    @property
    def channels(self) -> int:
        """Numbers of each neuron that the link carries back: togo, what λ multiplies in it, and traces."""
        return 2 + self.traces + (self.alpha is not None)

    def fits(self, other: Plan) -> bool:
        """Time steps of this plan may follow those of another one: what decays between them decays alike."""
        pairs = zip(self.made_of, other.made_of, strict=True)
        same = (first[0] is second[0] and first[1] == second[1] for first, second in pairs)
        return self.traces == other.traces and all(same)

    @property
    def keeps_noise(self) -> bool:
        """The backward pass needs the noise itself."""
        return self.kind not in (kinds.LOGISTIC_ESCAPE, kinds.GAUSSIAN_ESCAPE)


_SETTINGS = (
    "alpha", "beta", "R", "C", "time_step", "threshold", "noise", "spike_grad", "inhibition", "state_quant",
    "reset_delay", "_reset_mechanism", "_snn_state_function",
)  # fmt: skip


def _mark(value: Tensor) -> int:
    """Changes when a tensor is changed in place, or begins to be learned."""
    return 2 * version(value) + value.requires_grad


def _watch(module: torch.nn.Module, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], str, Any, int | None]]:
    for name in names:
        for place in (module._parameters, module._buffers, module._modules, module.__dict__):
            if name in place:
                value: Any = place[name]
                yield place, name, value, _mark(value) if isinstance(value, Tensor) else None


@dataclass(frozen=True)
class State:
    """The state of a train and its shadow between fused time steps.

    Attributes:
        plan: of the presentation.
        presentation: see there.
        settings: λ and γ.
        sigma: noise level, with its graph.
        mem: membrane potential of the train, ``[batch, ...]``.
        shadow: that of the shadow.
        syn: synaptic current; None without one.
        code: of the last step, ``[2, batch, ...]``, whose lowest bits are spikes; None before the first step.
        fired: the spikes before the first step, in place of it; None for none.
        link: carries credit from a step to the one before it.
        bytes: of the spikes of this presentation so far.
        run: of calls with the last current.
    """

    plan: Plan
    presentation: Presentation
    settings: Tensor
    sigma: Tensor
    mem: Tensor
    shadow: Tensor
    syn: Tensor | None
    code: Tensor | None
    fired: Tensor | None
    link: Tensor
    bytes: int = 0
    run: Run | None = None


class Run:
    """Time steps that follow each other with one and the same current: they add up its gradient among themselves.

    Attributes:
        input: the current, and its version.
        length: number of calls so far.
    """

    def __init__(self, current: Tensor) -> None:
        self.input = weakref.ref(current), version(current)
        self.length = 1
        self._buffer: Tensor | None = None
        self._task = -1

    def goes_on(self, current: Tensor) -> bool:
        """A current is the same."""
        return self.input[0]() is current and self.input[1] == version(current)

    def take(self) -> Tensor | None:
        """What the later ones have added up in this backward pass; None if this is the last one."""
        task = torch._C._current_graph_task_id()
        buffer, self._buffer = self._buffer, None
        return buffer if task == self._task else None

    def hand_on(self, buffer: Tensor) -> None:
        """Leaves it to the call before this one."""
        self._buffer, self._task = buffer, torch._C._current_graph_task_id()


class FusedSpikes(torch.autograd.Function):
    """Spikes of a train in one or more time steps; backward, counterfactual credit.

    As ``CounterfactualSpike``, with the neuron's own update inside. Of each number a step keeps z and the spike in two
    bytes, and as much for membrane noise; the link carries the gradient of the states back, too.
    """

    @staticmethod
    def forward(
        ctx: Any, state: State, keys: Tensor, steps: int, lead: tuple[int, ...], seen: tuple[int, ...],
        current: Tensor, sigma: Tensor, link: Tensor, kept: list[Tensor], run: Run,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Spikes, the link, membrane potentials and synaptic currents.

        Args:
            ctx: of autograd.
            state: before.
            keys: of the noise, ``[steps]``.
            steps: number of time steps.
            lead: dimensions of the spikes in front of ``[batch, ...]``: none, or the steps.
            seen: the same of states that are handed out.
            current: ``[batch, ...]`` or ``[steps, batch, ...]``.
            sigma: noise level, with its graph.
            link: of the state.
            kept: filled with the membrane potential of the shadow, and the code of all steps.
            run: of calls with this current.
        """
        ctx.set_materialize_grads(False)
        plan, shape, like = state.plan, state.mem.shape, state.mem
        current = current.contiguous()
        currents = current.numel() // like.numel()
        codes, device = plan.module.CODES[like.dtype], like.device
        code = memory.empty((steps, 2, *shape), codes, device)
        noise_code = memory.empty(code.shape, codes, device) if plan.keeps_noise else None
        spikes, mem = (memory.empty((*dims, *shape), like.dtype, device) for dims in (lead, seen))
        syn = None if plan.alpha is None else memory.empty(mem.shape, like.dtype, device)
        shadow = memory.empty(shape, like.dtype, device)
        plan.module.forward(
            shape[0], like.dtype, neurons=plan.leak.numel(), sets=2, steps=steps, currents=currents,
            seen=mem.numel() // like.numel(), kind=plan.kind, mechanism=plan.mechanism, keys=keys, current=current,
            mem=state.mem, shadow=state.shadow, syn=state.syn, fired=state.fired, before=state.code, leak=plan.leak,
            share=plan.share, alpha=plan.alpha, threshold=plan.threshold, sigma=plan.levels, new_shadow=shadow,
            new_fired=None, spikes=spikes, seen_mem=mem, seen_syn=syn, code=code, noise_code=noise_code,
        )  # fmt: skip
        before = [each for each in (state.code, state.fired) if each is not None and plan.mechanism == kinds.ERASE]
        ctx.save_for_backward(code, *([] if noise_code is None else [noise_code]), *before)
        ctx.plan, ctx.presentation, ctx.settings = plan, state.presentation, state.settings
        ctx.before_is_code = state.code is not None
        ctx.run, ctx.is_first = run, run.length == 1
        ctx.current, ctx.sigma, ctx.seen = current.shape, (sigma.shape, sigma.dtype), seen
        kept += [shadow, code]
        carried = like.new_zeros(()).expand(link.shape)
        return (spikes, carried, mem) if syn is None else (spikes, carried, mem, syn)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, later: Tensor | None, *states: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of current, σ and link."""
        refuse_double_backward()
        plan, presentation = ctx.plan, ctx.presentation
        presentation.fit.steps += 1
        code, *rest = ctx.saved_tensors
        noise_code = rest.pop(0) if plan.keeps_noise else None
        before = rest.pop(0) if rest else None
        steps, shape, like = len(code), code.shape[2:], plan.leak
        # Of a link, which nothing else uses: what it held is not needed again.
        if later is None:
            later = memory.empty((plan.channels, *shape), like.dtype, like.device).zero_()
        held = later.contiguous()
        added = to_current = None
        if ctx.needs_input_grad[5]:
            added = ctx.run.take()
            to_current = memory.empty(ctx.current, like.dtype, like.device) if added is None else added
        b, b_syn = (_of_all_steps(each, steps, ctx.seen) for each in (*states, None)[:2])
        end = 2 + plan.traces
        to_sigma, sums = plan.module.backward(
            shape[0], like.dtype, ctx.needs_input_grad[6], neurons=like.numel(), steps=steps,
            currents=1 if to_current is None else to_current.numel() // shape.numel(), kind=plan.kind,
            mechanism=plan.mechanism, a=None if a is None else a.contiguous(), b=b, b_syn=b_syn, code=code,
            noise_code=noise_code, fired=None if ctx.before_is_code else before,
            before=before if ctx.before_is_code else None, leak=plan.leak, share=plan.share, alpha=plan.alpha,
            threshold=plan.threshold, sigma=plan.levels, settings=ctx.settings, togo=held[0], parted=held[1],
            fit_rows=min(shape[0], _FIT_ROWS), trace=held[2:end] if plan.traces else None, traces=plan.traces,
            syn_trace=None if plan.alpha is None else held[end], to_current=to_current,
            adds=int(added is not None),
        )  # fmt: skip
        presentation.fit.add(sums)
        if to_current is not None and not ctx.is_first:
            ctx.run.hand_on(to_current)
            to_current = None
        if to_sigma is not None:
            size, dtype = ctx.sigma
            to_sigma = (to_sigma.view(1, *shape[1:]) / plan.levels).sum_to_size(size).to(dtype)
        return None, None, None, None, None, to_current, to_sigma, held, None, None


def _of_all_steps(gradient: Tensor | None, steps: int, seen: tuple[int, ...]) -> Tensor | None:
    """The gradient of the states of all steps, of which the last one alone may have been handed out."""
    if gradient is None or steps == 1 or seen == (steps,):
        return None if gradient is None else gradient.contiguous()
    last = gradient.reshape(1, *gradient.shape[len(seen) :])
    return torch.cat([last.new_zeros(steps - 1, *last.shape[1:]), last])


def begin(
    plan: Plan, neuron: NoisyNeuron, presentation: Presentation, given: dict[str, Tensor], fired: Tensor | None
) -> State:
    """The state in which a presentation begins.

    Args:
        plan: of the neuron.
        neuron: see there.
        presentation: that begins.
        given: states of the train, ``[batch, ...]``, without a graph.
        fired: spikes that are to reset it, ``[2, batch, ...]``; None if there are none.
    """
    assert neuron.noise is not None
    memory.pool.count_presentation()
    mem = given["mem"].detach().contiguous()
    syn = given["syn"].detach().contiguous() if "syn" in given else None
    return State(
        plan,
        presentation,
        torch.stack([presentation.control.to(mem.dtype), mem.new_full((), presentation.discount)]),
        neuron.noise.sigma.to(mem.dtype),
        mem,
        mem,
        syn,
        None,
        None if fired is None else fired.contiguous(),
        mem.new_zeros(()).expand(plan.channels, *mem.shape),
    )


def advance(
    state: State, neuron: NoisyNeuron, current: Tensor, steps: int | None = None, all_states: bool = False
) -> tuple[State, tuple[Tensor, ...]]:
    """Time steps of a train and its shadow.

    Args:
        state: before.
        neuron: whose noise it is.
        current: ``[batch, ...]``, the same in all steps, or ``[steps, batch, ...]``.
        steps: number of time steps; None for one, whose outputs have no dimension for it.
        all_states: hand out the states of all steps; otherwise those of the last one.

    Returns:
        The state after; and spikes, membrane potentials, and synaptic currents, if there are any.
    """
    assert neuron.noise is not None
    count = 1 if steps is None else steps
    lead = () if steps is None else (steps,)
    keys = torch.tensor([new_key(neuron.noise.generator) for _ in range(count)])
    kept: list[Tensor] = []
    run = state.run
    if run is not None and run.goes_on(current):
        run.length += 1
    else:
        run = Run(current)
    spikes, link, *states = FusedSpikes.apply(
        state, keys, count, lead, lead if all_states else (), current, state.sigma, state.link, kept, run
    )
    mem, *syn = (each.detach()[-1] if all_states and lead else each.detach() for each in states)
    shadow, code = kept
    size = state.bytes + spikes.numel() * spikes.element_size()
    after = replace(
        state, mem=mem, shadow=shadow, syn=syn[0] if syn else None, code=code[-1], fired=None, link=link, bytes=size,
        run=run,
    )  # fmt: skip
    if neuron.emits_zeros_and_ones():
        setattr(spikes, SPIKES, Emitted(code[:, 0] if lead else code[0, 0], version(spikes), size))
    return after, (neuron.graded(spikes), *states)
