"""``attach``, ``closure`` and ``use_gradient``: which gradient an optimizer's loop has, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import snntorch_lr as slr
from snntorch_lr.network import noisy_neurons

from .helpers import BATCH, DEVICES, MAKERS, Net, assert_same, data, every_estimator, gradients, weights

COPIES = 4
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=3),
}
X, Y = data()


@contextmanager
def nothing_is_updated(net: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Weights, gradients and the optimizer are the same after the block."""
    before = weights(net), gradients(net), str(optimizer.state_dict())
    try:
        yield
    finally:
        assert_same(before[0], weights(net))
        torch.testing.assert_close(before[1], gradients(net), rtol=0, atol=0, equal_nan=True)
        assert before[2] == str(optimizer.state_dict())


def attached(optimizer: str = "SGD", net: Net | None = None, **options: Any) -> tuple[Net, Optimizer, slr.optim.Hook]:
    net = Net() if net is None else net
    made = OPTIMIZERS[optimizer](net.parameters())
    return net, made, slr.attach(made, net, **options)


def loss_of(net: Net, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return net.loss(X, Y).mean()


def backward_of(net: Net, optimizer: Optimizer, seed: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(net, seed)
    loss.backward()
    return loss


def moved(net: nn.Module, start: dict[str, Tensor]) -> set[str]:
    return {name for name, value in weights(net).items() if not torch.equal(value, start[name])}


class TestPlainLoop:
    """``loss.backward(); optimizer.step()``."""

    @pytest.mark.parametrize(
        ("name", "in_closure"), [*((name, True) for name in OPTIMIZERS), ("momentum", False), ("AdamW", False)]
    )
    def test_steps_with_the_gradient_of_counterfactual_credit(self, name: str, in_closure: bool) -> None:
        net, optimizer, _ = attached(name)
        other = Net()
        slr.use_gradient(other)
        plain, start = OPTIMIZERS[name](other.parameters()), weights(net)
        for seed in range(3):
            losses = []
            for model, made in ((net, optimizer), (other, plain)):
                backpropagate = partial(backward_of, model, made, seed)
                losses.append(made.step(backpropagate) if in_closure else backpropagate())
                if not in_closure:
                    made.step()
            assert losses[0] == losses[1]
            assert_same(weights(net), weights(other))
        assert moved(net, start) == start.keys()

    @pytest.mark.parametrize("estimator", ["counterfactual", "approximate"])
    def test_copies_are_refused(self, estimator: str) -> None:
        net, optimizer, _ = attached(estimator=estimator, copies=2)
        slr.rollout(nn.Sequential(net.fc1, net.lif1), X.transpose(0, 1)).sum().backward()
        with nothing_is_updated(net, optimizer), pytest.raises(ValueError, match=r"copies=2 is for .*closure"):
            optimizer.step()

    @pytest.mark.parametrize("ordinary", [False, True])
    @pytest.mark.parametrize("name", ["SGD", "LBFGS"])
    def test_an_estimator_that_runs_the_forward_pass_refuses_it(self, name: str, ordinary: bool) -> None:
        net, optimizer, _ = attached(name, estimator="vanilla")
        loss_of(net).backward()
        closures = [lambda: loss_of(net)] if ordinary else []
        said = r"(without a|ordinary) closure.*step\(snntorch_lr\.closure\(.*hook\.remove.*counterfactual"
        with nothing_is_updated(net, optimizer), pytest.raises(RuntimeError, match=said):
            optimizer.step(*closures)

    def test_gradients_without_noise_are_refused(self) -> None:
        net, optimizer, _ = attached()
        said = r"no likelihood-ratio gradients.*lif1 \(Leaky\), lif2 \(Leaky\) is off: call net.train\(\)"
        for _ in range(2):
            net.eval()
            loss_of(net).backward()
            with nothing_is_updated(net, optimizer), pytest.raises(ValueError, match=said):
                optimizer.step()
            net.train()
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()
            optimizer.zero_grad()

    def test_gradients_of_a_copy_of_the_network_are_refused(self) -> None:
        net, optimizer, _ = attached()
        other = copy.deepcopy(net)
        loss_of(other).backward()
        for parameter, twin in zip(net.parameters(), other.parameters(), strict=True):
            parameter.grad = twin.grad
        with nothing_is_updated(net, optimizer), pytest.raises(ValueError, match="did not reach them"):
            optimizer.step()

    def test_a_step_without_gradients_does_nothing(self) -> None:
        net, optimizer, _ = attached()
        with nothing_is_updated(net, optimizer):
            optimizer.step()

    @pytest.mark.parametrize(("noise", "value"), [("membrane", torch.nan), ("escape", torch.inf)])
    def test_gradients_that_are_not_finite_are_refused(self, noise: str, value: float) -> None:
        net, optimizer, _ = attached("AdamW", Net(noise=noise))
        loss_of(net).backward()
        optimizer.step()
        optimizer.zero_grad()
        x = X.clone()
        x[1, 2, 0] = value
        net.loss(x, Y).mean().backward()
        said = r"not finite in fc1\.weight.*no weight"
        with nothing_is_updated(net, optimizer), pytest.raises(ValueError, match=said):
            optimizer.step()
        optimizer.zero_grad()
        loss_of(net).backward()
        assert all(gradient.isfinite().all() for gradient in gradients(net).values())
        optimizer.step()

    @pytest.mark.parametrize("fused", [False, True], ids=["the scaler looks", "the optimizer looks"])
    def test_what_overflowed_is_left_to_a_gradient_scaler(self, fused: bool) -> None:
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
        slr.attach(optimizer, net)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        start = weights(net)
        scaler.scale(loss_of(net) * 2.0**120).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() < 2.0**10
        assert not moved(net, start)


def test_a_first_backward_pass_of_frozen_weights_may_leave_them_out() -> None:
    net, optimizer, _ = attached()
    net.fc1.requires_grad_(False)
    loss_of(net).backward()
    start = weights(net)
    optimizer.step()
    assert moved(net, start) == {name for name in start if not name.startswith("fc1")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "estimator"), [("LBFGS", "counterfactual"), ("AdamW", "vanilla"), *(("SGD", name) for name in MAKERS)]
)
def test_closures_step_with_the_estimators_gradient(name: str, estimator: str, device: str) -> None:
    net, other = Net().to(device), Net().to(device)
    optimizer, plain = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](other.parameters())
    slr.attach(optimizer, net, estimator, copies=COPIES, seed=0)
    made = MAKERS[estimator](other, COPIES, seed=0)
    # What was there before is cleared.
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)

    def by_hand() -> Tensor:
        plain.zero_grad()
        return made.backward(other.loss, *data(device=device))

    start = weights(net)
    for _ in range(3):
        loss = optimizer.step(closure=slr.closure(net.loss, *data(device=device)))
        assert torch.equal(torch.as_tensor(loss), torch.as_tensor(plain.step(by_hand)))
        assert_same(weights(net), weights(other))
    assert moved(net, start) == start.keys()


