"""Networks and random numbers left as they were found: gradients, modes, buffers, states of neurons."""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .network import parameters, spiking_neurons


@dataclass(frozen=True)
class RandomState:
    """State of the global random generators of torch, on the CPU and on every CUDA device in use, NumPy and Python."""

    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> RandomState:
        """The state now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), python_random.getstate())

    def restore(self) -> None:
        """Goes back to the state that was captured."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        python_random.setstate(self.python)


class Buffers:
    """Buffers of a network, to undo updates of them; states of neurons are not among them.

    Args:
        net: the network.
        statistics_only: only those of normalisations in training mode, which forward passes update.
    """

    def __init__(self, net: nn.Module, statistics_only: bool = False) -> None:
        neurons = {neuron for _, neuron in spiking_neurons(net)}
        self._saved = [
            (module, name, buffer, buffer.clone())
            for module in net.modules()
            if module not in neurons and (not statistics_only or (isinstance(module, _NormBase) and module.training))
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Puts back what was captured."""
        for module, name, buffer, value in self._saved:
            # A graph that was built meanwhile holds the buffer, but does not read it: not to be counted as a change.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def left_as_found(
    *nets: nn.Module,
    gradients: bool = False,
    modes: bool = False,
    buffers: bool = False,
    states: bool = False,
    random: bool = False,
) -> Iterator[None]:
    """Context after which networks and random numbers are as before, whatever happens in it.

    Args:
        *nets: the networks.
        gradients: ``.grad`` of the parameters, which is None at the start of the context.
        modes: training or evaluation, module by module.
        buffers: all buffers outside the neurons, such as running statistics.
        states: states and other attributes of the neurons.
        random: the global generators of torch, NumPy and Python.

    Examples:
        >>> with left_as_found(net, modes=True):
        ...     logits = net.eval()(images)
    """
    with ExitStack() as at_end:
        if random:
            at_end.callback(RandomState.capture().restore)
        for net in nets:
            if buffers:
                at_end.callback(Buffers(net).restore)
            for _, neuron in spiking_neurons(net) if states else ():
                at_end.callback(_restore_attributes, neuron, dict(vars(neuron)), dict(neuron._buffers))
                # What λ is fitted by is collected in an object, from here on in another one.
                vars(neuron).pop("_control", None)
            if modes:
                at_end.callback(_restore_modes, [(module, module.training) for module in net.modules()])
            for parameter in parameters(net) if gradients else ():
                at_end.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
        yield


def _restore_attributes(neuron: nn.Module, attributes: dict[str, Any], states: dict[str, Tensor | None]) -> None:
    vars(neuron).clear()
    vars(neuron).update(attributes)
    neuron._buffers.clear()
    neuron._buffers.update(states)


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:
            module.training = training
