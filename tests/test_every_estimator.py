"""What a loop of one's own may expect of every estimator; ``test_estimators`` says the same of ``Vanilla`` and more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import BATCH, COUNTERFACTUAL, FEATURES, MAKERS, STEPS, Net, assert_same, data, gradients

COPIES = 4
every_estimator = pytest.mark.parametrize("estimator", ["approximate", *COUNTERFACTUAL])
with_credit = pytest.mark.parametrize("estimator", COUNTERFACTUAL)


def estimate(estimator: str, net: Net, x: Tensor | None = None, y: Tensor | None = None, **options: Any) -> Any:
    net.zero_grad()
    given = data() if x is None or y is None else (x, y)
    MAKERS[estimator](net, **{"copies": COPIES, "seed": 0, **options}).backward(net.loss, *given)
    return gradients(net)


@pytest.mark.parametrize("again", [False, True], ids=["for another step", "after its last one"])
@pytest.mark.parametrize("estimator", ["approximate", "rates"])
def test_a_current_that_changes_in_place_is_refused_where_currents_are_summed(estimator: str, again: bool) -> None:
    neuron, readout = slr.Leaky(beta=0.8, noise=True), nn.Linear(FEATURES, 1)
    net = nn.ModuleList([neuron, readout])
    change = nn.Parameter(torch.full((FEATURES,), 0.3))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        current, mem = x[:, 0] * change, neuron.reset_mem()
        out = torch.zeros(())
        for step in range(STEPS):
            spikes, mem = neuron(current, mem)
            if again or step == STEPS - 1:
                current.add_(change)
            out = out + readout(spikes).squeeze(1)
        return out

    with pytest.raises(ValueError, match=r"changed in place.*current = current \+ change"):
        MAKERS[estimator](net, COPIES).backward(loss_fn, *data())
    assert change.grad is None


@with_credit
def test_a_step_whose_gradient_overflows_leaves_the_control_as_it_was(estimator: str) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES, seed=0)
    made.backward(net.loss, *data())
    before = dict(made.control)
    # The root of zero has an infinite slope, and no value that a check of the losses could see.
    made.backward(lambda x, y: (net.loss(x, y) * 0).sqrt(), *data())
    assert not gradients(net)["fc1.weight"].isfinite().all()
    assert made.control == before
    made.backward(net.loss, *data())
    assert made.control != before


@with_credit
def test_an_error_in_the_backward_pass_has_no_part_in_later_steps(estimator: str) -> None:
    found = []
    for fails in (False, True):
        net = Net()
        made = MAKERS[estimator](net, COPIES, seed=0)
        made.backward(net.loss, *data())
        state = made.state_dict()
        if fails:
            handle = net.fc1.weight.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                made.backward(net.loss, *data())
            handle.remove()
            made.load_state_dict(state)
        net.zero_grad()
        made.backward(net.loss, *data())
        found.append({**gradients(net), **made.control})
    assert_same(*found)


@pytest.mark.parametrize("copies", [1, 2])
@with_credit
def test_one_copy_is_enough(estimator: str, copies: int) -> None:
    net = Net()
    made = MAKERS[estimator](net, copies, seed=0)
    made.backward(net.loss, *data())
    rows: list[int] = []
    net.readout.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    made.backward(net.loss, *data())
    assert rows == [copies * BATCH] * STEPS
    assert all(gradient.any() for gradient in gradients(net).values())


@with_credit
def test_gradient_is_filled_inside_no_grad(estimator: str) -> None:
    net = Net()
    with torch.no_grad():
        got = estimate(estimator, net)
    assert_same(got, estimate(estimator, Net()))


@pytest.mark.parametrize("shift", [0.0, 0.5])
@with_credit
def test_states_of_every_step_may_be_learned(estimator: str, shift: float) -> None:
    neuron = slr.Synaptic(alpha=0.5, beta=0.9, threshold=0.5, noise=True)
    readout = nn.Linear(FEATURES, 1)
    start = torch.full((FEATURES,), shift, requires_grad=True)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        syn, mem = start.expand(BATCH, FEATURES), torch.zeros(BATCH, FEATURES)
        out = torch.zeros(())
        for t in range(STEPS):
            spikes, syn, mem = neuron(x[:, t], syn, mem)
            out = out + readout(spikes).squeeze(1)
        return out

    MAKERS[estimator](neuron, COPIES).backward(loss_fn, *data())
    assert start.grad is not None
    assert start.grad.all()


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda estimator: pickle.loads(pickle.dumps(estimator)),
}