def test_parameter_groups_keep_their_settings() -> None:
    net = Net()
    sigmas = [net.lif1.noise.log_sigma, net.lif2.noise.log_sigma]
    rest = [*net.fc1.parameters(), *net.fc2.parameters()]
    optimizer = torch.optim.SGD([{"params": sigmas, "lr": 0.0}, {"params": rest, "lr": 0.1}])
    slr.attach(optimizer, net, copies=COPIES, seed=0)
    start = weights(net)
    optimizer.step(slr.closure(net.loss, X, Y))
    assert moved(net, start) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("attach_first", [False, True])
def test_learning_rate_schedulers_work(attach_first: bool) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    if attach_first:
        slr.attach(optimizer, net)
    step, plateau = lr_scheduler.StepLR(optimizer, 1, gamma=0.1), lr_scheduler.ReduceLROnPlateau(optimizer)
    if not attach_first:
        slr.attach(optimizer, net)
    plateau.step(optimizer.step(slr.closure(net.loss, X, Y)))
    step.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@every_estimator
def test_a_closure_that_fails_changes_nothing(estimator: str) -> None:
    net, optimizer, _ = attached("AdamW", estimator=estimator, copies=COPIES)
    optimizer.step(slr.closure(net.loss, X, Y))

    def backward_fails(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        if losses.requires_grad:
            losses.register_hook(lambda _: 1 / 0)
        return losses

    for loss_fn, error in ((lambda x, y: net.loss(x, y) * torch.nan, ValueError), (backward_fails, ZeroDivisionError)):
        with nothing_is_updated(net, optimizer), pytest.raises(error):
            optimizer.step(slr.closure(loss_fn, X, Y))


class TestRemove:
    """``hook.remove()``."""

    @every_estimator
    @pytest.mark.parametrize("name", ["SGD", "AdamW", "LBFGS"])
    @pytest.mark.parametrize("steps", [0, 2])
    def test_gives_surrogate_gradients_back_bit_for_bit(self, steps: int, name: str, estimator: str) -> None:
        net, optimizer, hook = attached(name, estimator=estimator, copies=COPIES)
        for _ in range(steps):
            optimizer.step(slr.closure(net.loss, X, Y))
        hook.remove()
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())
        slr.reset(net)
        # A network that knew of no estimator.
        other = Net()
        other.load_state_dict(net.state_dict())
        expected = OPTIMIZERS[name](other.parameters())
        expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(2):
            losses = []
            for model, made in ((net, optimizer), (other, expected)):
                torch.manual_seed(0)
                losses.append(made.step(slr.closure(model.loss, X, Y)))
            assert losses[0] == losses[1]
            assert_same(weights(net), weights(other))

    def test_of_a_plain_loop_too(self) -> None:
        net, optimizer, hook = attached()
        loss_of(net).backward()
        optimizer.step()
        hook.remove()
        assert all(neuron.sampler is None for neuron in noisy_neurons(net).values())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        # Without noise too.
        net.eval()
        loss_of(net).backward()
        optimizer.step()

    @pytest.mark.parametrize("other_net", [False, True])
    def test_lets_another_hook_in(self, other_net: bool) -> None:
        net, optimizer, hook = attached()
        with pytest.raises(ValueError, match=r"hook already; call remove\(\)"):
            slr.attach(optimizer, Net() if other_net else net)
        hook.remove()
        slr.attach(optimizer, net)


