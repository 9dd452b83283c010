"""Noise in a snnTorch neuron's time step. With ``neurons``, the only files that touch snnTorch's internals.

One step of a snnTorch neuron is: reset from the last membrane potential, ``state_function(input)``, ``fire(mem)``. The
membrane is always the last state that ``state_function`` returns. Noise is added there, so that the next reset and the
next leak see the very membrane potential that fired.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import snntorch as snn
import torch
from torch import Tensor, nn

from ._messages import place, warn
from .dynamics import Dynamics
from .graph import same_numbers, version
from .noise import EscapeNoise, MembraneNoise, Noise, hint, make_noise
from .pickling import Portable

UNSUPPORTED = {
    "LeakyParallel": "it computes all time steps at once, without a reset; use Leaky in a loop over time",
    "DeltaLeaky": "it fires on changes of the membrane; use Leaky on the differences of the input",
    "StateLeaky": "it computes all time steps at once; use Leaky with reset_mechanism='none' in a loop over time",
    "LinearLeaky": "it computes all time steps at once; use torch.nn.Linear and Leaky in a loop over time",
    "AssociativeLeaky": "it computes all time steps at once; use RLeaky in a loop over time",
}

ALPHA_DEFECT = "snnTorch's Alpha cannot be built with learn_alpha=True; use learn_beta, or Synaptic with learn_alpha"


def check_defects(neuron: nn.Module, noise: Noise | None, name: str = "") -> None:
    """Says which options of a neuron do not work in snnTorch itself, or not with its noise.

    Raises:
        ValueError: if the neuron is to have noise and the option would make its gradient or its reset wrong. Without
            noise it is a warning, because then the neuron behaves exactly as snnTorch's.
    """
    defect = None
    pooling = vars(neuron).get("max_pool") or vars(neuron).get("avg_pool")
    if isinstance(noise, EscapeNoise) and (neuron.inhibition or pooling):
        raise ValueError(
            f"{place(name, neuron)}: escape noise decides for each neuron alone; with inhibition or pooling "
            "inside the neuron use membrane noise"
        )
    if isinstance(neuron, snn.RSynaptic) and not neuron.reset_delay:
        defect = "snnTorch ignores reset_delay=False there, or fails on it; use reset_delay=True, or Synaptic"
    elif isinstance(neuron, snn.Lapicque) and isinstance(neuron.beta, nn.Parameter):
        defect = "snnTorch derives C from beta once, so that learn_beta=True fails at the second backward; use Leaky"
    elif isinstance(neuron, snn.SLSTM) and neuron.input_size != neuron.hidden_size:
        warn(
            f"{place(name, neuron)}: snnTorch zeroes the state of an SLSTM at each step unless input_size == "
            "hidden_size; put a torch.nn.Linear in front of it to make them equal"
        )
    if defect is None:
        return
    message = f"{place(name, neuron)}: {defect}"
    if noise is not None:
        raise ValueError(message)
    warn(message)


class TimeStep(Protocol):
    """One time step of one neuron in a forward pass of noise copies; the neuron asks in the order of the methods.

    Attributes:
        input: the current, for all rows.
        states: of the last step, as they were given by position; and by name.
        builds_graph: the neuron's own update is to carry a graph.
        decided: spikes, where the update has sampled them with the noise; None otherwise.
    """

    input: Tensor
    decided: Tensor | None
    states: tuple[Any, ...]
    named_states: dict[str, Any]
    builds_graph: bool

    def update(self, input_: Tensor) -> Any:
        """The next states, before noise."""

    def sample(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """A noisy membrane potential, or its distance to a learned threshold, without a graph."""

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Spikes of escape noise, given the distance to the threshold, without a graph."""

    def emit(self, spikes: Tensor) -> Tensor:
        """The spikes for the next layer."""

    def grade(self, spikes: Tensor) -> Tensor:
        """Emitted spikes times ``graded_spikes_factor``."""

    def end(self, output: Any) -> Any:
        """The return value of the neuron, from that of snnTorch's forward."""


class Sampler(Protocol):
    """A forward pass of noise copies, as a neuron sees it.

    Attributes:
        run_apart: ``run`` of a sampler that it is given, for which compiled code leaves its graph.
    """

    run_apart: Callable[..., Any]

    def run(self, neuron: Any, input_: Tensor, *states: Any, **named: Any) -> Any:
        """A neuron's time step."""

    def begin(self, neuron: Any, input_: Tensor, states: tuple[Any, ...], named: dict[str, Any]) -> TimeStep:
        """A time step from its input and the states that the user gave."""

    def name(self, neuron: Any) -> str:
        """Name of a neuron in errors: its place in the network and its class."""


