"""What went wrong in silence once: it is right now, or an error before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr.estimators.base import Estimator

from .helpers import Net, assert_same, data, gradients, nothing_changes

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "store": lambda net, **options: slr.Vanilla(net, 8, **options),
    "replay": lambda net, **options: slr.Vanilla(net, 8, memory="replay", **options),
    "chunk": lambda net, **options: slr.Vanilla(net, 8, chunk=3, **options),
    "approximate": lambda net, **options: slr.Approximate(net, 8, **options),
    "rates": lambda net, **options: slr.Counterfactual(net, **options),
    "exact": lambda net, **options: slr.Counterfactual(net, over_time="exact", **options),
}
every_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


@every_estimator
@pytest.mark.parametrize("pixel", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("noise", ["membrane", "escape"])
def test_a_pixel_that_is_not_finite_is_an_error_before_anything_changes(make: Any, pixel: float, noise: str) -> None:
    net = Net(noise=noise)
    estimator = make(net)
    x, y = data()
    estimator.backward(net.loss, x, y)
    x[1, 2, 0] = pixel
    with nothing_changes(net), pytest.raises(ValueError, match=r"in fc1\.weight.*\. 1 of 60 numbers"):
        estimator.backward(net.loss, x, y)
    net.zero_grad()
    estimator.backward(net.loss, *data())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    if isinstance(estimator, slr.Counterfactual):
        assert all(control.sums.isfinite().all() for control in estimator._controls.values())


def test_running_statistics_are_put_back_after_a_gradient_that_is_not_finite() -> None:
    net = Net()
    net.fc1 = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x, y = data()
    x[0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="BatchNorm"), pytest.raises(ValueError, match="not finite"):
        slr.Vanilla(net).backward(net.loss, x, y)
    assert net.fc1[1].running_mean.isfinite().all()


@pytest.mark.parametrize("make", [ESTIMATORS["replay"], ESTIMATORS["chunk"]])
def test_an_error_in_the_middle_of_a_call_leaves_every_gradient(make: Any) -> None:
    net, calls = Net(), 0

    def fails_late(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        losses = net.loss(x, y)
        calls += torch.is_grad_enabled()
        if calls > 1 and torch.is_grad_enabled():
            raise KeyError("late")
        return losses

    with nothing_changes(net), pytest.raises(KeyError, match="late"):
        make(net).backward(fails_late, *data())


def test_gradients_are_added_to_those_that_were_there_also_where_they_are_sparse() -> None:
    net = Net()
    net.fc1 = nn.EmbeddingBag(5, 4, sparse=True)
    tokens, y = torch.arange(5 * 4 * 2).view(5, 4, 2) % 5, data()[1]
    estimator = slr.Vanilla(net, seed=0)
    estimator.backward(net.loss, tokens, y)
    first = net.fc1.weight.grad.to_dense()
    state = slr.Vanilla(net, seed=0)
    state.backward(net.loss, tokens, y)
    torch.testing.assert_close(net.fc1.weight.grad.to_dense(), 2 * first)


def half_are_seven_tenths(spikes: Tensor) -> Tensor:
    spikes[:, :2] = 0.7
    return spikes


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "dropout": (lambda s: F.dropout(s, inplace=True), F.dropout),
    "factor": (lambda s: s.mul_(0.5), lambda s: s * 0.5),
    "slice": (half_are_seven_tenths, lambda s: half_are_seven_tenths(s.clone())),
}


def seeded_gradients(make: Any, change: Callable[[Tensor], Tensor], **options: Any) -> dict[str, Tensor]:
    """Of two calls, with spikes that are changed before the next block."""
    net = Net(**options)
    net.fc2 = nn.Sequential(Changed(change), net.fc2)
    net.readout = nn.Sequential(Changed(change), net.readout)
    estimator = make(net, seed=0)
    torch.manual_seed(0)
    for _ in range(2):
        estimator.backward(net.loss, *data())
    return gradients(net)


class Changed(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = change


@every_estimator
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("in_place", "copied"), IN_PLACE.values(), ids=IN_PLACE)
def test_spikes_that_are_changed_in_place_give_the_gradient_of_a_changed_copy(
    make: Any, in_place: Callable[[Tensor], Tensor], copied: Callable[[Tensor], Tensor], learned: bool
) -> None:
    found = [seeded_gradients(make, change, learn_beta=learned) for change in (in_place, copied)]
    assert_same(*found, rtol=1e-5, atol=1e-7)


@every_estimator
@pytest.mark.parametrize(("in_place", "copied"), IN_PLACE.values(), ids=IN_PLACE)
def test_escape_spikes_that_are_changed_in_place_are_right_or_an_error(
    make: Any, in_place: Callable[[Tensor], Tensor], copied: Callable[[Tensor], Tensor]
) -> None:
    if not isinstance(make(Net()), slr.Counterfactual):
        with pytest.raises(RuntimeError, match="changed in place"):
            seeded_gradients(make, in_place, noise="escape")
        return
    found = [seeded_gradients(make, change, noise="escape") for change in (in_place, copied)]
    assert_same(*found, rtol=1e-5, atol=1e-7)


@every_estimator
def test_what_a_block_changes_after_it_was_used_is_an_error_as_it_is_in_autograd(make: Any) -> None:
    net = Net()

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = x.sigmoid()
            return hidden * 1 + hidden.mul_(2)

    net.readout = nn.Sequential(net.readout, Block())
    with nothing_changes(net), pytest.raises(RuntimeError, match=r"in.?place"):
        make(net).backward(net.loss, *data())


def test_what_overflows_in_float16_is_left_to_a_grad_scaler_unless_the_inputs_are_not_finite() -> None:
    net = Net().half()
    x, y = data(torch.float16)
    estimator = slr.Vanilla(net)
    estimator.backward(lambda x, y: net.loss(x, y).float() * 2.0**40, x, y)
    assert not all(p.grad.isfinite().all() for p in net.parameters())
    x[0, 0, 0] = torch.nan
    with nothing_changes(net), pytest.raises(ValueError, match="1 of 60 numbers"):
        estimator.backward(net.loss, x, y)
