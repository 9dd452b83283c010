"""Noise copies inside ``loss_fn``: who repeats rows, and what is said where they do not fit."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr.copies import Copies

from .helpers import BATCH, FEATURES, MAKERS, STEPS, Net, data, every_estimator, gradients, nothing_changes

COPIES = 4


def rows_fed_to(module: nn.Module) -> list[int]:
    """Number of rows of each input that a module gets from now on."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


@every_estimator
def test_only_what_follows_the_first_noisy_neuron_is_computed_for_every_copy(estimator: str) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES)
    # The first call looks at other passes too.
    made.backward(net.loss, *data())
    rows = [rows_fed_to(module) for module in (net.fc1, net.fc2, net.readout)]
    made.backward(net.loss, *data())
    assert [lengths[:STEPS] for lengths in rows] == [[BATCH] * STEPS, *[[COPIES * BATCH] * STEPS] * 2]


def test_a_noise_free_neuron_before_the_first_noisy_one_is_not_copied() -> None:
    net = nn.Sequential(snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(3, 2), slr.Leaky(beta=0.9, noise=True))
    rows = [rows_fed_to(module) for module in net]
    slr.Vanilla(net, COPIES).backward(lambda x, y: net(x[:, 0])[0].sum(1), *data())
    assert {count for lengths in rows for count in lengths} == {BATCH}


class Skip(Net):
    """The input goes around both neurons too, and is to be found again in the output."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.fc2 = nn.Linear(4 + FEATURES, 4)
        self.readout = nn.Linear(4, FEATURES)
        self.by_hand = by_hand

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        # The same at all time steps, as approximate asks of what enters a deeper block.
        still, out = x[:, 0], torch.zeros(())
        repeated = still.repeat(len(y) // BATCH, 1) if self.by_hand else slr.per_copy(still)
        assert len(repeated) == len(y)
        for _ in range(STEPS):
            spikes = self.lif1(self.fc1(still))
            out = out + self.readout(self.lif2(self.fc2(torch.cat([spikes, repeated], 1))))
        return (out - repeated).square().mean(1)


@every_estimator
def test_per_copy_is_repetition_by_hand(estimator: str) -> None:
    nets = Skip(), Skip(by_hand=True)
    for net in nets:
        MAKERS[estimator](net, COPIES, seed=0).backward(net.loss, *data())
    torch.testing.assert_close(*map(gradients, nets))


def test_per_copy_is_the_identity_outside_of_an_estimator_and_the_second_time() -> None:
    net, (x, y) = Skip(), data()
    assert slr.per_copy(x) is x
    slr.use_gradient(net)
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


def test_what_has_not_the_batch_first_is_refused() -> None:
    net = Net()
    said = rf"per_copy has {STEPS} rows, but there are {BATCH} samples in {COPIES} copies: .*\[time, batch"
    with nothing_changes(net), pytest.raises(ValueError, match=said):
        slr.Vanilla(net, COPIES).backward(lambda x, _: slr.per_copy(x.transpose(0, 1)), *data())
    said = rf"enters Leaky has {STEPS} rows, but there are {BATCH} samples"
    with nothing_changes(net), pytest.raises(ValueError, match=said):
        slr.Vanilla(net, COPIES).backward(lambda x, _: net.lif1(net.fc1(x.transpose(0, 1))), *data())


@every_estimator
def test_states_are_copied_by_hand_and_by_name(estimator: str) -> None:
    def found(repeated: bool, name: bool) -> dict[str, Tensor]:
        neuron = slr.Leaky(beta=0.9, learn_beta=True, noise=True)
        start = 2 * torch.rand(BATCH, FEATURES, generator=torch.Generator().manual_seed(0))

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            mem = slr.per_copy(start) if repeated else start
            spikes, _ = neuron(x[:, 0], mem=mem) if name else neuron(x[:, 0], mem)
            return F.cross_entropy(spikes, y, reduction="none")

        MAKERS[estimator](neuron, COPIES, seed=0).backward(loss_fn, *data())
        return gradients(neuron)

    expected = found(repeated=True, name=False)
    assert expected["beta"].any()
    for repeated, name in ((False, False), (False, True), (True, True)):
        torch.testing.assert_close(found(repeated, name), expected, rtol=0, atol=0)


def test_a_state_of_a_noise_free_readout_is_the_users() -> None:
    neuron = slr.Leaky(beta=0.9, noise=True)
    readout = snn.Leaky(beta=1.0, reset_mechanism="none")
    net = nn.ModuleList([neuron, readout])

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        spikes, _ = neuron(x[:, 0], neuron.reset_mem())
        return readout(0 * spikes, torch.full((COPIES * BATCH, FEATURES), 7.0)[: len(spikes)])[1].mean(1)

    assert slr.Vanilla(net, COPIES).backward(loss_fn, *data()).item() == pytest.approx(7)


def test_one_copy_of_counterfactual_credit_takes_any_rows_and_any_loss() -> None:
    net = Net(noise="escape")
    x, y = data()

    def triplets(x: Tensor, y: Tensor) -> Tensor:
        anchor, same, other = net(torch.cat([x, x.flip(0), x.flip(1)])).chunk(3)
        return F.triplet_margin_loss(anchor, same, other)

    loss = slr.Counterfactual(net).backward(triplets, x, y)
    assert loss.shape == ()
    assert all(gradient.any() for gradient in gradients(net).values())


def wrong(net: Net) -> dict[str, Any]:
    other = copy.deepcopy(net)
    return {
        "view": lambda x, y: net.readout(net.lif2(net.lif1(net.fc1(x[:, 0])).view(len(x), -1))).sum(1),
        "accumulator": lambda x, y: (torch.zeros(len(x), 4) + net.lif1(net.fc1(x[:, 0]))).sum(1),
        "skip": lambda x, y: torch.cat([net.lif1(net.fc1(x[:, 0])), x[:, 0]], 1).sum(1),
        "another network": lambda x, y: net.loss(x, y) + other.loss(x, y),
    }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
@pytest.mark.parametrize("kind", wrong(Net()))
def test_errors_of_torch_inside_loss_fn_say_how_many_rows_there_are(kind: str) -> None:
    net = Net()
    with nothing_changes(net), pytest.raises((RuntimeError, ValueError)) as caught:
        slr.Vanilla(net, COPIES).backward(wrong(net)[kind], *data())
    (note,) = caught.value.__notes__
    for words in (f"{BATCH} samples in {COPIES} copies", f"{COPIES * BATCH} rows", "per_copy(x)"):
        assert words in note


def test_what_was_repeated_and_then_changed_in_place_is_repeated_anew() -> None:
    x = torch.ones(2, 3)
    with Copies(2, x) as copies:
        first = copies.repeat(x, "x")
        assert copies.repeat(x, "x") is first
        first += 1
        assert torch.equal(copies.repeat(x, "x"), torch.ones(4, 3))