class NoisyNeuron(Portable, Dynamics, snn.SpikingNeuron):
    """Mixin in front of a snnTorch neuron class: adds ``noise=``, and changes nothing when it is False.

    Outside an estimator the noise is reparameterised, u = μ + σ ε with the graph kept, so that ``loss.backward()`` is
    surrogate-gradient training with noise, σ included. Inside one (``Vanilla.backward``, an attached optimizer) the
    neuron expands its input to the copies, detaches what it samples, and files the score.

    Args:
        noise: False for exactly the snnTorch neuron; True or ``"membrane"`` for learnable Gaussian membrane noise at
            its default level; ``"escape"`` for logistic escape noise; or a ``MembraneNoise`` or ``EscapeNoise``.

    Raises:
        ValueError: if ``noise`` is no noise, or if an option of the neuron is broken in snnTorch itself.
    """

    transient = ("sampler", "estimating", "_step", "_known_factor")
    sampler: Sampler | None = None
    estimating: bool = False
    _step: TimeStep | None = None
    _known_factor: tuple[Tensor, int, bool] | None = None
    _last_spikes: Tensor | None = None
    fired: tuple[Tensor, Tensor, int] | None = None

    def __init__(self, *args: Any, noise: bool | str | Noise = False, **kwargs: Any) -> None:
        made = make_noise(noise)
        if kwargs.get("learn_alpha") and isinstance(self, snn.Alpha):
            raise ValueError(f"Alpha: {ALPHA_DEFECT}")
        super().__init__(*args, **kwargs)
        check_defects(self, made)
        self.noise = made

    @property
    def state_function(self) -> Callable[[Tensor], Any]:
        """snnTorch's state update, with noise on the membrane where there is any."""
        return self._snn_state_function if self.noise is None else self._noisy_state_function

    @state_function.setter
    def state_function(self, function: Callable[[Tensor], Any]) -> None:
        self._snn_state_function = function

    def forward(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        """One time step with snnTorch's arguments, shapes and return values."""
        if self.noise is None:
            return super().forward(input_, *states, **named_states)
        sampler = self.sampler
        if sampler is None:
            return self.noisy_step(input_, *states, **named_states)
        if torch.compiler.is_compiling():
            return sampler.run_apart(sampler, self, input_, *states, **named_states)
        return sampler.run(self, input_, *states, **named_states)

    def noisy_step(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        """One time step with noise.

        Raises:
            RuntimeError: if the backward pass of an estimator runs it again.
        """
        if self.estimating and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__}: gradient checkpointing runs a noisy neuron again in the backward pass, where "
                "it would draw other spikes: put torch.utils.checkpoint around blocks without noisy neurons. The "
                'estimators keep spikes as bits; Vanilla(memory="replay") and chunk= take less memory still'
            )
        if self.sampler is None or self.noise is None or not self.noise.active:
            output = self._advance(input_, states, named_states)
            self._remember_spikes()
            return output
        step = self._step = self.sampler.begin(self, input_, states, named_states)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and step.builds_graph):
                output = self._advance(step.input, step.states, step.named_states)
            self._remember_spikes()
            return step.end(output)
        finally:
            del self._step

    def _advance(self, input_: Tensor, states: tuple[Any, ...], named_states: dict[str, Any]) -> Any:
        """snnTorch's forward, from states that fit."""
        self._make_states(input_)
        if self.noise is not None and self.noise.log_sigma.dim():
            where = type(self).__name__ if self.sampler is None else self.sampler.name(self)
            self.noise.check_fits(self._state_shape(input_) or tuple(input_.shape), where)
        states = tuple(self._fitting_state(state, input_) for state in states)
        named_states = {key: self._fitting_state(state, input_) for key, state in named_states.items()}
        return super().forward(input_, *states, **named_states)

    def _remember_spikes(self) -> None:
        """Keeps the spikes of this step for the reset of the next: what was sampled, and not to be compared again."""
        spikes, self._last_spikes = self._last_spikes, None
        delayed = getattr(self, "reset_delay", True)
        if spikes is not None and (delayed or isinstance(self.noise, EscapeNoise)):
            # With reset_delay=False the spike has reset the membrane already.
            kept = spikes if delayed else torch.zeros_like(spikes)
            self.fired = (self.mem, kept, version(kept))

    def reset_mem(self) -> Any:
        """Zeroes the state."""
        self.fired = None
        return super().reset_mem()

    def fire(self, mem: Tensor) -> Tensor:
        """Spikes, in the dtype of the membrane; a sampled spike carries no graph."""
        noise, step = self.noise, self._step
        if noise is None:
            return super().fire(mem)
        if step is not None and step.decided is not None:
            self._last_spikes = spikes = step.decided
            return step.grade(step.emit(spikes))
        if not noise.active or (step is None and not isinstance(noise, EscapeNoise)):
            return super().fire(mem).to(mem.dtype)
        mem = self.state_quant(mem) if self.state_quant else mem
        if not isinstance(noise, EscapeNoise):
            spikes = self._above_threshold(mem)
        elif step is None:
            margin = mem - self.threshold
            spikes = self.spike_grad(margin + noise.sigma.to(mem.dtype) * noise.sample(mem)).to(mem.dtype)
        else:
            spikes = step.fire(noise, mem - self.threshold)
        self._last_spikes = spikes.detach()
        return spikes * self.graded_spikes_factor if step is None else step.grade(step.emit(spikes))

    @torch.no_grad()
    def _above_threshold(self, mem: Tensor) -> Tensor:
        if self.is_step_function:
            return torch.gt(mem, self.threshold, out=torch.empty_like(mem))
        return self.spike_grad(mem - self.threshold).to(mem.dtype)

    def fire_inhibition(self, batch_size: int, mem: Tensor) -> Tensor:
        """Spike of the strongest neuron only; a sampled spike carries no graph."""
        if self.noise is None:
            return super().fire_inhibition(batch_size, mem)
        if self._step is None:
            return super().fire_inhibition(batch_size, mem).to(mem.dtype)
        with torch.no_grad():
            spikes = super().fire_inhibition(batch_size, mem).to(mem.dtype)
        return self._step.emit(spikes)

    @property
    def all_states(self) -> tuple[str, ...]:
        """Names of what a step returns and the next one takes, the fed back spikes of a recurrent neuron included."""
        return ("spk", *self.state_names) if hasattr(self, "recurrent") else self.state_names

    @property
    def fires_above_threshold(self) -> bool:
        """Each neuron spikes, once, exactly where its own membrane potential exceeds its threshold."""
        return self.is_step_function and not self.inhibition and not self.state_quant

    @property
    def is_step_function(self) -> bool:
        """Spikes are zeros and ones: all surrogates of snnTorch are the step function going forward."""
        return (getattr(self.spike_grad, "__module__", None) or "").startswith("snntorch.")

    def emits_zeros_and_ones(self) -> bool:
        """Spikes are zeros and ones, and their factor is one and fixed."""
        factor = self.graded_spikes_factor
        if not self.is_step_function or factor.requires_grad:
            return False
        known = self._known_factor
        if known is None or known[0] is not factor or known[1] != version(factor):
            # Looked at once, as long as it stays: the answer waits for the device.
            known = self._known_factor = (factor, version(factor), bool((factor == 1).all()))
        return known[2]

    def mem_reset(self, mem: Tensor) -> Tensor:
        """Reset signal: the spike of the last step.

        Raises:
            RuntimeError: if that was changed in place, and cannot be had again.
        """
        if self.fired is not None and (self._step is not None or isinstance(self.noise, EscapeNoise)):
            fired_mem, spikes, count = self.fired
            if same_numbers(mem, fired_mem):
                if version(spikes) == count:
                    return spikes
                if isinstance(self.noise, EscapeNoise):
                    raise RuntimeError(
                        f"the spikes of {type(self).__name__} were changed in place, but with escape noise they decide "
                        "about its next reset: use dropout without inplace=True, or change a copy"
                    )
        reset = super().mem_reset(mem)
        return reset if self.noise is None else reset.to(mem.dtype)

    def _noisy_state_function(self, input_: Tensor) -> Any:
        states = self._snn_state_function(input_) if self._step is None else self._step.update(input_)
        if isinstance(states, tuple):
            return (*states[:-1], self._add_noise(states[-1]))
        return self._add_noise(states)

    def _add_noise(self, mean: Tensor) -> Tensor:
        noise = self.noise
        if not isinstance(noise, MembraneNoise) or not noise.active:
            return mean
        if self._step is not None and self._step.decided is not None:
            return mean
        if self._step is None:
            return mean + noise.sigma.to(mean.dtype) * noise.sample(mean)
        if not self.threshold.requires_grad:
            return self._step.sample(noise, mean)
        # The margin u - threshold is what decides. With u sampled, a learned threshold would have no score at all.
        return self._step.sample(noise, mean - self.threshold) + self.threshold

    def _make_states(self, input_: Tensor) -> None:
        """Makes missing first states where snnTorch would make them in the wrong dtype."""
        shape = self._state_shape(input_)
        for name in self.state_names if shape is not None else ():
            setattr(self, name, self._fitting_state(getattr(self, name), input_))

    def _fitting_state(self, state: Any, input_: Tensor) -> Any:
        shape = self._state_shape(input_)
        wrong = shape is not None and isinstance(state, Tensor) and state.shape != shape
        return input_.new_zeros(shape) if wrong and shape is not None else state

    def _state_shape(self, input_: Tensor) -> tuple[int, ...] | None:
        """Shape of the states, for the cells whose first states snnTorch makes in float32 whatever their input is."""
        return None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.noise is None:
            hint(args[3], f"{prefix}noise.log_sigma", "this network has no noise: call add_noise(net) before loading")
