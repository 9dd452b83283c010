"""States as users handle them: kept, cut, shared, computed, of several presentations in one loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor

import snntorch_lr as slr

from .helpers import (
    BATCH,
    FEATURES,
    STEPS,
    Net,
    assert_same,
    backward,
    credited,
    data,
    estimate,
    every_estimator,
    every_path,
    gradients,
)

HIDDEN = 4


def inputs(seed: int = 0, batch: int = BATCH) -> Tensor:
    return 2 * torch.rand(batch, STEPS, FEATURES, generator=torch.Generator().manual_seed(seed))


def go_on(net: Net, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Time steps after others, without a reset."""
    out = torch.zeros(())
    for now in x.unbind(1):
        added, *states = net.step(now, *states)
        out = out + added
    return out, tuple(states)


@pytest.fixture(autouse=True)
def only_own_neurons(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of what is handled well here nothing is to be said."""
    # snnTorch detaches the states of all neurons there are, and fails at a DeltaLeaky of another test.
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """Sets the keys of the noise of the next calls of noisy neurons."""
    waiting: list[int] = []
    monkeypatch.setattr("snntorch_lr.noise.new_key", lambda generator: waiting.pop(0))
    next_keys = lambda count, generator, device: torch.tensor([waiting.pop(0) for _ in range(count)])  # noqa: E731
    monkeypatch.setattr("snntorch_lr.gradients.fused.new_keys", next_keys)

    def use(values: Sequence[int]) -> None:
        assert not waiting, "not all noise was drawn"
        waiting[:] = values

    return use


@every_path
@pytest.mark.parametrize("again", ["reset_mem", "reset", "other size"])
def test_a_new_presentation_knows_nothing_of_the_last_one(noise: str, again: str) -> None:
    net = credited(noise)

    def loss() -> Tensor:
        return go_on(net, inputs(), ())[0].square().mean()

    net.fresh()
    expected = backward(net, loss)
    net.fresh()
    before = inputs(1, batch=BATCH - 2 * (again == "other size")).requires_grad_()
    net.step(before[:, 0])
    if again != "other size":
        net.fresh() if again == "reset_mem" else slr.reset(net)
    assert_same(backward(net, loss), expected)
    assert before.grad is None


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda mem: mem.detach(),
    "detach_": lambda mem: mem.detach_(),
    "detach and clone": lambda mem: mem.detach().clone(),
}


@every_path
@pytest.mark.parametrize("cut", CUTS)
def test_truncated_backpropagation_by_hand_goes_on_with_the_state_and_not_with_the_graph(noise: str, cut: str) -> None:
    net = credited(noise, init_hidden=False)

    def two(cut: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x = inputs().requires_grad_()
        torch.manual_seed(3)
        _, states = go_on(net, x[:, :2], net.fresh())
        out, _ = go_on(net, x[:, 2:], tuple(map(cut, states)))
        out.square().sum().backward()
        assert x.grad is not None
        return out, x.grad[:, :2], x.grad[:, 2:]

    out, before, after = two(CUTS[cut])
    whole, reached, _ = two(lambda mem: mem)
    assert torch.equal(out, whole)
    assert not before.any()
    assert reached.any()
    assert torch.equal(after, two(CUTS["detach and clone"])[2])
    assert after.any()


@every_path
def test_detach_hidden_cuts_states_that_are_held_and_kept_across_calls(noise: str) -> None:
    held, by_hand = credited(noise), credited(noise, init_hidden=False)
    states = by_hand.fresh()
    held.fresh()
    for part in inputs().split(2, 1):
        snn.Leaky.detach_hidden()
        found = backward(held, lambda part=part: go_on(held, part, ())[0].square().mean())
        by_hand.zero_grad()
        torch.manual_seed(3)
        out, states = go_on(by_hand, part, [mem.detach() for mem in states])
        out.square().mean().backward()
        assert_same(found, gradients(by_hand))
        assert found["fc1.weight"].any()


@every_estimator
def test_states_are_left_so_that_snntorch_can_detach_them(estimator: str) -> None:
    net = Net()
    estimate(estimator, net)
    snn.Leaky.detach_hidden()
    assert net.lif1.mem.grad_fn is None


@every_path
def test_two_presentations_whose_time_steps_alternate_are_as_one_after_the_other(noise: str, keys: Any) -> None:
    net = credited(noise, init_hidden=False)
    pair = inputs(0), inputs(1)
    numbers = [[100 * which + call for call in range(2 * STEPS)] for which in range(2)]

    def in_turn() -> Tensor:
        keys(numbers[0] + numbers[1])
        return (net(pair[0]) - net(pair[1])).square().mean()

    def alternating() -> Tensor:
        keys([key for t in range(STEPS) for which in range(2) for key in numbers[which][2 * t : 2 * t + 2]])
        states: list[Any] = [net.fresh(), net.fresh()]
        outs = [torch.zeros(()), torch.zeros(())]
        for t in range(STEPS):
            for which in range(2):
                now, *states[which] = net.step(pair[which][:, t], *states[which])
                outs[which] = outs[which] + now
        return (outs[0] - outs[1]).square().mean()

    assert_same(backward(net, alternating), backward(net, in_turn), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize("evaluation", ["no_grad", "eval", "noise_off", "noise_on"])
@every_path
def test_an_evaluation_changes_no_number_of_training(noise: str, evaluation: str, init_hidden: bool) -> None:
    def train(evaluate: bool) -> dict[str, Tensor]:
        net = Net(init_hidden, noise=noise)
        optimizer = torch.optim.Adam(net.parameters(), 0.05)
        slr.attach(optimizer, net)
        torch.manual_seed(3)
        for step in range(3):
            optimizer.zero_grad()
            loss = net.loss(inputs(step), data()[1]).mean()
            if evaluate:
                look(net)
            loss.backward()
            optimizer.step()
            if evaluate:
                look(net)
        return dict(net.state_dict())

    def look(net: Net) -> None:
        generator = torch.Generator().manual_seed(0)
        contexts = {
            "no_grad": torch.random.fork_rng,
            "noise_off": partial(slr.noise_off, net),
            "noise_on": partial(slr.noise_on, net, generator),
        }
        net.train(evaluation in ("no_grad", "noise_off"))
        with torch.no_grad(), contexts.get(evaluation, nullcontext)():
            assert not net(inputs(9, batch=2)).requires_grad
        net.train()

    assert_same(train(True), train(False))


@every_path
def test_a_neuron_that_two_layers_share_is_as_two_neurons(noise: str, keys: Any) -> None:
    net, shared = credited(noise, init_hidden=False), credited(noise, init_hidden=False)
    shared.lif2 = shared.lif1

    def loss(net: Net) -> Tensor:
        keys(range(2 * STEPS))
        return net(inputs()).square().mean()

    found, expected = backward(shared, lambda: loss(shared)), backward(net, lambda: loss(net))
    for name in [name for name in expected if name.startswith("lif2")]:
        expected[name.replace("lif2", "lif1")] += expected.pop(name)
    assert_same(found, expected, rtol=1e-5, atol=1e-7)


COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked": lambda mem, mask: mem * mask,
    "mixed": lambda mem, mask: torch.where(mask > 0, mem, torch.zeros_like(mem)),
    "in place": lambda mem, mask: mem.mul_(mask),
    "rows in place": lambda mem, mask: mem.masked_fill_(mask == 0, 0.0),
    "in another order": lambda mem, _: mem.flip(0),
    "clone": lambda mem, _: mem.clone(),
}


@every_path
@pytest.mark.parametrize("compute", COMPUTED)
def test_of_a_computed_state_one_warning_says_what_is_lost(noise: str, compute: str) -> None:
    net = credited(noise, init_hidden=False)
    mask = (torch.arange(BATCH) % 2).float()[:, None]

    def loss() -> Tensor:
        states, out = net.fresh(), torch.zeros(())
        for now in inputs().unbind(1):
            added, mem1, mem2 = net.step(now, *states)
            states = COMPUTED[compute](mem1, mask), mem2
            out = out + added
        return out.square().mean()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, second = (backward(net, loss) for _ in range(2))
    assert ["membrane potential was computed" in str(warning.message) for warning in said] == [True]
    assert_same(first, second)
    # The direct part of the gradient is there.
    assert first["fc1.weight"].any()


@every_path
def test_a_state_that_was_made_or_detached_is_none_that_was_computed(noise: str) -> None:
    net = credited(noise, init_hidden=False)
    states: Any = torch.zeros(BATCH, HIDDEN), torch.rand(BATCH, HIDDEN)
    for now in inputs().unbind(1):
        out, *states = net.step(now, *states)
        states = [0.5 * mem.detach() for mem in states]
    out.square().mean().backward()
    initial = torch.zeros(BATCH, HIDDEN, requires_grad=True)
    out, *_ = net.step(inputs()[:, 0], 2 * initial, torch.zeros(BATCH, HIDDEN))
    out.square().mean().backward()
    # A learned initial state has a gradient.
    assert initial.grad is not None
    assert initial.grad.any()
