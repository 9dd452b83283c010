from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr

from .helpers import Net, assert_same, data, gradients, nothing_changes

COPIES = 8


def estimate(estimator: Any, net: Net, loss_fn: Any = None) -> dict[str, Tensor]:
    net.zero_grad()
    loss = estimator.backward(loss_fn or net.loss, *data())
    return {"loss": loss, **gradients(net)}


def test_equal_losses_get_equal_copies() -> None:
    allocated = slr.Allocated(Net(), COPIES)
    assert allocated.allocate(torch.full((10,), 2.3)).tolist() == [COPIES] * 10
    assert allocated.allocate(torch.zeros(10)).tolist() == [COPIES] * 10


def test_hard_samples_get_more_and_all_together_get_what_they_would() -> None:
    allocated = slr.Allocated(Net(), COPIES)
    losses = torch.logspace(-4, 1, 200)
    counts = allocated.allocate(losses)
    assert set(counts.tolist()) == {2, 8, 32}
    assert bool((counts.diff() >= 0).all())
    assert 0.9 * COPIES < counts.double().mean() <= COPIES


def test_one_hard_sample_gets_the_most_that_is_allowed() -> None:
    counts = slr.Allocated(Net(), COPIES).allocate(torch.tensor([0.0] * 30 + [5.0]))
    assert counts[-1] == 32


def test_a_level_of_one_is_the_estimator_itself() -> None:
    net = Net()
    alone = estimate(slr.Vanilla(net, COPIES, seed=3), net)
    assert_same(estimate(slr.Allocated(net, COPIES, seed=3, levels=[1]), net), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"estimator": "approximate"}, {"memory": "replay"}, {"antithetic": True}])
def test_runs_what_it_is_made_of(options: dict[str, Any]) -> None:
    net = Net()
    found = estimate(slr.Allocated(net, COPIES, seed=3, **options), net)
    assert all(value.isfinite().all() for value in found.values())
    assert found["fc1.weight"].any()
    assert_same(found, estimate(slr.Allocated(net, COPIES, seed=3, **options), net))


def test_samples_are_weighted_by_their_number() -> None:
    net = Net()
    exact = estimate(slr.Vanilla(net, 64), net, lambda x, y: net.readout.bias.sum() * (1 + y))
    allocated = slr.Allocated(net, COPIES)
    allocated.allocate = lambda losses: torch.tensor([2, 8, 32, 8, 2])  # type: ignore[method-assign]
    found = estimate(allocated, net, lambda x, y: net.readout.bias.sum() * (1 + y) + 0 * net.loss(x, y))
    assert_same({"b": found["readout.bias"]}, {"b": exact["readout.bias"]}, rtol=1e-5, atol=1e-6)


def test_inputs_with_time_first() -> None:
    net = Net()
    x, y = data()
    batch_first = slr.Allocated(net, COPIES, seed=3)
    batch_first.backward(net.loss, x, y)
    expected = gradients(net)
    net.zero_grad()
    time_first = slr.Allocated(net, COPIES, seed=3, batch_dim=1)
    time_first.backward(lambda x, y: net.loss(x.transpose(0, 1), y), x.transpose(0, 1).contiguous(), y)
    assert_same(gradients(net), expected, rtol=1e-5, atol=1e-6)


def test_refuses_inputs_that_are_not_a_batch() -> None:
    net = Net()
    x, y = data()
    with pytest.raises(ValueError, match=r"dimension 0 .*\(4, 5, 3\).*batch_dim="), nothing_changes(net):
        slr.Allocated(net, COPIES).backward(lambda x, y: net.loss(x.transpose(0, 1), y), x.transpose(0, 1), y)


def test_refuses_to_run_without_targets() -> None:
    net = Net()
    with pytest.raises(ValueError, match="no targets"):
        slr.Allocated(net, COPIES).backward(lambda x, y: net(x).sum(1), data()[0], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "vanilla, approximate"),
        ({"levels": []}, "levels"),
        ({"levels": [0, 1]}, "levels"),
        ({"memory": "disk"}, "memory"),
    ],
)
def test_refuses_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slr.Allocated(Net(), **{"copies": COPIES, **options})


@pytest.mark.parametrize(("options", "least"), [({"copies": 2}, 2), ({"copies": 4, "estimator": "controlled"}, 4)])
def test_says_that_there_is_nothing_to_allocate(options: dict[str, Any], least: int) -> None:
    with pytest.warns(UserWarning, match=f"{least} copies leave nothing to allocate"):
        slr.Allocated(Net(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slr.Allocated(Net(), levels=[1], **options)
        slr.Allocated(Net(), **options | {"copies": least + 1})


def test_negative_losses_are_allocated_too() -> None:
    net = Net()
    found = estimate(slr.Allocated(net, COPIES), net, lambda x, y: net.loss(x, y) - 100)
    assert found["loss"] < 0


def test_the_optimizer_hook_takes_it() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.attach(optimizer, net, slr.Allocated(net, COPIES))
    before = net.fc1.weight.detach().clone()
    loss = optimizer.step(slr.closure(net.loss, *data()))
    assert loss.isfinite()
    assert not torch.equal(net.fc1.weight, before)


def test_an_error_in_one_level_leaves_the_gradients_of_before() -> None:
    net = Net()
    x, y = data()
    allocated = slr.Allocated(net, COPIES)
    allocated.allocate = lambda losses: torch.tensor([2, 2, 2, 2, 32])  # type: ignore[method-assign]
    allocated.backward(net.loss, x, y)

    def fails_for_many_copies(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        return losses * torch.nan if len(y) == 32 else losses

    with pytest.raises(ValueError, match="not finite"), nothing_changes(net):
        allocated.backward(fails_for_many_copies, x, y)


def test_gradients_are_added_to_those_of_before() -> None:
    net = Net()
    once = estimate(slr.Allocated(net, COPIES, seed=3), net)
    slr.Allocated(net, COPIES, seed=3).backward(net.loss, *data())
    twice = gradients(net)
    assert_same(twice, {name: 2 * once[name] for name in twice}, rtol=1e-5, atol=1e-6)
