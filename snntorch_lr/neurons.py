"""snnTorch's neurons with ``noise=``. The only file that touches snnTorch's internals.

One step of a snnTorch neuron is: reset from the last membrane potential, ``state_function(input)``, ``fire(mem)``. The
membrane is always the last state that ``state_function`` returns. Noise is added there, so that the next reset and the
next leak see the very membrane potential that fired.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import snntorch as snn
import torch
from torch import Tensor, nn

from .noise import EscapeNoise, MembraneNoise, Noise, make_noise
from .warn import warn

if TYPE_CHECKING:
    from .recording import Recording

UNSUPPORTED = {
    "LeakyParallel": "it computes all time steps at once, without a reset; use Leaky in a loop over time",
    "DeltaLeaky": "it fires on changes of the membrane; use Leaky on the differences of the input",
    "StateLeaky": "it computes all time steps at once; use Leaky with reset_mechanism='none' in a loop over time",
    "LinearLeaky": "it computes all time steps at once; use torch.nn.Linear and Leaky in a loop over time",
    "AssociativeLeaky": "it computes all time steps at once; use RLeaky in a loop over time",
}
# snnTorch 0.9.4 lacks some of them.
_UNSUPPORTED_TYPES = tuple(getattr(snn, name) for name in UNSUPPORTED if hasattr(snn, name))
_SPIKING_TYPES = (snn.SpikingNeuron, *_UNSUPPORTED_TYPES)


class NoisyNeuron(snn.SpikingNeuron):
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

    noise: Noise | None
    state_names: tuple[str, ...] = ("mem",)
    _recording: Recording | None = None
    _last_spikes: Tensor | None = None
    _fired: tuple[Tensor, Tensor] | None = None
    _snn_state_function: Callable[[Tensor], Any]

    def __init__(self, *args: Any, noise: bool | str | Noise = False, **kwargs: Any) -> None:
        made = make_noise(noise)
        if kwargs.get("learn_alpha") and isinstance(self, snn.Alpha):
            raise ValueError(f"Alpha: {_ALPHA_DEFECT}")
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
        recording = self.sampling_for
        if recording is not None:
            input_ = recording.receive(self, input_)
            states = tuple(self._expand_state(state, recording) for state in states)
            named_states = {key: self._expand_state(state, recording) for key, state in named_states.items()}
            if recording.starts(self) and not states and not named_states:
                self._warn_about_left_over_state(input_, recording)
        self._make_states(input_)
        states = tuple(self._fitting_state(state, input_) for state in states)
        named_states = {key: self._fitting_state(state, input_) for key, state in named_states.items()}
        output = super().forward(input_, *states, **named_states)
        if self._last_spikes is not None:
            # With reset_delay=False the spike has reset the membrane already.
            delayed = getattr(self, "reset_delay", True)
            self._fired = (self.mem, self._last_spikes if delayed else torch.zeros_like(self._last_spikes))
            self._last_spikes = None
        return output

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
        margin = (self.state_quant(mem) if self.state_quant else mem) - self.threshold
        if not isinstance(noise, EscapeNoise):
            with torch.no_grad():
                spikes = self.spike_grad(margin).to(mem.dtype)
        elif recording is None:
            spikes = self.spike_grad(margin + noise.sigma.to(mem.dtype) * noise.sample(mem)).to(mem.dtype)
        else:
            spikes = recording.fire(self, noise, margin)
        if isinstance(noise, EscapeNoise):
            self._last_spikes = spikes.detach()
        spikes = spikes * self.graded_spikes_factor
        if recording is not None and not self.graded_spikes_factor.requires_grad:
            recording.spikes.announce(spikes)
        return spikes

    def fire_inhibition(self, batch_size: int, mem: Tensor) -> Tensor:
        """Spike of the strongest neuron only; a sampled spike carries no graph."""
        if self.noise is None:
            return super().fire_inhibition(batch_size, mem)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.sampling_for is None):
            return super().fire_inhibition(batch_size, mem).to(mem.dtype)

    def mem_reset(self, mem: Tensor) -> Tensor:
        """Reset signal: the spike of the last step."""
        if isinstance(self.noise, EscapeNoise) and self._fired is not None:
            fired_mem, spikes = self._fired
            if _same(mem, fired_mem):
                return spikes.clone()
        reset = super().mem_reset(mem)
        return reset if self.noise is None else reset.to(mem.dtype)

    @property
    def is_markov(self) -> bool:
        """Whether nothing before the last sample matters, given it: no state carries a graph through time."""
        return self.state_names == ("mem",) and isinstance(self.noise, MembraneNoise)

    def _noisy_state_function(self, input_: Tensor) -> Any:
        states = self._snn_state_function(input_)
        if isinstance(states, tuple):
            return (*states[:-1], self._add_noise(states[-1]))
        return self._add_noise(states)

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

    def _expand_state(self, state: Any, recording: Recording) -> Any:
        if not isinstance(state, Tensor) or state.dim() == 0:
            return state
        if recording.fits(state):
            return recording.expand(state, self)
        if state.numel() and bool(state.any()):
            raise ValueError(
                f"{recording.name(self)} got a state of shape {tuple(state.shape)}, which does not fit its input; "
                "snnTorch would silently replace it by zeros. Start each forward pass from reset_mem() or reset(net)"
            )
        return state

    def _warn_about_left_over_state(self, input_: Tensor, recording: Recording) -> None:
        if self.mem.shape[:1] == input_.shape[:1] and bool(self.mem.any()):
            warn(
                f"{recording.name(self)} starts from the membrane potential that an earlier forward pass left; call "
                "snntorch_lr.reset(net) at the start of the forward pass"
            )


class Leaky(NoisyNeuron, snn.Leaky):
    """``snntorch.Leaky`` with ``noise=``; arguments, shapes and return values are snnTorch's."""


