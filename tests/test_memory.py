"""Every mode of memory gives the gradient of the plain computation."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.estimators.base import Call
from snntorch_lr.estimators.counterfactual import OVER_TIME
from snntorch_lr.estimators.storing import Storing
from snntorch_lr.estimators.vanilla import Topology

from .statistical.networks import NEURONS, RESETS, STEPS, TwoLayers, data

MODES = [{"memory": "replay"}, {"chunk": 3}, {"memory": "replay", "chunk": 3}, {"chunk": 1}, {"chunk": 99}]
OTHERS: list[dict[str, Any]] = [
    {"estimator": slr.Approximate},
    *({"estimator": slr.Counterfactual, "over_time": over_time} for over_time in OVER_TIME),
]


def gradients(net: nn.Module, estimator: slr.Vanilla, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    torch.manual_seed(3)
    loss = estimator.backward(net.loss, x, y)
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return found | {"loss": loss, "random state afterwards": torch.rand(3)}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-11, name


def with_noise(net: nn.Module, kind: str) -> nn.Module:
    if kind != "membrane":
        for lif in (net.lif1, net.lif2):
            lif.noise = slr.EscapeNoise(0.5, distribution=kind).double()
    return net


@functools.cache
def storing_everything(neuron: str, reset: str, kind: str) -> dict[str, Tensor]:
    net = with_noise(TwoLayers(neuron, reset), kind)
    return gradients(net, slr.Vanilla(net, 8, seed=1), *data())


# Whatever two of a class, a noise and a reset mechanism meet in each mode.
@pytest.mark.parametrize(
    ("neuron", "reset", "kind", "mode"),
    [
        (neuron, RESETS[(i + j + k) % 3], kind, mode)
        for i, neuron in enumerate(NEURONS)
        for j, kind in enumerate(["membrane", "gaussian", "logistic"])
        for k, mode in enumerate(MODES)
    ],
    ids=str,
)
def test_same_gradient_as_storing_everything(neuron: str, reset: str, kind: str, mode: dict[str, Any]) -> None:
    net = with_noise(TwoLayers(neuron, reset), kind)
    assert_same(gradients(net, slr.Vanilla(net, 8, seed=1, **mode), *data()), storing_everything(neuron, reset, kind))


def bytes_kept(recording_type: type[Storing], steps: int) -> int:
    """What the graph of one trial run holds, beside what was there before."""
    net = nn.Sequential(nn.Linear(4, 50), slr.Leaky(beta=0.9, init_hidden=True, noise="escape"), nn.Linear(50, 3))
    x, kept = torch.rand(steps, 8, 4), 0

    def loss_fn(_: Tensor, y: Tensor) -> Tensor:
        nonlocal kept
        losses = sum(nn.functional.cross_entropy(net(step), y, reduction="none") for step in x)
        gc.collect()
        found = {id(each): each for each in gc.get_objects() if issubclass(type(each), Tensor)}
        kept = sum(each.numel() * each.element_size() for each in found.values())
        return losses

    slr.Vanilla(net, 4).trial_run(recording_type, Call.of(net, loss_fn, torch.zeros(8), torch.arange(8) % 3))
    return kept


def test_a_trial_run_keeps_no_tensors_of_a_time_step() -> None:
    few, many = (bytes_kept(Topology, steps) for steps in (3, 30))
    currents = 27 * 8 * 4 * 4
    assert many - few <= 2 * currents
    # A recording that is to go back holds spikes and distances of 2 copies.
    few, many = (bytes_kept(Storing, steps) for steps in (3, 30))
    assert many - few > 27 * 2 * 8 * 50


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_same_gradient_with_antithetic_pairs_and_batch_mean(mode: dict[str, Any]) -> None:
    net = TwoLayers("Leaky", "subtract")
    options: dict[str, Any] = {"antithetic": True, "baseline": "batch-mean", "seed": 1}
    expected = gradients(net, slr.Vanilla(net, 8, **options), *data())
    assert_same(gradients(net, slr.Vanilla(net, 8, **options, **mode), *data()), expected)


class Busy(nn.Module):
    """Random input coding, BatchNorm before the noise, a residual branch, dropout after it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.lif1 = slr.Leaky(beta=0.8, init_hidden=True, noise=True)
        self.fc2, self.dropout = nn.Linear(5, 5), nn.Dropout(dropout)
        self.lif2 = slr.Leaky(beta=0.8, init_hidden=True, noise=True)
        self.readout = nn.Linear(5, 2)
        self.double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for t in range(STEPS):
            spikes = self.lif1(self.norm(self.fc1(torch.bernoulli((x[:, t] / 2).clamp(0, 1)))))
            out = out + self.readout(self.lif2(self.dropout(self.fc2(spikes)) + spikes))
        return (out - y).square().sum(1)