@pytest.mark.parametrize(("name", "copies"), [("counterfactual", 1), ("vanilla", 16), ("approximate", 16)])
def test_an_estimator_may_be_named_or_given(name: str, copies: int) -> None:
    net, optimizer, hook = attached(estimator=name)
    assert type(hook.estimator) is MAKERS[name]
    assert hook.estimator.copies == copies
    hook.remove()
    estimator = MAKERS[name](net, copies=3)
    assert slr.attach(optimizer, net, estimator).estimator is estimator


@pytest.mark.filterwarnings("ignore:the optimizer does not update")
def test_two_optimizers_may_train_one_network() -> None:
    net = Net()
    layers = [[*net.fc1.parameters(), net.lif1.noise.log_sigma], [*net.fc2.parameters(), net.lif2.noise.log_sigma]]
    first, second = (torch.optim.SGD(layer, lr=0.1) for layer in layers)
    for optimizer in (first, second):
        slr.attach(optimizer, net)
    start = weights(net)
    loss_of(net).backward()
    first.step()
    assert moved(net, start) == {"fc1.weight", "fc1.bias", "lif1.noise.log_sigma"}
    second.step()
    assert "fc2.weight" in moved(net, start)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("learn", [False, True])
def test_noise_levels_that_the_optimizer_does_not_know_are_warned_of_if_they_are_learned(learn: bool) -> None:
    net = Net(noise=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.add_noise(net, learn=learn)
    said = r"does not update the noise levels of lif1.noise, lif2.noise: build it after add_noise\(net\)"
    with pytest.warns(UserWarning, match=said) if learn else nullcontext():
        slr.attach(optimizer, net)


def test_optimizer_stays_an_ordinary_optimizer() -> None:
    net, optimizer, hook = attached("AdamW")
    optimizer.step(slr.closure(net.loss, X, Y))
    assert hook.optimizer is optimizer
    fresh = torch.optim.AdamW(net.parameters(), lr=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.01
    assert len(fresh.state) == len(list(net.parameters()))


def test_closure_backpropagates_the_mean_of_per_sample_losses_by_itself() -> None:
    net, other = Net().eval(), Net().eval()
    for _ in range(2):
        loss = slr.closure(net.loss, X, Y)()
    expected = other.loss(X, Y)
    assert expected.shape == (BATCH,)
    expected.mean().backward()
    torch.testing.assert_close(loss, expected.mean().detach())
    assert_same(gradients(net), gradients(other))


class TestUseGradient:
    """``use_gradient``."""

    def test_surrogate_undoes_counterfactual_bit_for_bit(self) -> None:
        net, other = Net(), Net()
        slr.use_gradient(net)
        loss_of(net).backward()
        credit = gradients(net)
        net.zero_grad()
        slr.use_gradient(net, "surrogate")
        loss_of(net).backward()
        loss_of(other).backward()
        assert_same(gradients(net), gradients(other))
        assert not torch.equal(credit["fc1.weight"], net.fc1.weight.grad)

    def test_removed_noise_takes_it_along_and_later_noise_needs_a_second_call(self) -> None:
        net = slr.add_noise(Net(noise=False), only=["lif1"])
        net.fc2.requires_grad_(False)
        slr.use_gradient(net)
        slr.use_gradient(slr.add_noise(net))
        assert all(neuron.sampler is not None for neuron in noisy_neurons(net).values())
        slr.add_noise(slr.remove_noise(net))
        assert all(neuron.sampler is None for neuron in noisy_neurons(net).values())


class LearnsMore(slr.Leaky):
    """With a parameter of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rho = nn.Parameter(torch.ones(()))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "SLSTM": (lambda: slr.SLSTM(3, 3, noise=True), r"1 \(SLSTM\): an LSTM cell mixes.*vanilla"),
    "SConv2dLSTM": (lambda: slr.SConv2dLSTM(1, 1, 3, noise=True), r"1 \(SConv2dLSTM\): an LSTM cell mixes.*vanilla"),
    "inhibition": (lambda: slr.Leaky(0.9, noise=True, inhibition=True), r"1 \(Leaky\): inhibition lets only.*vanilla"),
    "threshold met twice": (
        lambda: slr.Leaky(0.9, noise=True, learn_threshold=True, reset_delay=False),
        r"1 \(Leaky\): with reset_delay=False.*learn_threshold=False",
    ),
    "no noise": (lambda: slr.Leaky(0.9), r"Sequential has no noisy neuron.*noise=True.*add_noise\(net\)"),
}
BY_APPROXIMATE: dict[str, tuple[Callable[[], Any], str]] = {
    "recurrence": (
        lambda: slr.RLeaky(0.9, linear_features=3, noise=True), r"1 \(RLeaky\): all-to-all recurrence.*use estimator="
    ),
    "own parameter": (lambda: LearnsMore(beta=0.9, noise=True), r"1 \(LearnsMore\): its rho.*use estimator="),
}  # fmt: skip


def assert_refused(neuron: Any, estimator: str, message: str, *, in_rollout: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 3), neuron)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ways: list[Callable[[], object]] = [
        lambda: slr.attach(optimizer, net, estimator, copies=2),
        lambda: MAKERS[estimator](net).backward(lambda x, y: net(x)[0].sum(1), torch.rand(2, 3), torch.zeros(2)),
    ]
    for choose in [*ways, *[lambda: slr.use_gradient(net, estimator)] * in_rollout]:
        with pytest.raises(ValueError, match=message):
            choose()
    assert getattr(neuron, "sampler", None) is None


@pytest.mark.filterwarnings("ignore:Inhibition")
@pytest.mark.parametrize("estimator", ["counterfactual", "approximate"])
@pytest.mark.parametrize("kind", REFUSED)
def test_neurons_that_cannot_have_a_gradient_are_refused_by_name(kind: str, estimator: str) -> None:
    make, message = REFUSED[kind]
    assert_refused(make(), estimator, message, in_rollout=True)


@pytest.mark.parametrize("kind", BY_APPROXIMATE)
def test_neurons_that_sums_over_time_do_not_know_are_refused_by_name(kind: str) -> None:
    make, message = BY_APPROXIMATE[kind]
    assert_refused(make(), "approximate", message, in_rollout=False)
