"""Questions about autograd graphs."""

from __future__ import annotations

import torch

from snntorch_lr.graph import ancestors, version


def test_ancestors_are_all_nodes_once_and_stop_at_detached_values_and_where_told() -> None:
    a = torch.ones(2, requires_grad=True)
    double = a * 2
    total = (double + double).sum()
    detached = (double.detach() * a).sum()
    nodes = list(ancestors([total, total]))
    assert len(nodes) == len(set(nodes))
    assert {total.grad_fn, double.grad_fn} < set(nodes)
    assert double.grad_fn not in set(ancestors([detached]))
    assert len(list(ancestors([total], lambda node: node is double.grad_fn))) == len(nodes) - 1


def test_deep_graphs_are_no_problem() -> None:
    value = torch.ones(1, requires_grad=True)
    for _ in range(5000):
        value = value + 1
    assert len(list(ancestors([value]))) == 5001


def test_changes_in_place_are_counted_where_torch_counts_them() -> None:
    x = torch.ones(2)
    before = version(x)
    x.add_(1)
    assert version(x) == before + 1
    with torch.inference_mode():
        assert version(torch.ones(2).add_(1)) == 0
