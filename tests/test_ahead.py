"""Time steps that are computed before they are asked for, against those that are computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.estimators.fused import Ahead
from snntorch_lr.kernels import cpu

from .helpers import assert_same, gradients

pytest.importorskip("numba")

STEPS = 7


class Net(nn.Module):
    """Two noisy layers; what is done to the first one in the second pass is told by name."""

    def __init__(self, noise: Any, reset: str, init_hidden: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.readout = nn.Linear(12, 30), nn.Linear(30, 20), nn.Linear(20, 4)
        self.lif1 = slr.Leaky(0.9, noise=noise(), reset_mechanism=reset, init_hidden=init_hidden)
        self.lif2 = slr.Leaky(0.8, noise=noise(), reset_mechanism=reset)
        self.change = ""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        mem1, mem2, total = self.lif1.reset_mem(), self.lif2.reset_mem(), torch.zeros(())
        current, spikes1 = self.fc1(x), x.new_zeros(1, 30).expand(len(y), 30)
        steps = {"fewer": STEPS - 3, "one": 1, "more": STEPS + 2}.get(self.change, STEPS)
        for step in range(steps):
            late = step == 3
            if self.change == "other current" and late:
                current = self.fc1(2 * x)
            if self.change == "current in place" and late:
                current.detach().mul_(1.5)
            if self.change == "threshold" and late:
                self.lif1.threshold = self.lif1.threshold * 0.5
            if self.change == "other order" and step >= 3:
                spikes2, mem2 = self.lif2(2 * self.fc2(spikes1), mem2)
                spikes1, mem1 = self.lif1(current, mem1)
            elif self.lif1.init_hidden:
                spikes1 = self.lif1(current)
                spikes2, mem2 = self.lif2(2 * self.fc2(spikes1), mem2)
            else:
                given = mem1.detach().clone() if self.change == "copy of the state" else mem1
                given = given + 1 if self.change == "other state" and late else given
                spikes1, mem1 = self.lif1(current, given)
                if self.change == "spikes in place":
                    spikes1.mul_(0.5)
                spikes2, mem2 = self.lif2(2 * self.fc2(spikes1), mem2)
            total = total + self.readout(spikes2)
        self.lif1.threshold = torch.ones(())
        return nn.functional.cross_entropy(total, y, reduction="none")


ESTIMATORS: dict[str, Callable[[nn.Module], slr.Estimator]] = {
    "counterfactual": lambda net: slr.Counterfactual(net, 2, shadows=2, seed=3),
}
NOISES = {"escape": lambda: slr.EscapeNoise(0.4), "membrane": lambda: slr.MembraneNoise(0.4)}


def found(estimator: str, net: Net, change: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], int]:
    """The gradient after passes with and without a change, and how often a kernel ran in that."""
    x, y = torch.rand(6, 12, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4
    own = ESTIMATORS[estimator](net)
    calls: list[int] = []
    step = cpu.step
    for net.change in ("", change, ""):
        calls.append(0)

        def count(*args: Any, **named: Any) -> None:
            calls[-1] += 1
            step(*args, **named)

        monkeypatch.setattr(cpu, "step", count)
        loss = own.backward(net.loss, x, y)
        monkeypatch.setattr(cpu, "step", step)
    return gradients(net) | {"loss": loss}, calls[1]


CHANGES = [
    "", "fewer", "one", "more", "other current", "threshold", "other order", "copy of the state", "spikes in place"
]  # fmt: skip


@pytest.mark.parametrize("most_bytes", [8_000_000, 9000], ids=["at once", "some at once"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("noise", NOISES)
def test_what_is_computed_ahead_is_what_one_step_after_the_other_is(
    noise: str, estimator: str, change: str, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ahead, "most_bytes", most_bytes)
    monkeypatch.setattr(Ahead, "steps_of_large_layers", 1)
    ahead, calls = found(estimator, Net(NOISES[noise], "subtract"), change, monkeypatch)
    monkeypatch.setattr(Ahead, "ask", lambda *_: 1)
    one_by_one, all_calls = found(estimator, Net(NOISES[noise], "subtract"), change, monkeypatch)
    assert_same(ahead, one_by_one, rtol=0, atol=0)
    if change == "":
        assert calls < all_calls


@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("noise", NOISES)
def test_every_reset_and_hidden_states(
    noise: str, estimator: str, reset: str, init_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, _ = found(estimator, Net(NOISES[noise], reset, init_hidden), "fewer", monkeypatch)
    monkeypatch.setattr(Ahead, "ask", lambda *_: 1)
    one_by_one, _ = found(estimator, Net(NOISES[noise], reset, init_hidden), "fewer", monkeypatch)
    assert_same(ahead, one_by_one, rtol=0, atol=0)


@pytest.mark.parametrize("learned", [True, False])
def test_a_current_that_is_changed_in_place_is_refused(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(NOISES["escape"], "subtract")
    net.fc1.requires_grad_(learned)
    with pytest.raises(ValueError, match="a current was changed in place"):
        found("counterfactual", net, "current in place", monkeypatch)


def test_another_state_than_was_returned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="lif1 \\(Leaky\\) did not go on from the state that it had returned"):
        found("counterfactual", Net(NOISES["escape"], "subtract"), "other state", monkeypatch)


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize(
    "estimator",
    [
        lambda net: slr.Vanilla(net, 4, seed=3),
        lambda net: slr.Vanilla(net, 4, memory="replay", seed=3),
        lambda net: slr.Approximate(net, 4, seed=3),
        lambda net: slr.Counterfactual(net, 2, seed=3),
        lambda net: slr.Counterfactual(net, 2, over_time="exact", seed=3),
    ],
    ids=["vanilla", "replay", "approximate", "rates", "exact"],
)
@pytest.mark.parametrize("noise", NOISES)
def test_a_layer_in_the_loop_is_as_one_in_front_of_it(
    noise: str, estimator: Callable[[nn.Module], slr.Estimator], changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(12, 30), slr.Leaky(0.9, noise=NOISES[noise]()), nn.Linear(30, 4)]).double()
    x, y = torch.rand(6, 12, dtype=torch.float64), torch.arange(6) % 4

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mem, total = net[1].reset_mem(), torch.zeros(())
        for step in range(5):
            spikes, mem = net[1](net[0](x * (step + 1) if changes else x), mem)
            total = total + net[2](spikes)
        return nn.functional.cross_entropy(total, y, reduction="none")

    def result() -> dict[str, Tensor]:
        own = estimator(net)
        for _ in range(2):
            net.zero_grad()
            own.backward(loss, x, y)
        return gradients(net)

    recognised = result()
    monkeypatch.setattr("snntorch_lr.estimators.fused.origin", lambda _: None)
    assert_same(recognised, result(), rtol=1e-9, atol=1e-12)


def test_weights_that_are_changed_in_the_loop_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.ModuleList([nn.Linear(12, 30), slr.Leaky(0.9, noise=NOISES["escape"]()), nn.Linear(30, 4)])
    first = net[0].weight.detach().clone()
    membranes: list[Tensor] = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        # Through data, which torch does not count.
        net[0].weight.data.copy_(first)
        mem, total = net[1].reset_mem(), torch.zeros(())
        for _ in range(4):
            net[0].weight.data.mul_(2)
            spikes, mem = net[1](net[0](x), mem)
            membranes.append(mem.detach().clone())
            total = total + net[2](spikes)
        return nn.functional.cross_entropy(total, y, reduction="none")

    def last() -> Tensor:
        slr.Vanilla(net, 4, seed=0).backward(loss, torch.ones(6, 12), torch.arange(6) % 4)
        return membranes[-1]

    known = last()
    monkeypatch.setattr("snntorch_lr.estimators.fused.origin", lambda _: None)
    assert torch.equal(known, last())
