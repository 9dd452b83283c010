"""The exact expectation of a loss over all spike trains of a tiny network with escape noise, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.network import noisy_neurons

LossFn = Callable[[Tensor, Tensor], Tensor]


class Told:
    """Neurons that fire as they are told in a plain forward pass, with the probability of what they were told.

    Outside any estimator: only the noise is replaced, by one that is beyond any margin.
    """

    def __init__(self, net: nn.Module, bits: Tensor) -> None:
        self.neurons = list(noisy_neurons(net).values())
        self.bits = bits
        self.used = 0
        self.log_probability = torch.zeros(len(bits), dtype=torch.float64)

    def __enter__(self) -> Told:
        self._stack = ExitStack()
        for neuron in self.neurons:
            self._stack.enter_context(mock.patch.object(neuron.noise, "sample", partial(self._sample, neuron)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _sample(self, neuron: slr.Leaky, shape: torch.Size, mem: Tensor) -> Tensor:
        count = mem[0].numel()
        signs = 2 * self.bits[:, self.used : self.used + count].reshape(mem.shape) - 1
        self.used += count
        noise = neuron.noise
        z = signs * (mem - neuron.threshold) / noise.sigma
        log_p = torch.special.log_ndtr(z) if noise.distribution == "gaussian" else nn.functional.logsigmoid(z)
        self.log_probability = self.log_probability + log_p.flatten(1).sum(1)
        return signs


@torch.no_grad()
def expected_loss(net: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, count: int) -> float:
    """E[loss], the mean over samples, over all 2^count ways in which the neurons of a network can fire."""
    bits = (torch.arange(2**count).unsqueeze(1) >> torch.arange(count)).bitwise_and(1).double()
    # One pass for all samples.
    rows = (value.repeat_interleave(len(bits), 0) for value in (x, y))
    with Told(net, bits.repeat(len(x), 1)) as told:
        losses = loss_fn(*rows)
    assert told.used == count
    return float((told.log_probability.exp() * losses).sum()) / len(x)


def exact_derivative(
    net: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, count: int, direction: dict[str, Tensor], step: float = 1e-5
) -> float:
    """Central difference of the exact expectation along a direction."""
    parameters = dict(net.named_parameters())
    start = {name: parameters[name].detach().clone() for name in direction}
    values = []
    for shift in (step, -step):
        for name, vector in direction.items():
            parameters[name].data.copy_(start[name] + shift * vector)
        values.append(expected_loss(net, loss_fn, x, y, count))
    for name, value in start.items():
        parameters[name].data.copy_(value)
    return (values[0] - values[1]) / (2 * step)


def exact_gradient(net: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, count: int) -> dict[str, Tensor]:
    """Central differences of the exact expectation, by parameter."""
    found = {}
    for name, parameter in net.named_parameters():
        units = torch.eye(parameter.numel(), dtype=parameter.dtype).view(-1, *parameter.shape)
        values = [exact_derivative(net, loss_fn, x, y, count, {name: unit}) for unit in units]
        found[name] = torch.tensor(values, dtype=parameter.dtype).view_as(parameter)
    return found
