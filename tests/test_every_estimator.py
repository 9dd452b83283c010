"""What a loop of one's own may expect of ``backward(loss_fn, inputs, targets)``, whatever the estimator."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import snntorch_lr as slr
from snntorch_lr.gradients import ESTIMATORS

from .helpers import (
    BATCH,
    COPIERS,
    DEVICES,
    MAKERS,
    Net,
    assert_filled,
    assert_same,
    backward,
    data,
    estimate,
    every_estimator,
    every_noise,
    gradients,
    nothing_changes,
)

COPIES = 4


def fixed(estimator: str) -> dict[str, float]:
    """A λ that does not change, for calls that are compared."""
    return {"control": 0.5} if estimator == "counterfactual" else {}


def test_estimators_are_known_by_name() -> None:
    assert ESTIMATORS == MAKERS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@every_noise
@every_estimator
def test_fills_the_gradient_of_every_parameter(estimator: str, noise: str, dtype: torch.dtype, device: str) -> None:
    net = Net(noise=noise).to(device, dtype)
    estimate(estimator, net, arguments=data(dtype, device))
    assert_filled(net, dtype)


@pytest.mark.parametrize(("kind", "around"), [(torch.bfloat16, True), (torch.float16, False)])
@every_estimator
def test_half_precision_by_autocast_is_close(estimator: str, kind: torch.dtype, around: bool) -> None:
    net = Net()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=kind):
            return net.loss(x, y)

    with torch.autocast("cpu", dtype=kind, enabled=around):
        rounded = estimate(estimator, net, net.loss if around else loss_fn, copies=50)
    assert_filled(net)
    flat = [torch.cat([g.flatten() for g in of.values()]) for of in (rounded, estimate(estimator, Net(), copies=50))]
    assert nn.functional.cosine_similarity(*flat, dim=0) > 0.95


@every_estimator
def test_returns_the_mean_loss_detached_in_the_dtype_of_the_losses(estimator: str) -> None:
    net = Net()
    seen: list[Tensor] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y).double()
        if len(losses) == COPIES * BATCH and losses.requires_grad:
            seen.append(losses.detach())
        return losses

    loss = MAKERS[estimator](net, COPIES, seed=0).backward(loss_fn, *data())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, seen[0].mean())
    # Gradients have the dtype of the network.
    assert_same(gradients(net), estimate(estimator, Net()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [True, False])
@every_estimator
def test_a_seed_decides_or_else_the_global_generator(estimator: str, own: bool) -> None:
    net = Net()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(estimate(estimator, net, seed=seed if own else None, **fixed(estimator)))
        # A seed leaves the global generator alone.
        assert torch.equal(state, torch.get_rng_state()) == own
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["fc1.weight"], results[2]["fc1.weight"])


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
    net = Net(noise="escape")
    for name in ("lif1", "fc1"):
        setattr(net, name, net._modules.pop(name))
    assert next(iter(net._modules)) == "fc2"
    assert_same(estimate(estimator, net), estimate(estimator, Net(noise="escape")))


@every_estimator
def test_a_finite_gradient_whose_sum_overflows_is_taken(estimator: str) -> None:
    net = Net()
    net.fc1.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    estimate(estimator, net)
    assert torch.equal(net.fc1.weight.grad, torch.full_like(net.fc1.weight, 3e38))


@every_estimator
def test_shared_noise_gets_the_sum(estimator: str) -> None:
    shared, apart = estimate(estimator, Net(noise=slr.MembraneNoise(0.5))), estimate(estimator, Net())
    total = apart["lif1.noise.log_sigma"] + apart["lif2.noise.log_sigma"]
    torch.testing.assert_close(shared["lif1.noise.log_sigma"], total)


@every_estimator
def test_neither_no_grad_nor_who_holds_the_states_matters(estimator: str) -> None:
    with torch.no_grad():
        found = estimate(estimator, Net(init_hidden=False))
    assert_same(found, estimate(estimator, Net()))


@every_estimator
def test_gradient_reaches_learned_inputs(estimator: str) -> None:
    x, y = data()
    estimate(estimator, Net(), arguments=(x.requires_grad_(), y))
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
    net = Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in FROZEN[kind])
    free = estimate(estimator, Net(), **fixed(estimator))
    expected = {name: gradient for name, gradient in free.items() if name not in FROZEN[kind]}
    # What is frozen ends the graph, which may change the order of sums.
    assert_same(estimate(estimator, net, **fixed(estimator)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init_hidden", [False, True])
@every_estimator
def test_batches_of_other_sizes_follow_each_other(estimator: str, init_hidden: bool) -> None:
    x, y = data()
    net, fresh = Net(init_hidden), Net(init_hidden)
    made = MAKERS[estimator](net, COPIES, **fixed(estimator))
    for size in (BATCH, 2, 1):
        net.zero_grad()
        torch.manual_seed(0)
        made.backward(net.loss, x[:size], y[:size])
        with torch.no_grad():
            net(x)
    torch.manual_seed(0)
    assert_same(gradients(net), estimate(estimator, fresh, None, (x[:1], y[:1]), seed=None, **fixed(estimator)))


@every_estimator
def test_another_network_in_the_loss_is_left_alone(estimator: str) -> None:
    net, teacher = Net(), Net(noise="escape")
    rows: set[int] = set()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            rows.add(len(teacher(x)))
        return net.loss(x, y)

    assert_same(estimate(estimator, net, loss_fn), estimate(estimator, Net()))
    assert rows == {BATCH}


TARGETS = {
    "nested": (torch.arange(BATCH), {"boxes": torch.rand(BATCH, 2, 3), "ids": [torch.arange(BATCH * 2).view(-1, 2)]}),
    "with others": {"label": torch.arange(BATCH), "weight": 0.3, "name": "digits", "none": None, "t": torch.tensor(2)},
    "none": None,
    "empty": (),
    "without a tensor": {"weight": 2.0},
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

    found = estimate(estimator, net, loss_fn, (inputs, TARGETS[kind]))
    assert_same(found, estimate(estimator, Net()))
    arrived, targets = seen[-1]
    assert arrived is inputs
    assert arrived["images"] is x
    (leaves, tree), (originals, expected) = tree_flatten(targets), tree_flatten(TARGETS[kind])
    assert tree == expected
    for leaf, original in zip(leaves, originals, strict=True):
        if isinstance(original, Tensor) and original.dim():
            assert torch.equal(leaf.view(COPIES, *original.shape), original.expand(COPIES, *original.shape))
        else:
            assert leaf is original or torch.equal(leaf, original)


@every_noise
@every_estimator
def test_a_membrane_may_have_no_features(estimator: str, noise: str) -> None:
    neuron = slr.Leaky(beta=0.9, threshold=0.5, learn_beta=True, noise=noise)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mem, total = neuron.reset_mem(), torch.zeros(())
        for _ in range(3):
            spikes, mem = neuron(x, mem)
            total = total + spikes
        return (total - y).square()

    estimate(estimator, neuron, loss, (torch.rand(6), torch.ones(6)))
    assert_filled(neuron)


@every_estimator
@pytest.mark.parametrize("pixel", [torch.nan, torch.inf])
@every_noise
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
    arguments = torch.arange(5 * 4 * 2).view(5, 4, 2) % 5, data()[1]
    once = estimate(estimator, net, arguments=arguments, **fixed(estimator))["fc1.weight"].to_dense()
    MAKERS[estimator](net, COPIES, seed=0, **fixed(estimator)).backward(net.loss, *arguments)
    torch.testing.assert_close(net.fc1.weight.grad.to_dense(), 2 * once)


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


@every_noise
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
    expected = backward(net, lambda: net.loss(x, y).mean(), seed=0)
    torch.manual_seed(0)
    _Surrogate(net, copies=1).backward(net.loss, x, y)
    assert_same(gradients(net), {name: 2 * gradient for name, gradient in expected.items()}, rtol=1e-5, atol=1e-7)
    optimizer, before = torch.optim.SGD(net.parameters(), lr=0.1), net.fc1.weight.detach().clone()
    slr.attach(optimizer, net, _Surrogate(net, copies=3))
    optimizer.step(slr.closure(net.loss, x, y))
    assert not torch.equal(net.fc1.weight, before)
