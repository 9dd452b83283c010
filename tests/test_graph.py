from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snntorch_lr.graph import ancestors, leaves, origin


def test_leaves_are_the_parameters_that_a_backward_pass_reaches() -> None:
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    frozen = torch.ones(2)
    found = leaves([(a * b).sum() + a.sum() + (c * frozen).detach().sum()])
    assert {id(leaf) for leaf in found} == {id(a), id(b)}
    assert len(found) == 2
    assert leaves([frozen]) == []


def test_ancestors_are_all_nodes_once_and_stop_at_detached_values() -> None:
    a = torch.ones(2, requires_grad=True)
    double = a * 2
    total = (double + double).sum()
    detached = (double.detach() * a).sum()
    nodes = list(ancestors([total, total]))
    assert len(nodes) == len(set(nodes))
    assert {total.grad_fn, double.grad_fn} < set(nodes)
    assert double.grad_fn not in set(ancestors([detached]))


def test_deep_graphs_are_no_problem() -> None:
    value = torch.ones(1, requires_grad=True)
    for _ in range(5000):
        value = value + 1
    assert len(list(ancestors([value]))) == 5001


IMAGES = torch.rand(4, 1, 8, 8)


def layers(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    if kind == "linear without bias":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6, bias=False), nn.Linear(6, 6))
    pool = nn.MaxPool2d(2) if kind == "max" else nn.AvgPool2d(2)
    return nn.Sequential(nn.Conv2d(1, 2, 3, bias=kind == "max"), pool)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "max", "average"])
def test_what_is_computed_again_has_the_same_origin(kind: str) -> None:
    net = layers(kind)
    first, second = net(IMAGES), net(IMAGES)
    assert origin(first) is not None
    assert origin(first) == origin(second)
    assert origin(first) != origin(layers(kind)(IMAGES))
    assert origin(first) != origin(net(IMAGES.clone()))
    assert origin(net(IMAGES) + net(IMAGES)) == origin(first + second)
    assert origin(first + second) != origin(first)


@pytest.mark.parametrize("kind", ["linear", "max"])
@pytest.mark.parametrize("what", ["weight", "bias", "input", "result", "stride"])
def test_what_was_changed_in_between_has_another_origin(kind: str, what: str) -> None:
    net, x = layers(kind), IMAGES.clone()
    layer: Any = net[1] if kind == "linear" else net[0]
    first = net(x)
    before = origin(first)
    with torch.no_grad():
        if what == "weight":
            layer.weight.mul_(2)
        elif what == "bias":
            layer.bias.add_(1)
        elif what == "input":
            x.add_(1)
    if what == "stride" and kind == "max":
        layer.stride = (2, 2)
    second = net(x)
    if what == "result":
        with torch.no_grad():
            second.mul_(2)
    if what == "stride" and kind == "linear":
        second = 2 * second
    assert origin(second) != before or origin(second) is None


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: nn.functional.dropout(x, 0.5),
        lambda x: x.sigmoid(),
        lambda x: x + 1,
        lambda x: nn.functional.linear(x.detach(), torch.ones(6, 6)),
        lambda x: nn.functional.linear(x.detach(), torch.ones(6, 6, requires_grad=True), torch.ones(6)),
    ],
)
def test_where_a_graph_does_not_tell_there_is_no_origin(compute: Callable[[Tensor], Tensor]) -> None:
    assert origin(compute(layers("linear")(IMAGES))) is None


def test_what_waits_for_its_own_gradient_has_no_origin() -> None:
    first, second = layers("linear")(IMAGES), layers("linear")(IMAGES)
    first.register_hook(lambda gradient: gradient)
    second.retain_grad()
    assert origin(first) is None
    assert origin(second) is None
