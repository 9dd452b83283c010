"""The plain likelihood ratio: scores weighted by the losses of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr import objectives
from snntorch_lr.baselines import BASELINES

from .helpers import (
    BATCH,
    FEATURES,
    LOG_DENSITY,
    MAKERS,
    RESETS,
    STEPS,
    Net,
    assert_filled,
    assert_same,
    data,
    estimate,
    every_noise,
    gradients,
    nothing_changes,
)

COPIES = 4


every_row_estimator = pytest.mark.parametrize("estimator", ["vanilla", "approximate"])


class OneLayer(nn.Module):
    """Linear, Leaky with everything learned, linear readout; keeps its states and what it returned."""

    def __init__(self, reset: str, learn_threshold: bool, distribution: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(FEATURES, 2)
        self.lif = slr.Leaky(
            beta=0.8,
            threshold=0.6,
            learn_beta=True,
            learn_threshold=learn_threshold,
            reset_mechanism=reset,
            noise=slr.MembraneNoise(torch.tensor([0.4, 0.8]), distribution=distribution),
        )
        self.readout = nn.Linear(2, 1)
        self.double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        mem = self.lif.reset_mem()
        self.history: list[tuple[Tensor, Tensor]] = []
        trains = []
        for t in range(x.shape[1]):
            spikes, mem = self.lif(self.fc(x[:, t]), mem)
            trains.append(spikes)
            self.history.append((spikes.detach(), mem.detach()))
        return self.readout_loss(trains, y)

    def readout_loss(self, trains: list[Tensor], y: Tensor) -> Tensor:
        return (sum(self.readout(spikes) for spikes in trains).squeeze(1) - y).square()

    def log_likelihood(self, x: Tensor, distribution: str) -> Tensor:
        """Log density of all sampled margins u - threshold, given what was sampled before."""
        threshold, sigma = self.lif.threshold, self.lif.noise.sigma
        fixed = threshold.detach()
        spikes, margin, total = torch.zeros(()), -fixed, torch.zeros(())
        start = torch.zeros((), dtype=torch.float64)
        for t, (now, mem) in enumerate(self.history):
            last = start if t == 0 else margin + threshold
            if self.lif.reset_mechanism == "zero":
                last = last * (1 - spikes)
            mean = self.lif.beta * last + self.fc(x[:, t]) - threshold
            if self.lif.reset_mechanism == "subtract":
                mean = mean - spikes * threshold
            margin = mem - fixed
            spikes = now
            total = total + LOG_DENSITY[distribution](margin, mean, sigma).sum(1)
        return total


@pytest.mark.parametrize("distribution", LOG_DENSITY)
@pytest.mark.parametrize("learn_threshold", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_equals_advantages_times_the_log_likelihood_plus_the_pathwise_gradient(
    reset: str, learn_threshold: bool, distribution: str
) -> None:
    net = OneLayer(reset, learn_threshold, distribution)
    x = data(torch.float64)[0]
    y = torch.linspace(-1, 2, BATCH, dtype=torch.float64)
    slr.Vanilla(net, COPIES).backward(net.loss, x, y)
    got = gradients(net)
    losses = net.readout_loss([spikes for spikes, _ in net.history], y.repeat(COPIES))
    advantages = BASELINES["leave-one-out"](losses.detach().view(COPIES, BATCH)).flatten()
    surrogate = advantages * net.log_likelihood(x.repeat(COPIES, 1, 1), distribution) + losses
    net.zero_grad()
    surrogate.mean().backward()
    assert len(got) == 6 + learn_threshold
    assert_same(got, gradients(net), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", BASELINES)
def test_advantages_are_the_baselines(baseline: str) -> None:
    seen: list[Tensor] = []

    def spy(losses: Tensor) -> Tensor:
        assert losses.shape == (COPIES, BATCH)
        assert not losses.requires_grad
        seen.append(losses)
        return BASELINES[baseline](losses)

    assert_same(estimate("vanilla", Net(), baseline=baseline), estimate("vanilla", Net(), baseline=spy))
    assert len(seen) == 1


def test_seed_holds_for_a_network_without_parameters() -> None:
    neuron = slr.Leaky(beta=0.9, noise=slr.MembraneNoise(learn=False))
    weight = torch.full((FEATURES, 2), 0.3, requires_grad=True)
    results = []
    for _ in range(2):
        weight.grad = None
        slr.Vanilla(neuron, COPIES, seed=0).backward(lambda x, y: neuron(x[:, 0] @ weight)[0].sum(1), *data())
        slr.reset(neuron)
        results.append(weight.grad.clone())
    assert results[0].all()
    assert torch.equal(*results)


@pytest.mark.parametrize("baseline", ["none", "batch-mean"])
def test_a_single_copy_needs_no_second(baseline: str) -> None:
    net = Net()
    rows: list[int] = []
    net.readout.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    estimate("vanilla", net, copies=1, baseline=baseline)
    assert rows[-STEPS:] == [BATCH] * STEPS
    assert_filled(net)


def spikes_alone(net: Net, x: Tensor) -> Tensor:
    spikes = sum(net.lif2(net.fc2(net.lif1(net.fc1(x[:, t])))) for t in range(STEPS))
    assert not spikes.requires_grad
    return spikes.sum(1)


def first_step_without_gradient(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.lif1(net.fc1(x[:, 0]))
    return net.lif2(net.fc2(net.lif1(net.fc1(x[:, 1])))).sum(1)


def two_presentations(net: Net, x: Tensor) -> Tensor:
    return (net(x).softmax(1) - net(x.flip(0)).softmax(1)).square().sum(1)


def twice_in_a_step(net: Net, x: Tensor) -> Tensor:
    return net.lif1(net.fc2(net.lif2(net.fc2(net.lif1(net.fc1(x[:, 0])))))).sum(1)


@pytest.mark.parametrize("loss", [spikes_alone, first_step_without_gradient, two_presentations, twice_in_a_step])
def test_every_parameter_that_spikes_of_a_loss_depend_on_has_a_gradient(loss: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net()
    slr.reset(net)
    filled = estimate("vanilla", net, lambda x, y: (loss(net, x) - y).square())
    reads = {name for name, _ in net.named_parameters() if "readout" not in name or loss is two_presentations}
    assert {name for name, gradient in filled.items() if gradient.any()} == reads


def voting() -> Net:
    """Classes by the spikes of the last layer."""
    net = Net(noise="escape")
    net.readout = nn.Identity()
    return net


def test_a_loss_without_a_derivative_trains_what_comes_before_a_noisy_neuron() -> None:
    def found(dtype: torch.dtype) -> dict[str, Tensor]:
        net = voting()
        return estimate("vanilla", net, lambda x, y: (net(x).sum(1) > 3).to(dtype), copies=32)

    expected = found(torch.float32)
    assert all(expected[name].any() for name in ("fc1.weight", "fc2.weight", "lif1.noise.log_sigma"))
    for dtype in (torch.int64, torch.bool):
        assert_same(found(dtype), expected)


def test_a_0_1_loss_falls() -> None:
    net = voting()
    for lif in (net.lif1, net.lif2):
        # Enough noise that copies of each sample differ in their class.
        lif.noise = slr.EscapeNoise(1.0)
    y = torch.arange(12) % FEATURES
    x = 2 * torch.eye(FEATURES)[y].unsqueeze(1).repeat(1, STEPS, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    slr.attach(optimizer, net, "vanilla", copies=32, seed=0)
    step = slr.closure(lambda x, y: objectives.zero_one(net(x), y), x, y)
    losses = [optimizer.step(step).item() for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10]) / 4


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
    "lower limit": lambda s: (0.9 - objectives.spike_rate(s)).clamp(min=0),
}


def regularised(net: Net, term: Any) -> Any:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits, spikes = spikes_of(net, x)
        return F.cross_entropy(logits, y, reduction="none") + 0.1 * term(spikes)

    return loss


@every_row_estimator
@every_noise
@pytest.mark.parametrize("term", COUPLED.values(), ids=COUPLED)
def test_losses_that_couple_rows_are_refused(estimator: str, term: Any, noise: str) -> None:
    net = Net(noise=noise)
    with nothing_changes(net), pytest.raises(ValueError, match=r"changes with the spikes of other rows.*rate_above"):
        MAKERS[estimator](net).backward(regularised(net, term), *data())


@every_row_estimator
@pytest.mark.parametrize("term", APART.values(), ids=APART)
@pytest.mark.filterwarnings("error")
def test_regularisers_of_each_row_are_taken_without_a_warning(estimator: str, term: Any) -> None:
    net = Net()
    assert MAKERS[estimator](net).backward(regularised(net, term), *data()).isfinite()


@pytest.mark.parametrize("learned", [False, True])
def test_membranes_that_couple_rows_are_refused(learned: bool) -> None:
    net = Net(learn_threshold=learned)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(x, y) + net.lif1.mem.mean()

    with pytest.raises(ValueError, match="other rows"):
        slr.Vanilla(net, COPIES).backward(loss, *data())


def test_a_loss_that_changes_by_itself_is_not_called_coupled() -> None:
    net, generator = Net(), np.random.default_rng(0)
    estimate("vanilla", net, lambda x, y: net.loss(x, y) * generator.random())
    assert_filled(net)


def test_the_look_at_rows_leaves_no_trace() -> None:
    """With it and without it a call draws the same."""
    results = []
    for looks in (True, False):
        net = Net()
        estimator = slr.Vanilla(net, COPIES)
        estimator._inspected = not looks
        torch.manual_seed(0)
        np.random.seed(0)
        estimator.backward(lambda x, y, net=net: net.loss(x * np.random.rand(), y), *data())
        results.append({**gradients(net), "torch": torch.rand(3), "numpy": torch.tensor(np.random.rand())})
    assert_same(*results)


@every_row_estimator
def test_copies_with_equal_losses_are_said(estimator: str) -> None:
    net = Net()
    with torch.no_grad():
        net.readout.weight.zero_()
    with pytest.warns(UserWarning, match="all copies of a sample have the same loss"):
        MAKERS[estimator](net).backward(net.loss, *data())


WRONG_LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "mean": (lambda loss: loss.mean(), ValueError, r"one number.*reduction='none'"),
    "sum in a list": (lambda loss: loss.sum().view(1), ValueError, r"one number.*reduction='none'"),
    "no tensor": (lambda loss: loss.mean().item(), TypeError, "tensor of per-sample losses, not float"),
    "nothing": (lambda loss: None, TypeError, "not NoneType"),
    "too short": (lambda loss: loss[1:], ValueError, r"shape \(19,\).*4 copies of 5 samples need shape"),
    "batch only": (lambda loss: loss[:BATCH], ValueError, "does the loss use the targets passed to it"),
    "per output": (lambda loss: loss[:, None].expand(-1, 3), ValueError, r"losses.flatten\(1\).mean\(1\)"),
    "copies by batch": (lambda loss: loss.view(-1, BATCH), ValueError, r"need\s+shape \(20,\)"),
    "nan": (lambda loss: loss.index_fill(0, torch.tensor([2]), torch.nan), ValueError, "1 of 20 losses are not"),
    "inf": (lambda loss: loss / 0, ValueError, "20 of 20 losses are not finite.*learning rate"),
}


@every_row_estimator
@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_other_than_one_finite_loss_for_each_row_is_refused_whenever_it_comes(kind: str, estimator: str) -> None:
    net = Net()
    change, error, message = WRONG_LOSSES[kind]
    made = MAKERS[estimator](net, COPIES)
    for _ in range(2):
        with nothing_changes(net), pytest.raises(error, match=message):
            made.backward(lambda x, y: change(net.loss(x, y)), *data())
        # The network is fine, and so is the estimator.
        made.backward(net.loss, *data())
