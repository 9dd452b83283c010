"""Counterfactual credit: the likelihood ratio with a weight for each neuron, at the price of one or two copies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import place, positive_integer
from ..graph import ancestors, nodes_behind, normalises
from ..left_as_found import Buffers, RandomState
from ..network import noisy_inputs, parameters
from ..noise_stream import NoiseStream
from ..noisy_neuron import NoisyNeuron
from .base import Call, Estimator
from .credit import Control, CreditSums, Rate
from .fused import Plan
from .pooling import SpikePooling, check_nothing_is_pooled
from .recording import Copies
from .shadows import Shadowed
from .sums import RatePass, RatesCaptured, check_calls

OVER_TIME = ("rates", "exact")
# Of a trial run with a graph, which takes about 30 bytes for each.
_NUMBERS = 1_000_000


class Counterfactual(Estimator):
    """The likelihood-ratio gradient in which each neuron is weighted with what its own other draw would have done.

    ``Vanilla`` weights the score of every neuron with one number, the loss of its copy. But given the currents that
    enter a layer, the spike trains of its neurons are independent. So each neuron draws a second train from the same
    currents, a shadow, which goes nowhere; and what the loss would have been with that train instead is known to first
    order from ∂ℒ/∂s. For a noisy layer, in one copy of one sample, with currents I, spikes s, probabilities p and score
    q(τ) = ∂ log P(train) / ∂I(τ), and s̃, p̃, q̃ of the shadow:

        a(t) = ∂ℒ/∂s(t),   v = s − λ(s − p)
        D = ½ Σ_t a(t) (v(t) − ṽ(t))
        G(τ) = D · (q(τ) − q̃(τ)) + λ Σ_{t≥τ} a(t) ∂p(t)/∂I(τ)

    G estimates ∂E[ℒ]/∂I. It goes back through the block in front, whose weights get their gradient from it, and the
    layer below its a(t). σ, leaks, thresholds and one-to-one recurrent weights get the same D with scores of their own.
    What travels back: through blocks, from layer to layer; through time only in a layer's own leak and recurrence;
    never through a spike or a reset.

    There is no error where the loss is affine in the train of one neuron, and a small one where one neuron decides
    little (docs/theory.md). λ is fitted for each layer, from earlier steps alone, so that the variance is least.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample; one is enough. Only what comes after the first noisy neuron is computed
            K times.
        shadows: other trains of each neuron and copy.
        over_time: ``"rates"`` keeps sums over time in place of trains: one evaluation and one backward pass of each
            block, and memory that does not grow with the number of time steps, but for the graph of what comes after
            the last noisy layer. Spiking readouts, all-to-all recurrent layers, layers whose membrane potential the
            loss reads or whose current is normalised (BatchNorm, LayerNorm), and what comes after them, are computed
            in each time step all the same. ``"exact"`` computes all layers in each time step. ``"rates"`` may call
            ``loss_fn`` twice, and the second call ends early: that both compute the same is not checked. Random numbers
            of torch, NumPy and Python are put back for it.
        control: λ of all layers; None to fit it.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, an argument is wrong, or a neuron's trains are not independent
            given its currents (LSTM cells, inhibition).

    Examples:
        >>> estimator = slr.Counterfactual(net, copies=2)
        >>> loss = estimator.backward(loss_fn, images, labels)  # in place of loss.backward()

    Source: credit by a counterfactual baseline for each agent is COMA (Foerster et al. 2018); exact local expectations
    are those of Titsias & Lázaro-Gredilla (2015); MuProp (Gu et al. 2016) has the first-order control variate. Shadows,
    their pairs and the fitted control of a spike train are ours.
    """

    takes_batch_norm = True

    def __init__(
        self,
        net: nn.Module,
        copies: int = 2,
        shadows: int = 1,
        over_time: str = "rates",
        control: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(net, copies, "none", seed=seed)
        if over_time not in OVER_TIME:
            raise ValueError(f"over_time must be 'rates' or 'exact', got {over_time!r}")
        if control is not None and not (isinstance(control, (int, float)) and 0 <= control <= 1):
            raise ValueError(f"control must be in [0, 1], or None to fit it, got {control!r}")
        self.shadows = positive_integer("shadows", shadows)
        self.over_time = over_time
        self.fixed_control = control
        self._controls: dict[str, Control] = {}
        self._pooled: list[float | None] = []
        self._looked_at: tuple[tuple[str, ...], tuple[bool, ...]] | None = None
        self._timed: Collection[str] = ()
        self._internal: Collection[str] = ()
        self._profiles: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        self._plans: dict[str, Plan] = {}

    @property
    def control(self) -> dict[str, float]:
        """λ of each noisy neuron, by name."""
        return {name: float(control.value) for name, control in self._controls.items()}

    @property
    def timed(self) -> list[str]:
        """Neurons of which every time step is kept by ``over_time="rates"``; known after the first call."""
        return list(self._timed)

    def state_dict(self) -> dict[str, Any]:
        """State of the estimator, λ included, to resume a training loop of one's own with the same numbers."""
        controls = {name: control.sums.clone() for name, control in self._controls.items()}
        return super().state_dict() | {
            "control": controls,
            "looked at": self._looked_at,
            "timed": list(self._timed),
            "internal": list(self._internal),
            "profiles": dict(self._profiles),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict()``."""
        super().load_state_dict(state)
        for name, sums in state["control"].items():
            self._controls.setdefault(name, Control(self.fixed_control)).sums = sums.clone()
        self._looked_at = state["looked at"]
        self._timed, self._internal, self._profiles = state["timed"], state["internal"], dict(state["profiles"])

    def estimate(self, call: Call) -> Tensor:
        """Adds the gradient of this process into ``.grad``."""
        neurons = call.neurons
        check_independent(neurons)
        for name in neurons:
            # What an error left there belongs to no step.
            self._controls.setdefault(name, Control(self.fixed_control)).take()
        # What has no noise now, or is frozen, is not in the graph that tells who feeds whom.
        learned = (tuple(neurons), tuple(parameter.requires_grad for parameter in parameters(self.net)))
        learned = (learned[0], (*learned[1], self._input_changes))
        if self.over_time == "rates" and learned != self._looked_at:
            self._look_ahead(call)
            self._looked_at = learned
        copies = self.make_copies(call, self.next_seed())
        exact = self.over_time == "exact"
        timed = None if exact else [neurons[name] for name in self._timed if name in neurons]
        internal = [neurons[name] for name in self._internal if name in neurons]
        profiles = {neurons[name]: profile for name, profile in self._profiles.items() if name in neurons}
        plans = {neurons[name]: plan for name, plan in self._plans.items() if name in neurons}
        recording = self._recording(copies, timed, internal, profiles, plans)
        before, pooling = RandomState.capture(), SpikePooling(self._pooled, self.checks, recording.spikes.knows)
        # It looks at every function of torch, which takes time for nothing where nothing is pooled.
        with pooling if exact or self._pooled else nullcontext():
            if exact:
                losses = self.run_watched(recording, call)
                if not self.inspected:
                    check_derivative(recording, losses)
            else:
                with recording.spikes:
                    losses = self.run(recording, call, grad=True)
        if not pooling.calls:
            check_nothing_is_pooled(losses)
        check_calls(recording.sums, neurons, 'use over_time="exact"')
        self._plans = {name: recording.plans[neuron] for name, neuron in neurons.items() if neuron in recording.plans}
        everyone = self.gather(losses.view(recording.copies, -1))
        rates = self._rates(recording, call, before, pooling)
        self._push(losses, everyone.numel(), recording, rates)
        self._fit(recording, neurons)
        return everyone.mean()

    @property
    def _input_changes(self) -> bool:
        return any(noise.active and not noise.frozen for noise in noisy_inputs(self.net).values())

    def _recording(self, copies: Copies, *wiring: Any) -> Shadowed:
        controls = {neuron: self._controls[name] for name, neuron in copies.neurons.items()}
        return Shadowed(copies, self.shadows, controls, *wiring)

    def _look_ahead(self, call: Call) -> None:
        """A trial run of two copies with a whole graph: which neurons feed which, what the loss reads, and when.

        Of long presentations, whose graph is large, it looks at some of the samples only.
        """
        samples = max(1, _NUMBERS // (2 * (1 + self.shadows) * max(1, self.numbers)))
        recording = self._recording(replace(self._make(call, NoiseStream(0, 2, 0, 2)), first_samples=samples))
        recording.keeps_steps = True
        neurons = call.neurons
        with self.trial():
            with SpikePooling(self._pooled, self.checks, recording.spikes.knows):
                losses = self.run_watched(recording, call)
            check_derivative(recording, losses)
        wiring = Wiring.of(recording, losses)
        timed = wiring.read | wiring.readouts | wiring.normalised | wiring.recurrent | recording.given
        if self._input_changes:
            # Mean rates would lose how noise and credit of the same time step go together.
            timed |= {neuron for neuron in neurons.values() if not wiring.feeding.get(neuron)}
        self._timed = [
            name for name, neuron in neurons.items() if neuron in timed or wiring.feeding.get(neuron, set()) & timed
        ]
        self._internal = [name for name, neuron in neurons.items() if wiring.feeding.get(neuron)]
        kept = [name for name, neuron in neurons.items() if neuron in recording.emitted and name not in self._timed]
        steps = [each[neurons[name]] for name in kept for each in (recording.emitted, recording.entered)]
        found = iter(profiles_over_time(losses, steps, 2))
        self._profiles = {name: (next(found), next(found)) for name in kept}

    def _rates(
        self, recording: Shadowed, call: Call, before: RandomState, pooling: SpikePooling
    ) -> dict[NoisyNeuron, Tensor]:
        """Mean rates of the neurons that are not timed, as a graph of blocks between them."""
        controls = {neuron: self._controls[name] for name, neuron in call.neurons.items()}
        copies = replace(self._make(call, recording.stream), batch=recording.batch)
        through = CreditPass(copies, recording.sums, controls)
        if through.missing:
            after, statistics = RandomState.capture(), Buffers(self.net, statistics_only=True)
            before.restore()
            try:
                with suppress(RatesCaptured), SpikePooling(pooling.of_one_step(recording.steps), rates=True):
                    self.run(through, call, grad=True)
            finally:
                after.restore()
                statistics.restore()
        with torch.enable_grad():
            return {neuron: through.rate_by_current(neuron) for neuron in recording.sums}

    def _push(self, losses: Tensor, count: int, recording: Shadowed, rates: Mapping[NoisyNeuron, Tensor]) -> None:
        """Back from the losses to what reads spikes, and from there through the blocks."""
        if losses.requires_grad:
            # Blocks in front of both graphs are used twice.
            torch.autograd.backward(losses, torch.full_like(losses, 1 / count), retain_graph=bool(rates))
        roots = [
            (rate, recording.readers[neuron].grad)
            for neuron, rate in rates.items()
            if rate.requires_grad and recording.readers[neuron].grad is not None
        ]
        if roots:
            torch.autograd.backward(*zip(*roots, strict=True))  # type: ignore[arg-type]

    def _fit(self, recording: Shadowed, neurons: Mapping[str, NoisyNeuron]) -> None:
        """Lets λ know of this step, for the steps after it."""
        for name, neuron in neurons.items():
            for chain in recording.chains.get(neuron, ()):
                if chain.credit[0] is not None and chain.credit[1] is not None:
                    self._controls[name].add(chain.credit[0], chain.credit[1])
        found = self.division.total(torch.stack([self._controls[name].take() for name in neurons]))
        for name, each in zip(neurons, found, strict=True):
            self._controls[name].update(each)


class CreditPass(RatePass):
    """Sends mean rates through the blocks once; backwards, each neuron tells what its mean current did to the loss."""

    def __init__(
        self, copies: Copies, sums: Mapping[NoisyNeuron, CreditSums], controls: Mapping[NoisyNeuron, Control]
    ) -> None:
        super().__init__(copies, sums)
        self._own = sums
        self._controls = controls
        self._rates: dict[NoisyNeuron, Tensor] = {}

    def rate(self, neuron: NoisyNeuron, spikes: Tensor) -> Tensor:
        """The mean rate, as it was sampled; nothing of a neuron of which every time step is kept."""
        # A copy: a block may change it in place.
        return self.rate_by_current(neuron).clone() if neuron in self._own else spikes

    def rate_by_current(self, neuron: NoisyNeuron) -> Tensor:
        """The mean rate of a neuron as a function of its mean current."""
        if neuron not in self._rates:
            sums = self._own[neuron]
            sums.add_last_current()
            current = self.currents.get(neuron)
            if current is None:
                current = torch.zeros(()) if sums.current is None else sums.current / sums.total_current
            assert neuron.noise is not None
            learned = [neuron.elementwise_parameters[name][1] for name in sums.own]
            self._rates[neuron] = Rate.apply(
                sums, self.copies * (self.batch or 0), self._controls[neuron], current, neuron.noise.sigma, *learned
            )
        return self._rates[neuron]


@dataclass(frozen=True)
class Wiring:
    """Which neurons feed which, and what the loss reads.

    Attributes:
        feeding: for each neuron, those whose spikes enter its current, through others too.
        read: neurons whose membrane potential or synaptic current is read by the loss or another neuron.
        readouts: neurons whose spikes the loss reads with nothing learned in between, and which feed no other neuron.
        recurrent: neurons whose own earlier spikes enter their current, through a block of theirs or of the user's.
        normalised: neurons whose current is normalised between them and the neurons that feed them. The statistics of
            mean rates say nothing of those of single time steps.
    """

    feeding: Mapping[NoisyNeuron, set[NoisyNeuron]]
    read: set[NoisyNeuron]
    readouts: set[NoisyNeuron]
    recurrent: set[NoisyNeuron]
    normalised: set[NoisyNeuron]

    @classmethod
    def of(cls, recording: Shadowed, losses: Tensor) -> Wiring:
        """From the graph of a forward pass in which every time step was kept."""
        nodes = recording.nodes
        feeding = {
            neuron: {nodes[node] for node in ancestors([token]) if node in nodes} - {neuron}
            for neuron, token in recording.tokens.items()
        }
        recurrent = {
            neuron
            for neuron, currents in recording.entered.items()
            if neuron.recurrent_block is not None or any(nodes.get(node) is neuron for node in ancestors(currents[-1:]))
        }
        normalised = set()
        for neuron, token in recording.tokens.items():
            others = {node for node, owner in nodes.items() if owner is not neuron}
            if feeding[neuron] and any(map(normalises, nodes_behind([token.grad_fn], stop=others))):
                normalised.add(neuron)
        read = {
            nodes[parent]
            for node in ancestors([losses])
            for parent, output in node.next_functions
            # The first two are the spikes, and what orders the steps.
            if parent in nodes and output >= 2
        }
        behind_losses = list(nodes_behind([losses.grad_fn], stop=nodes))
        learned = any(hasattr(node, "variable") for node in behind_losses)
        last = {nodes[node] for node in behind_losses if node in nodes}
        readouts = set() if learned else last - set().union(*feeding.values())
        return cls(feeding, read, readouts, recurrent, normalised)


def profiles_over_time(losses: Tensor, sequences: Sequence[Sequence[Tensor]], copies: int) -> list[list[float]]:
    """Profiles over time of the effects of spikes or currents on the loss, one for all neurons and samples of a layer.

    That of one copy is regressed on the mean over time of the others, so that noise does not look like effect.

    Args:
        losses: with their graph.
        sequences: the spikes or currents of each time step, ``[sets * copies * batch, ...]``.
        copies: at least two.

    Returns:
        For each sequence numbers whose mean is one; a single one if there is no effect that stands out of its noise, or
        if a current stays the same.
    """
    # In one backward pass: what the steps hand to each other is not there for a second one.
    tensors = [step for steps in sequences for step in steps if step.requires_grad]
    found = torch.autograd.grad(losses, tensors, torch.ones_like(losses), allow_unused=True) if tensors else ()
    effects = {id(step): effect for step, effect in zip(tensors, found, strict=True) if effect is not None}
    return [_profile(steps, effects, copies, len(losses)) for steps in sequences]


def _profile(steps: Sequence[Tensor], effects: Mapping[int, Tensor], copies: int, rows: int) -> list[float]:
    if len({id(step) for step in steps}) < len(steps) or not any(id(step) in effects for step in steps):
        return [1.0]
    # Of long presentations this is large: no more of it is there at a time than needed.
    totals = steps[0].new_zeros(len(steps), rows, *steps[0].shape[1:])
    for total, step in zip(totals, steps, strict=True):
        if id(step) in effects:
            torch.sum(effects[id(step)].reshape(-1, *total.shape), 0, out=total)
    by_copy = totals.view(len(steps), copies, -1)
    means = by_copy.mean(0)
    others = means.sum(0) - means
    power = (means * others).sum()
    if not bool(power > 0):
        return [1.0]
    return list((by_copy.flatten(1) @ others.flatten() / power).tolist())


def check_independent(neurons: Mapping[str, NoisyNeuron]) -> None:
    """Refuses neurons whose spike trains are not independent of each other, given their currents.

    Raises:
        ValueError: if there is one.
    """
    for name, neuron in neurons.items():
        reason = None
        if not neuron.is_elementwise:
            reason = "an LSTM cell mixes the membrane potentials of its neurons"
        elif neuron.inhibition:
            reason = "inhibition lets only one neuron of a layer fire"
        if reason is not None:
            raise ValueError(
                f"{place(name, neuron)}: {reason}, so that no neuron's spikes can be changed alone, as "
                'counterfactual credit does; use estimator="vanilla"'
            )


def check_derivative(recording: Shadowed, losses: Tensor) -> None:
    """Refuses losses that do not tell what a spike does to them.

    Raises:
        ValueError: if no spike has a derivative.
    """
    if recording.nodes and not any(node in recording.nodes for node in ancestors([losses])):
        raise ValueError(
            "the losses have no derivative with respect to the spikes of any noisy neuron, which counterfactual credit "
            'needs: use a loss that has one, or estimator="vanilla"'
        )
