from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr import objectives
from snntorch_lr.noise import DISTRIBUTIONS

from .helpers import assert_same, gradients


class Net(nn.Module):
    """Two hidden layers and a readout; the first current is constant, and computed once or in every step."""

    def __init__(self, noise: Any = "membrane", hoisted: bool = True, reset: str = "subtract") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.readout = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.lif1 = slr.Leaky(beta=0.9, init_hidden=True, reset_mechanism=reset, threshold=0.3)
        self.lif2 = slr.Leaky(beta=0.9, init_hidden=True, reset_mechanism=reset, threshold=0.3)
        kind, _, distribution = noise.partition(" ")
        slr.add_noise(self, 0.4, kind=kind, distribution=distribution or "gaussian")
        self.hoisted = hoisted
        self.calls = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        self.calls += 1
        current, total = self.fc1(x), torch.zeros(())
        for _ in range(5):
            given = current if self.hoisted else self.fc1(x)
            total = total + self.readout(self.lif2(self.fc2(self.lif1(given))))
        return total

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y, reduction="none")


class OneLayer(Net):
    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        current, total = self.fc1(x), torch.zeros(())
        for _ in range(5):
            given = current if self.hoisted else self.fc1(x)
            total = total + self.readout(self.lif1(given)[:, :7])
        return total


X = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1])
NOISES = ["membrane", "membrane logistic", "escape gaussian", "escape logistic"]


def estimate(net: nn.Module, estimator: Any, loss: Any) -> dict[str, Tensor]:
    net.zero_grad()
    estimator.backward(loss, X, Y)
    return gradients(net)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", [Net, OneLayer])
def test_a_current_that_stays_the_same_gives_the_same_gradient(kind: type[Net], noise: str, reset: str) -> None:
    found = [
        estimate(net, slr.Controlled(net, 6, seed=3), net.loss)
        for net in (kind(noise, True, reset), kind(noise, False, reset))
    ]
    assert_same(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise", NOISES)
def test_the_gradient_varies_less(noise: str) -> None:
    net = OneLayer(noise)

    def variance(estimator: Any) -> float:
        found = []
        for _ in range(60):
            net.zero_grad()
            estimator.backward(net.loss, X, Y)
            found.append(net.fc1.weight.grad.flatten().clone())
        return torch.stack(found).var(0).sum().item()

    assert variance(slr.Controlled(net, 16, seed=0)) < 0.7 * variance(slr.Vanilla(net, 16, seed=0))


def test_without_a_derivative_of_the_loss_it_is_vanilla() -> None:
    net = Net()
    slr.remove_noise(net)
    net.out = slr.Leaky(beta=0.9, init_hidden=True, output=True, reset_mechanism="none", noise=True).double()
    slr.add_noise(net)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        for _ in range(3):
            _, mem = net.out(net.readout(net.lif2(net.fc2(net.lif1(net.fc1(x))))))
        return objectives.zero_one(mem, y)

    one, other = (estimate(net, kind(net, 8, seed=2), loss) for kind in (slr.Controlled, slr.Vanilla))
    assert_same(one, other)


def test_the_loss_is_called_once_more_and_returned_as_it_is() -> None:
    net = Net()
    loss = slr.Controlled(net, 4, seed=1).backward(net.loss, X, Y)
    assert net.calls == 2
    net.zero_grad()
    torch.testing.assert_close(loss, slr.Vanilla(net, 4, seed=1).backward(net.loss, X, Y))


def test_the_extra_pass_leaves_the_random_state_alone() -> None:
    net = Net()
    dropout = nn.Dropout(0.5)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(dropout(x), y)

    for estimator in (slr.Controlled, slr.Vanilla):
        torch.manual_seed(4)
        net.zero_grad()
        estimator(net, 4, seed=1).backward(loss, X, Y)
        after = torch.rand(3)
        if estimator is slr.Controlled:
            kept = after
    assert torch.equal(kept, after)


@pytest.mark.parametrize("antithetic", [False, True])
def test_no_copy_has_a_coefficient_that_depends_on_its_own_noise(antithetic: bool) -> None:
    estimator = slr.Controlled(Net(), 8, antithetic=antithetic)
    losses, control = torch.rand(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = estimator._fit(losses, control)
    for copy in range(8):
        # In a pair both have the same noise, but for its sign.
        same_noise = {copy, (copy + 4) % 8} if antithetic else {copy}
        changed = losses.clone()
        changed[copy] *= 3
        changed = estimator._fit(changed, control) != before
        assert changed.any()
        assert not changed[list(same_noise)].any()


def test_too_few_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="copies >= 4"):
        slr.Controlled(Net(), 3)


def test_allocated_copies_may_be_controlled() -> None:
    net = Net("escape logistic")
    hook = slr.attach(torch.optim.SGD(net.parameters(), 0.1), net, "allocated-controlled", copies=8)
    before = net.fc1.weight.clone()
    hook.optimizer.step(slr.closure(net.loss, X, Y))
    assert not torch.equal(before, net.fc1.weight)
    assert min(hook.estimator.parts) == 4


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chances_are_the_distribution_of_the_noise(distribution: str) -> None:
    z = torch.linspace(-4, 4, 81, dtype=torch.float64, requires_grad=True)
    noise = slr.MembraneNoise(distribution=distribution)
    chance, density = noise.chances(z.detach())
    reference = {
        "gaussian": torch.distributions.Normal(0.0, 1.0).cdf,
        "laplace": torch.distributions.Laplace(0.0, 1.0).cdf,
        "logistic": torch.sigmoid,
    }[distribution](z)
    torch.testing.assert_close(chance, reference.detach(), rtol=1e-6, atol=1e-9)
    (slope,) = torch.autograd.grad(reference.sum(), z)
    torch.testing.assert_close(density, slope, rtol=1e-6, atol=1e-9)
