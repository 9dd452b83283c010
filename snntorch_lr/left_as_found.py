"""Running a forward pass again, as if for the first time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .network import spiking_neurons


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
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Goes back to the state that was captured."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


class Statistics:
    """Running statistics of the BatchNorm layers of a network, to undo further updates."""

    def __init__(self, net: nn.Module) -> None:
        self._saved = [
            (buffer, buffer.clone())
            for module in net.modules()
            if isinstance(module, _BatchNorm) and module.training
            for buffer in module.buffers()
        ]

    def restore(self) -> None:
        """Puts back what was captured."""
        for buffer, value in self._saved:
            # A graph that was built meanwhile holds the buffer, but does not read it: not to be counted as a change.
            buffer.data.copy_(value)


@contextmanager
def trial(net: nn.Module) -> Iterator[None]:
    """Context that leaves no trace of forward passes: random numbers, running statistics and states are put back."""
    before, statistics = RandomState.capture(), Statistics(net)
    neurons = [(neuron, dict(vars(neuron)), dict(neuron._buffers)) for _, neuron in spiking_neurons(net)]
    try:
        yield
    finally:
        for neuron, attributes, states in neurons:
            vars(neuron).clear()
            vars(neuron).update(attributes)
            neuron._buffers.clear()
            neuron._buffers.update(states)
        statistics.restore()
        before.restore()
