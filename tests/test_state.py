"""States as users handle them: kept, cut, shared, computed, of several presentations in one loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

from .helpers import BATCH, FEATURES, STEPS, assert_same, every_estimator, gradients

# A leak that is learned keeps time steps from being fused.
NOISES = ["membrane", "escape", "membrane, not fused", "escape, not fused"]
HIDDEN, CLASSES = 6, 3


class Net(nn.Module):
    """Linear, noisy neuron, Linear, noisy neuron, readout; states by hand, or held by the neurons."""

    def __init__(self, noise: str = "escape", init_hidden: bool = False, chosen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        kind, _, apart = noise.partition(", ")
        options: dict[str, Any] = {"beta": 0.8, "threshold": 0.5, "noise": kind, "init_hidden": init_hidden}
        options["learn_beta"] = bool(apart)
        self.fc1, self.lif1 = nn.Linear(FEATURES, HIDDEN), slr.Leaky(**options)
        self.fc2, self.lif2 = nn.Linear(HIDDEN, HIDDEN), slr.Leaky(**options)
        self.readout = nn.Linear(HIDDEN, CLASSES)
        if chosen:
            # A fixed λ, so that calls differ by nothing but their noise.
            slr.use_gradient(self, "counterfactual", control=0.4)

    def step(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        spikes, mem1 = self.lif1(self.fc1(x), states[0])
        spikes, mem2 = self.lif2(self.fc2(spikes), states[1])
        return self.readout(spikes), (mem1, mem2)

    def fresh(self) -> tuple[Tensor, Tensor]:
        return self.lif1.reset_mem(), self.lif2.reset_mem()

    def held(self, x: Tensor) -> Tensor:
        """A time step of neurons that hold their states."""
        return self.readout(self.lif2(self.fc2(self.lif1(self.fc1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        states, out = self.fresh(), torch.zeros(())
        for t in range(x.shape[1]):
            if self.lif1.init_hidden:
                out = out + self.held(x[:, t])
            else:
                now, states = self.step(x[:, t], states)
                out = out + now
        return out


def inputs(seed: int = 0, batch: int = BATCH) -> Tensor:
    return 2 * torch.rand(batch, STEPS, FEATURES, generator=torch.Generator().manual_seed(seed))


def backward(net: nn.Module, loss: Callable[[], Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Gradients of a loss, alone."""
    net.zero_grad()
    torch.manual_seed(seed)
    loss().backward()  # type: ignore[no-untyped-call]
    return gradients(net)


@pytest.fixture(autouse=True)
def only_own_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """snnTorch detaches the states of all neurons there are, and fails at a DeltaLeaky of another test."""
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])


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


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Of what is handled well here nothing is to be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("again", ["reset_mem", "reset", "other size"])
def test_a_new_presentation_knows_nothing_of_the_last_one(noise: str, again: str) -> None:
    net = Net(noise, init_hidden=True)
    x = inputs()

    def loss() -> Tensor:
        return torch.stack([net.held(x[:, t]) for t in range(STEPS)]).square().mean()

    net.fresh()
    expected = backward(net, loss)
    net.fresh()
    before = inputs(1, batch=BATCH - 2).requires_grad_() if again == "other size" else inputs(1).requires_grad_()
    net.held(before[:, 0])
    if again == "reset_mem":
        net.fresh()
    elif again == "reset":
        slr.reset(net)
    assert_same(backward(net, loss), expected)
    assert before.grad is None


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda mem: mem.detach(),
    "detach_": lambda mem: mem.detach_(),
    "detach and clone": lambda mem: mem.detach().clone(),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("cut", CUTS)
