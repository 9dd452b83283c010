"""Small float64 networks with two noisy layers, everything that can be learned learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import snntorch_lr as slr

STEPS, BATCH, INPUTS, HIDDEN = 4, 2, 3, 2

# Every class whose neurons do not mix their inputs, with everything learned that can be.
NEURONS: dict[str, Callable[..., Any]] = {
    "Leaky": lambda **k: slr.Leaky(beta=0.7, learn_beta=True, **k),
    "Leaky, reset at once": lambda **k: slr.Leaky(beta=0.7, learn_beta=True, reset_delay=False, **k),
    "Lapicque": lambda **k: slr.Lapicque(R=1.0, C=2.0, time_step=1, **k),
    "Synaptic": lambda **k: slr.Synaptic(alpha=0.5, beta=0.7, learn_alpha=True, learn_beta=True, **k),
    "Alpha": lambda **k: slr.Alpha(alpha=0.8, beta=0.6, learn_beta=True, **k),
    "RLeaky, one to one": lambda **k: slr.RLeaky(beta=0.7, learn_beta=True, all_to_all=False, V=0.4, **k),
    "RSynaptic, one to one": lambda **k: slr.RSynaptic(
        alpha=0.5, beta=0.7, learn_alpha=True, learn_beta=True, all_to_all=False, V=0.4, **k
    ),
}
ALL_TO_ALL: dict[str, Callable[..., Any]] = {
    "RLeaky": lambda **k: slr.RLeaky(beta=0.7, learn_beta=True, linear_features=HIDDEN, **k),
    "RSynaptic": lambda **k: slr.RSynaptic(
        alpha=0.5, beta=0.7, learn_alpha=True, learn_beta=True, linear_features=HIDDEN, **k
    ),
}


class TwoLayers(nn.Module):
    """Linear, neuron, Linear, neuron, Linear readout, driven by an input that changes over time."""

    def __init__(self, neuron: str, reset: str, noise_level: float = 0.6, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        make = (NEURONS | ALL_TO_ALL)[neuron]
        settings = dict(reset_mechanism=reset, learn_threshold=True, init_hidden=True, **options)
        self.fc1 = nn.Linear(INPUTS, HIDDEN)
        self.lif1 = make(threshold=0.8, noise=slr.MembraneNoise(noise_level), **settings)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.lif2 = make(threshold=0.7, noise=slr.MembraneNoise(torch.tensor([0.5, 0.7])), **settings)
        self.readout = nn.Linear(HIDDEN, 2)
        self.double()
        with torch.no_grad():
            for p in (self.fc1.weight, self.fc2.weight, self.readout.weight):
                p.mul_(1.5)
            for b in (self.fc1.bias, self.fc2.bias):
                b.add_(0.4)

    def forward(self, x: Tensor) -> Tensor:
        """From ``[batch, time, inputs]`` to ``[batch, 2]``."""
        slr.reset(self)
        out = torch.zeros(())
        for step in x.unbind(1):
            out = out + self.readout(self.lif2(self.fc2(self.lif1(self.fc1(step)))))
        return out

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) - y).square().sum(1)


def groups(net: nn.Module) -> dict[str, list[str]]:
    """Learned parameters by kind: those whose gradient has a term of its own."""
    kinds: dict[str, list[str]] = {}
    for name, parameter in net.named_parameters():
        head, _, kind = name.rpartition(".")
        if parameter.requires_grad:
            kind = "recurrent" if "recurrent" in head or kind == "V" else "readout" if head == "readout" else kind
            kinds.setdefault(kind, []).append(name)
    return kinds


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(BATCH, STEPS, INPUTS, generator=generator, dtype=torch.float64) * 1.5
    return x, torch.tensor([[1.0, -1.0], [0.0, 2.0]], dtype=torch.float64)
