from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import BATCH, COUNTERFACTUAL, MAKERS, STEPS, Net, assert_same, data, gradients, nothing_changes

COPIES = 4

TARGETS = {
    "tensor": torch.arange(BATCH),
    "nested": (torch.arange(BATCH), {"boxes": torch.rand(BATCH, 2, 3), "ids": [torch.arange(BATCH * 2).view(-1, 2)]}),
    "with others": {
        "label": torch.arange(BATCH),
        "weight": 0.3,
        "name": "digits",
        "none": None,
        "t": torch.tensor(2.0),
    },
}


@pytest.mark.parametrize("estimator", ["vanilla", "exact"])
@pytest.mark.parametrize("kind", TARGETS)
def test_targets_arrive_repeated_copy_first_and_inputs_as_they_are(kind: str, estimator: str) -> None:
    net = Net()
    x, y = data()
    inputs = {"images": x}
    seen: list[Any] = []

    def loss_fn(inputs: Any, targets: Any) -> Tensor:
        seen.append((inputs, targets))
        return net.loss(inputs["images"], y.repeat(COPIES))

    MAKERS[estimator](net, COPIES).backward(loss_fn, inputs, TARGETS[kind])
    given, targets = seen[-1]
    assert given is inputs
    assert given["images"] is x

    def check(got: Any, original: Any) -> None:
        if isinstance(original, Tensor) and original.dim():
            assert torch.equal(got.view(COPIES, *original.shape), original.expand(COPIES, *original.shape))
        elif isinstance(original, dict):
            assert got.keys() == original.keys()
            for key in original:
                check(got[key], original[key])
        elif isinstance(original, (list, tuple)):
            assert type(got) is type(original)
            for one, other in zip(got, original, strict=True):
                check(one, other)
        else:
            assert got is original or torch.equal(got, original)

    check(targets, TARGETS[kind])


@pytest.mark.parametrize("estimator", MAKERS)
@pytest.mark.parametrize("targets", [None, (), {"weight": 2.0}], ids=str)
def test_there_may_be_no_targets(targets: Any, estimator: str) -> None:
    net, expected = Net(), Net()

    def loss_fn(net: Net) -> Any:
        return lambda x, y: net(x).square().sum(1)

    MAKERS[estimator](net, COPIES, seed=0).backward(loss_fn(net), data()[0], targets)
    MAKERS[estimator](expected, COPIES, seed=0).backward(loss_fn(expected), *data())
    assert_same(gradients(net), gradients(expected))


@pytest.mark.parametrize("estimator", ["vanilla", *COUNTERFACTUAL])
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_network_may_have_any_float_dtype(
    dtype: torch.dtype, loss_dtype: torch.dtype, estimator: str
) -> None:
    net, expected = Net().to(dtype), Net().to(dtype)
    x, y = data(dtype)
    loss = MAKERS[estimator](net, COPIES, seed=0).backward(lambda x, y: net.loss(x, y).to(loss_dtype), x, y)
    assert loss.dtype == loss_dtype
    assert {gradient.dtype for gradient in gradients(net).values()} == {dtype}
    MAKERS[estimator](expected, COPIES, seed=0).backward(expected.loss, x, y)
    assert_same(gradients(net), gradients(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_loss_without_gradient_trains_or_is_refused_before_any_gradient(dtype: torch.dtype) -> None:
    net, expected = Net(), Net()

    def fires(net: Net, dtype: torch.dtype) -> Any:
        return lambda x, y: (net(x).sum(1) > STEPS * net.readout.bias.sum()).to(dtype)

    slr.Vanilla(expected, 16, seed=0).backward(fires(expected, torch.float32), *data())
    assert expected.fc1.weight.grad.any()
    assert expected.readout.weight.grad is None
    try:
        slr.Vanilla(net, 16, seed=0).backward(fires(net, dtype), *data())
    except (TypeError, ValueError):
        assert dtype != torch.float32
        assert gradients(net) == {}
    else:
        assert_same(gradients(net), gradients(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("estimator", COUNTERFACTUAL)
def test_loss_without_gradient_is_refused_by_credit_before_any_gradient(estimator: str, dtype: torch.dtype) -> None:
    net = Net()
    with nothing_changes(net), pytest.raises(ValueError, match=r"no derivative.*estimator=\"vanilla\""):
        MAKERS[estimator](net, COPIES).backward(lambda x, y: (net(x).argmax(1) == y).to(dtype), *data())


@pytest.mark.parametrize("estimator", MAKERS)
@pytest.mark.parametrize("kind", ["membrane", "escape"])
def test_a_membrane_may_have_no_features(kind: str, estimator: str) -> None:
    net = nn.ModuleDict({"lif": slr.Leaky(beta=0.9, threshold=0.5, learn_beta=True, noise=kind)})

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mem, total = net["lif"].reset_mem(), torch.zeros(())
        for _ in range(3):
            spikes, mem = net["lif"](x, mem)
            total = total + spikes
        return (total - y).square()

    MAKERS[estimator](net, copies=4).backward(loss, torch.rand(6), torch.ones(6))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
