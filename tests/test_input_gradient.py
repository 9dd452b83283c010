"""The gradient with respect to inputs; that it points the right way, the tests of gate G7 say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr

from .helpers import Net, assert_same, data, nothing_changes

ESTIMATORS: dict[str, dict[str, Any]] = {
    "rates": {},
    "exact": {"over_time": "exact"},
    "vanilla": {"estimator": "vanilla"},
}


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_network_the_inputs_and_their_gradients_are_left_alone(options: dict[str, Any]) -> None:
    net = Net()
    net.fc2.bias.requires_grad_(False)
    x, y = data()
    before = x.clone()
    with nothing_changes(net):
        found = slr.input_gradient(net, net.loss, x, y, 4, seed=0, **options)
    assert found.shape == x.shape
    assert found.any()
    assert not found.requires_grad
    assert x.grad is None
    assert torch.equal(x, before)
    assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["fc2.bias"]


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
def test_each_sample_has_the_gradient_of_its_own_loss(options: dict[str, Any]) -> None:
    net = Net()
    # A loss that is linear in the inputs, which no spike has a part in.
    x, y = data()
    weights = torch.arange(1.0, 1 + len(x))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        scale = weights.repeat(len(y) // len(weights))
        spikes = net(x)
        return spikes.sum(1) * 0 + scale * x.repeat(len(y) // len(x), 1, 1).sum((1, 2))

    found = slr.input_gradient(net, loss_fn, x, y, 4, seed=0, **options)
    torch.testing.assert_close(found, weights[:, None, None].expand_as(x))


@pytest.mark.parametrize(("copies", "chunk"), [(6, 2), (5, 2), (3, 8)])
def test_copies_in_chunks_are_averaged(copies: int, chunk: int) -> None:
    net, x, y = Net(), *data()
    counts = [min(chunk, copies - done) for done in range(0, copies, chunk)]
    torch.manual_seed(0)
    found = slr.input_gradient(net, net.loss, x, y, copies, chunk, over_time="exact", control=0.5)
    torch.manual_seed(0)
    parts = [slr.input_gradient(net, net.loss, x, y, count, count, over_time="exact", control=0.5) for count in counts]
    expected = sum(count * part for count, part in zip(counts, parts, strict=True)) / copies
    assert_same({"x": found}, {"x": expected}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "evolution"}, "choose one of counterfactual, vanilla, approximate"),
        ({"copies": 0}, "copies must be a positive integer"),
        ({"chunk": 0}, "chunk must be a positive integer"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        slr.input_gradient(net, net.loss, *data(), **options)


def test_losses_that_do_not_depend_on_the_inputs_are_refused_and_nothing_stays_frozen() -> None:
    net, (x, y) = Net(), data()
    with nothing_changes(net), pytest.raises(ValueError, match=r"requires_grad_\(\) on .* the inputs"):
        slr.input_gradient(net, lambda _, targets: net.loss(x, targets), x, y)
    assert all(parameter.requires_grad for parameter in net.parameters())
