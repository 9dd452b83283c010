"""BatchNorm in training mode behind noisy neurons."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

STEPS, BATCH, COPIES = 3, 6, 2


def network(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    neurons = [slr.Leaky(beta=0.8, threshold=0.3, init_hidden=True, noise="escape") for _ in range(2)]
    return nn.Sequential(nn.Linear(4, 5), neurons[0], nn.Linear(5, 5), norm, neurons[1], nn.Linear(5, 3))


def gradient(net: nn.Sequential, over_time: str) -> Tensor:
    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(slr.rollout(net, x, num_steps=STEPS).mean(0), y, reduction="none")

    x = torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(1))
    estimator = slr.Counterfactual(net, copies=COPIES, seed=0, over_time=over_time)
    estimator.backward(loss_fn, x, torch.arange(BATCH) % 3)
    return net[2].weight.grad.clone()


@pytest.mark.parametrize("over_time", ["rates", "exact"])
def test_running_statistics_are_updated_once_in_each_time_step_of_a_call(over_time: str) -> None:
    net = network(nn.BatchNorm1d(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(net, over_time)
    assert net[3].num_batches_tracked == STEPS
    assert not torch.equal(net[3].running_mean, torch.zeros(5))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.LayerNorm(5), nn.GroupNorm(1, 5)], ids=str)
def test_rates_keep_the_time_steps_of_a_layer_behind_a_normalisation(norm: nn.Module) -> None:
    net = network(norm)
    rates = gradient(net, "rates")
    net.zero_grad()
    assert torch.allclose(rates, gradient(net, "exact"), rtol=1e-4, atol=1e-7)


def test_frozen_statistics_leave_sums_over_time() -> None:
    net = network(nn.BatchNorm1d(5).eval())
    rates = gradient(net, "rates")
    net.zero_grad()
    assert not torch.allclose(rates, gradient(net, "exact"), rtol=1e-2)
