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


def test_errors_of_network_and_optimizer_are_found_at_once() -> None:
    net = Net()
    with torch.no_grad():
        net[2].noise.log_sigma.fill_(float("nan"))
        net[0].weight[0, 0] = float("inf")
    other = torch.optim.Adam(Net().parameters())
    findings = slr.check(net, estimator="vanilla", optimizer=other)
    assert not findings
    assert len(findings.errors) == 3
    for said, part in zip(
        findings.errors, ("sigma must be positive", "0.weight has values", "optimizer holds none"), strict=True
    ):
        assert part in str(said)
        assert str(said).startswith("error: ")
    (batch_norm,) = findings.warnings
    assert "BatchNorm 1 is in training mode" in batch_norm.message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net: lambda x, y: net.loss(x, y).mean(), "one loss per sample"),
        (lambda net: lambda x, y: net.loss(x, y) + net[2].mem.mean(), "other rows"),
        (lambda net: lambda x, y: x @ x, "RuntimeError in loss_fn"),
        (lambda net: lambda x, y: torch.zeros(len(y)), "ran none of 2"),
        (lambda net: lambda x, y: net.loss(x, y) * torch.nan, "are not finite"),
    ],
)
def test_what_is_wrong_with_a_loss_is_an_error(loss: Any, message: str) -> None:
    net = Net()
    (error,) = slr.check(net, loss(net), X, Y).errors
    assert message in error.message


def test_what_an_estimator_refuses_and_warns_of_is_found() -> None:
    lstm = nn.Sequential(slr.SLSTM(4, 4, init_hidden=True, noise=True), nn.Linear(4, 3))
    assert slr.check(lstm, estimator="vanilla")
    (error,) = slr.check(lstm, lambda x, y: slr.rollout(lstm, x, num_steps=2).mean(0).square().sum(1), X, Y).errors
    assert "LSTM" in error.message
    net = Net()
    nn.init.constant_(net[0].weight, 0)
    nn.init.constant_(net[0].bias, 0)
    net[1].eval()
    net[2].noise.log_sigma.data.fill_(-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        findings = slr.check(net, net.loss, X, Y)
    assert findings
    assert any("never fired" in each.message for each in findings.warnings)


def test_an_error_of_the_optimizer_hides_none_of_the_loss() -> None:
    net = Net()
    findings = slr.check(net, lambda x, y: net.loss(x, y).mean(), X, Y, optimizer=torch.optim.Adam(Net().parameters()))
    assert ["optimizer holds none" in findings.errors[0].message, len(findings.errors)] == [True, 2]


def test_checkpointing_around_a_noisy_neuron_is_found() -> None:
    net = Net()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        hidden = checkpoint(lambda z: net[2](net[1](net[0](z))), 3 * x, use_reentrant=False)
        return nn.functional.cross_entropy(net[3](hidden), y, reduction="none")

    errors = slr.check(net, loss, X, Y, estimator="vanilla").errors
    assert any("gradient checkpointing" in error.message for error in errors)


@pytest.mark.parametrize(("estimator", "options"), [("vanilla", {"memory": "replay"}), ("approximate", {})])
def test_a_loss_that_goes_back_through_a_graph_of_its_own_is_well(estimator: str, options: dict[str, Any]) -> None:
    """As one that makes adversarial images: a trial run that keeps no tensors is made again with them."""
    net, teacher = Net(), nn.Linear(4, 3)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            near = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(teacher(near).square().sum(), near)
        return net.loss(x + 0.1 * slope.sign(), y)

    net[1].eval()
    assert slr.check(net, loss, X, Y, estimator=estimator, **options)
    attached = slr.attach(torch.optim.SGD(net.parameters(), 0.1), net, estimator, copies=4, **options)
    attached.optimizer.step(slr.closure(loss, X, Y))


def test_a_network_without_noise_and_an_unknown_estimator() -> None:
    (error,) = slr.check(Net(noise=False)).errors
    assert isinstance(error, slr.Finding)
    assert "has no noisy neuron" in error.message
    with pytest.raises(ValueError, match="choose one of counterfactual"):
        slr.check(Net(), estimator="exact")


def test_documented_old_names_still_import() -> None:
    with pytest.warns(DeprecationWarning, match="snntorch_lr.storing is snntorch_lr.estimators.storing now"):
        from snntorch_lr.storing import Storing
    from snntorch_lr.estimators import vanilla

    assert Storing is vanilla.Storing
    with pytest.warns(DeprecationWarning, match="snntorch_lr.experiments.models is snntorch_lr.experiments.recipe now"):
        from snntorch_lr.experiments import models
    assert isinstance(models.build("mlp", (1, 8, 8)), torch.nn.Module)


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
    (found,) = slr.check(net, lambda x, y: nn.functional.cross_entropy(net(x), y, reduction="none"), X, Y).errors
    assert "Sizes of tensors must match" in found.message
    assert sys.version_info < (3, 11) or "per_copy(x)" in found.message
