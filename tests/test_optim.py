from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import snntorch_lr as slr

from .helpers import BATCH, DEVICES, MAKERS, Net, assert_same, data, gradients

COPIES = 4
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=3),
}


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def attached(optimizer: str = "SGD", **options: Any) -> tuple[Net, Optimizer, Any]:
    net = Net()
    made = OPTIMIZERS[optimizer](net.parameters())
    return net, made, slr.attach(made, net, **{"copies": COPIES, "seed": 0, **options})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_with_the_estimators_gradient(name: str, device: str) -> None:
    net, other = Net().to(device), Net().to(device)
    optimizer, plain = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](other.parameters())
    slr.attach(optimizer, net, copies=COPIES, seed=0)
    estimator = slr.Counterfactual(other, COPIES, seed=0)

    def by_hand() -> Tensor:
        plain.zero_grad()
        return estimator.backward(other.loss, *data(device=device))

    start = weights(net)
    for _ in range(3):
        loss = optimizer.step(slr.closure(net.loss, *data(device=device)))
        expected = plain.step(by_hand)
        assert torch.equal(torch.as_tensor(loss), torch.as_tensor(expected))
        assert_same(weights(net), weights(other))
    assert all(not torch.equal(value, start[key]) for key, value in weights(net).items())


@pytest.mark.parametrize(
    ("estimator", "made", "copies"),
    [(None, slr.Counterfactual, 2), ("vanilla", slr.Vanilla, 16), ("approximate", slr.Approximate, 16)],
)
def test_estimators_have_copies_by_default(estimator: str | None, made: type, copies: int) -> None:
    net = Net()
    options = {} if estimator is None else {"estimator": estimator}
    hook = slr.attach(torch.optim.SGD(net.parameters(), lr=0.1), net, **options)
    assert type(hook.estimator) is made
    assert hook.estimator.copies == copies


def test_loss_falls() -> None:
    net, optimizer, _ = attached("Adam", copies=16)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    losses = [optimizer.step(slr.closure(net.loss, *data())).item() for _ in range(40)]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2


def test_parameter_groups_keep_their_settings() -> None:
    net = Net()
    sigmas = [net.lif1.noise.log_sigma, net.lif2.noise.log_sigma]
    rest = [*net.fc1.parameters(), *net.fc2.parameters()]
    optimizer = torch.optim.SGD([{"params": sigmas, "lr": 0.0}, {"params": rest, "lr": 0.1}])
    slr.attach(optimizer, net, copies=COPIES, seed=0)
    start = weights(net)
    optimizer.step(slr.closure(net.loss, *data()))
    moved = {key for key, value in weights(net).items() if not torch.equal(value, start[key])}
    assert moved == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.StepLR(o, 1, gamma=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=4),
        lr_scheduler.ReduceLROnPlateau,
    ],
    ids=["StepLR", "Cosine", "OneCycle", "Plateau"],
)
@pytest.mark.parametrize("attach_first", [False, True])
def test_learning_rate_schedulers_work(schedule: Callable[[Optimizer], Any], attach_first: bool) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hook = slr.attach(optimizer, net, copies=COPIES) if attach_first else None
        scheduler = schedule(optimizer)
        hook = hook or slr.attach(optimizer, net, copies=COPIES)
        rates = []
        for _ in range(3):
            loss = optimizer.step(slr.closure(net.loss, *data()))
            scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            rates.append(optimizer.param_groups[0]["lr"])
    if not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        assert len(set(rates)) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("with_closure", [False, True])
def test_step_without_our_closure_is_refused_before_any_change(name: str, with_closure: bool) -> None:
    net, optimizer, _ = attached(name)
    net.loss(*data()).mean().backward()
    start, grads = weights(net), gradients(net)
    given = [lambda: net.loss(*data()).mean()] if with_closure else []
    with pytest.raises(RuntimeError, match=r"step\(snntorch_lr\.closure\(loss_fn, inputs, targets\)\).*hook.remove"):
        optimizer.step(*given)
    assert_same(start, weights(net))
    assert_same(grads, gradients(net))


def test_closure_may_be_a_keyword() -> None:
    (net, optimizer, _), (other, expected, _) = attached(), attached()
    optimizer.step(closure=slr.closure(net.loss, *data()))
    expected.step(slr.closure(other.loss, *data()))
    assert_same(weights(net), weights(other))


def test_ordinary_closure_as_a_keyword_is_refused() -> None:
    net, optimizer, _ = attached()
    with pytest.raises(RuntimeError, match="ordinary closure"):
        optimizer.step(closure=lambda: net.loss(*data()).mean())


def test_each_step_clears_the_gradients() -> None:
    (net, optimizer, _), (other, expected, _) = attached(), attached()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    optimizer.step(slr.closure(net.loss, *data()))
    expected.step(slr.closure(other.loss, *data()))
    assert_same(weights(net), weights(other))
    assert_same(gradients(net), gradients(other))


