"""Counterfactual credit: what would the loss have been, had only this neuron drawn other noise?"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import place, warn
from ..blocks import new_presentation
from ..copies import running_copies
from ..network import noisy_neurons
from ..node import CounterfactualSpike, Presentation, Reads
from ..noisy_neuron import Carried, NoisyNeuron
from ..philox import resolved
from ..validate import check_loss
from . import fused
from .base import Estimator, LossFn, sampling

DISCOUNT = 0.7
"""Default of γ; docs/theory.md says what it does, and where it was measured."""


@dataclass(frozen=True)
class CounterfactualCredit:
    """Sampler that gives the spikes of a neuron their gradient by counterfactual credit.

    Inside run the train and its shadow, from the same currents; outside only the train is seen. Without a graph (under
    ``no_grad``) there is no shadow.

    Attributes:
        discount: γ.
        control: λ; None to fit it.

    Raises:
        ValueError: if one of them is not in [0, 1].
    """

    discount: float = DISCOUNT
    control: float | None = None

    def __post_init__(self) -> None:
        for name, value in ("discount", self.discount), ("control", self.control):
            if value is None and name == "control":
                continue
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                hint = ", or None to fit it" if name == "control" else ""
                raise ValueError(f"{name} must be in [0, 1]{hint}, got {value!r}")

    def step(self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """A time step of a neuron; see ``snntorch_lr.noisy_neuron.Sampler``."""
        mem = states["mem"]
        if input_.dtype != mem.dtype and torch.promote_types(input_.dtype, mem.dtype) == mem.dtype:
            # As snnTorch's update does; a presentation goes on in the dtype of its states.
            input_ = input_.to(mem.dtype)
        state = fused.going_on(neuron, input_, states)
        if state is not None:
            return state.step(neuron, input_)
        if not torch.is_grad_enabled():
            return self._step_without_shadow(neuron, input_, states)
        carried, fired = neuron.carried(mem)
        known = carried is not None
        if carried is not None and (carried.inside is None or carried.attached != (mem.grad_fn is not None)):
            # A new presentation: of what was handed out, the spikes alone go on.
            carried = None
        if carried is not None:
            presentation, link = carried.presentation, carried.link
        else:
            self._warn_if_computed(neuron, mem, known)
            presentation, link = self._present(neuron), None
            if fired is not None:
                train = fired[0] if fired.dim() > mem.dim() else fired
                fired = train.expand(2, *train.shape)
        assert presentation is not None
        plan = None if carried is not None else fused.planned(neuron, input_, states)
        if plan is not None:
            state = fused.begin(plan, neuron, states, None if fired is None else fired[0], presentation)
            return state.step(neuron, input_)
        pairs = {
            name: state.expand(2, *state.shape) if carried is None else carried.pair(name, state)
            for name, state in states.items()
            if name != "spk"
        }
        with _Recurrence(neuron, states, carried) as fed_back:
            sample = neuron.sample(input_.expand(2, *input_.shape), pairs | fed_back, fired, sets=2)
        inside = {name: getattr(neuron, name) for name in neuron.state_names}
        if link is None:
            link = sample.z.new_zeros(()).expand(sample.z.shape)
        reads = Reads(neuron.resets_at_once, [self._difference(neuron, name, inside[name]) for name in inside])
        spikes, link, *new = CounterfactualSpike.apply(
            sample, presentation, reads, sample.margin, sample.sigma, link, *inside.values()
        )
        spikes = neuron.graded(spikes)
        for name, state in zip(inside, new, strict=True):
            setattr(neuron, name, state)
        others = {name: weakref.ref(state) for name, state in zip(inside, new, strict=True) if name != "mem"}
        if states.get("spk") is not None:
            neuron.spk = spikes
            others["spk"] = weakref.ref(spikes)
            inside["spk"] = neuron.graded(sample.spikes)
        neuron.reset = neuron.reset[0]
        neuron.carry(sample.spikes, inside=inside, others=others, link=link, presentation=presentation)
        return (spikes, *new)

    def sequence(self, neuron: NoisyNeuron, current: Tensor, steps: int, constant: bool) -> tuple[Tensor, ...] | None:
        """Time steps that follow the state which the neuron holds; None if they cannot be fused.

        Args:
            neuron: the neuron.
            current: ``[batch, ...]`` if it is constant, otherwise ``[steps, batch, ...]``.
            steps: number of time steps.
            constant: the current is the same in all steps.

        Returns:
            Spikes and states, ``[steps, batch, ...]``, in the order of ``neuron.state_names``.
        """
        copies = running_copies()
        if copies is not None:
            copies.ran = True
            current = copies.repeat(current, "a current", dim=0 if constant else 1)
        shape = current.shape if constant else current.shape[1:]
        states = {name: getattr(neuron, name) for name in neuron.state_names}
        if any(state.shape != shape for state in states.values()):
            states = dict.fromkeys(states, current.new_zeros(shape))
        state = None
        if constant:
            state = fused.going_on(neuron, current, states)
        elif steps:
            state = fused.going_on(neuron, current[0], states)
        if state is None:
            plan = fused.planned(neuron, current if constant else current[0], states)
            carried, fired = neuron.carried(states["mem"])
            if plan is None or carried is not None or fired is not None:
                return None
            presentation = self._present(neuron) if torch.is_grad_enabled() else None
            state = fused.begin(plan, neuron, states, None, presentation)
        state, spikes, mem, syn = fused.advance(state, neuron, current, steps, all_states=neuron.output)
        # No views: snnTorch detaches states in place.
        last, last_syn = (value[-1].clone() if neuron.output and value is not None else value for value in (mem, syn))
        assert last is not None
        state.hang(neuron, spikes, last, last_syn)
        return (spikes, mem) if syn is None else (spikes, syn, mem)

    def _step_without_shadow(
        self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        fired = neuron.train_resets(states["mem"])
        plan = fused.planned(neuron, input_, states)
        if plan is not None:
            return fused.begin(plan, neuron, states, fired).step(neuron, input_)
        sample = neuron.sample(input_, states, fired)
        spikes = neuron.graded(sample.spikes.clone())
        if "spk" in states:
            neuron.spk = spikes
        neuron.carry(sample.spikes)
        return (spikes, *(getattr(neuron, name) for name in neuron.state_names))

    def _present(self, neuron: NoisyNeuron) -> Presentation:
        """A new presentation, with λ of what was learned from earlier ones."""
        assert neuron.noise is not None
        if not neuron._was_reset:
            new_presentation()
        neuron._was_reset = False
        with torch.no_grad():
            fitted = neuron.control.value(neuron.noise.control)
            control = fitted if self.control is None else torch.full_like(fitted, self.control)
        return Presentation(control, self.discount, neuron.control)

    @staticmethod
    def _difference(neuron: NoisyNeuron, name: str, state: Tensor) -> Tensor | None:
        """Train minus shadow of a state; None where they are equal, or where the sample says it."""
        equal = name in neuron.shared_states or (name == "mem" and not neuron.resets_at_once)
        if equal:
            return None
        state = state.detach()
        return (state[0] - state[1]).to(resolved(state.dtype))

    @staticmethod
    def _warn_if_computed(neuron: NoisyNeuron, mem: Tensor, known: bool) -> None:
        if not known and mem.grad_fn is not None and not neuron.warned and neuron.computed_from(mem) is not None:
            neuron.warned = True
            warn(
                f"{type(neuron).__name__}: its membrane potential was computed from the one that it had returned "
                "(masked, mixed, changed in place): what a spike does to later spikes through its reset gets no credit "
                "there. To begin a new presentation pass what reset_mem() returns; to leave rows as they are, mask the "
                "input or the spikes instead"
            )


class _Recurrence:
    """Context in which the spikes that are fed back fit the train and its shadow.

    All-to-all recurrence takes the spikes of the train for both, with their graph: the recurrent weights act on what
    others see. One-to-one recurrence belongs to the neuron, as its reset does: each gets its own spikes.
    """

    def __init__(self, neuron: NoisyNeuron, states: dict[str, Tensor], carried: Carried | None) -> None:
        self._neuron = neuron
        self._states = states
        self._carried = carried

    def __enter__(self) -> dict[str, Tensor]:
        neuron, spikes = self._neuron, self._states.get("spk")
        if spikes is None:
            return {}
        if neuron.mixes_spikes:
            module: Any = neuron.recurrent
            # Found before the module of the same name.
            neuron.__dict__["recurrent"] = lambda _: module(spikes)
            return {"spk": spikes.expand(2, *spikes.shape)}
        carried = self._carried
        return {"spk": spikes.expand(2, *spikes.shape) if carried is None else carried.pair("spk", spikes)}

    def __exit__(self, *_: object) -> None:
        self._neuron.__dict__.pop("recurrent", None)


class Counterfactual(Estimator):
    """The likelihood-ratio gradient in which each neuron is weighted with what its own other draw would have done.

    ``Vanilla`` weights the score of every neuron with one number, the loss of its copy. But given the currents that
    enter a layer, the spike trains of its neurons are independent. So each neuron draws a second train from the same
    currents, its shadow, which goes nowhere; what the loss would have been with that train instead is known to first
    order from a(t) = ∂ℒ/∂s(t), which autograd brings. With the probability p of a spike, v = s − λ(s − p), and ṽ of
    the shadow, in each time step, the last one first:

        togo ← γ togo + ½ a (v − ṽ)
        ∂/∂m of the train: togo · ∂ log P(s)/∂m + λ a ∂p/∂m;   of the shadow: −togo · ∂ log P(s̃)/∂m̃

    Both go back through the neuron's own leak into the current, β, ϑ, σ; never through a spike or a reset. That is the
    backward pass of the neuron: ``attach`` and ``use_gradient`` make it that of ``loss.backward()`` in any loop. This
    class is for noise copies: it runs ``loss_fn`` itself.

    With γ = 1 there is no error where the loss is affine in the train of one neuron, and a small one where one neuron
    decides little. λ is fitted for each layer, from earlier backward passes alone, so that the variance is least.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample; one is enough. Only what comes after the first noisy neuron is computed
            K times.
        discount: γ in [0, 1], how much a later time step counts in what a spike does through its reset. 1 has no bias,
            and much variance in long sequences; 0 leaves the reset out, as snnTorch's detached reset does.
        control: λ in [0, 1] of all layers; None to fit it.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, an argument is wrong, or a neuron's trains are not independent
            given its currents (LSTM cells, inhibition).

    Examples:
        >>> estimator = slr.Counterfactual(net, copies=2)
        >>> loss = estimator.backward(loss_fn, images, labels)  # in place of loss.backward()

    Source: credit by a counterfactual baseline for each agent is COMA (Foerster et al. 2018); exact local expectations
    are those of Titsias & Lázaro-Gredilla (2015); MuProp (Gu et al. 2016) has the first-order control variate. Shadows,
    their pairs, the discount and the fitted control of a spike train are ours.
    """

    needs_rows = False

    def __init__(
        self,
        net: nn.Module,
        copies: int = 1,
        discount: float = DISCOUNT,
        control: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(net, copies, seed)
        self.sampler = CounterfactualCredit(discount, control)
        check_independent(net)

    def estimate(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Adds the gradient into ``.grad``."""
        with self.first_call(neurons) as first:
            losses, copies = self.run(neurons, self.sampler, loss_fn, inputs, targets)
            loss = check_loss(losses, self.net)
            if first is not None:
                first.check_losses(loss)
        # Activation checkpointing runs neurons again in it.
        with sampling(neurons, self.sampler), copies:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def check_independent(net: nn.Module) -> None:
    """Refuses neurons whose spike trains are not independent of each other, given their currents.

    Raises:
        ValueError: if there is one.
    """
    for error in dependent_neurons(net):
        raise ValueError(error)


def dependent_neurons(net: nn.Module) -> Iterator[str]:
    """What is wrong with each neuron whose spike trains are not independent of each other, given their currents."""
    for name, neuron in noisy_neurons(net).items():
        reason = None
        if not neuron.is_elementwise:
            reason = "an LSTM cell mixes the membrane potentials of its neurons"
        elif neuron.inhibition:
            reason = "inhibition lets only one neuron of a layer fire"
        if reason is not None:
            yield (
                f"{place(name, neuron)}: {reason}, so that no neuron's spikes can be changed alone, as "
                'counterfactual credit does; use estimator="vanilla", or surrogate gradients'
            )