class Lapicque(NoisyNeuron, snn.Lapicque):
    """``snntorch.Lapicque`` with ``noise=``; arguments, shapes and return values are snnTorch's."""


class Synaptic(NoisyNeuron, snn.Synaptic):
    """``snntorch.Synaptic`` with ``noise=``; arguments, shapes and return values are snnTorch's."""

    state_names = ("syn", "mem")


class Alpha(NoisyNeuron, snn.Alpha):
    """``snntorch.Alpha`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    snnTorch's Alpha computes its membrane from the synaptic currents alone, so noise acts on the spike and the reset
    of one time step and is not carried on.
    """

    state_names = ("syn_exc", "syn_inh", "mem")


class RLeaky(NoisyNeuron, snn.RLeaky):
    """``snntorch.RLeaky`` with ``noise=``; arguments, shapes and return values are snnTorch's."""


class RSynaptic(NoisyNeuron, snn.RSynaptic):
    """``snntorch.RSynaptic`` with ``noise=``; arguments, shapes and return values are snnTorch's."""

    state_names = ("syn", "mem")


class SLSTM(NoisyNeuron, snn.SLSTM):
    """``snntorch.SLSTM`` with ``noise=``; arguments, shapes and return values are snnTorch's."""

    state_names = ("syn", "mem")

    def _state_shape(self, input_: Tensor) -> tuple[int, ...]:
        return (input_.shape[0], self.hidden_size)


class SConv2dLSTM(NoisyNeuron, snn.SConv2dLSTM):
    """``snntorch.SConv2dLSTM`` with ``noise=``; arguments, shapes and return values are snnTorch's."""

    state_names = ("syn", "mem")

    def _state_shape(self, input_: Tensor) -> tuple[int, ...]:
        return (input_.shape[0], self.out_channels, *input_.shape[2:])


NOISY: dict[type[nn.Module], type[NoisyNeuron]] = {
    cls.__bases__[1]: cls for cls in (Leaky, Lapicque, Synaptic, Alpha, RLeaky, RSynaptic, SLSTM, SConv2dLSTM)
}


def _give_signature(noisy: type[NoisyNeuron], plain: type[nn.Module]) -> None:
    """Shows snnTorch's arguments and ``noise`` to ``help`` and editors."""

    def __init__(self: NoisyNeuron, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        NoisyNeuron.__init__(self, *args, **kwargs)

    signature = inspect.signature(plain.__init__)
    noise = inspect.Parameter("noise", inspect.Parameter.KEYWORD_ONLY, default=False)
    vars(__init__)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), noise])
    setattr(noisy, "__init__", __init__)  # noqa: B010


for _plain, _noisy in NOISY.items():
    _give_signature(_noisy, _plain)