@pytest.mark.parametrize("estimator", MAKERS)
def test_a_step_that_fails_changes_neither_weights_nor_gradients_nor_the_control(estimator: str) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    made = MAKERS[estimator](net, COPIES, seed=0)
    slr.attach(optimizer, net, made)
    optimizer.step(slr.closure(net.loss, *data()))
    start, grads, known = weights(net), gradients(net), copy.deepcopy(optimizer.state_dict())
    control = getattr(made, "control", {})

    def backward_fails(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        losses.register_hook(lambda _: 1 / 0)
        return losses

    for loss_fn, error in ((lambda x, y: net.loss(x, y) * torch.nan, ValueError), (backward_fails, ZeroDivisionError)):
        with pytest.raises(error):
            optimizer.step(slr.closure(loss_fn, *data()))
        assert_same(weights(net), start)
        assert_same(gradients(net), grads)
        assert str(optimizer.state_dict()) == str(known)
        assert getattr(made, "control", {}) == control


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_removed_hook_gives_ordinary_backpropagation(name: str, steps_before: int) -> None:
    net, optimizer, hook = attached(name)
    for _ in range(steps_before):
        optimizer.step(slr.closure(net.loss, *data()))
    hook.remove()
    slr.reset(net)
    other = copy.deepcopy(net)
    expected = OPTIMIZERS[name](other.parameters())
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def backpropagate() -> Tensor:
        expected.zero_grad()
        loss = other.loss(*data()).mean()
        loss.backward()
        return loss

    for _ in range(2):
        torch.manual_seed(0)
        loss = optimizer.step(slr.closure(net.loss, *data()))
        torch.manual_seed(0)
        assert torch.equal(torch.as_tensor(loss), expected.step(backpropagate).detach())
        assert not loss.requires_grad
        assert_same(weights(net), weights(other))


def test_removed_hook_leaves_no_gradient_behind() -> None:
    net, optimizer, hook = attached()
    optimizer.step(slr.closure(net.loss, *data()))
    hook.remove()
    start = weights(net)
    # Without noise nothing depends on σ, so it must not move.
    with slr.noise_off(net):
        optimizer.step(slr.closure(net.loss, *data()))
    moved = {key for key, value in weights(net).items() if not torch.equal(value, start[key])}
    assert moved == {name for name in start if "noise" not in name}


def test_removed_hook_allows_ordinary_steps() -> None:
    net, optimizer, hook = attached()
    hook.remove()
    net.loss(*data()).mean().backward()
    start = weights(net)
    optimizer.step()
    assert not torch.equal(net.fc1.weight, start["fc1.weight"])


@pytest.mark.parametrize("other_net", [False, True])
def test_second_hook_is_refused_until_the_first_is_removed(other_net: bool) -> None:
    net, optimizer, hook = attached()
    second = Net() if other_net else net
    with pytest.raises(ValueError, match=r"hook already; call remove\(\)"):
        slr.attach(optimizer, second, copies=COPIES)
    hook.remove()
    slr.attach(optimizer, net, copies=COPIES)


def test_two_optimizers_may_train_one_network() -> None:
    net = Net()
    first = torch.optim.SGD([*net.fc1.parameters(), net.lif1.noise.log_sigma], lr=0.1)
    second = torch.optim.SGD([*net.fc2.parameters(), net.lif2.noise.log_sigma], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for optimizer in (first, second):
            slr.attach(optimizer, net, copies=COPIES)
    start = weights(net)
    first.step(slr.closure(net.loss, *data()))
    assert torch.equal(net.fc2.weight, start["fc2.weight"])
    second.step(slr.closure(net.loss, *data()))
    assert not torch.equal(net.fc2.weight, start["fc2.weight"])


def test_estimator_may_be_given() -> None:
    (net, optimizer, _), other = attached(estimator="vanilla", copies=6, antithetic=True), Net()
    expected = torch.optim.SGD(other.parameters(), lr=0.1)
    estimator = slr.Vanilla(other, copies=6, antithetic=True, seed=0)
    assert slr.attach(expected, other, estimator=estimator).estimator is estimator
    optimizer.step(slr.closure(net.loss, *data()))
    expected.step(slr.closure(other.loss, *data()))
    assert_same(weights(net), weights(other))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda net: {"estimator": "evolution"},
            "unknown estimator 'evolution'; choose one of counterfactual, vanilla",
        ),
        (lambda net: {"estimator": slr.Vanilla(net), "seed": 3, "antithetic": True}, "seed, antithetic belongs"),
        (lambda net: {"estimator": slr.Vanilla(Net())}, "another network"),
        (lambda net: {"estimator": "vanilla", "copies": 1}, "copies >= 2"),
        (lambda net: {"copies": 0}, "copies must be a positive integer"),
        (lambda net: {"over_time": "sums"}, "over_time must be 'rates' or 'exact'"),
    ],
    ids=["name", "options with an instance", "other network", "copies", "no copies", "over_time"],
)
def test_wrong_options_are_refused_and_nothing_is_attached(make: Callable[[Net], dict[str, Any]], message: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        slr.attach(optimizer, net, **make(net))
    net.loss(*data()).mean().backward()
    optimizer.step()


def test_noise_levels_that_the_optimizer_does_not_know_are_warned_of() -> None:
    net = Net(noise=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.add_noise(net)
    with pytest.warns(UserWarning, match=r"noise levels of lif1.noise, lif2.noise: build it after add_noise\(net\)"):
        slr.attach(optimizer, net, copies=COPIES)


def test_noise_levels_that_are_not_learned_are_not_warned_of() -> None:
    net = Net(noise=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.add_noise(net, learn=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slr.attach(optimizer, net, copies=COPIES)


def test_optimizer_stays_an_ordinary_optimizer() -> None:
    net, optimizer, hook = attached("Adam")
    optimizer.step(slr.closure(net.loss, *data()))
    assert hook.optimizer is optimizer
    fresh = torch.optim.Adam(net.parameters(), lr=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.01
    assert len(fresh.state) == len(list(net.parameters()))


def test_closure_backpropagates_the_mean_of_per_sample_losses_by_itself() -> None:
    net, other = Net().eval(), Net().eval()
    for _ in range(2):
        loss = slr.closure(net.loss, *data())()
    expected = other.loss(*data())
    assert expected.shape == (BATCH,)
    expected.mean().backward()
    torch.testing.assert_close(loss, expected.mean().detach())
    assert_same(gradients(net), gradients(other))