@pytest.mark.filterwarnings("ignore:BatchNorm")
@pytest.mark.parametrize(
    ("mode", "dropout"), [({"memory": "replay"}, 0.5), ({"chunk": 3}, 0.0), ({"memory": "replay", "chunk": 3}, 0.0)]
)
def test_same_gradient_with_random_forward_passes(mode: dict[str, Any], dropout: float) -> None:
    results = []
    for options in ({}, mode):
        net = Busy(dropout)
        results.append(gradients(net, slr.Vanilla(net, 8, seed=1, **options), *data()))
        results[-1] |= {name: buffer.double() for name, buffer in net.norm.named_buffers()}
        assert net.norm.num_batches_tracked == STEPS
    assert_same(results[1], results[0])


def test_a_constant_current_is_pushed_back_once() -> None:
    calls = []
    torch.manual_seed(0)
    fc, lif = nn.Linear(3, 4), slr.Leaky(beta=0.8, noise=True)
    net = nn.ModuleList([fc, lif])
    fc.weight.register_hook(lambda _: calls.append(1))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        current, mem, total = fc(x), lif.reset_mem(), torch.zeros(())
        for _ in range(10):
            spikes, mem = lif(current, mem)
            total = total + spikes.sum(1)
        return total

    estimator = slr.Vanilla(net, 4, memory="replay")
    for _ in range(2):
        calls.clear()
        estimator.backward(loss_fn, torch.rand(2, 3), torch.zeros(2))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"), [({"memory": "disk"}, "'store' or 'replay'"), ({"chunk": 0}, "chunk must be a positive")]
)
def test_refuses_nonsense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slr.Vanilla(slr.Leaky(beta=0.9, noise=True), **options)


@pytest.mark.parametrize("options", [{}, *MODES, *OTHERS], ids=str)
@pytest.mark.parametrize("kind", ["membrane", "logistic"])
@pytest.mark.parametrize("neuron", ["Leaky", "Synaptic"])
def test_a_call_leaves_nothing_alive(neuron: str, kind: str, options: dict[str, Any]) -> None:
    net = with_noise(TwoLayers(neuron, "subtract"), kind)
    settings = dict(options)
    estimator = settings.pop("estimator", slr.Vanilla)(net, 8, **settings)
    alive = []
    gc.disable()  # a graph in a cycle would stay, and the collector cannot see through autograd's nodes
    gc.freeze()  # what was there before is not looked through
    try:
        for _ in range(5):
            estimator.backward(net.loss, *data())
            slr.reset(net)
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    finally:
        gc.unfreeze()
        gc.enable()
    assert len(set(alive[1:])) == 1


@pytest.mark.parametrize("mode", [{"memory": "replay"}, {"chunk": 3}], ids=str)
def test_an_error_in_the_second_pass_leaves_the_random_state_of_the_first(mode: dict[str, Any]) -> None:
    net = TwoLayers("Leaky", "subtract")
    estimator = slr.Vanilla(net, 8, seed=1, **mode)
    estimator.backward(net.loss, *data())

    def fails_with_a_graph(x: Tensor, y: Tensor) -> Tensor:
        torch.rand(3)
        if torch.is_grad_enabled():
            torch.rand(5)
            raise RuntimeError
        return net.loss(x, y)

    torch.manual_seed(0)
    torch.rand(3)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        estimator.backward(fails_with_a_graph, *data())
    assert torch.equal(torch.get_rng_state(), expected)
