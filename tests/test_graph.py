from __future__ import annotations

import torch

from snntorch_lr.graph import ancestors, leaves


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
