"""A tiny spiking network trained on scikit-learn's digits, and copies of it that only look robust."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import replace
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snntorch_lr.experiments import data
from snntorch_lr.robustness import Descent, suite
from snntorch_lr.robustness.suites import Transfer

QUICK = Descent(steps=2, length=0.5)
TRANSFER = replace(suite(["transfer"])[0], run=Transfer(QUICK))
"""Evaluations transfer images in any case: that of the suites takes 20 steps."""


class Net(nn.Module):
    """64-32-10 with direct coding over 2 steps; logits are the mean membrane potential, or scaled spike rates."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.hidden = snn.Leaky(beta=0.9, init_hidden=True)
        self.readout = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        current = self.first(self.encode(images))
        return torch.stack([self.readout(self.hidden(current)) for _ in range(2)]).mean(0)

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def digits(count: int = 48) -> tuple[Tensor, Tensor]:
    images = data.load("digits")
    return images.test[:count], images.test_labels[:count]


@functools.cache
def _trained() -> Net:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    images, net = data.load("digits"), Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(60):
        rows = torch.randperm(len(images.train))[:256]
        net.hidden.reset_mem()
        optimizer.zero_grad()
        F.cross_entropy(net(images.train[rows]), images.train_labels[rows]).backward()
        optimizer.step()
    net.hidden.reset_mem()
    torch.set_rng_state(state)
    return net


def trained() -> Net:
    """A copy of its own for each test, in evaluation mode."""
    return deepcopy(_trained()).eval()


class _Blind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, margin: Tensor) -> Tensor:
        return (margin > 0).to(margin.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def with_zero_gradient() -> Net:
    net = trained()
    net.hidden.spike_grad = _Blind.apply
    return net


def with_steep_surrogate() -> Net:
    """The derivative of an arctangent 1,000 times as steep as snnTorch's default."""
    net = trained()
    net.hidden.spike_grad = snn.surrogate.atan(alpha=2000.0)
    return net


class Unreset(Net):
    """Keeps a membrane potential of its own, which nothing resets."""

    left: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        current = self.first(self.encode(images))
        if self.left is not None and self.left.shape == current.shape:
            current = current + 0.5 * self.left
        self.left = current.detach() if self.detached else current
        return torch.stack([self.readout(self.hidden(current)) for _ in range(2)]).mean(0)

    detached = True


def with_unreset_state(detached: bool) -> Net:
    net = Unreset()
    net.load_state_dict(trained().state_dict())
    net.detached = detached
    return net.eval()


def with_saturated_rates() -> Net:
    """Logits so far apart that the cross-entropy has no gradient left."""
    net = trained()
    net.readout.weight.data *= 1e3
    net.readout.bias.data *= 1e3
    return net


class Reseeding(Net):
    """Noise of its own, from a seed that it sets itself: the same in each call, and so no noise at all."""

    def encode(self, images: Tensor) -> Tensor:
        torch.manual_seed(3)
        return (images + 0.2 * torch.randn_like(images)).flatten(1)


def with_seed_of_its_own() -> Net:
    net = Reseeding()
    net.load_state_dict(trained().state_dict())
    return net.eval()
