"""Noise in a snnTorch neuron's time step. With ``neurons``, the only files that touch snnTorch's internals.

One step of a snnTorch neuron is: reset from the last membrane potential, ``state_function(input)``, ``fire(mem)``. The
membrane is always the last state that ``state_function`` returns. Noise is added there, so that the next reset and the
next leak see the very membrane potential that fired.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import snntorch as snn
import torch
from torch import Tensor, nn

from ._messages import place, warn
from .blocks import new_presentation
from .copies import running_copies
from .graph import Portable, ancestors, outside_of_graphs, version
from .kernels.kinds import Update
from .node import Control, Presentation, Sample
from .noise import DISTRIBUTIONS, EscapeNoise, MembraneNoise, Noise, hint, make_noise
from .philox import resolved

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
    if isinstance(noise, EscapeNoise) and (neuron.inhibition or pooling or neuron.state_quant):
        wrong = "decides for each neuron alone; with inhibition or pooling inside the neuron"
        if neuron.state_quant:
            wrong = "decides by a potential that state_quant clips just above the threshold: gradients would be wrong;"
        raise ValueError(f"{place(name, neuron)}: escape noise {wrong} use membrane noise")
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


class Sampler(Protocol):
    """Gives the spikes of neurons a gradient other than the surrogate one."""

    def step(self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """A time step of a neuron whose noise is on.

        Args:
            neuron: the neuron.
            input_: current, ``[rows, ...]``.
            states: the states that it goes on from, by name.

        Returns:
            Spikes and new states, in the order of ``neuron.state_names``.
        """


@dataclass(slots=True)
class Carried:
    """What a membrane potential that was handed out does not say by itself; it hangs on the tensor.

    Attributes:
        fired: the spikes that are to reset it, zeros and ones, as ``inside``, or integers that have them in their
            lowest bits; None if they are found by comparing it with the threshold.
        version: of the tensor, to tell changes in place.
        attached: the tensor had a graph.
        inside: states of the train and its shadow, by name, ``[2, batch, ...]``; None if there is no shadow.
        others: the other states that were handed out with it.
        link: that of the last time step.
        presentation: which it is a part of.
        state: of fused time steps, in place of these three.
    """

    fired: Tensor | None
    version: int
    attached: bool
    inside: Mapping[str, Tensor] | None = None
    others: Mapping[str, weakref.ref[Tensor]] = field(default_factory=dict)
    link: Tensor | None = None
    presentation: Presentation | None = None
    state: Any = None

    def holds(self, name: str, state: Tensor) -> bool:
        """A state is the one that was handed out under this name."""
        return name == "mem" or (name in self.others and self.others[name]() is state)

    def pair(self, name: str, state: Tensor) -> Tensor:
        """A state of the train and its shadow, ``[2, batch, ...]``; the same for both, if it was not handed out."""
        if self.inside is not None and self.holds(name, state):
            return self.inside[name]
        return state.expand(2, *state.shape)


# Where it hangs: in the dictionary of the tensor.
CARRIED = "_snntorch_lr_carried"
# A neuron may be shared by several layers, each of which has its own membrane potential.
_REMEMBERED = 4


@dataclass(slots=True)
class _Last:
    """A membrane potential that was handed out a short while ago, in case that it comes back in another guise.

    Attributes:
        mem: without its graph; None where spikes follow from it.
        version: of the tensor.
        fired: the spikes that are to reset it, or integers that have them in their lowest bits.
        node: number of the node that made it; None if it had no graph.
    """

    mem: Tensor | None
    version: int
    fired: Tensor | None
    node: int | None


@dataclass
class _Inside:
    """Of a time step whose spikes are sampled without a graph, while snnTorch computes it.

    Attributes:
        sets: 2 for a train and its shadow, whose numbers have the shape ``[2, batch, ...]``; otherwise 1.
        told: what is to be sampled, where that is known.
    """

    sets: int
    told: Sample | None = None
    margin: Tensor | None = None
    sigma: Tensor | None = None
    epsilon: Tensor | None = None
    sample: Sample | None = None


def _spikes(fired: Tensor | None, mem: Tensor) -> Tensor | None:
    """Zeros and ones in the dtype of a membrane potential."""
    if fired is None or fired.is_floating_point():
        return fired
    return fired.bitwise_and(1).to(mem.dtype)


def _draw(noise: Noise, like: Tensor, sets: int) -> Tensor:
    """Noise in the shape of a tensor; the train's does not depend on whether there is a shadow."""
    shape = like.shape if sets == 1 else torch.Size((sets * like.shape[1], *like.shape[2:]))
    return noise.sample(shape, like).view(like.shape)


