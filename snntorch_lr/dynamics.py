"""Dynamics of a snnTorch neuron: its class and options as flags, and the derivatives of its state update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .noise import MembraneNoise, Noise


@cache
def _start_forward_mode() -> None:
    """Has torch import what it needs for forward-mode differentiation, without its warning that it uses torch.jit."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class Dynamics:
    """Mixin of ``NoisyNeuron``: flags and derivatives of the state update, for estimators.

    Attributes:
        state_names: states of the neuron, the membrane potential last.
        is_elementwise: a current drives its own neuron only; LSTM cells mix them.
        unit_gain_resets: resets with which a current adds to the membrane potential as it is.
        known_updates: snnTorch's own updates, whose derivatives ``gains_after`` knows.
        update_parameters: what they take from the neuron, beside its threshold.
        resets_before_current: a reset to zero leaves the current of the same time step.
    """

    state_names: tuple[str, ...] = ("mem",)
    is_elementwise = True
    unit_gain_resets: tuple[str, ...] = ()
    known_updates: tuple[Callable[..., Any], ...] = ()
    update_parameters: tuple[str, ...] = ("beta",)
    resets_before_current = False

    mem: Tensor
    reset: Tensor
    recurrent: nn.Module
    alpha: Tensor
    beta: Tensor
    threshold: Tensor
    reset_mechanism: str
    noise: Noise | None
    _snn_state_function: Callable[[Tensor], Any]

    @property
    def is_markov(self) -> bool:
        """The last sample says all about the past: no state carries a graph through time."""
        return self.state_names == ("mem",) and isinstance(self.noise, MembraneNoise)

    @property
    def has_unit_gain(self) -> bool:
        """A current adds to the sampled membrane potential as it is, and to none of later steps."""
        return self.is_markov and self.reset_mechanism in self.unit_gain_resets

    @property
    def meets_threshold_twice(self) -> bool:
        """One noisy membrane potential is compared with a learned threshold before its reset and after it."""
        at_once = not getattr(self, "reset_delay", True) and self.reset_mechanism == "subtract"
        return at_once and isinstance(self.noise, MembraneNoise) and self.threshold.requires_grad

    @property
    def has_known_graph(self) -> bool:
        """A known update of which nothing is learned: its graph is known without being built."""
        if not (self._is_known and getattr(self, "reset_delay", True)):
            return False
        return not any(getattr(self, name).requires_grad for name in (*self.update_parameters, "threshold"))

    @property
    def _is_known(self) -> bool:
        return getattr(self._snn_state_function, "__func__", None) in self.known_updates

    def leak_and_share(self, one: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the next membrane potential takes of the last one, and of the current; None for all of that.

        Args:
            one: the number, in the dtype of the current.
        """
        return self.beta.clamp(0, 1), None

    def slopes(self) -> tuple[Tensor, Tensor | None]:
        """As ``leak_and_share``, without a graph and as the reset leaves it."""
        with torch.no_grad():
            leak, share = self.leak_and_share(self.mem.new_ones(()))
        if self.reset_mechanism == "zero":
            rest = 1 - self.reset
            leak = leak * rest
            if not self.resets_before_current:
                share = rest if share is None else share * rest
        return leak, share

    def gains_after(
        self, before: Sequence[Tensor | None], slopes: tuple[Tensor, Tensor | None] | None = None
    ) -> tuple[Tensor, ...]:
        """Derivatives of the next states, before noise, by a current that never changes; of a known update.

        Args:
            before: those of the last states, in the order of ``state_names``; None where they are zero.
            slopes: what ``slopes`` returns, where that is known.

        Returns:
            Tensors that broadcast against the states, in the same order.
        """
        *syn, mem = before
        leak, share = self.slopes() if slopes is None else slopes
        drive = self.mem.new_ones(())
        if syn and syn[0] is not None:
            drive = drive + syn[0] * self.alpha.detach().clamp(0, 1)
        gain = drive if share is None else drive * share
        if mem is not None:
            gain = gain + mem * leak
        return (drive, gain) if syn else (gain,)

    @property
    def recurrent_block(self) -> nn.Module | None:
        """The module between the neuron's own last spikes and its current, if it mixes neurons."""
        return self.recurrent if getattr(self, "all_to_all", False) else None

    @property
    def elementwise_parameters(self) -> dict[str, tuple[nn.Module, nn.Parameter]]:
        """Learned parameters that act on each neuron alone, with the module in which they are looked up."""
        found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
        if self.is_elementwise:
            own: Any = self
            inner = getattr(self, "recurrent", own)
            for module, name in (own, "alpha"), (own, "beta"), (own, "threshold"), (inner, "V"):
                value = getattr(module, name, None)
                if isinstance(value, nn.Parameter) and value.requires_grad:
                    found[name] = (module, value)
        return found

    def derive(
        self, input_: Tensor, parameter: str | None, tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Derivatives of the next states, each neuron's with respect to its own parameter or input current.

        Forward-mode differentiation of snnTorch's own state update, where it is not known; exact because that is
        element-wise.

        Args:
            input_: input current.
            parameter: name of an element-wise parameter; None for the input current, the same at all time steps.
            tangents: derivatives of the last states, in the order of ``state_names``; None where they are zero.

        Returns:
            Derivatives of the next states, in the same order.
        """
        if parameter is None and self._is_known:
            return self.gains_after(tangents)
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

    def update(self, input_: Tensor) -> Any:
        """The next states, by snnTorch's state update."""
        if not torch.is_grad_enabled() and self._leaks_in_one_dtype(input_):
            return self._leak(input_)
        return self._snn_state_function(input_)

    def _leaks_in_one_dtype(self, input_: Tensor) -> bool:
        same = self._is_known and self.resets_before_current
        return same and input_.dtype == self.mem.dtype == self.beta.dtype == self.threshold.dtype

    def _leak(self, input_: Tensor) -> Tensor:
        """snnTorch's update of Leaky, rounded alike, in one new tensor instead of four."""
        mem = self.mem * self.beta.clamp(0, 1)
        if self.reset_mechanism == "zero":
            mem.addcmul_(mem, self.reset, value=-1)
        mem.add_(input_)
        if self.reset_mechanism == "subtract":
            mem.addcmul_(self.reset, self.threshold, value=-1)
        return mem
