"""Running a forward pass again, as if for the first time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class RandomState:
    """State of torch's global random generators, on the CPU and on every CUDA device in use."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def capture(cls) -> RandomState:
        """The state now."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])

    def restore(self) -> None:
        """Goes back to the state that was captured."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


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
