"""The two passes of the rate-factorised score: one that sums while it samples, one through the mean rates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._messages import place
from ..graph import version
from ..kernels import memory
from ..noise import EscapeNoise, MembraneNoise
from ..noisy_neuron import NoisyNeuron
from .fused import Current
from .recording import Copies, Recording, Step, sigma_gradient, weighted

CHANGED_CURRENT = (
    "a current was changed in place after a noisy neuron had got it, and sums over time need it as it was: write "
    'current = current + change in place of current += change, or use estimator="vanilla"'
)


@dataclass
class Sums:
    """Sums over the time steps of one neuron; tensors are ``[copies * batch, ...]``.

    Attributes:
        steps: number of time steps.
        internal: whether its input comes from spikes of other noisy neurons.
        score: Σ_t score_t · ∂(what was sampled) / ∂(input current), times σ.
        scale: Σ_t score of log σ.
        own: Σ_t score_t · ∂(what was sampled) / ∂(parameter), times σ, for each element-wise parameter.
        spikes: Σ_t s_t.
        fed_back: Σ_t s_{t-1}, for a recurrent block.
        states: Σ_t of the states before the step and of the reset, for cells that are not element-wise.
        current: the input currents, one by one as long as they differ: sum with its graph, and weight and
            version of the last.
        tangents: derivatives of the states, by parameter name; None for the input current.
        derived: those of the step that is being computed.
    """

    steps: int = 0
    internal: bool = False
    score: Tensor | None = None
    scale: Tensor | None = None
    own: dict[str, Tensor] = field(default_factory=dict)
    spikes: Tensor | None = None
    fed_back: Tensor | None = None
    states: Sequence[Tensor | None] = field(default_factory=list)
    current: Tensor | None = None
    last_current: Tensor | None = None
    repeats: float = 0
    last_version: int = 0
    tangents: dict[str | None, tuple[Tensor | None, ...]] = field(default_factory=dict)
    derived: dict[str | None, tuple[Tensor | None, ...]] = field(default_factory=dict)

    def receive(self, x: Tensor, weight: float = 1.0) -> None:
        """Adds the graph of a current from outside the noisy layers to the mean current."""
        if self.internal or not x.requires_grad:
            return
        if self.last_current is x and version(x) == self.last_version:
            self.repeats += weight
        else:
            self.add_last_current()
            self.last_current, self.repeats, self.last_version = x, weight, version(x)

    def add_last_current(self) -> None:
        """Moves the last current, as often as it came, into the sum.

        Raises:
            ValueError: if it was changed in place, and has the graph of other numbers now.
        """
        if self.last_current is not None:
            if version(self.last_current) != self.last_version:
                raise ValueError(CHANGED_CURRENT)
            share = self.last_current * self.repeats if self.repeats != 1 else self.last_current
            self.current = share if self.current is None else self.current + share
            self.last_current, self.repeats = None, 0

    def begin_step(self, neuron: NoisyNeuron, input_: Tensor) -> None:
        """Derives the next states, before the neuron updates them."""
        self.steps += 1
        if not neuron.is_elementwise:
            before = [*(getattr(neuron, name) for name in neuron.state_names), neuron.reset]
            totals = self.states or [None] * len(before)
            self.states = [add(total, state) for total, state in zip(totals, before, strict=True)]
            return
        if neuron.recurrent_block is not None:
            self.fed_back = add(self.fed_back, neuron.spk)
        wanted: list[str | None] = list(neuron.elementwise_parameters)
        if not neuron.has_unit_gain:
            wanted.append(None)
        zeros = (None,) * len(neuron.state_names)
        self.derived = {name: neuron.derive(input_, name, self.tangents.get(name, zeros)) for name in wanted}

    def file(self, noise: MembraneNoise | EscapeNoise, value: Tensor, score: Tensor) -> None:
        """Adds scores; overwrites the value that they are of, ε or z, last: the score may be the same tensor."""
        gain: Tensor | None = None
        for name, tangent in self.sampled_tangents(score):
            if name is None:
                gain = tangent
            elif tangent is not None:
                self.own[name] = add(self.own.get(name), score * tangent)
        if self.score is None:
            self.score = torch.zeros_like(score)
        self.score = self.score.add_(score) if gain is None else self.score.addcmul_(score, gain)
        if noise.log_sigma.requires_grad:
            self.scale = add(self.scale, noise.scale_score(value, score, out=value))

    def make(self, names: Iterable[str], like: Tensor) -> None:
        """Makes sums that are not there yet, of zeros."""
        for name in names:
            if getattr(self, name) is None:
                setattr(self, name, memory.zeros_like(like))

    @property
    def gain(self) -> Tensor | None:
        """Derivative of what this step samples by the current; None if it is one."""
        return self.derived[None][-1] if None in self.derived else None

    def sampled_tangents(self, like: Tensor) -> Iterator[tuple[str | None, Tensor | None]]:
        """Derivatives of what this step samples by each element-wise parameter, and by the current under None."""
        for name, tangents in self.derived.items():
            tangent = tangents[-1]
            if name == "threshold":
                tangent = -torch.ones_like(like) if tangent is None else tangent - 1
            yield name, tangent

    def end_step(self, neuron: NoisyNeuron, spikes: Tensor | None) -> None:
        """Carries the derivatives of the states on, as the sample and the reset leave them.

        Args:
            neuron: the neuron.
            spikes: of the step, as they were emitted; None is enough if they reset the next one only.
        """
        for name, tangents in self.derived.items():
            *rest, mem = tangents
            if isinstance(neuron.noise, MembraneNoise):
                # What is sampled is a constant; with a learned threshold that is the margin, u - threshold.
                mem = torch.ones_like(neuron.mem) if name == "threshold" else None
            if spikes is not None and not getattr(neuron, "reset_delay", True):
                mem = _after_reset(neuron, spikes, name, mem)
            self.tangents[name] = (*rest, mem)
        self.derived = {}


def _after_reset(neuron: NoisyNeuron, spikes: Tensor, name: str | None, mem: Tensor | None) -> Tensor | None:
    extra: Tensor = (spikes / neuron.graded_spikes_factor - neuron.reset).detach()
    if neuron.reset_mechanism == "zero":
        return None if mem is None else mem * (1 - extra)
    if neuron.reset_mechanism == "subtract" and name == "threshold":
        return -extra if mem is None else mem - extra
    return mem


class SummingStep(Step):
    """A time step of which sums remain; derivatives are taken forwards."""

    recording: Summing
    builds_graph = False
    fuses = True

    def __init__(self, recording: Summing, neuron: NoisyNeuron, current: Current) -> None:
        super().__init__(recording, neuron, current)
        self.sums = recording.sums.setdefault(neuron, Sums(internal=neuron in recording.internal))
        self.sums.receive(current.raw)

    def enter(self) -> Tensor:
        """The current without its graph."""
        return super().enter().detach()

    def update(self, input_: Tensor) -> Any:
        """The next states, and their derivatives."""
        sums, noise = self.sums, self.neuron.noise
        sums.begin_step(self.neuron, input_)
        if self.fused is None or noise is None:
            return super().update(input_)
        sums.make(("score", "spikes"), input_)
        if noise.log_sigma.requires_grad:
            sums.make(("scale",), input_)
        return self.fuse(sums.gain, score=sums.score, scale=sums.scale, fired=sums.spikes)

    def sample(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """A noisy membrane potential, whose score is added."""
        sampled, epsilon, _ = self.draw(noise, mean)
        self.sums.file(noise, epsilon, noise.location_score(epsilon))
        return sampled

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Spikes of escape noise, whose score is added."""
        spikes, z, limit = self.draw_spikes(noise, margin)
        self.sums.file(noise, z, noise.location_score(z, spikes, limit))
        return spikes

    def emit(self, spikes: Tensor) -> Tensor:
        """The spikes for the next layer, which are added."""
        if self.decided is None:
            self.sums.spikes = add(self.sums.spikes, spikes)
        return spikes

    def end(self, output: Any) -> Any:
        """The return value; carries the derivatives of the states on, as the sample and the reset leave them."""
        self.sums.end_step(self.neuron, output[0] if isinstance(output, tuple) else output)
        return output


