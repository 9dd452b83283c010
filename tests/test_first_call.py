"""What an estimator refuses or says in its first call: nothing to learn from, rows that are not apart, other passes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr import objectives
from snntorch_lr.left_as_found import left_as_found

from .helpers import Net, assert_same, data, gradients, nothing_changes
from .test_silence import ESTIMATORS, every_estimator

TWICE = {name: ESTIMATORS[name] for name in ("replay", "chunk")}
LIKELIHOOD_RATIO = {name: ESTIMATORS[name] for name in ("store", "replay", "chunk", "approximate")}


def spikes_of(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the spikes of the last layer, ``[time, rows, neurons]``."""
    slr.reset(net)
    spikes = torch.stack([net.lif2(net.fc2(net.lif1(net.fc1(x[:, t])))) for t in range(x.shape[1])])
    return net.readout(spikes.sum(0)), spikes


COUPLED = {
    "mean rate": lambda s: s.mean(),
    "limit": lambda s: (s.mean() - 0.15).clamp(min=0),
    "lower limit": lambda s: (0.9 - s.mean()).clamp(min=0),
    "squared rate of each neuron": lambda s: s.mean((0, 1)).square().sum(),
}
APART = {
    "nothing": lambda s: 0.0,
    "rate": objectives.spike_rate,
    "limit": lambda s: objectives.rate_above(s, 0.15),
    "lower limit": lambda s: objectives.rate_below(s, 0.9),
}


def regularised(net: Net, term: Any) -> Any:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits, spikes = spikes_of(net, x)
        return F.cross_entropy(logits, y, reduction="none") + 0.1 * term(spikes)

    return loss


@every_estimator
@pytest.mark.parametrize("noise", ["membrane", "escape"])
@pytest.mark.parametrize("term", COUPLED.values(), ids=COUPLED)
def test_losses_that_couple_rows_are_refused(make: Any, term: Any, noise: str) -> None:
    net = Net(noise=noise)
    with nothing_changes(net), pytest.raises(ValueError, match=r"changes with the spikes of other rows.*rate_above"):
        make(net).backward(regularised(net, term), *data())


@every_estimator
@pytest.mark.parametrize("noise", ["membrane", "escape"])
@pytest.mark.parametrize("term", APART.values(), ids=APART)
@pytest.mark.filterwarnings("error")
def test_regularisers_of_each_row_are_taken_without_a_warning(make: Any, term: Any, noise: str) -> None:
    net = Net(noise=noise)
    assert make(net).backward(regularised(net, term), *data()).isfinite()


def test_batch_norm_is_warned_of_and_a_loss_that_changes_by_itself_is_not_called_coupled() -> None:
    net, generator = Net(), np.random.default_rng(0)
    net.fc2 = nn.Sequential(net.fc2, nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="BatchNorm"):
        slr.Vanilla(net).backward(lambda x, y: net.loss(x, y) * generator.random(), *data())
    assert net.fc2[1].training


@pytest.mark.parametrize("learned", [False, True])
def test_membranes_that_couple_rows_are_refused(learned: bool) -> None:
    net = Net(learn_threshold=learned)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(x, y) + net.lif1.mem.mean()

    with pytest.raises(ValueError, match="other rows"):
        slr.Vanilla(net).backward(loss, *data())


def test_the_look_at_rows_leaves_no_trace() -> None:
    net = Net()
    net.loss(*data())
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), net.lif1.mem, set(vars(net.lif1)))
    with left_as_found(net, buffers=True, states=True, random=True):
        net.loss(*data())
        np.random.random()
    assert net.lif1.mem is before[2]
    assert set(vars(net.lif1)) == before[3]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("make", TWICE.values(), ids=TWICE)
def test_passes_that_differ_are_refused(make: Any) -> None:
    net, generator, calls = Net(), np.random.default_rng(0), 0

    def coded(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(x * torch.from_numpy(generator.integers(0, 2, x.shape)), y)

    def counted(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return net.loss(x, y) * 0.9**calls

    for loss in (coded, counted):
        with nothing_changes(net), pytest.raises(ValueError, match=r"two passes .* differ in .*default_rng"):
            make(net).backward(loss, *data())


@pytest.mark.parametrize("make", TWICE.values(), ids=TWICE)
def test_numpys_global_randomness_is_the_same_in_both_passes(make: Any) -> None:
    found = []
    for each in (ESTIMATORS["store"], make):
        net = Net()
        np.random.seed(0)

        def coded(x: Tensor, y: Tensor, net: Net = net) -> Tensor:
            return net.loss(x * torch.from_numpy(np.random.randint(0, 2, x.shape)), y)

        each(net, seed=0).backward(coded, *data())
        found.append(gradients(net))
    assert_same(*found, rtol=1e-4, atol=1e-6)


@every_estimator
def test_a_loss_that_runs_another_network_is_refused(make: Any) -> None:
    net, other = Net(), Net()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return other.loss(x.repeat(len(y) // len(x), 1, 1), y)

    with (
        nothing_changes(net),
        pytest.raises(ValueError, match=r"ran none of lif1 \(Leaky\), lif2 \(Leaky\), the noisy neurons of Net"),
    ):
        make(net).backward(loss, *data())


@every_estimator
def test_a_frozen_network_is_refused_unless_something_else_learns(make: Any) -> None:
    net, encoder = Net().requires_grad_(False), nn.Linear(3, 3)
    with pytest.raises(ValueError, match="there is nothing to learn: all parameters of Net"):
        make(net).backward(net.loss, *data())
    make(net).backward(lambda x, y: net.loss(encoder(x), y), *data())
    assert encoder.weight.grad is not None


def test_an_optimizer_of_another_network_is_refused() -> None:
    net = Net()
    with pytest.raises(ValueError, match="holds none of the parameters of Net"):
        slr.attach(torch.optim.SGD(Net().parameters(), 0.1), net)
    slr.attach(torch.optim.SGD(net.readout.parameters(), 0.1), net)


@every_estimator
@pytest.mark.parametrize(
    ("threshold", "said"), [(1e3, r"lif1 \(Leaky\) never fired"), (-1e3, r"all of lif1 \(Leaky\) fired in every step")]
)
def test_layers_that_never_or_always_fire_are_named_once(make: Any, threshold: float, said: str) -> None:
    net = Net(reset_mechanism="zero")
    net.lif1.threshold.fill_(threshold)
    estimator = make(net)
    with pytest.warns(UserWarning, match=said):
        estimator.backward(net.loss, *data())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.backward(net.loss, *data())


@pytest.mark.parametrize("make", LIKELIHOOD_RATIO.values(), ids=LIKELIHOOD_RATIO)
def test_copies_with_equal_losses_are_said(make: Any) -> None:
    net = Net()
    with torch.no_grad():
        net.readout.weight.zero_()
    with pytest.warns(UserWarning, match="all copies of a sample have the same loss"):
        make(net).backward(net.loss, *data())


def test_the_report_says_what_is_exactly_zero_and_why() -> None:
    net = Net()
    net.lif2.threshold.fill_(1e3)
    net.unused = nn.Linear(1, 1, bias=False)
    with pytest.warns(UserWarning, match=r"lif2 \(Leaky\) never fired"):
        report = slr.gradient_report(net, net.loss, *data(), estimators=["vanilla"], repeats=2, reference=4)
    assert report.zero["unused.weight"] == "the loss does not depend on it"
    assert report.zero["fc1.weight"] == "lif2 (Leaky) never fired"
    assert "readout.bias" not in report.zero
    assert "fc1.weight: the gradient is exactly zero, lif2 (Leaky) never fired" in report.table()
