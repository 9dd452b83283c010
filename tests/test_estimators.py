from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.baselines import BASELINES
from snntorch_lr.estimators import ESTIMATORS

from .helpers import (
    BATCH,
    DEVICES,
    FEATURES,
    LOG_DENSITY,
    STEPS,
    Net,
    assert_same,
    data,
    gradients,
    nothing_changes,
)

COPIES = 4


def estimate(net: Net, x: Tensor | None = None, y: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    net.zero_grad()
    given = data() if x is None or y is None else (x, y)
    slr.Vanilla(net, **{"copies": COPIES, "seed": 0, **options}).backward(net.loss, *given)
    return gradients(net)


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
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_equals_advantages_times_the_log_likelihood_plus_the_pathwise_gradient(
    reset: str, learn_threshold: bool, distribution: str
) -> None:
    net = OneLayer(reset, learn_threshold, distribution)
    x = data(torch.float64)[0]
    y = torch.linspace(-1, 2, BATCH, dtype=torch.float64)
    slr.Vanilla(net, COPIES).backward(net.loss, x, y)
    got = gradients(net)
    losses = net.readout_loss([spikes for spikes, _ in net.history], y.repeat(COPIES))
    advantages = BASELINES["leave-one-out"](losses.detach().view(COPIES, BATCH), False).flatten()
    surrogate = advantages * net.log_likelihood(x.repeat(COPIES, 1, 1), distribution) + losses
    net.zero_grad()
    surrogate.mean().backward()
    assert len(got) == 6 + learn_threshold
    assert_same(got, gradients(net), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_advantages_are_the_baselines(baseline: str, antithetic: bool) -> None:
    seen: list[Tensor] = []

    def spy(losses: Tensor, pairs: bool) -> Tensor:
        assert losses.shape == (COPIES, BATCH)
        assert not losses.requires_grad
        assert pairs == antithetic
        seen.append(losses)
        return BASELINES[baseline](losses, pairs)

    named = estimate(Net(), baseline=baseline, antithetic=antithetic)
    assert_same(named, estimate(Net(), baseline=spy, antithetic=antithetic))
    assert len(seen) == 1


def test_baselines_differ() -> None:
    weights = [estimate(Net(), baseline=baseline)["fc1.weight"] for baseline in BASELINES]
    assert not any(torch.equal(weights[i], weights[i - 1]) for i in range(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_fills_the_gradient_of_every_parameter(antithetic: bool, device: str) -> None:
    net = Net().to(device)
    filled = estimate(net, *data(device=device), antithetic=antithetic)
    assert filled.keys() == dict(net.named_parameters()).keys()
    for name, gradient in filled.items():
        assert gradient.isfinite().all()
        assert gradient.any(), name


def test_returns_the_mean_loss_detached() -> None:
    net = Net()
    seen: list[Tensor] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        seen.append(net.loss(x, y))
        return seen[-1]

    loss = slr.Vanilla(net, COPIES).backward(loss_fn, *data())
    assert seen[-1].shape == (COPIES * BATCH,)
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, seen[-1].detach().mean())


@pytest.mark.parametrize("device", DEVICES)
def test_seed_decides_the_gradient(device: str) -> None:
    given = data(device=device)
    first, same, other = (estimate(Net().to(device), *given, seed=seed) for seed in (1, 1, 2))
    assert_same(first, same)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_without_seed_the_global_generator_decides() -> None:
    results = []
    for seed in (1, 1, 2):
        net = Net()
        torch.manual_seed(seed)
        results.append(estimate(net, seed=None))
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["fc1.weight"], results[2]["fc1.weight"])


def test_seed_leaves_the_global_generator_alone() -> None:
    net = Net()
    state = torch.get_rng_state()
    estimate(net, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


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


def test_every_call_draws_fresh_noise_and_adds_to_the_gradient() -> None:
    net, other = Net(), Net()
    estimator = slr.Vanilla(net, COPIES, seed=0)
    calls = []
    for _ in range(2):
        net.zero_grad()
        estimator.backward(net.loss, *data())
        calls.append(gradients(net))
    estimator = slr.Vanilla(other, COPIES, seed=0)
    for _ in range(2):
        estimator.backward(other.loss, *data())
    assert not torch.equal(calls[0]["fc1.weight"], calls[1]["fc1.weight"])
    assert_same(gradients(other), {name: calls[0][name] + calls[1][name] for name in calls[0]}, rtol=1e-5, atol=1e-6)


FROZEN = {
    "first layer": ["fc1.weight", "fc1.bias"],
    "bias": ["fc2.bias"],
    "sigma": ["lif1.noise.log_sigma", "lif2.noise.log_sigma"],
    "readout": ["readout.weight", "readout.bias"],
    "all but sigma": [f"{layer}.{kind}" for layer in ("fc1", "fc2", "readout") for kind in ("weight", "bias")],
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters_get_no_gradient_and_do_not_change_the_others(kind: str) -> None:
    net, free = Net(), Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in FROZEN[kind])
    expected = {name: gradient for name, gradient in estimate(free).items() if name not in FROZEN[kind]}
    assert_same(estimate(net), expected)


def test_noise_that_is_not_learned_gives_the_same_weight_gradient() -> None:
    fixed = estimate(Net(noise=slr.MembraneNoise(0.5, learn=False)))
    assert_same(fixed, {name: value for name, value in estimate(Net()).items() if "noise" not in name})


def test_shared_noise_gets_the_sum() -> None:
    shared = estimate(Net(noise=slr.MembraneNoise(0.5)))
    apart = estimate(Net())
    total = apart["lif1.noise.log_sigma"] + apart["lif2.noise.log_sigma"]
    torch.testing.assert_close(shared["lif1.noise.log_sigma"], total)


def test_spikes_alone_are_enough() -> None:
    net = Net()
    x, y = data()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        spikes = sum(net.lif2(net.fc2(net.lif1(net.fc1(x[:, t])))) for t in range(STEPS))
        assert not spikes.requires_grad
        return (spikes.sum(1) - y).square()

    slr.Vanilla(net, COPIES).backward(loss_fn, x, y)
    assert all(gradient.any() for gradient in gradients(net).values())
    assert gradients(net).keys() == {name for name, _ in net.named_parameters() if "readout" not in name}


def test_learned_size_of_graded_spikes_gets_its_pathwise_gradient() -> None:
    neuron = slr.Leaky(beta=0.9, graded_spikes_factor=2.5, learn_graded_spikes_factor=True, noise=True)
    counts: list[Tensor] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        spikes, _ = neuron(x[:, 0], neuron.reset_mem())
        counts.append((spikes > 0).float().sum(1))
        assert spikes.unique().tolist() == [0.0, 2.5]
        return spikes.sum(1)

    slr.Vanilla(neuron, COPIES).backward(loss_fn, *data())
    torch.testing.assert_close(neuron.graded_spikes_factor.grad, counts[-1].mean())


@pytest.mark.parametrize("baseline", ["none", "batch-mean"])
def test_a_single_copy_needs_no_second(baseline: str) -> None:
    net = Net()
    rows: list[int] = []
    net.readout.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    filled = estimate(net, copies=1, baseline=baseline)
    assert rows[-STEPS:] == [BATCH] * STEPS
    assert all(gradient.any() for gradient in filled.values())


def test_batch_of_one() -> None:
    x, y = data()
    assert estimate(Net(), x[:1], y[:1])["fc1.weight"].any()


def test_gradient_is_the_mean_over_the_batch() -> None:
    net = Net()
    x, y = data()
    # With σ tiny there is nothing random, and the pathwise gradient is that of the mean loss.
    with torch.no_grad():
        for lif in (net.lif1, net.lif2):
            lif.noise.log_sigma.fill_(math.log(1e-6))
    got = estimate(net, x, y, baseline="leave-one-out")["readout.weight"]
    net.zero_grad()
    with slr.noise_off(net):
        net.loss(x, y).mean().backward()
    torch.testing.assert_close(got, net.readout.weight.grad)


def test_steps_without_gradient_do_not_lose_the_score_of_later_steps() -> None:
    net = Net()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        with torch.no_grad():
            net.lif1(net.fc1(x[:, 0]))
        return net.lif1(net.fc1(x[:, 1])).sum(1)

    slr.Vanilla(net, COPIES).backward(loss_fn, *data())
    assert net.fc1.weight.grad is not None
    assert net.lif1.noise.log_sigma.grad is not None


def test_gradient_is_filled_inside_no_grad() -> None:
    net = Net()
    with torch.no_grad():
        got = estimate(net)
    assert_same(got, estimate(Net()))


def test_two_forward_passes_in_one_loss_both_count() -> None:
    net = Net()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return (net(x).softmax(1) - net(x.flip(0)).softmax(1)).square().sum(1)

    slr.Vanilla(net, COPIES).backward(loss_fn, *data())
    assert all(gradient.any() for gradient in gradients(net).values())


def test_neuron_may_be_used_twice_in_a_step() -> None:
    neuron = slr.Leaky(beta=0.9, threshold=0.3, noise=True)
    weight = nn.Parameter(torch.eye(FEATURES))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        first, _ = neuron(x[:, 0], torch.zeros(BATCH, FEATURES))
        second, _ = neuron(first @ weight, torch.zeros(len(first), FEATURES))
        return second.sum(1)

    slr.Vanilla(neuron, COPIES).backward(loss_fn, *data())
    assert weight.grad.any()


def test_noise_that_stays_on_at_evaluation_can_be_trained_there() -> None:
    net = Net(noise=slr.MembraneNoise(at_eval=True)).eval()
    assert estimate(net)["fc1.weight"].any()


def test_noise_can_be_switched_on_for_training_in_evaluation_mode() -> None:
    net = Net()
    estimator = slr.Vanilla(net, COPIES, seed=0)
    net.eval()
    with slr.noise_on(net):
        estimator.backward(net.loss, *data())
    assert_same(gradients(net), estimate(Net()))


def test_gradient_reaches_learned_inputs() -> None:
    net = Net()
    x, y = data()
    x.requires_grad_()
    estimate(net, x, y)
    assert x.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 0}, "copies must be a positive integer"),
        ({"copies": 2.5}, "copies must be a positive integer"),
        ({"baseline": "mean"}, "unknown baseline 'mean'; choose one of none, batch-mean, leave-one-out"),
        ({"copies": 5, "antithetic": True}, "even number of copies, got 5"),
        ({"copies": 1}, "1 copy leaves nothing.*copies >= 2.*'batch-mean' or 'none'"),
        ({"copies": 2, "antithetic": True}, "2 copies leave nothing.*antithetic pairs needs copies >= 4"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slr.Vanilla(Net(), **options)


def test_baseline_object_without_enough_copies_is_refused_before_any_gradient() -> None:
    net = Net()
    with nothing_changes(net), pytest.raises(ValueError, match="use more copies"):
        slr.Vanilla(net, copies=1, baseline=BASELINES["leave-one-out"]).backward(net.loss, *data())


def test_estimators_are_known_by_name() -> None:
    assert ESTIMATORS["vanilla"] is slr.Vanilla
