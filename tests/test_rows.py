"""Rows of noise copies inside ``loss_fn``: repeated where it is asked for, and explained where shapes do not fit."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import BATCH, FEATURES, STEPS, Net, data, gradients, nothing_changes

COPIES = 4
ESTIMATORS: dict[str, Any] = {
    "vanilla": lambda net: slr.Vanilla(net, COPIES, seed=0),
    "chunk": lambda net: slr.Vanilla(net, COPIES, chunk=3, seed=0),
    "replay": lambda net: slr.Vanilla(net, COPIES, memory="replay", seed=0),
    "approximate": lambda net: slr.Approximate(net, COPIES, seed=0),
    "counterfactual": lambda net: slr.Counterfactual(net, COPIES, seed=0),
    "exact": lambda net: slr.Counterfactual(net, COPIES, over_time="exact", seed=0),
}


class Skip(Net):
    """The input goes around both neurons too, and is to be found again in the output."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.fc2 = nn.Linear(4 + FEATURES, 4)
        self.readout = nn.Linear(4, FEATURES)
        self.seen: list[int] = []
        self.by_hand = by_hand

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        # The same at all time steps, as counterfactual and approximate ask of what enters a deeper block.
        still, out = x[:, 0], torch.zeros(())
        repeat = (lambda x: x.repeat(len(y) // BATCH, 1)) if self.by_hand else slr.per_copy
        self.seen.append(len(repeat(still)))
        for _ in range(STEPS):
            spikes = self.lif1(self.fc1(still))
            out = out + self.readout(self.lif2(self.fc2(torch.cat([spikes, repeat(still)], 1))))
        return (out - repeat(still)).square().mean(1)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_per_copy_is_repetition_by_hand(kind: str) -> None:
    nets = Skip(), Skip(by_hand=True)
    for net in nets:
        ESTIMATORS[kind](net).backward(net.loss, *data())
    torch.testing.assert_close(*map(gradients, nets))
    assert nets[0].seen == nets[1].seen
    # The first call looks ahead with two copies.
    assert set(nets[0].seen) <= {2 * BATCH, BATCH * COPIES, *([3 * BATCH, BATCH] if kind == "chunk" else [])}
    assert max(nets[0].seen) == (3 if kind == "chunk" else COPIES) * BATCH


def test_per_copy_is_the_identity_outside_an_estimator_and_the_second_time() -> None:
    net = Skip()
    x, y = data()
    assert slr.per_copy(x) is x
    net.loss(x, y).sum().backward()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        once = slr.per_copy(x)
        assert slr.per_copy(once) is once
        assert slr.per_copy(torch.ones(())).shape == ()
        return net.loss(x, y)

    slr.Vanilla(net, COPIES).backward(loss_fn, x, y)
    # Also after an error.
    with pytest.raises(ZeroDivisionError):
        slr.Vanilla(net, COPIES).backward(lambda *_: 1 / 0, x, y)
    assert slr.per_copy(x) is x


def test_per_copy_takes_the_batch_of_inputs_where_there_are_no_targets() -> None:
    net = Net()
    x, _ = data()
    slr.Vanilla(net, COPIES).backward(lambda x, _: (slr.per_copy(x[:, 0]).sum(1) - net(x).sum(1)).square(), x, None)


def test_per_copy_refuses_what_has_not_the_batch_first() -> None:
    net = Net()
    message = rf"per_copy takes a tensor with the batch first, here of {BATCH} samples.*\({STEPS}, {BATCH}, {FEATURES}"
    with nothing_changes(net), pytest.raises(ValueError, match=message):
        slr.Vanilla(net, COPIES).backward(lambda x, _: slr.per_copy(x.transpose(0, 1)), *data())


def wrong(net: Net) -> dict[str, Any]:
    other = copy.deepcopy(net)
    return {
        "view": lambda x, y: net.readout(net.lif2(net.lif1(net.fc1(x[:, 0])).view(len(x), -1))).sum(1),
        "accumulator": lambda x, y: (torch.zeros(len(x), 4) + net.lif1(net.fc1(x[:, 0]))).sum(1),
        "skip": lambda x, y: torch.cat([net.lif1(net.fc1(x[:, 0])), x[:, 0]], 1).sum(1),
        "another network": lambda x, y: other.loss(x, y),
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
@pytest.mark.parametrize("kind", wrong(Net()))
def test_errors_of_torch_inside_loss_fn_say_how_many_rows_there_are(kind: str) -> None:
    net = Net()
    with nothing_changes(net), pytest.raises((RuntimeError, ValueError)) as caught:
        slr.Vanilla(net, COPIES).backward(wrong(net)[kind], *data())
    (note,) = caught.value.__notes__
    for words in (
        f"{COPIES} noise copies of {BATCH} samples",
        f"{COPIES * BATCH} rows",
        "flatten(1)",
        "torch.zeros(())",
        "per_copy(x)",
        "the very network",
    ):
        assert words in note
