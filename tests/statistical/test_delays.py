"""Delays between layers: every tap of a convolution over time gets its gradient, and so does the layer before it."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

from ..helpers import MAKERS

pytestmark = pytest.mark.statistical
STEPS, TAPS, INPUTS, HIDDEN = 5, 3, 3, 4
LIMIT = 0.05


class Delayed(nn.Conv1d):
    """Spikes of so many steps back, zeros before the start: ``[rows, time, in]`` to ``[rows, time, out]``."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, TAPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x.transpose(1, 2), (TAPS - 1, 0))).transpose(1, 2)


class Layered(nn.Module):
    """Each layer runs over all time steps before the next; the loss is linear in the spikes of the last one."""

    def __init__(self) -> None:
        super().__init__()
        widths = INPUTS, HIDDEN, HIDDEN
        self.delays = nn.ModuleList(Delayed(*pair) for pair in pairwise(widths))
        self.neurons = nn.ModuleList(snn.Leaky(beta=0.6, threshold=0.4) for _ in self.delays)
        self.readout = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        for delay, neuron in zip(self.delays, self.neurons, strict=True):
            mem, record = neuron.reset_mem(), []
            for current in delay(x).unbind(1):
                spikes, mem = neuron(current, mem)
                record.append(spikes)
            x = torch.stack(record, 1)
        return self.readout(x.mean(1))[:, 0]


@functools.cache
def gradient(estimator: str, **options: float) -> list[Tensor]:
    """Mean gradient of the weights of both convolutions over many noise copies, ``[out, in, taps]``."""
    torch.manual_seed(3)
    net = slr.add_noise(Layered(), sigma=0.8, kind="escape", learn=False)
    x, calls = torch.rand(1, STEPS, INPUTS), 80 if estimator == "vanilla" else 24
    made = MAKERS[estimator](net, copies=5_000, seed=4, **options)
    for _ in range(calls):
        made.backward(lambda x, _: net(x), x, torch.zeros(1))
    return [delay.weight.grad / calls for delay in net.delays]


def errors(layer: int, **options: float) -> tuple[Tensor, Tensor]:
    """Of each tap's counterfactual gradient along the vanilla one, and in all, as parts of the length of that."""
    expected = gradient("vanilla")[layer]
    error = gradient("counterfactual", **options)[layer] - expected
    square = expected.square().sum((0, 1))
    return (error * expected).sum((0, 1)).abs() / square, (error.square().sum((0, 1)) / square).sqrt()


@pytest.mark.parametrize("layer", [0, 1])
def test_every_tap_gets_its_gradient(layer: int) -> None:
    along, error = errors(layer, discount=1.0)
    assert along.max() < LIMIT
    # In the first layer the error of the vanilla gradient itself is 3 %.
    assert error.max() < 2 * LIMIT


def test_a_discount_leaves_a_part_of_the_reset_out() -> None:
    unbiased, without_reset = (errors(1, discount=discount)[0][-1] for discount in (1.0, 0.0))
    assert without_reset > LIMIT > 4 * unbiased