def _sampled(neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """A time step by the sampler of a neuron."""
    assert neuron.sampler is not None
    if torch._C._current_graph_task_id() != -1:
        _check_rerun(neuron, states["mem"])
    return neuron.sampler.step(neuron, input_, states)


def _check_rerun(neuron: NoisyNeuron, mem: Tensor) -> None:
    """Refuses to be run in a backward pass, by activation checkpointing, with another state or noise than before.

    Raises:
        RuntimeError: if that is the case.
    """
    assert neuron.noise is not None
    cause = None
    if neuron.init_hidden and neuron._reset_during != torch._C._current_graph_task_id():
        cause = (
            "its state has gone on since (init_hidden=True): pass states by hand, or checkpoint a whole presentation, "
            "which begins with a reset"
        )
    elif mem.is_leaf and mem.requires_grad and not isinstance(mem, nn.Parameter):
        cause = "use_reentrant=True hands it a copy of its state, without the shadow's: use use_reentrant=False"
    elif neuron.noise.generator is not None:
        cause = "the noise of torch's global generator alone is repeated: leave out seed="
    if cause is not None:
        raise RuntimeError(f"{type(neuron).__name__}: activation checkpointing runs a neuron again, but {cause}")


_apart = outside_of_graphs(_sampled)


class NoisyNeuron(Portable, snn.SpikingNeuron):
    """Mixin in front of a snnTorch neuron class: adds ``noise=``, and changes nothing when it is False.

    By default the noise is reparameterised, u = μ + σ ε with the graph kept, so that ``loss.backward()`` is
    surrogate-gradient training with noise, σ included. With a ``sampler`` (``attach``, ``use_gradient``) spikes are
    sampled without a graph, and the sampler gives them their gradient.

    Args:
        noise: False for exactly the snnTorch neuron; True or ``"membrane"`` for learnable Gaussian membrane noise at
            its default level; ``"escape"`` for logistic escape noise; or a ``MembraneNoise`` or ``EscapeNoise``.

    Raises:
        ValueError: if ``noise`` is no noise, or if an option of the neuron is broken in snnTorch itself.

    Attributes:
        state_names: states of the neuron, the membrane potential last.
        shared_states: those that the neuron's own spikes do not change: a train and its shadow have the same.
        is_elementwise: a current drives its own neuron only; LSTM cells mix them.
        sampler: see above; None for the surrogate gradient.
    """

    transient = ("_inside", "_last", "_reset_by", "_control", "_known_factor", "_known_function")
    state_names: tuple[str, ...] = ("mem",)
    shared_states: tuple[str, ...] = ()
    is_elementwise = True

    noise: Noise | None
    sampler: Sampler | None = None
    _inside: _Inside | None = None
    _reset_by: Tensor | None = None
    _reset_during: int = -1
    _was_reset: bool = False
    _known_factor: tuple[Tensor, int, bool] | None = None
    _known_function: tuple[Any, bool] | None = None
    # Of a state that was computed from the last one.
    warned: bool = False
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
    def control(self) -> Control:
        """Where the sums go that λ of counterfactual credit is fitted by."""
        made: Control = self.__dict__.setdefault("_control", Control())
        return made

    @property
    def all_states(self) -> tuple[str, ...]:
        """Names of what a step takes from the last one, the fed back spikes of a recurrent neuron included."""
        return ("spk", *self.state_names) if hasattr(self, "recurrent") else self.state_names

    @property
    def mixes_spikes(self) -> bool:
        """Spikes come back to other neurons of the layer: all-to-all recurrence."""
        return bool(getattr(self, "all_to_all", False))

    def fused_update(self) -> Update | None:
        """What its time step is made of, if nothing in it needs a graph of its own; None if that is not known."""
        return None

    @property
    def resets_at_once(self) -> bool:
        """The membrane potential that is handed out has been reset by the spike of this very time step."""
        return not getattr(self, "reset_delay", True)

    def forward(self, input_: Tensor, *states: Any, **named_states: Any) -> Any:
        """One time step with snnTorch's arguments, shapes and return values."""
        noise = self.noise
        if noise is None:
            return super().forward(input_, *states, **named_states)
        outputs = None if named_states else self._go_on(input_, states)
        if outputs is not None:
            return outputs if self.output or not self.init_hidden else outputs[0]
        names = self.all_states
        passed = dict(zip(names, states, strict=False)) | named_states
        if passed and (self.init_hidden or len(states) > len(names) or not passed.keys() <= set(names)):
            # snnTorch says what is wrong.
            return super().forward(input_, *states, **named_states)
        copies = running_copies()
        if copies is not None and self in copies.neurons and noise.active:
            copies.ran = True
            input_ = copies.repeat(input_, f"what enters {type(self).__name__}")
            passed = {name: copies.repeat_state(state) for name, state in passed.items()}
        before = self._states(input_, passed)
        if self.sampler is None or not noise.active:
            return self._plain_step(input_, before)
        run = _apart if torch.compiler.is_compiling() else _sampled
        spikes, *new = run(self, input_, before)
        if self.output or not self.init_hidden:
            return (spikes, *new)
        return spikes

    def _go_on(self, input_: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """A fused time step that follows another one; None if it is not known to be one."""
        if bool(states) == self.init_hidden or torch.compiler.is_compiling():
            return None
        states = states or tuple(self._buffers.get(name) for name in self.state_names)
        carried: Carried | None = getattr(states[-1], CARRIED, None)
        if carried is None or carried.state is None or len(states) != len(self.state_names):
            return None
        if torch._C._current_graph_task_id() != -1 or self.noise is None or not self.noise.active:
            return None
        state = carried.state.next(self, input_, states[-1], states[0] if len(states) == 2 else None)
        return None if state is None else state.step(self, input_)

    def hold(self, name: str, state: Tensor) -> None:
        """Keeps a state, where snnTorch does."""
        self._buffers[name] = state

    def _states(self, input_: Tensor, passed: Mapping[str, Any]) -> dict[str, Tensor]:
        """States by name, from those that were passed and those that the neuron holds; zeros where they do not fit."""
        shape = self._state_shape(input_)
        assert self.noise is not None
        if self.noise.log_sigma.dim():
            self.noise.check_fits(shape, type(self).__name__)
        states = {}
        for name in self.all_states:
            state = passed.get(name)
            state = getattr(self, name) if state is None else state
            states[name] = state if state.shape == shape else input_.new_zeros(shape)
        return states

    def _state_shape(self, input_: Tensor) -> tuple[int, ...]:
        """Shape of the states."""
        return tuple(input_.shape)

    def _plain_step(self, input_: Tensor, states: Mapping[str, Tensor]) -> Any:
        """snnTorch's forward, with reparameterised noise where it is on."""
        self._reset_by = self.train_resets(states["mem"])
        output = self._snn_forward(input_, states)
        if isinstance(self.noise, EscapeNoise) and self.noise.active:
            spikes = (output[0] if isinstance(output, tuple) else output).detach() != 0
            self.carry(spikes.to(self.mem.dtype))
        return output

    def _snn_forward(self, input_: Tensor, states: Mapping[str, Tensor]) -> Any:
        before = {name: getattr(self, name) for name in states}
        for name, state in states.items():
            setattr(self, name, state)
        try:
            return super().forward(input_)
        except BaseException:
            # Inside, states have a shadow: they are not to be found in the neuron.
            for name, state in before.items():
                setattr(self, name, state)
            raise
        finally:
            self._reset_by = None

    def sample(
        self,
        input_: Tensor,
        states: Mapping[str, Tensor],
        fired: Tensor | None,
        sets: int = 1,
        told: Sample | None = None,
    ) -> Sample:
        """A time step whose spikes are sampled without a graph; the neuron holds the new states afterwards.

        Args:
            input_: current, in the shape of the states.
            states: states by name, ``[rows, ...]`` or ``[2, batch, ...]``.
            fired: the spikes that reset the membrane potential; None to compare that with the threshold.
            sets: 2 for a train and its shadow.
            told: what was sampled in this step before, to be sampled again.
        """
        inside = self._inside = _Inside(sets, told)
        self._reset_by = fired
        try:
            self._snn_forward(input_, states)
        finally:
            self._inside = None
        assert inside.sample is not None
        return inside.sample

    def carry(self, fired: Tensor | None, **more: Any) -> None:
        """Hangs on the membrane potential, which is handed out now, what the next time step needs.

        Args:
            fired: spikes, zeros and ones.
            **more: of ``Carried``.
        """
        mem = self.mem
        if self.resets_at_once and fired is not None:
            # The spike has reset the membrane already; without escape noise snnTorch compares it once more.
            fired = torch.zeros_like(fired) if isinstance(self.noise, EscapeNoise) else None
        own_version = version(mem)
        setattr(mem, CARRIED, Carried(fired, own_version, mem.grad_fn is not None, **more))
        train = fired[0] if fired is not None and fired.dim() > mem.dim() else fired
        node = None if mem.grad_fn is None else mem.grad_fn._sequence_nr()
        last: deque[_Last] = self.__dict__.setdefault("_last", deque(maxlen=_REMEMBERED))
        last.append(_Last(mem.detach() if isinstance(self.noise, EscapeNoise) else None, own_version, train, node))

    def carried(self, mem: Tensor) -> tuple[Carried | None, Tensor | None]:
        """What hangs on a membrane potential that comes back, and the spikes that are to reset it."""
        carried: Carried | None = getattr(mem, CARRIED, None)
        if carried is not None and carried.version == version(mem):
            return carried, _spikes(carried.fired, mem)
        if not isinstance(self.noise, EscapeNoise):
            return None, None
        last: deque[_Last] = vars(self).get("_last", deque())
        for recent in reversed(last):
            same = recent.mem is not None and recent.mem.data_ptr() == mem.data_ptr()
            if same and recent.version == version(mem) and recent.fired is not None and recent.fired.shape == mem.shape:
                return None, _spikes(recent.fired, mem)
        origin = self.computed_from(mem) if mem.grad_fn is not None else next(reversed(last), None)
        if origin is None or origin.fired is None or origin.fired.shape != mem.shape:
            return None, None
        # A spike that was sampled resets, whatever was done to the membrane since; rows of zeros are fresh states.
        goes_on = (mem.detach() != 0).reshape(len(mem), -1).any(1)
        fired = _spikes(origin.fired, mem)
        return None, fired if fired is None else fired * goes_on.view(-1, *[1] * (mem.dim() - 1))

    def train_resets(self, mem: Tensor) -> Tensor | None:
        """The spikes that are to reset a membrane potential that comes back, without those of a shadow."""
        _, fired = self.carried(mem)
        return fired[0] if fired is not None and fired.dim() > mem.dim() else fired

    def computed_from(self, mem: Tensor) -> Any:
        """Which membrane potential, handed out a short while ago, this one was computed from; None if from none."""
        last: deque[_Last] = vars(self).get("_last", deque())
        numbers = {recent.node: recent for recent in last if recent.node is not None}
        if not numbers:
            return None
        earliest = min(numbers)
        # Later nodes have larger numbers: what is older than all of these is not looked at.
        for node in ancestors([mem], lambda node: node._sequence_nr() <= earliest):
            if node._sequence_nr() in numbers:
                return numbers[node._sequence_nr()]
        return None

    def reset_mem(self) -> Any:
        """Zeroes the state."""
        self.__dict__.pop("_last", None)
        self._reset_during = torch._C._current_graph_task_id()
        self._was_reset = True
        new_presentation()
        return super().reset_mem()

    def mem_reset(self, mem: Tensor) -> Tensor:
        """Reset signal: the spike of the last step."""
        if self._reset_by is not None:
            return self._reset_by
        reset = super().mem_reset(mem)
        return reset if self.noise is None else reset.to(mem.dtype)

    def fire(self, mem: Tensor) -> Tensor:
        """Spikes, in the dtype of the membrane."""
        noise, inside = self.noise, self._inside
        if noise is None:
            return super().fire(mem)
        if inside is None and not (noise.active and isinstance(noise, EscapeNoise)):
            return super().fire(mem).to(mem.dtype)
        mem = self.state_quant(mem) if self.state_quant else mem
        if inside is None:
            assert isinstance(noise, EscapeNoise)
            epsilon = DISTRIBUTIONS[noise.distribution].quantile(noise.sample(mem.shape, mem))
            spikes = self.spike_grad(mem - self.threshold + noise.sigma.to(mem.dtype) * epsilon).to(mem.dtype)
            return spikes * self.graded_spikes_factor
        return self._sample_spikes(inside, mem)

    def fire_inhibition(self, batch_size: int, mem: Tensor) -> Tensor:
        """Spike of the strongest neuron only."""
        if self.noise is None:
            return super().fire_inhibition(batch_size, mem)
        inside = self._inside
        if inside is None:
            return super().fire_inhibition(batch_size, mem).to(mem.dtype)
        with torch.no_grad():
            spikes = super().fire_inhibition(batch_size, mem).to(mem.dtype)
        return self._end_sample(inside, spikes, chance_known=False)

    def _sample_spikes(self, inside: _Inside, mem: Tensor) -> Tensor:
        noise = self.noise
        if isinstance(noise, MembraneNoise):
            with torch.no_grad():
                if self.is_step_function:
                    spikes = (mem.detach() > self.threshold.detach()).to(mem.dtype)
                else:
                    spikes = self.spike_grad(mem - self.threshold).to(mem.dtype)
            return self._end_sample(inside, spikes, self.is_step_function and not self.state_quant)
        assert isinstance(noise, EscapeNoise)
        inside.margin, inside.sigma = mem - self.threshold, noise.sigma.to(mem.dtype)
        with torch.no_grad():
            z = (inside.margin.detach() / inside.sigma.detach()).to(resolved(mem.dtype))
            if inside.told is not None:
                spikes = inside.told.spikes
            else:
                p, _ = noise.cdf_and_pdf(z)
                spikes = noise.fires(p, _draw(noise, z, inside.sets)).to(mem.dtype)
        return self._end_sample(inside, spikes, True, z)

    def _end_sample(self, inside: _Inside, spikes: Tensor, chance_known: bool, z: Tensor | None = None) -> Tensor:
        margin, sigma = inside.margin, inside.sigma
        assert isinstance(self.noise, (MembraneNoise, EscapeNoise))
        assert margin is not None
        assert sigma is not None
        if z is None:
            z = (margin.detach() / sigma.detach()).to(resolved(margin.dtype))
        inside.sample = Sample(self.noise, margin, sigma, z, spikes, inside.epsilon, chance_known)
        # With its graph: snnTorch divides by the factor again.
        return self.graded(spikes)

    def _noisy_state_function(self, input_: Tensor) -> Any:
        states = self._snn_state_function(input_)
        if isinstance(states, tuple):
            return (*states[:-1], self._add_noise(states[-1]))
        return self._add_noise(states)

    def _add_noise(self, mean: Tensor) -> Tensor:
        noise, inside = self.noise, self._inside
        if not isinstance(noise, MembraneNoise) or not noise.active:
            return mean
        sigma = noise.sigma.to(mean.dtype)
        if inside is None:
            return mean + sigma * noise.sample(mean.shape, mean)
        with torch.no_grad():
            told = inside.told
            epsilon = _draw(noise, mean, inside.sets) if told is None or told.epsilon is None else told.epsilon
        inside.margin, inside.sigma, inside.epsilon = mean - self.threshold, sigma, epsilon.to(resolved(mean.dtype))
        # Forward-mode differentiation puts another tensor in the parameter's place.
        if not self._parameters.get("threshold", self.threshold).requires_grad:
            return torch.addcmul(mean.detach(), sigma.detach(), epsilon)
        # The margin u - threshold is what decides. With u sampled, a learned threshold would have no score at all.
        return torch.addcmul(inside.margin.detach(), sigma.detach(), epsilon) + self.threshold

    def graded(self, spikes: Tensor) -> Tensor:
        """Spikes as they are handed out, times ``graded_spikes_factor``."""
        return spikes if self.emits_zeros_and_ones() else spikes * self.graded_spikes_factor

    @property
    def is_step_function(self) -> bool:
        """Spikes are one where the membrane potential exceeds the threshold, and zero elsewhere.

        So are those of all surrogates of snnTorch; one of the user's own is tried once.
        """
        function = self.spike_grad
        if (getattr(function, "__module__", None) or "").startswith("snntorch."):
            return True
        known = self._known_function
        if known is None or known[0] is not function:
            margins = torch.tensor([-3.0, -0.7, -1e-3, 1e-3, 0.7, 3.0])
            with torch.no_grad():
                is_step = torch.equal(function(margins).float(), (margins > 0).float())
            known = self._known_function = (function, is_step)
        return known[1]

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

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._take_in_control()
        super()._save_to_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._take_in_control()
        return super().__getstate__()

    def _take_in_control(self) -> None:
        """Adds what the last backward passes tell of λ to the sums in the noise, before these are saved or copied."""
        if self.noise is not None:
            with torch.no_grad():
                self.control.value(self.noise.control)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # It belongs to the sums that are replaced.
        self.control.pending = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.noise is None:
            hint(args[3], f"{prefix}noise.log_sigma", "this network has no noise: call add_noise(net) before loading")
