"""The exact expectation of a loss over all spike trains of a tiny network with escape noise, and its derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.estimators.recording import Copies, Recording, Step
from snntorch_lr.network import noisy_neurons
from snntorch_lr.noise_stream import NoiseStream

LossFn = Callable[[Tensor, Tensor], Tensor]


class ForcedStep(Step):
    """A time step whose rows fire as they are told."""

    recording: Forced

    def fire(self, noise: slr.EscapeNoise, margin: Tensor) -> Tensor:
        return self.recording.told(noise, margin)


class Forced(Recording):
    """A forward pass whose rows fire as they are told, with the probability of what they were told."""

    step_type = ForcedStep

    def __init__(self, net: nn.Module, bits: Tensor) -> None:
        super().__init__(Copies(noisy_neurons(net), NoiseStream(0, 1, 0, 1), len(bits)))
        self.bits = bits
        self.used = 0
        self.log_probability = torch.zeros(len(bits), dtype=torch.float64)

    def told(self, noise: slr.EscapeNoise, margin: Tensor) -> Tensor:
        count = margin[0].numel()
        spikes = self.bits[:, self.used : self.used + count].reshape(margin.shape)
        self.used += count
        z = (2 * spikes - 1) * margin / noise.sigma
        log_p = torch.special.log_ndtr(z) if noise.distribution == "gaussian" else nn.functional.logsigmoid(z)
        self.log_probability = self.log_probability + log_p.flatten(1).sum(1)
        return spikes


def expected_loss(net: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, count: int) -> float:
    """E[loss] of one sample, over all 2^count ways in which the neurons of a network can fire."""
    bits = (torch.arange(2**count).unsqueeze(1) >> torch.arange(count)).bitwise_and(1).double()
    forced = Forced(net, bits)
    with torch.no_grad(), forced:
        losses = loss_fn(x.expand(len(bits), *x.shape[1:]), y.expand(len(bits), *y.shape[1:]))
    assert forced.used == count
    return float((forced.log_probability.exp() * losses).sum())


def exact_gradient(
    net: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, count: int, step: float = 1e-5
) -> dict[str, Tensor]:
    """Central differences of the exact expectation, by parameter; the mean over the samples."""
    found = {}
    for name, parameter in net.named_parameters():
        gradient = torch.zeros_like(parameter)
        flat = parameter.data.view(-1)
        for index in range(flat.numel()):
            before = float(flat[index])
            values = []
            for sign in (1, -1):
                flat[index] = before + sign * step
                values.append(
                    sum(expected_loss(net, loss_fn, x[i : i + 1], y[i : i + 1], count) for i in range(len(x)))
                )
            flat[index] = before
            gradient.view(-1)[index] = (values[0] - values[1]) / (2 * step * len(x))
        found[name] = gradient
    return found