def to_noisy(neuron: nn.Module, noise: Noise, name: str = "") -> None:
    """Turns a snnTorch neuron into its noisy counterpart, in place: the same object, parameters and state.

    Raises:
        ValueError: if the class of the neuron has no noisy counterpart, or one of its options is broken in snnTorch.
    """
    cls = type(neuron)
    where = f"{name} ({cls.__name__})" if name else cls.__name__
    if isinstance(neuron, NoisyNeuron):
        check_defects(neuron, noise, name)
        neuron.noise = noise
        return
    for unsupported in UNSUPPORTED:
        if cls.__name__ == unsupported:
            raise ValueError(f"{where} cannot have noise: {UNSUPPORTED[unsupported]}")
    if cls not in NOISY:
        raise ValueError(
            f"{where} is a class of your own, and noise could be lost in its code: derive it from "
            "snntorch_lr.Leaky (or another neuron of snntorch_lr) and pass noise=, or leave it out through only="
        )
    check_defects(neuron, noise, name)
    function = neuron.__dict__.pop("state_function")
    vars(neuron)["_snn_state_function"] = function
    neuron.__class__ = NOISY[cls]
    neuron.noise = noise


def to_plain(neuron: nn.Module) -> None:
    """Turns a noisy neuron back into snnTorch's, in place. A class derived by the user stays, without noise."""
    delattr(neuron, "noise")
    cls = type(neuron)
    for plain, noisy in NOISY.items():
        if noisy is cls:
            function = neuron.__dict__.pop("_snn_state_function")
            neuron.__class__ = plain
            neuron.__dict__["state_function"] = function
            return
    vars(neuron)["noise"] = None


def spiking_neurons(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All snnTorch neurons of a network, with their names, each once.

    Finds them at any depth, and also in plain lists, tuples and dicts, which ``net.modules()`` does not see.
    """
    seen: set[int] = set()

    def visit(name: str, value: object) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from visit(f"{name}.{index}", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from visit(f"{name}.{key}", item)
        elif isinstance(value, nn.Module) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, _SPIKING_TYPES):
                yield name, value
                return
            prefix = f"{name}." if name else ""
            for child, module in value.named_children():
                yield from visit(prefix + child, module)
            for attribute, held in vars(value).items():
                if attribute not in _MODULE_INTERNALS and isinstance(held, (list, tuple, dict)):
                    yield from visit(prefix + attribute, held)

    yield from visit("", net)


def noisy_neurons(net: nn.Module) -> dict[str, NoisyNeuron]:
    """The neurons of a network that have noise, by name, whether it is on or off now."""
    return {
        name: neuron
        for name, neuron in spiking_neurons(net)
        if isinstance(neuron, NoisyNeuron) and neuron.noise is not None
    }


def reset_state(neuron: nn.Module) -> None:
    """Zeroes the state of one snnTorch neuron and cuts it from the graph of the last forward pass."""
    reset_mem = getattr(neuron, "reset_mem", None)
    if callable(reset_mem):
        reset_mem()
    for attribute, value in vars(neuron).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            vars(neuron)[attribute] = value.detach()


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
            f"{name or type(neuron).__name__}: escape noise decides for each neuron alone; with inhibition or pooling "
            "inside the neuron use membrane noise"
        )
    if isinstance(neuron, snn.RSynaptic) and not neuron.reset_delay:
        defect = "snnTorch ignores reset_delay=False there, or fails on it; use reset_delay=True, or Synaptic"
    elif isinstance(neuron, snn.Lapicque) and isinstance(neuron.beta, nn.Parameter):
        defect = "snnTorch derives C from beta once, so that learn_beta=True fails at the second backward; use Leaky"
    elif isinstance(neuron, snn.SLSTM) and neuron.input_size != neuron.hidden_size:
        warn(
            f"{name or 'SLSTM'}: snnTorch zeroes the state of an SLSTM at each step unless input_size == hidden_size; "
            "put a torch.nn.Linear in front of it to make them equal"
        )
    if defect is None:
        return
    message = f"{name or type(neuron).__name__}: {defect}"
    if noise is not None:
        raise ValueError(message)
    warn(message)


_ALPHA_DEFECT = "snnTorch's Alpha cannot be built with learn_alpha=True; use learn_beta, or Synaptic with learn_alpha"
_MODULE_INTERNALS = frozenset(vars(nn.Module()))


def _same(mem: Tensor, fired: Tensor) -> bool:
    """Whether a membrane potential given by hand is the one that the neuron returned, also detached or copied."""
    if mem is fired:
        return True
    if mem.shape != fired.shape or mem.device != fired.device:
        return False
    return mem.data_ptr() == fired.data_ptr() or torch.equal(mem, fired)
