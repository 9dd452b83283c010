"""Delays between layers: every tap of a convolution over time gets its gradient, and so does the layer before it."""

from __future__ import annotations

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

from .enumeration import exact_gradient

pytestmark = pytest.mark.statistical
STEPS, TAPS, WIDTH, CALLS = 3, 3, 2, 12
LIMIT = 0.04


class Delayed(nn.Conv1d):
    """Spikes of so many steps back, zeros before the start: ``[rows, time, in]`` to ``[rows, time, out]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x.transpose(1, 2), (TAPS - 1, 0))).transpose(1, 2)


class Layered(nn.Module):
    """Each layer runs over all time steps before the next; the loss is linear in the spikes of the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.delays = nn.ModuleList(Delayed(WIDTH, WIDTH, TAPS) for _ in range(2))
        self.neurons = nn.ModuleList(snn.Leaky(beta=0.6, threshold=0.4) for _ in self.delays)
        self.readout = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for delay, neuron in zip(self.delays, self.neurons, strict=True):
            mem, record = neuron.reset_mem(), []
            for current in delay(x).unbind(1):
                spikes, mem = neuron(current, mem)
                record.append(spikes)
            x = torch.stack(record, 1)
        return self.readout(x.mean(1))[:, 0]


def test_every_tap_gets_its_gradient_and_without_a_discount_that_of_the_reset_too() -> None:
    net = slr.add_noise(Layered().double(), sigma=0.8, kind="escape", learn=False)
    data = torch.rand(1, STEPS, WIDTH).double(), torch.zeros(1).double()
    expected = exact_gradient(net, lambda x, _: net(x), *data, count=STEPS * 2 * WIDTH)
    errors = {}
    for discount in (1.0, 0.0):
        net.zero_grad()
        # λ adds an error of second order where two neurons decide everything.
        estimator = slr.Counterfactual(net, copies=5000, seed=4, discount=discount, control=0.0)
        for _ in range(CALLS):
            estimator.backward(lambda x, _: net(x), *data)
        for layer, delay in enumerate(net.delays):
            exact = expected[f"delays.{layer}.weight"]
            # Of each tap, as a part of the length of its gradient.
            square = (delay.weight.grad / CALLS - exact).square().sum((0, 1)) / exact.square().sum((0, 1))
            errors[layer, discount] = square.sqrt()
    assert max(errors[0, 1.0].max(), errors[1, 1.0].max()) < LIMIT
    # The last tap is that of the current time step, behind which there is most to reset.
    assert errors[1, 0.0][-1] > LIMIT > 3 * errors[1, 1.0][-1]
