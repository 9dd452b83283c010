"""What a loop of one's own may expect of ``backward(loss_fn, inputs, targets)``, whatever the estimator."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.gradients import ESTIMATORS

from .helpers import (
    BATCH,
    DEVICES,
    MAKERS,
    Net,
    assert_same,
    data,
    every_estimator,
    gradients,
    nothing_changes,
)

COPIES = 4


def estimate(estimator: str, net: Net, x: Tensor | None = None, y: Tensor | None = None, **options: Any) -> Any:
    net.zero_grad()
    arguments = data() if x is None or y is None else (x, y)
    MAKERS[estimator](net, **{"copies": COPIES, "seed": 0, **options}).backward(net.loss, *arguments)
    return gradients(net)


def test_estimators_are_known_by_name() -> None:
    assert ESTIMATORS == MAKERS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", ["membrane", "escape"])
@every_estimator
def test_fills_the_gradient_of_every_parameter(estimator: str, noise: str, device: str) -> None:
    net = Net(noise=noise).to(device)
    filled = estimate(estimator, net, *data(device=device))
    assert filled.keys() == dict(net.named_parameters()).keys()
    for name, gradient in filled.items():
        assert gradient.isfinite().all()
        assert gradient.any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("noise", ["membrane", "escape"])
@every_estimator
def test_the_network_may_be_in_half_precision(estimator: str, noise: str, dtype: torch.dtype) -> None:
    net = Net(noise=noise).to(dtype)
    found = estimate(estimator, net, *data(dtype))
    assert {gradient.dtype for gradient in found.values()} == {dtype}
    assert found.keys() == dict(net.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@every_estimator
def test_half_precision_by_autocast_is_close(estimator: str, kind: torch.dtype, around: bool) -> None:
    net = Net()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=kind):
            return net.loss(x, y)

    with torch.autocast("cpu", dtype=kind, enabled=around):
        MAKERS[estimator](net, 50, seed=0).backward(net.loss if around else loss_fn, *data())
    expected, found = estimate(estimator, Net(), copies=50), gradients(net)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    flat = [torch.cat([gradient.flatten() for gradient in gradient_of.values()]) for gradient_of in (found, expected)]
    assert nn.functional.cosine_similarity(*flat, dim=0) > 0.95


@every_estimator
def test_returns_the_mean_loss_detached(estimator: str) -> None:
    net = Net()
    seen: list[Tensor] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        if len(losses) == COPIES * BATCH and losses.requires_grad:
            seen.append(losses.detach())
        return losses

    loss = MAKERS[estimator](net, COPIES, seed=0).backward(loss_fn, *data())
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, seen[0].mean())


@every_estimator
def test_the_seed_decides_or_else_the_global_generator(estimator: str) -> None:
    first, same, other = (estimate(estimator, Net(), seed=seed) for seed in (1, 1, 2))
    assert_same(first, same)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])
    results = []
    for seed in (1, 1, 2):
        net = Net()
        torch.manual_seed(seed)
        results.append(estimate(estimator, net, seed=None))
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["fc1.weight"], results[2]["fc1.weight"])


@every_estimator
def test_a_seed_leaves_the_global_generator_alone(estimator: str) -> None:
    net = Net()
    state = torch.get_rng_state()
    estimate(estimator, net)
    assert torch.equal(torch.get_rng_state(), state)


@every_estimator
def test_the_global_random_numbers_of_the_forward_pass_are_drawn_once_a_call(estimator: str) -> None:
    def states(draws: bool) -> list[Tensor]:
        net = Net()
        made = MAKERS[estimator](net, COPIES, seed=0)
        torch.manual_seed(3)
        np.random.seed(3)

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            return net.loss(torch.bernoulli(x.clamp(0, 1)) * np.random.rand(), y)

        for _ in range(2):
            if draws:
                torch.bernoulli(data()[0].clamp(0, 1))
                np.random.rand()
            else:
                made.backward(loss_fn, *data())
        return [torch.get_rng_state(), torch.tensor(np.random.rand())]

    assert all(map(torch.equal, states(True), states(False)))


@every_estimator
def test_every_call_draws_fresh_noise_and_adds_to_the_gradient(estimator: str) -> None:
    def calls(accumulate: bool) -> list[dict[str, Tensor]]:
        net = Net()
        made = MAKERS[estimator](net, COPIES, seed=0)
        found = []
        for _ in range(2):
            if not accumulate:
                net.zero_grad()
            made.backward(net.loss, *data())
            found.append(gradients(net))
        return found

    apart, together = calls(False), calls(True)
    assert not torch.equal(apart[0]["fc1.weight"], apart[1]["fc1.weight"])
    assert_same(together[1], {name: apart[0][name] + apart[1][name] for name in apart[0]}, rtol=1e-5, atol=1e-6)


@every_estimator
def test_the_order_in_which_layers_are_declared_does_not_matter(estimator: str) -> None:
    found = []
    for backwards in (False, True):
        net = Net(noise="escape")
        if backwards:
            for name in ("lif1", "fc1"):
                setattr(net, name, net._modules.pop(name))
        assert next(iter(net._modules)) == ("fc2" if backwards else "fc1")
        found.append(estimate(estimator, net))
    assert_same(*found)


@every_estimator
def test_a_finite_gradient_whose_sum_overflows_is_taken(estimator: str) -> None:
    net = Net()
    net.fc1.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    MAKERS[estimator](net, COPIES, seed=0).backward(net.loss, *data())
    assert torch.equal(net.fc1.weight.grad, torch.full_like(net.fc1.weight, 3e38))


@every_estimator
def test_shared_noise_gets_the_sum(estimator: str) -> None:
    shared = estimate(estimator, Net(noise=slr.MembraneNoise(0.5)))
    apart = estimate(estimator, Net())
    total = apart["lif1.noise.log_sigma"] + apart["lif2.noise.log_sigma"]
    torch.testing.assert_close(shared["lif1.noise.log_sigma"], total)


@every_estimator
def test_gradient_is_filled_inside_no_grad(estimator: str) -> None:
    net = Net()
    with torch.no_grad():
        got = estimate(estimator, net)
    assert_same(got, estimate(estimator, Net()))


@every_estimator
def test_gradient_reaches_learned_inputs(estimator: str) -> None:
    x, y = data()
    x.requires_grad_()
    estimate(estimator, Net(), x, y)
    assert x.grad is not None
    assert x.grad.any()


FROZEN = {
    "first layer": ["fc1.weight", "fc1.bias"],
    "bias": ["fc2.bias"],
    "sigma": ["lif1.noise.log_sigma", "lif2.noise.log_sigma"],
    "readout": ["readout.weight", "readout.bias"],
    "all but sigma": [f"{layer}.{kind}" for layer in ("fc1", "fc2", "readout") for kind in ("weight", "bias")],
}


@pytest.mark.parametrize("kind", FROZEN)
@every_estimator
def test_frozen_parameters_get_no_gradient_and_do_not_change_the_others(estimator: str, kind: str) -> None:
    net, free = Net(), Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in FROZEN[kind])
    options = {"control": 0.5} if estimator == "counterfactual" else {}
    expected = {name: g for name, g in estimate(estimator, free, **options).items() if name not in FROZEN[kind]}
    # What is frozen ends the graph, which may change the order of sums.
    assert_same(estimate(estimator, net, **options), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init_hidden", [False, True])
@every_estimator
def test_batches_of_other_sizes_follow_each_other(estimator: str, init_hidden: bool) -> None:
    x, y = data()
    net, fresh = Net(init_hidden), Net(init_hidden)
    options = {"control": 0.3} if estimator == "counterfactual" else {}
    made = MAKERS[estimator](net, COPIES, **options)
    for size in (BATCH, 2, 1):
        net.zero_grad()
        torch.manual_seed(0)
        made.backward(net.loss, x[:size], y[:size])
        with torch.no_grad():
            net(x)
    torch.manual_seed(0)
    MAKERS[estimator](fresh, COPIES, **options).backward(fresh.loss, x[:1], y[:1])
    assert_same(gradients(net), gradients(fresh))


@every_estimator
def test_both_ways_to_hold_states_give_the_same_gradient(estimator: str) -> None:
    assert_same(*(estimate(estimator, Net(init_hidden)) for init_hidden in (False, True)))


@every_estimator
def test_another_network_in_the_loss_is_left_alone(estimator: str) -> None:
    net, alone, teacher = Net(), Net(), Net(noise="escape")
    rows: set[int] = set()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            rows.add(len(teacher(x)))
        return net.loss(x, y)

    MAKERS[estimator](net, COPIES, seed=0).backward(loss_fn, *data())
    MAKERS[estimator](alone, COPIES, seed=0).backward(alone.loss, *data())
    assert rows == {BATCH}
    assert_same(gradients(net), gradients(alone))


TARGETS = {
    "tensor": torch.arange(BATCH),
    "nested": (torch.arange(BATCH), {"boxes": torch.rand(BATCH, 2, 3), "ids": [torch.arange(BATCH * 2).view(-1, 2)]}),
    "with others": {
        "label": torch.arange(BATCH),
        "weight": 0.3,
        "name": "digits",
        "none": None,
        "t": torch.tensor(2.0),
    },
}


@every_estimator
@pytest.mark.parametrize("kind", TARGETS)
def test_targets_arrive_repeated_copy_first_and_inputs_as_they_are(kind: str, estimator: str) -> None:
    net = Net()
    x, y = data()
    inputs = {"images": x}
    seen: list[Any] = []

    def loss_fn(inputs: Any, targets: Any) -> Tensor:
        seen.append((inputs, targets))
        return net.loss(inputs["images"], y.repeat(COPIES))

    MAKERS[estimator](net, COPIES).backward(loss_fn, inputs, TARGETS[kind])
    given, targets = seen[-1]
    assert given is inputs
    assert given["images"] is x

    def check(got: Any, original: Any) -> None:
        if isinstance(original, Tensor) and original.dim():
            assert torch.equal(got.view(COPIES, *original.shape), original.expand(COPIES, *original.shape))
        elif isinstance(original, dict):
            assert got.keys() == original.keys()
            for key in original:
                check(got[key], original[key])
        elif isinstance(original, (list, tuple)):
            assert type(got) is type(original)
            for one, other in zip(got, original, strict=True):
                check(one, other)
        else:
            assert got is original or torch.equal(got, original)

    check(targets, TARGETS[kind])


@every_estimator
@pytest.mark.parametrize("targets", [None, (), {"weight": 2.0}], ids=str)
def test_there_may_be_no_targets(targets: Any, estimator: str) -> None:
    net, expected = Net(), Net()

    def loss_fn(net: Net) -> Any:
        return lambda x, y: net(x).square().sum(1)

    MAKERS[estimator](net, COPIES, seed=0).backward(loss_fn(net), data()[0], targets)
    MAKERS[estimator](expected, COPIES, seed=0).backward(loss_fn(expected), *data())
    assert_same(gradients(net), gradients(expected))


@every_estimator
@pytest.mark.parametrize("loss_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_network_may_have_any_float_dtype(
    dtype: torch.dtype, loss_dtype: torch.dtype, estimator: str
) -> None:
    net, expected = Net().to(dtype), Net().to(dtype)
    x, y = data(dtype)
    loss = MAKERS[estimator](net, COPIES, seed=0).backward(lambda x, y: net.loss(x, y).to(loss_dtype), x, y)
    assert loss.dtype == loss_dtype
    assert {gradient.dtype for gradient in gradients(net).values()} == {dtype}
    MAKERS[estimator](expected, COPIES, seed=0).backward(expected.loss, x, y)
    assert_same(gradients(net), gradients(expected), rtol=1e-4, atol=1e-5)


@every_estimator
def test_a_membrane_may_have_no_features(estimator: str) -> None:
    neuron = slr.Leaky(beta=0.9, threshold=0.5, learn_beta=True, noise="escape")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mem, total = neuron.reset_mem(), torch.zeros(())
        for _ in range(3):
            spikes, mem = neuron(x, mem)
            total = total + spikes
        return (total - y).square()

    MAKERS[estimator](neuron, copies=4).backward(loss, torch.rand(6), torch.ones(6))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in neuron.parameters())


@every_estimator
@pytest.mark.parametrize("pixel", [torch.nan, torch.inf])
@pytest.mark.parametrize("noise", ["membrane", "escape"])
def test_a_pixel_that_is_not_finite_is_an_error_before_anything_changes(
    estimator: str, pixel: float, noise: str
) -> None:
    net = Net(noise=noise)
    net.fc1 = nn.Sequential(net.fc1, nn.BatchNorm1d(4, track_running_stats=False).eval())
    made = MAKERS[estimator](net, COPIES)
    x, y = data()
    made.backward(net.loss, x, y)
    x[1, 2, 0] = pixel
    with nothing_changes(net), pytest.raises(ValueError, match=r"in fc1\.0\.weight.*\. 1 of 60 numbers"):
        made.backward(net.loss, x, y)
    net.zero_grad()
    made.backward(net.loss, *data())
    assert all(gradient.isfinite().all() for gradient in gradients(net).values())


@every_estimator
def test_levels_and_parameters_that_are_not_finite_are_named(estimator: str) -> None:
    net = Net(noise=slr.MembraneNoise(torch.full((4,), 0.5)))
    made = MAKERS[estimator](net, COPIES)
    for value in (-200.0, 200.0, torch.nan):
        with torch.no_grad():
            net.lif2.noise.log_sigma[-1] = value
        with pytest.raises(ValueError, match=r"noise: sigma must be positive.*learning rate"):
            made.backward(net.loss, *data())
    with torch.no_grad():
        net.lif2.noise.log_sigma.zero_()
        net.fc2.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"parameter fc2\.weight has values that are not finite"):
        made.backward(net.loss, *data())


@every_estimator
def test_a_network_that_lost_its_noise_or_has_it_off_is_refused(estimator: str) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES)
    off = (
        r"noise of lif1 \(Leaky\), lif2 \(Leaky\) is off: call net.train\(\), leave noise_off\(net\), or .*at_eval=True"
    )
    with nothing_changes(net), slr.noise_off(net), pytest.raises(ValueError, match=off):
        made.backward(net.loss, *data())
    net.eval()
    with nothing_changes(net), pytest.raises(ValueError, match=off):
        made.backward(net.loss, *data())
    with slr.noise_on(net):
        made.backward(net.loss, *data())
    slr.remove_noise(net)
    with nothing_changes(net), pytest.raises(ValueError, match="no noisy neuron"):
        made.backward(net.loss, *data())


@every_estimator
def test_a_learned_threshold_that_one_sample_meets_twice_is_refused(estimator: str) -> None:
    net = slr.Leaky(beta=0.9, noise=True, init_hidden=True, learn_threshold=True, reset_delay=False)

    def call() -> None:
        MAKERS[estimator](net, COPIES).backward(
            lambda x, y: slr.rollout(nn.Sequential(net), x, 1)[0].sum(1), torch.rand(3, 2), torch.zeros(3)
        )

    with pytest.raises(ValueError, match="reset_delay=True"):
        call()
    assert net.threshold.grad is None
    net.noise = slr.EscapeNoise()
    call()
    assert net.threshold.grad is not None


@pytest.mark.filterwarnings("ignore:BatchNorm")
@every_estimator
def test_an_error_inside_leaves_gradients_and_statistics(estimator: str) -> None:
    net = Net()
    net.fc1 = nn.Sequential(net.fc1, nn.BatchNorm1d(4))
    made = MAKERS[estimator](net, COPIES)
    mean = net.fc1[1].running_mean.clone()

    def fails(x: Tensor, y: Tensor) -> Tensor:
        net.loss(x, y)
        raise KeyError("late")

    for loss_fn, error in ((fails, KeyError), (lambda x, y: net.loss(x, y) / 0, ValueError)):
        with nothing_changes(net), pytest.raises(error):
            made.backward(loss_fn, *data())
        assert torch.equal(net.fc1[1].running_mean, mean)


@every_estimator
def test_sparse_gradients_are_added_to_those_that_were_there(estimator: str) -> None:
    net = Net()
    net.fc1 = nn.EmbeddingBag(5, 4, sparse=True)
    tokens, y = torch.arange(5 * 4 * 2).view(5, 4, 2) % 5, data()[1]
    options = {"control": 0.5} if estimator == "counterfactual" else {}
    for _ in range(2):
        MAKERS[estimator](net, COPIES, seed=0, **options).backward(net.loss, tokens, y)
    twice = net.fc1.weight.grad.to_dense()
    net.zero_grad()
    MAKERS[estimator](net, COPIES, seed=0, **options).backward(net.loss, tokens, y)
    torch.testing.assert_close(twice, 2 * net.fc1.weight.grad.to_dense())


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda estimator: pickle.loads(pickle.dumps(estimator)),
}


@pytest.mark.parametrize("copier", COPIERS)
@every_estimator
def test_a_copied_estimator_goes_on_with_the_same_numbers(estimator: str, copier: str) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES, seed=0)
    made.backward(net.loss, *data())
    copied = COPIERS[copier](made)
    assert copied.net is not net
    found = []
    for one in (made, copied):
        one.net.zero_grad()
        for _ in range(2):
            one.backward(one.net.loss, *data())
        found.append(gradients(one.net))
    assert_same(*found)


@pytest.mark.parametrize("noise", ["membrane", "escape"])
@every_estimator
def test_a_call_leaves_nothing_alive(estimator: str, noise: str) -> None:
    net = Net(noise=noise)
    made = MAKERS[estimator](net, COPIES)
    alive = []
    gc.disable()  # a graph in a cycle would stay, and the collector cannot see through autograd's nodes
    gc.freeze()  # what was there before is not looked through
    try:
        for _ in range(5):
            made.backward(net.loss, *data())
            slr.reset(net)
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    finally:
        gc.unfreeze()
        gc.enable()
    assert len(set(alive[1:])) == 1


class _Surrogate(slr.Estimator):
    """An estimator of one's own: surrogate gradients, with noise copies."""

    def estimate(self, neurons: Any, loss_fn: Any, inputs: Any, targets: Any) -> torch.Tensor:
        losses, _ = self.run(neurons, None, loss_fn, inputs, targets)
        losses.mean().backward()
        return losses.detach().mean()


def test_an_estimator_of_ones_own_adds_its_gradient_and_is_attached() -> None:
    net, (x, y) = Net(), data()
    torch.manual_seed(0)
    net.loss(x, y).mean().backward()
    expected = gradients(net)
    torch.manual_seed(0)
    _Surrogate(net, copies=1).backward(net.loss, x, y)
    assert_same(gradients(net), {name: 2 * gradient for name, gradient in expected.items()}, rtol=1e-5, atol=1e-7)
    optimizer, before = torch.optim.SGD(net.parameters(), lr=0.1), net.fc1.weight.detach().clone()
    slr.attach(optimizer, net, _Surrogate(net, copies=3))
    optimizer.step(slr.closure(net.loss, x, y))
    assert not torch.equal(net.fc1.weight, before)
