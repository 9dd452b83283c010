from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import nn

import snntorch_lr as slr
from snntorch_lr import blocks, neurons
from snntorch_lr.graph import ancestors

from .helpers import assert_same, gradients

STEPS, BATCH = 6, 4


def make(noise: bool = False, **last: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), slr.Leaky(beta=0.8, init_hidden=True, noise=noise),
        nn.Linear(5, 3), snn.Leaky(beta=0.8, init_hidden=True, **last),
    )  # fmt: skip


def images() -> torch.Tensor:
    return 3 * torch.rand(BATCH, 2, 3, generator=torch.Generator().manual_seed(1))


def test_constant_input_is_the_same_as_repeated() -> None:
    net = make()
    x = images()
    constant = slr.rollout(net, x, STEPS)
    assert constant.shape == (STEPS, BATCH, 3)
    assert constant.any()
    assert torch.equal(constant, slr.rollout(net, x.expand(STEPS, *x.shape)))
    assert torch.equal(constant, slr.rollout(net, x, STEPS))


def test_what_precedes_the_first_neuron_runs_once() -> None:
    net = make()
    calls: list[int] = []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    net[3].register_forward_hook(lambda *_: calls.append(3))
    slr.rollout(net, images(), STEPS)
    assert calls == [1] + [3] * STEPS


def test_states_are_returned_if_the_last_neuron_returns_them() -> None:
    spikes, mem = slr.rollout(make(output=True), images(), STEPS)
    assert spikes.shape == mem.shape == (STEPS, BATCH, 3)
    assert not torch.equal(spikes, mem)


@pytest.mark.parametrize("estimator", ["vanilla", "approximate", "counterfactual"])
def test_trains_by_the_likelihood_ratio_as_a_loop_does(estimator: str) -> None:
    def train(constant: bool) -> dict[str, torch.Tensor]:
        net = make(noise=True, output=True, reset_mechanism="none")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        slr.attach(optimizer, net, estimator, copies=8, seed=0)

        def loss_fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            _, mem = slr.rollout(net, x, STEPS) if constant else slr.rollout(net, x.expand(STEPS, *x.shape))
            return nn.functional.cross_entropy(mem.mean(0), y, reduction="none")

        optimizer.step(slr.closure(loss_fn, images(), torch.tensor([0, 1, 2, 0])))
        return dict(net.state_dict())

    hoisted, repeated = train(True), train(False)
    for name in ("1.weight", "3.weight"):
        assert_same({name: hoisted[name]}, {name: repeated[name]}, rtol=1e-4, atol=1e-5)


def test_spikes_kept_as_bits_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    first, second = (slr.Leaky(beta=0.8, threshold=0.2, init_hidden=True, noise="escape") for _ in range(2))
    net = nn.Sequential(nn.Conv2d(1, 2, 2), first, nn.Conv2d(2, 3, 2), second, nn.Flatten(), nn.Linear(12, 2)).double()
    slr.use_gradient(net, control=0.4)
    x = torch.rand(STEPS, BATCH, 1, 4, 4, dtype=torch.float64)
    for _ in range(2):
        # Presentations that are watched, step by step.
        slr.rollout(net, x).sum().backward()
    found = []
    for worth in (0, blocks.WORTH_KEEPING_AS_BITS):
        monkeypatch.setattr(blocks, "WORTH_KEEPING_AS_BITS", worth)
        net.zero_grad()
        torch.manual_seed(1)
        outputs = slr.rollout(net, x)
        kept = {node.name() for node in ancestors([outputs]) if "OfSpikes" in node.name()}
        assert len(kept) == (0 if worth else 2)
        outputs.square().sum().backward()
        found.append(gradients(net))
    assert_same(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make_readout", [snn.Leaky, slr.Leaky], ids=["snnTorch", "ours"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_readout_without_reset_is_that_of_a_loop(
    make_readout: Any, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    options = {"reset_mechanism": "none", "learn_beta": learned, "learn_threshold": learned}
    readout = make_readout(torch.tensor([0.5, 0.7, 0.9]), 0.2, init_hidden=True, output=True, **options)
    net = nn.Sequential(nn.Linear(6, 3), readout)
    steps: list[int] = []
    counted = lambda *args: (steps.append(args[2]), neurons.integrate(*args))[1]  # noqa: E731
    monkeypatch.setattr(import_module("snntorch_lr.rollout"), "integrate", counted)
    x = torch.rand(40, BATCH, 6, generator=torch.Generator().manual_seed(1))

    def run(sequence: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        slr.reset(net)
        net.zero_grad()
        spikes, mem = slr.rollout(net, x) if sequence else map(torch.stack, zip(*map(net, x), strict=True))
        (spikes.sum() + (mem * torch.arange(40).view(-1, 1, 1)).mean()).backward()
        return {"spikes": spikes, "mem": mem, "last": readout.mem, "reset": readout.reset}, gradients(net)

    (own, own_gradients), (loop, loop_gradients) = run(True), run(False)
    # In pieces, which go on from each other.
    assert steps == [5] * 8
    assert own["spikes"].any()
    assert_same(own, loop)
    assert_same(own_gradients, loop_gradients, rtol=1e-4, atol=1e-6)


class Halved(snn.Leaky):
    """A class of the user's own, with another update."""

    def _base_int(self, input_: torch.Tensor) -> torch.Tensor:
        return 0.5 * super()._base_int(input_)


@pytest.mark.parametrize(
    "options",
    [
        {"reset_mechanism": "subtract"},
        {"reset_mechanism": "zero"},
        {"state_quant": lambda mem: mem.mul(4).round().div(4)},
        {"inhibition": True},
    ],
    ids=["subtract", "zero", "quantised", "inhibition"],
)
@pytest.mark.parametrize("make_readout", [snn.Leaky, Halved], ids=["snnTorch", "of one's own"])
def test_a_noise_free_readout_that_is_no_sum_is_that_of_a_loop(make_readout: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    readout = make_readout(0.9, 0.1, init_hidden=True, output=True, **{"reset_mechanism": "none"} | options)
    net, x = nn.Sequential(nn.Linear(6, 3), readout), 3 * torch.rand(STEPS, BATCH, 6)
    # So that several neurons fire at once.
    net[0].weight.data.abs_()
    spikes, mem = slr.rollout(net, x)
    slr.reset(net)
    loop = [torch.stack(part) for part in zip(*map(net, x), strict=True)]
    assert spikes.any()
    assert torch.equal(spikes, loop[0])
    assert torch.equal(mem, loop[1])


def test_neurons_in_nested_modules_are_found() -> None:
    net = make(output=True)
    nested = nn.Sequential(net[:2], nn.Sequential(net[2], nn.Sequential(net[3], net[4])))
    assert torch.equal(slr.rollout(nested, images(), STEPS)[1], slr.rollout(net, images(), STEPS)[1])


def test_an_infinite_current_is_over_after_its_time_step() -> None:
    net = nn.Sequential(slr.Leaky(beta=0.9, init_hidden=True, output=True, reset_mechanism="none", noise=True))
    slr.use_gradient(net)
    x = torch.zeros(3, 2, 5)
    x[0, 0, 0] = torch.inf
    # As in a loop, where it leaks; infinity times zero is no number.
    assert slr.rollout(net, x)[1][:, 0, 0].isinf().all()
