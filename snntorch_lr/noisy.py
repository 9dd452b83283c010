"""What noise changes in a snnTorch neuron. With ``neurons``, the only files that touch snnTorch's internals.

One step of a snnTorch neuron is: reset from the last membrane potential, ``state_function(input)``, ``fire(mem)``. The
membrane is always the last state that ``state_function`` returns. Noise is added there, so that the next reset and the
next leak see the very membrane potential that fired.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import snntorch as snn
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .defects import ALPHA_DEFECT, check_defects
from .graph import same_numbers, version
from .noise import EscapeNoise, MembraneNoise, Noise, hint, make_noise
from .portable import Portable
from .warn import warn

if TYPE_CHECKING:
    from .recording import Recording

# snnTorch's three updates of Leaky, one for each reset mechanism; another one may not be repeated in place.
_LEAKS = {getattr(snn.Leaky, name, None) for name in ("_base_sub", "_base_zero", "_base_int")} - {None}


@cache
def _start_forward_mode() -> None:
    """Has torch import what it needs for forward-mode differentiation, without its warning that it uses torch.jit."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class NoisyNeuron(Portable, snn.SpikingNeuron):
    """Mixin in front of a snnTorch neuron class: adds ``noise=``, and changes nothing when it is False.

    Outside an estimator the noise is reparameterised, u = μ + σ ε with the graph kept, so that ``loss.backward()`` is
    surrogate-gradient training with noise, σ included. Inside one (``Vanilla.backward``, an attached optimizer) the
    neuron expands its input to the copies, detaches what it samples, and files the score.

    Args:
        noise: False for exactly the snnTorch neuron; True or ``"membrane"`` for learnable Gaussian membrane noise at
            its default level; ``"escape"`` for Gaussian escape noise; or a ``MembraneNoise`` or ``EscapeNoise``.

    Raises:
        ValueError: if ``noise`` is no noise, or if an option of the neuron is broken in snnTorch itself.
    """

    mem: Tensor
    noise: Noise | None
    state_names: tuple[str, ...] = ("mem",)
    transient = ("_recording", "_estimating")
    _recording: Recording | None = None
    _estimating: bool = False
    _last_spikes: Tensor | None = None
    _fired: tuple[Tensor, Tensor, int] | None = None
    _has_binary_spikes: bool = False
    _snn_state_function: Callable[[Tensor], Any]

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

    @property
    def sampling_for(self) -> Recording | None:
        """The recording that this neuron files scores with now, if any."""
        return self._recording if self.noise is not None and self.noise.active else None

    def forward(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        """One time step with snnTorch's arguments, shapes and return values."""
        if self.noise is None:
            return super().forward(input_, *states, **named_states)
        step = NoisyNeuron.step if self._recording is None else self._recording.step
        return step(self, input_, *states, **named_states)

    def step(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        """One time step with noise; a recording runs it outside compiled code.

        Raises:
            RuntimeError: if the backward pass of an estimator runs it again.
        """
        if self._estimating and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__}: gradient checkpointing runs a noisy neuron again in the backward pass, where "
                "it would draw other spikes: put torch.utils.checkpoint around blocks without noisy neurons. The "
                'estimators keep spikes as bits; Vanilla(memory="replay") and chunk= take less memory still'
            )
        recording = self.sampling_for
        if recording is not None:
            input_ = recording.receive(self, input_)
            if recording.starts(self):
                self._has_binary_spikes = self._emits_zeros_and_ones()
                if not states and not named_states:
                    self._warn_about_left_over_state(recording)
            states, named_states = recording.receive_states(self, states, named_states)
        self._make_states(input_)
        if self.noise is not None and self.noise.log_sigma.dim():
            where = type(self).__name__ if self._recording is None else self._recording.name(self)
            self.noise.check_fits(self._state_shape(input_) or tuple(input_.shape), where)
        states = tuple(self._fitting_state(state, input_) for state in states)
        named_states = {key: self._fitting_state(state, input_) for key, state in named_states.items()}
        builds_graph = torch.is_grad_enabled()
        if recording is not None:
            mem = states[-1] if states else named_states.get("mem", self.mem)
            builds_graph = builds_graph and recording.builds_graph(self, mem)
        with torch.set_grad_enabled(builds_graph):
            output = super().forward(input_, *states, **named_states)
        self._remember_spikes()
        return output if recording is None else recording.leave(self, output)

    def _remember_spikes(self) -> None:
        """Keeps the spikes of this step for the reset of the next: what was sampled, and not to be compared again."""
        spikes, self._last_spikes = self._last_spikes, None
        delayed = getattr(self, "reset_delay", True)
        if spikes is not None and (delayed or isinstance(self.noise, EscapeNoise)):
            # With reset_delay=False the spike has reset the membrane already.
            kept = spikes if delayed else torch.zeros_like(spikes)
            self._fired = (self.mem, kept, version(kept))

    def reset_mem(self) -> Any:
        """Zeroes the state."""
        self._fired = None
        return super().reset_mem()

    def fire(self, mem: Tensor) -> Tensor:
        """Spikes, in the dtype of the membrane; a sampled spike carries no graph."""
        noise, recording = self.noise, self.sampling_for
        if noise is None:
            return super().fire(mem)
        if not noise.active or (recording is None and not isinstance(noise, EscapeNoise)):
            return super().fire(mem).to(mem.dtype)
        mem = self.state_quant(mem) if self.state_quant else mem
        if not isinstance(noise, EscapeNoise):
            spikes = self._above_threshold(mem)
        elif recording is None:
            margin = mem - self.threshold
            spikes = self.spike_grad(margin + noise.sigma.to(mem.dtype) * noise.sample(mem)).to(mem.dtype)
        else:
            spikes = recording.fire(self, noise, mem - self.threshold)
        self._last_spikes = spikes.detach()
        if recording is None:
            return spikes * self.graded_spikes_factor
        with torch.set_grad_enabled(recording.grad):
            emitted = recording.emit(self, spikes)
            if not self._has_binary_spikes:
                return emitted * self.graded_spikes_factor
        recording.spikes.announce(emitted)
        return emitted

    @torch.no_grad()
    def _above_threshold(self, mem: Tensor) -> Tensor:
        if self._is_step_function:
            return torch.gt(mem, self.threshold, out=torch.empty_like(mem))
        return self.spike_grad(mem - self.threshold).to(mem.dtype)

    def fire_inhibition(self, batch_size: int, mem: Tensor) -> Tensor:
        """Spike of the strongest neuron only; a sampled spike carries no graph."""
        if self.noise is None:
            return super().fire_inhibition(batch_size, mem)
        recording = self.sampling_for
        if recording is None:
            return super().fire_inhibition(batch_size, mem).to(mem.dtype)
        with torch.no_grad():
            spikes = super().fire_inhibition(batch_size, mem).to(mem.dtype)
        with torch.set_grad_enabled(recording.grad):
            return recording.emit(self, spikes)

    @property
    def all_states(self) -> tuple[str, ...]:
        """Names of what a step returns and the next one takes, the fed back spikes of a recurrent neuron included."""
        return ("spk", *self.state_names) if hasattr(self, "recurrent") else self.state_names

    @property
    def fires_above_threshold(self) -> bool:
        """Whether each neuron spikes, once, exactly where its own membrane potential exceeds its threshold."""
        return self._is_step_function and not self.inhibition and not self.state_quant

    @property
    def _is_step_function(self) -> bool:
        """Whether spikes are zeros and ones: all surrogates of snnTorch are the step function going forward."""
        return (getattr(self.spike_grad, "__module__", None) or "").startswith("snntorch.")

    def _emits_zeros_and_ones(self) -> bool:
        factor = self.graded_spikes_factor
        return self._is_step_function and not factor.requires_grad and bool((factor == 1).all())

    def mem_reset(self, mem: Tensor) -> Tensor:
        """Reset signal: the spike of the last step.

        Raises:
            RuntimeError: if that was changed in place, and cannot be had again.
        """
        if self._fired is not None and (self.sampling_for is not None or isinstance(self.noise, EscapeNoise)):
            fired_mem, spikes, count = self._fired
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

    @property
    def is_markov(self) -> bool:
        """Whether nothing before the last sample matters, given it: no state carries a graph through time."""
        return self.state_names == ("mem",) and isinstance(self.noise, MembraneNoise)

    @property
    def has_unit_gain(self) -> bool:
        """Whether a current adds to what is sampled as it is, and to nothing that is sampled later."""
        return self.is_markov and (
            isinstance(self, snn.Leaky) or (isinstance(self, snn.RLeaky) and self.reset_mechanism != "zero")
        )

    @property
    def meets_threshold_twice(self) -> bool:
        """Whether one noisy membrane is compared with a learned threshold before its reset and after it."""
        at_once = not getattr(self, "reset_delay", True) and self.reset_mechanism == "subtract"
        return at_once and isinstance(self.noise, MembraneNoise) and self.threshold.requires_grad

    @property
    def leaks_only(self) -> bool:
        """Whether this is a Leaky of which nothing is learned, so that its graph is known without being built."""
        return self._is_leaky and getattr(self, "reset_delay", True) and not self.elementwise_parameters

    @property
    def _is_leaky(self) -> bool:
        return isinstance(self, snn.Leaky) and getattr(self._snn_state_function, "__func__", None) in _LEAKS

    def gain_after(self, before: Tensor | None) -> Tensor:
        """Derivative of the membrane of a Leaky, before it is sampled, with respect to a current that never changes.

        Args:
            before: that of the last time step; None in the first.

        Returns:
            A tensor that broadcasts against the membrane.
        """
        if before is None:
            return torch.ones_like(self.beta, requires_grad=False)
        kept = before * self.beta.detach().clamp(0, 1)
        return 1 + (kept * (1 - self.reset) if self.reset_mechanism == "zero" else kept)

    @property
    def is_elementwise(self) -> bool:
        """Whether a current drives its own neuron only; LSTM cells mix them."""
        return not isinstance(self, (snn.SLSTM, snn.SConv2dLSTM))

    @property
    def recurrent_block(self) -> nn.Module | None:
        """The module between the neuron's own last spikes and its current, if it mixes neurons."""
        return self.recurrent if getattr(self, "all_to_all", False) else None

    @property
    def elementwise_parameters(self) -> dict[str, tuple[nn.Module, nn.Parameter]]:
        """Learned parameters that act on each neuron alone, with the module in which they are looked up."""
        found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
        if self.is_elementwise:
            inner: Any = getattr(self, "recurrent", self)
            for module, name in (self, "alpha"), (self, "beta"), (self, "threshold"), (inner, "V"):
                value = getattr(module, name, None)
                if isinstance(value, nn.Parameter) and value.requires_grad:
                    found[name] = (module, value)
        return found

    def derive(
        self, input_: Tensor, parameter: str | None, tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Derivatives of the next states, each neuron's with respect to its own parameter or input current.

        Forward-mode differentiation of snnTorch's own state update; exact because that is element-wise.

        Args:
            input_: input current.
            parameter: name of an element-wise parameter; None for the input current, the same at all time steps.
            tangents: derivatives of the last states, in the order of ``state_names``; None where they are zero.

        Returns:
            Derivatives of the next states, in the same order.
        """
        saved = [getattr(self, name) for name in self.state_names]
        module, value = self.elementwise_parameters[parameter] if parameter else (self, None)
        _start_forward_mode()
        with torch.no_grad(), forward_ad.dual_level():
            for name, state, tangent in zip(self.state_names, saved, tangents, strict=True):
                if tangent is not None:
                    setattr(self, name, forward_ad.make_dual(state.detach(), tangent))
            if value is None:
                input_ = forward_ad.make_dual(input_.detach(), torch.ones_like(input_))
            else:
                # Found before the parameter of the same name.
                vars(module)[str(parameter)] = forward_ad.make_dual(value.detach(), torch.ones_like(value))
            try:
                states = self._snn_state_function(input_)
            finally:
                if value is not None:
                    del vars(module)[str(parameter)]
                for name, state in zip(self.state_names, saved, strict=True):
                    setattr(self, name, state)
            states = states if isinstance(states, tuple) else (states,)
            return tuple(
                forward_ad.unpack_dual(state).tangent if isinstance(state, Tensor) else None for state in states
            )

    def mean_after(self, input_: Tensor, states: Sequence[Tensor], reset: Tensor) -> Tensor:
        """Mean of what the neuron samples, from given states; for cells that are not element-wise."""
        saved = [getattr(self, name) for name in self.state_names]
        for name, state in zip(self.state_names, states, strict=True):
            setattr(self, name, state)
        self.reset = reset
        mem: Tensor = self._snn_state_function(input_)[-1]
        for name, state in zip(self.state_names, saved, strict=True):
            setattr(self, name, state)
        return mem - self.threshold if self.threshold.requires_grad else mem

    def _noisy_state_function(self, input_: Tensor) -> Any:
        if (recording := self.sampling_for) is not None:
            recording.begin_step(self, input_)
        if recording is not None and not torch.is_grad_enabled() and self._leaks_in_one_dtype(input_):
            return self._add_noise(self._leak(input_))
        states = self._snn_state_function(input_)
        if isinstance(states, tuple):
            return (*states[:-1], self._add_noise(states[-1]))
        return self._add_noise(states)

    def _leaks_in_one_dtype(self, input_: Tensor) -> bool:
        return self._is_leaky and input_.dtype == self.mem.dtype == self.beta.dtype == self.threshold.dtype

    def _leak(self, input_: Tensor) -> Tensor:
        """snnTorch's update of Leaky, rounded alike, in one new tensor instead of four."""
        mem = self.mem * self.beta.clamp(0, 1)
        if self.reset_mechanism == "zero":
            mem.addcmul_(mem, self.reset, value=-1)
        mem.add_(input_)
        if self.reset_mechanism == "subtract":
            mem.addcmul_(self.reset, self.threshold, value=-1)
        return mem

    def _add_noise(self, mean: Tensor) -> Tensor:
        noise = self.noise
        if not isinstance(noise, MembraneNoise) or not noise.active:
            return mean
        if self._recording is None:
            return mean + noise.sigma.to(mean.dtype) * noise.sample(mean)
        if not self.threshold.requires_grad:
            return self._recording.draw(self, noise, mean)
        # The margin u - threshold is what decides. With u sampled, a learned threshold would have no score at all.
        return self._recording.draw(self, noise, mean - self.threshold) + self.threshold

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

    def _warn_about_left_over_state(self, recording: Recording) -> None:
        if self.mem.dim() and len(self.mem) == recording.rows and bool(self.mem.any()):
            warn(
                f"{recording.name(self)} starts from the membrane potential that an earlier forward pass left; call "
                "snntorch_lr.reset(net) at the start of the forward pass"
            )
