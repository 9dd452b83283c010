"""All findings about a network, a loss and an optimizer at once."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snntorch_lr as slr

from .helpers import assert_same

X, Y = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Net(nn.Sequential):
    def __init__(self, noise: bool = True) -> None:
        torch.manual_seed(0)
        neuron = slr.Leaky(beta=0.9, init_hidden=True, noise=noise) if noise else snn.Leaky(beta=0.9, init_hidden=True)
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), neuron, nn.Linear(8, 3))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(slr.rollout(self, 3 * x, num_steps=5).mean(0), y, reduction="none")


def test_a_network_that_is_well_has_no_findings_and_is_left_as_it_was() -> None:
    net = Net()
    net(X)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mem, state = net[2].mem, torch.get_rng_state()
    findings = slr.check(net, net.loss, X, Y, optimizer=torch.optim.Adam(net.parameters()))
    assert isinstance(findings, slr.Findings)
    assert findings
    assert not findings.found
    assert str(findings) == "nothing found"
    assert_same(dict(net.state_dict()), before)
    assert net[2].mem is mem
    assert torch.equal(torch.get_rng_state(), state)
    assert bool((net[0].weight.grad == 1).all())


def test_the_estimator_is_that_of_the_optimizer() -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    mean = {"loss_fn": lambda x, y: net.loss(x, y).mean(), "inputs": X, "targets": Y, "optimizer": optimizer}
    assert slr.check(net, **mean)
    hook = slr.attach(optimizer, net, "vanilla", copies=2)
    assert "one loss" in str(slr.check(net, **mean).errors[0])
    assert slr.check(net, estimator="counterfactual", **mean)
    hook.remove()
    assert slr.check(net, **mean)


def test_errors_of_network_and_optimizer_are_found_at_once() -> None:
    net = Net()
    with torch.no_grad():
        net[2].noise.log_sigma.fill_(float("nan"))
        net[0].weight[0, 0] = float("inf")
    other = torch.optim.Adam(Net().parameters())
    findings = slr.check(net, estimator="vanilla", optimizer=other)
    assert not findings
    for error, part in zip(findings.errors, ("sigma must be", "0.weight has", "optimizer holds none"), strict=True):
        assert part in str(error)
        assert str(error).startswith("error: ")
    (batch_norm,) = findings.warnings
    assert "BatchNorm 1 is in training mode" in batch_norm.message


@pytest.mark.parametrize(
    ("estimator", "loss", "message"),
    [
        ("vanilla", lambda net: lambda x, y: net.loss(x, y).mean(), "one loss per sample"),
        ("vanilla", lambda net: lambda x, y: net.loss(x, y) + net[2].mem.mean(), "other rows"),
        ("counterfactual", lambda net: lambda x, y: x @ x, "RuntimeError in loss_fn"),
        ("counterfactual", lambda net: lambda x, y: torch.zeros(len(y)), "ran none of 2"),
        ("counterfactual", lambda net: lambda x, y: net.loss(x, y) * torch.nan, "are not finite"),
        ("counterfactual", lambda net: lambda x, y: (net.loss(x, y) > 1).float(), "no derivative"),
        ("counterfactual", lambda net: lambda x, y: net.eval().loss(x, y), "ran none of 2 (Leaky)"),
        ("counterfactual", lambda net: lambda x, y: detached(net, x, y), "did not reach 2 (Leaky)"),
        ("counterfactual", lambda net: penalised(net), "create_graph=True"),
    ],
)
def test_what_is_wrong_with_a_loss_is_an_error(estimator: str, loss: Any, message: str) -> None:
    net = Net()
    net[1].eval()
    errors = slr.check(net, loss(net), X, Y, estimator=estimator).errors
    assert [message in error.message for error in errors] == [True]


def detached(net: Net, x: Tensor, y: Tensor) -> Tensor:
    slr.reset(net)
    return nn.functional.cross_entropy(net[3](net[2](net[0](3 * x)).detach()), y)


def penalised(net: Net) -> Any:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        losses = net.loss(x, y)
        (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses + slope.square().sum(1)

    return loss


@pytest.mark.parametrize(
    "loss",
    [
        lambda net: lambda x, y: net.loss(x, y).mean(),
        lambda net: lambda x, y: net.loss(x, y).mean() + net[2].mem.mean().square(),
        lambda net: lambda x, y: net.loss(torch.cat([x, -x]), torch.cat([y, y])).view(2, -1).mean(),
        lambda net: lambda x, y: net.loss(x, y) - net.loss(x.flip(0), y).mean(),
    ],
    ids=["a mean", "coupled rows", "two views", "two presentations"],
)
def test_any_loss_with_a_derivative_is_well_for_counterfactual_credit(loss: Any) -> None:
    net = Net()
    findings = slr.check(net, loss(net), X, Y)
    assert not findings.found
    attached = slr.attach(torch.optim.SGD(net.parameters(), 0.1), net)
    attached.optimizer.step(slr.closure(loss(net), X, Y))


def test_a_computed_state_is_a_warning_whenever_one_asks() -> None:
    net = slr.Leaky(beta=0.9, noise=True)
    fc = nn.Linear(4, 3)
    both = nn.Sequential(fc, net)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mem = net.reset_mem()
        for _ in range(3):
            _, mem = net(fc(x), mem)
            mem = mem * (y > 0).float()[:, None]
        return nn.functional.cross_entropy(mem, y)

    for _ in range(2):
        findings = slr.check(both, loss, X, Y)
        assert findings
        assert ["membrane potential was computed" in warning.message for warning in findings.warnings] == [True]
    assert not net.warned


def test_a_layer_that_the_loss_does_not_reach_is_a_warning() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(4, 8), slr.Leaky(beta=0.9, noise=True), nn.Linear(8, 3), slr.Leaky(0.9, noise=True)])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        spikes, _ = net[1](net[0](3 * x), net[1].reset_mem())
        spikes, _ = net[3](net[2](spikes.detach()), net[3].reset_mem())
        return nn.functional.cross_entropy(spikes, y)

    findings = slr.check(net, loss, X, Y)
    assert findings
    assert any("did not reach 1 (Leaky)" in warning.message for warning in findings.warnings)


def test_what_counterfactual_credit_learned_of_its_variance_stays() -> None:
    net = Net()
    slr.use_gradient(net, "counterfactual")
    net.loss(X, Y).mean().backward()
    pending, steps = net[2].control.pending.clone(), net[2].control.steps
    sums = net[2].noise.control.clone()
    assert not slr.check(net, net.loss, X, Y).found
    assert torch.equal(net[2].control.pending, pending)
    assert torch.equal(net[2].noise.control, sums)
    assert net[2].control.steps == steps


def test_what_an_estimator_refuses_and_warns_of_is_found() -> None:
    lstm = nn.Sequential(slr.SLSTM(4, 4, init_hidden=True, noise=True), nn.Linear(4, 3))
    assert slr.check(lstm, estimator="vanilla")
    lstm.append(slr.Leaky(beta=0.9, inhibition=True, init_hidden=True, noise=True))
    first, second = slr.check(lstm, lambda x, y: slr.rollout(lstm, x, num_steps=2).mean(0).square().sum(1), X, Y).errors
    assert "LSTM" in first.message
    assert "inhibition" in second.message
    net = Net()
    nn.init.constant_(net[0].weight, 0)
    nn.init.constant_(net[0].bias, 0)
    net[1].eval()
    net[2].noise.log_sigma.data.fill_(-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        findings = slr.check(net, net.loss, X, Y)
    assert findings
    assert any("never fired" in warning.message for warning in findings.warnings)


def test_an_error_of_the_optimizer_hides_none_of_the_loss() -> None:
    net = Net()
    other = torch.optim.Adam(Net().parameters())
    findings = slr.check(net, lambda x, y: net.loss(x, y).mean(), X, Y, estimator="vanilla", optimizer=other)
    assert ["optimizer holds none" in findings.errors[0].message, len(findings.errors)] == [True, 2]


def test_checkpointing_a_single_step_of_a_state_that_is_held_is_found() -> None:
    net = Net()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        hidden = [checkpoint(lambda z: net[2](net[0](z)), 3 * x, use_reentrant=False) for _ in range(2)]
        return nn.functional.cross_entropy(net[3](hidden[1]), y)

    (error,) = slr.check(net, loss, X, Y).errors
    assert "activation checkpointing" in error.message


@pytest.mark.parametrize("estimator", ["vanilla", "approximate", "counterfactual"])
def test_a_loss_that_goes_back_through_a_graph_of_its_own_is_well(estimator: str) -> None:
    """As one that makes adversarial images."""
    net, teacher = Net(), nn.Linear(4, 3)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            near = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(teacher(near).square().sum(), near)
        return net.loss(x + 0.1 * slope.sign(), y)

    net[1].eval()
    assert slr.check(net, loss, X, Y, estimator=estimator)
    attached = slr.attach(torch.optim.SGD(net.parameters(), 0.1), net, estimator, copies=4)
    attached.optimizer.step(slr.closure(loss, X, Y))


def test_a_network_without_noise_and_an_unknown_estimator() -> None:
    (error,) = slr.check(Net(noise=False)).errors
    assert isinstance(error, slr.Finding)
    assert "has no noisy neuron" in error.message
    with pytest.raises(ValueError, match="choose one of counterfactual"):
        slr.check(Net(), estimator="exact")


def test_an_error_of_shapes_says_how_many_rows_there_are() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif, self.readout = nn.Linear(4, 4), slr.Leaky(beta=0.9, noise=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            current = self.fc(x)
            spikes, _ = self.lif(current, self.lif.reset_mem())
            return self.readout(torch.cat([spikes, current], 1))

    net = Skip()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x), y, reduction="none")

    assert not slr.check(net, loss, X, Y).found
    (error,) = slr.check(net, loss, X, Y, copies=2).errors
    assert "Sizes of tensors must match" in error.message
    assert sys.version_info < (3, 11) or "per_copy(x)" in error.message