def test_truncated_backpropagation_by_hand_goes_on_with_the_state_and_not_with_the_graph(noise: str, cut: str) -> None:
    net = Net(noise)

    def two(cut: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x = inputs().requires_grad_()
        torch.manual_seed(3)
        states: Any = net.fresh()
        for t in range(STEPS):
            if t == 2:
                states = tuple(map(cut, states))
            out, states = net.step(x[:, t], states)
        net.zero_grad()
        out.square().sum().backward()
        assert x.grad is not None
        return out, x.grad[:, :2], x.grad[:, 2:]

    out, before, after = two(CUTS[cut])
    whole, reached, _ = two(lambda mem: mem)
    torch.testing.assert_close(out, whole, rtol=0, atol=0)
    assert not before.any()
    assert reached.any()
    torch.testing.assert_close(after, two(CUTS["detach and clone"])[2], rtol=0, atol=0)
    assert after.any()


@pytest.mark.parametrize("noise", NOISES)
def test_detach_hidden_cuts_states_that_are_held_and_kept_across_calls(noise: str) -> None:
    held, by_hand = Net(noise, init_hidden=True), Net(noise)
    x = inputs()
    states: Any = by_hand.fresh()
    held.fresh()
    for chunk in range(2):
        part = x[:, 2 * chunk : 2 * chunk + 2]
        if chunk:
            snn.Leaky.detach_hidden()
            states = tuple(mem.detach() for mem in states)
        found = backward(held, lambda part=part: sum(held.held(part[:, t]) for t in range(2)).square().mean())
        by_hand.zero_grad()
        torch.manual_seed(3)
        out = torch.zeros(())
        for t in range(2):
            now, states = by_hand.step(part[:, t], states)
            out = out + now
        out.square().mean().backward()
        assert_same(found, gradients(by_hand))
        assert found["fc1.weight"].any()


@every_estimator
def test_states_are_left_so_that_snntorch_can_detach_them(estimator: str) -> None:
    net = Net(init_hidden=True, chosen=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    slr.attach(optimizer, net, estimator)
    optimizer.step(
        slr.closure(lambda x, y: F.cross_entropy(net(x), y, reduction="none"), inputs(), torch.arange(5) % 3)
    )
    snn.Leaky.detach_hidden()
    assert net.lif1.mem.grad_fn is None


@pytest.mark.parametrize("noise", NOISES)
def test_a_loss_of_three_presentations_adds_what_each_one_gives(noise: str) -> None:
    net = Net(noise)
    xs = [inputs(seed) for seed in range(3)]

    def triplet() -> Tensor:
        return F.triplet_margin_loss(*(net(x) for x in xs))

    torch.manual_seed(3)
    embedded = [net(x).detach().requires_grad_() for x in xs]
    slopes = torch.autograd.grad(F.triplet_margin_loss(*embedded), embedded)

    def of_one(index: int) -> Callable[[], Tensor]:
        return lambda: (torch.stack([net(x) for x in xs])[index] * slopes[index]).sum()

    parts = [backward(net, of_one(index)) for index in range(3)]
    assert all(part["fc1.weight"].any() for part in parts)
    expected = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    assert_same(backward(net, triplet), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("noise", NOISES)
def test_two_presentations_whose_time_steps_alternate_are_as_one_after_the_other(noise: str, keys: Any) -> None:
    net = Net(noise)
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
                now, states[which] = net.step(pair[which][:, t], states[which])
                outs[which] = outs[which] + now
        return (outs[0] - outs[1]).square().mean()

    assert_same(backward(net, alternating), backward(net, in_turn), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize("noise", NOISES)
def test_a_pass_under_no_grad_between_forward_and_backward_changes_nothing(noise: str, init_hidden: bool) -> None:
    net = Net(noise, init_hidden)

    def loss(between: bool) -> Tensor:
        value = net(inputs())
        if between:
            with torch.no_grad(), torch.random.fork_rng():
                target = net(inputs(1))
            assert not target.requires_grad
        return (value - 1).square().mean() + net(inputs(2)).square().mean()

    assert_same(backward(net, lambda: loss(True)), backward(net, lambda: loss(False)))


@pytest.mark.parametrize("evaluation", ["eval", "noise_off", "noise_on"])
@pytest.mark.parametrize("noise", NOISES)
def test_an_evaluation_between_two_training_steps_changes_no_number(noise: str, evaluation: str) -> None:
    def train(evaluate: bool) -> dict[str, Tensor]:
        net = Net(noise, init_hidden=True, chosen=False)
        optimizer = torch.optim.Adam(net.parameters(), 0.05)
        slr.attach(optimizer, net)
        torch.manual_seed(3)
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs(step)), torch.arange(BATCH) % CLASSES).backward()
            optimizer.step()
            if evaluate:
                look(net)
        return dict(net.state_dict())

    def look(net: Net) -> None:
        with torch.no_grad():
            if evaluation == "eval":
                net.eval()
                net(inputs(9, batch=2))
                net.train()
            elif evaluation == "noise_off":
                with slr.noise_off(net):
                    net(inputs(9, batch=2))
            else:
                with slr.noise_on(net.eval(), torch.Generator().manual_seed(0)):
                    net(inputs(9, batch=2))
                net.train()

    assert_same(train(True), train(False))


@pytest.mark.parametrize("noise", NOISES)
def test_the_last_batch_may_have_another_size(noise: str) -> None:
    net = Net(noise, init_hidden=True)
    expected = backward(net, lambda: net(inputs(5, batch=2)).square().mean())
    backward(net, lambda: net(inputs()).square().mean())
    assert_same(backward(net, lambda: net(inputs(5, batch=2)).square().mean()), expected)


@pytest.mark.parametrize("noise", NOISES)
def test_a_neuron_that_two_layers_share_is_as_two_neurons(noise: str, keys: Any) -> None:
    net, shared = Net(noise), Net(noise)
    shared.lif2 = shared.lif1

    def loss(net: Net) -> Callable[[], Tensor]:
        def run() -> Tensor:
            keys(range(2 * STEPS))
            return net(inputs()).square().mean()

        return run

    found, expected = backward(shared, loss(shared)), backward(net, loss(net))
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


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("compute", COMPUTED)
def test_of_a_computed_state_one_warning_says_what_is_lost(noise: str, compute: str) -> None:
    net = Net(noise)
    mask = (torch.arange(BATCH) % 2).float()[:, None]

    def loss() -> Tensor:
        states, out = net.fresh(), torch.zeros(())
        for t in range(STEPS):
            now, (mem1, mem2) = net.step(inputs()[:, t], states)
            states = COMPUTED[compute](mem1, mask), mem2
            out = out + now
        return out.square().mean()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, second = (backward(net, loss) for _ in range(2))
    assert ["membrane potential was computed" in str(warning.message) for warning in said] == [True]
    assert_same(first, second)
    # The direct part of the gradient is there.
    assert first["fc1.weight"].any()


@pytest.mark.parametrize("noise", NOISES)
def test_a_state_that_was_made_or_detached_is_none_that_was_computed(noise: str) -> None:
    net = Net(noise)
    states: Any = torch.zeros(BATCH, HIDDEN), torch.rand(BATCH, HIDDEN)
    for t in range(STEPS):
        out, states = net.step(inputs()[:, t], states)
        states = tuple(0.5 * mem.detach() for mem in states)
    out.square().mean().backward()
    initial = torch.zeros(BATCH, HIDDEN, requires_grad=True)
    out, _ = net.step(inputs()[:, 0], (2 * initial, torch.zeros(BATCH, HIDDEN)))
    out.square().mean().backward()
    # A learned initial state has a gradient.
    assert initial.grad is not None
    assert initial.grad.any()
