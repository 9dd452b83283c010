"""What a loop of one's own may expect of every estimator; ``test_estimators`` says the same of ``Vanilla`` and more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import BATCH, COUNTERFACTUAL, DEVICES, FEATURES, MAKERS, STEPS, Net, assert_same, data, gradients

COPIES = 4
every_estimator = pytest.mark.parametrize("estimator", ["approximate", *COUNTERFACTUAL])
with_credit = pytest.mark.parametrize("estimator", COUNTERFACTUAL)


def estimate(estimator: str, net: Net, x: Tensor | None = None, y: Tensor | None = None, **options: Any) -> Any:
    net.zero_grad()
    given = data() if x is None or y is None else (x, y)
    MAKERS[estimator](net, **{"copies": COPIES, "seed": 0, **options}).backward(net.loss, *given)
    return gradients(net)


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
@with_credit
def test_the_network_may_be_in_half_precision(estimator: str, noise: str, dtype: torch.dtype) -> None:
    net = Net(noise=noise).to(dtype)
    found = estimate(estimator, net, *data(dtype))
    assert {gradient.dtype for gradient in found.values()} == {dtype}
    assert found.keys() == dict(net.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@with_credit
def test_half_precision_by_autocast_is_close(estimator: str, kind: torch.dtype, around: bool) -> None:
    net = Net()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=kind):
            return net.loss(x, y)

    with torch.autocast("cpu", dtype=kind, enabled=around):
        MAKERS[estimator](net, COPIES, seed=0).backward(net.loss if around else loss_fn, *data())
    expected = estimate(estimator, Net())
    for name, gradient in gradients(net).items():
        assert gradient.dtype == torch.float32
        cosine = nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.99, name


@every_estimator
def test_returns_the_mean_loss_detached(estimator: str) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES, seed=0)
    # The first call looks at the network with other copies.
    made.backward(net.loss, *data())
    seen: list[Tensor] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        seen.append(losses.detach())
        return losses

    loss = made.backward(loss_fn, *data())
    assert seen[0].shape == (COPIES * BATCH,)
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


@with_credit
def test_what_is_random_in_the_forward_pass_is_drawn_once_a_call(estimator: str) -> None:
    states = []
    for each in ("vanilla", estimator):
        net = Net()

        def loss_fn(x: Tensor, y: Tensor, net: Net = net) -> Tensor:
            return net.loss(torch.bernoulli(x.clamp(0, 1)), y)

        made = MAKERS[each](net, COPIES, seed=0)
        torch.manual_seed(3)
        for _ in range(2):
            made.backward(loss_fn, *data())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@with_credit
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


@pytest.mark.parametrize("estimator", MAKERS)
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


@pytest.mark.parametrize("again", [False, True], ids=["for another step", "after its last one"])
@pytest.mark.parametrize("estimator", ["approximate", "rates"])
def test_a_current_that_changes_in_place_is_refused_where_currents_are_summed(estimator: str, again: bool) -> None:
    neuron, readout = slr.Leaky(beta=0.8, noise=True), nn.Linear(FEATURES, 1)
    net = nn.ModuleList([neuron, readout])
    change = nn.Parameter(torch.full((FEATURES,), 0.3))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        current, mem = x[:, 0] * change, neuron.reset_mem()
        out = torch.zeros(())
        for step in range(STEPS):
            spikes, mem = neuron(current, mem)
            if again or step == STEPS - 1:
                current.add_(change)
            out = out + readout(spikes).squeeze(1)
        return out

    with pytest.raises(ValueError, match=r"changed in place.*current = current \+ change"):
        MAKERS[estimator](net, COPIES).backward(loss_fn, *data())
    assert change.grad is None


@with_credit
def test_a_step_whose_gradient_overflows_leaves_the_control_as_it_was(estimator: str) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES, seed=0)
    made.backward(net.loss, *data())
    before = dict(made.control)
    # The root of zero has an infinite slope, and no value that a check of the losses could see.
    with pytest.raises(ValueError, match="the new gradient is not finite"):
        made.backward(lambda x, y: (net.loss(x, y) * 0).sqrt(), *data())
    assert made.control == before
    made.backward(net.loss, *data())
    assert made.control != before


@with_credit
def test_a_finite_gradient_whose_sum_overflows_is_taken(estimator: str) -> None:
    net = Net()
    net.fc1.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    MAKERS[estimator](net, COPIES, seed=0).backward(net.loss, *data())
    assert net.fc1.weight.grad is not None
    assert torch.equal(net.fc1.weight.grad, torch.full_like(net.fc1.weight, 3e38))


@with_credit
def test_an_error_in_the_backward_pass_has_no_part_in_later_steps(estimator: str) -> None:
    found = []
    for fails in (False, True):
        net = Net()
        made = MAKERS[estimator](net, COPIES, seed=0)
        made.backward(net.loss, *data())
        state = made.state_dict()
        if fails:
            handle = net.fc1.weight.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                made.backward(net.loss, *data())
            handle.remove()
            made.load_state_dict(state)
        net.zero_grad()
        made.backward(net.loss, *data())
        found.append({**gradients(net), **made.control})
    assert_same(*found)


@with_credit
def test_shared_noise_gets_the_sum(estimator: str) -> None:
    shared = estimate(estimator, Net(noise=slr.MembraneNoise(0.5)))
    apart = estimate(estimator, Net())
    total = apart["lif1.noise.log_sigma"] + apart["lif2.noise.log_sigma"]
    torch.testing.assert_close(shared["lif1.noise.log_sigma"], total)


@pytest.mark.parametrize("copies", [1, 2])
@with_credit
def test_one_copy_is_enough(estimator: str, copies: int) -> None:
    net = Net()
    made = MAKERS[estimator](net, copies, seed=0)
    made.backward(net.loss, *data())
    rows: list[int] = []
    net.readout.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    made.backward(net.loss, *data())
    assert rows == [copies * BATCH] * STEPS
    assert all(gradient.any() for gradient in gradients(net).values())


@with_credit
def test_gradient_is_filled_inside_no_grad(estimator: str) -> None:
    net = Net()
    with torch.no_grad():
        got = estimate(estimator, net)
    assert_same(got, estimate(estimator, Net()))


@with_credit
def test_gradient_reaches_learned_inputs(estimator: str) -> None:
    x, y = data()
    x.requires_grad_()
    estimate(estimator, Net(), x, y)
    assert x.grad is not None
    assert x.grad.any()


def test_two_forward_passes_in_one_loss_are_refused_by_rates_and_not_by_exact() -> None:
    for estimator in COUNTERFACTUAL:
        net = Net()

        def loss_fn(x: Tensor, y: Tensor, net: Net = net) -> Tensor:
            return (net(x).softmax(1) - net(x.flip(0)).softmax(1)).square().sum(1)

        made = MAKERS[estimator](net, COPIES)
        if estimator == "exact":
            made.backward(loss_fn, *data())
            assert all(gradient.any() for gradient in gradients(net).values())
            continue
        with pytest.raises(ValueError, match="one presentation in each call"):
            made.backward(loss_fn, *data())
        assert not gradients(net)


@pytest.mark.parametrize("shift", [0.0, 0.5])
@with_credit
def test_states_of_every_step_may_be_learned(estimator: str, shift: float) -> None:
    neuron = slr.Synaptic(alpha=0.5, beta=0.9, threshold=0.5, noise=True)
    readout = nn.Linear(FEATURES, 1)
    start = torch.full((FEATURES,), shift, requires_grad=True)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        syn, mem = start.expand(BATCH, FEATURES), torch.zeros(BATCH, FEATURES)
        out = torch.zeros(())
        for t in range(STEPS):
            spikes, syn, mem = neuron(x[:, t], syn, mem)
            out = out + readout(spikes).squeeze(1)
        return out

    MAKERS[estimator](neuron, COPIES).backward(loss_fn, *data())
    assert start.grad is not None
    assert start.grad.all()


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda estimator: pickle.loads(pickle.dumps(estimator)),
}


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("estimator", MAKERS)
def test_a_copied_estimator_goes_on_with_the_same_numbers(estimator: str, copier: str) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES, seed=0)
    made.backward(net.loss, *data())
    copied = COPIERS[copier](made)
    assert copied.net is not net
    found = []
    for each in (made, copied):
        each.net.zero_grad()
        for _ in range(2):
            each.backward(each.net.loss, *data())
        found.append({**gradients(each.net), **getattr(each, "control", {})})
    assert_same(*found)