class Summing(Recording):
    """Samples, and adds up what the rate-factorised score needs; nothing of a time step remains.

    Args:
        copies: who samples, and what.
        internal: neurons that spikes of other noisy neurons feed; the graphs of other inputs are averaged.
    """

    step_type = SummingStep

    def __init__(self, copies: Copies, internal: Collection[NoisyNeuron] = ()) -> None:
        super().__init__(copies)
        self.sums: dict[NoisyNeuron, Sums] = {}
        self.internal = internal


class RatesCaptured(BaseException):
    """Every block was evaluated: the rest of the forward pass is not needed. Never leaves the estimator."""


class RateStep(Step):
    """A neuron's place in a pass of mean rates: no noise and no spikes, and what it computes is not used."""

    recording: RatePass
    builds_graph = False

    def __init__(self, recording: RatePass, neuron: NoisyNeuron, current: Current) -> None:
        super().__init__(recording, neuron, current)
        recording.capture(neuron, recording.expanded(current, neuron))

    def enter(self) -> Tensor:
        """The current without its graph."""
        return super().enter().detach()

    def sample(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """The mean."""
        return mean

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """No spikes."""
        return torch.zeros_like(margin)

    def emit(self, spikes: Tensor) -> Tensor:
        """The mean rate of the neuron, as it was sampled."""
        with torch.set_grad_enabled(self.recording.grad):
            return self.recording.rate(self.neuron, spikes)


class RatePass(Recording):
    """Sends mean rates through the blocks once, and captures the current that each gives to its neuron.

    Attributes:
        currents: what was captured.
        missing: neurons whose current is still to come.
    """

    step_type = RateStep

    def __init__(self, copies: Copies, sums: Mapping[NoisyNeuron, Sums]) -> None:
        super().__init__(copies)
        self.sums = sums
        self.currents: dict[NoisyNeuron, Tensor] = {}
        self.missing = {neuron for neuron in sums if sums[neuron].internal}

    def capture(self, neuron: NoisyNeuron, current: Tensor) -> None:
        """Captures the current of the first time step.

        Raises:
            RatesCaptured: when every one is there.
        """
        if neuron in self.missing:
            self.currents[neuron] = current
            self.missing.discard(neuron)
            if not self.missing:
                raise RatesCaptured

    def rate(self, neuron: NoisyNeuron, spikes: Tensor) -> Tensor:
        """The mean rate of a neuron in place of its spikes."""
        sums = self.sums[neuron]
        return spikes if sums.spikes is None else sums.spikes / sums.steps


def roots(
    neuron: NoisyNeuron, sums: Sums, current: Tensor | None, weights: Tensor, copies: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs of a tensor and its gradient, for everything that one neuron's scores reach.

    Args:
        neuron: the neuron.
        sums: what it added up.
        current: its captured current, for a neuron that is fed by spikes.
        weights: one weight per copy and sample, ``[copies * batch]``.
        copies: number of copies.
    """
    assert neuron.noise is not None
    assert sums.score is not None
    noise = neuron.noise
    sigma = noise.sigma.detach()
    signal = weighted(sums.score, weights) / sigma
    if current is None:
        sums.add_last_current()
        current = None if sums.current is None else sums.current / sums.steps
    if not neuron.is_elementwise:
        rows = len(signal)
        entering = torch.zeros(()) if current is None else current
        if entering.dim() and len(entering) != rows:
            entering = entering.unsqueeze(0).expand(copies, *entering.shape).flatten(0, 1)
        *states, reset = (total / sums.steps for total in sums.states if total is not None)
        yield neuron.mean_after(entering, states, reset), signal
    elif current is not None and current.requires_grad:
        if len(current) != len(signal):
            yield current, signal.view(copies, *current.shape).sum(0)
        else:
            yield current, signal
    block = neuron.recurrent_block
    if block is not None and sums.fed_back is not None:
        fed = block(sums.fed_back / sums.steps)
        if fed.requires_grad:
            yield fed, signal
    for name, (_, parameter) in neuron.elementwise_parameters.items():
        if name in sums.own:
            own = (sums.own[name] / sigma).reshape(len(signal), -1)
            total = (weights.to(signal.dtype) @ own).view(1, *signal.shape[1:])
            yield parameter, total.sum_to_size(parameter.shape).to(parameter.dtype)
    if sums.scale is not None:
        yield noise.sigma, sigma_gradient(sums.scale, weights, sigma)


def add(total: Tensor | None, value: Tensor, weight: float = 1.0) -> Tensor:
    """A running sum, in place, without a graph."""
    value = value.detach()
    if total is None:
        return value.clone() if weight == 1 else value * weight
    return total.add_(value, alpha=weight)


def check_calls(sums: Mapping[NoisyNeuron, Sums], neurons: Mapping[str, NoisyNeuron], remedy: str) -> None:
    """Refuses neurons that were not called once in each time step: sums over time would mix what they did.

    Raises:
        ValueError: if there is one.
    """
    steps = {place(name, neuron): sums[neuron].steps for name, neuron in neurons.items() if neuron in sums}
    if len(set(steps.values())) > 1:
        raise ValueError(
            "sums over time need each noisy neuron to be called once in each time step, but the calls were "
            f"{', '.join(f'{where}: {count}' for where, count in steps.items())}; give each layer a neuron of its own, "
            f"or {remedy}"
        )
