"""Scores that are summed without a graph, against the graph that they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.estimators.storing import Storing, StoringStep

from .helpers import RESETS, assert_same, gradients

BATCH, FEATURES, COPIES, STEPS = 5, 6, 4, 7
KINDS = ["membrane", "gaussian", "logistic"]
MODES: list[dict[str, Any]] = [{}, {"memory": "replay"}, {"chunk": 2}]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
ZERO = torch.zeros((), dtype=torch.float64)
Run = Callable[[slr.Leaky, Tensor, Tensor], Tensor]


def constant(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """Direct coding."""
    mem, total = ZERO, ZERO
    for _ in range(STEPS):
        spikes, mem = neuron(one, mem)
        total = total + spikes
    return total


def switching(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """Another current after a while, and the first one again."""
    mem, total = ZERO, ZERO
    for current in (one, one, one, two, two, one, one):
        spikes, mem = neuron(current, mem)
        total = total + spikes
    return total


def changing(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """A new current in each step."""
    mem, total = ZERO, ZERO
    for step in range(STEPS):
        spikes, mem = neuron(one + step * two, mem)
        total = total + spikes
    return total


def in_place(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """The same tensor with other numbers."""
    mem, total = ZERO, ZERO
    current = one * 1
    for _ in range(STEPS):
        spikes, mem = neuron(current, mem)
        current.add_(two)
        total = total + spikes
    return total


def altered(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """A membrane potential that the user changes, with its graph."""
    mem, total = ZERO, ZERO
    for _ in range(STEPS):
        spikes, mem = neuron(one, mem)
        mem = 0.5 * mem
        total = total + spikes
    return total


def altered_in_place(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """A membrane potential that the user changes in place."""
    mem, total = ZERO, ZERO
    for _ in range(STEPS):
        spikes, mem = neuron(one, mem)
        mem.mul_(0.5)
        total = total + spikes
    return total


def truncated(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """A membrane potential that is cut from the past now and then."""
    mem, total = ZERO, ZERO
    for step in range(STEPS):
        spikes, mem = neuron(one, mem.detach() if step % 3 == 0 else mem)
        total = total + spikes
    return total


def restarted(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """Two sequences in one forward pass."""
    return constant(neuron, one, two) * constant(neuron, one, two)


def from_learned_state(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """A first membrane potential that is learned."""
    mem, total = two, ZERO
    for _ in range(STEPS):
        spikes, mem = neuron(one, mem)
        total = total + spikes
    return total


def reading_the_membrane(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    """A loss with a gradient of its own in the membrane potential; with membrane noise that is a sample."""
    mem, total = ZERO, ZERO
    for _ in range(STEPS):
        spikes, mem = neuron(one, mem)
        total = total + spikes * mem.square()
    return total


class Net(nn.Module):
    def __init__(self, run: Run, kind: str, reset: str, beta: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.fc1, self.fc2 = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        noise = slr.MembraneNoise() if kind == "membrane" else slr.EscapeNoise(distribution=kind)
        self.lif = slr.Leaky(beta=beta, threshold=0.3, reset_mechanism=reset, noise=noise)
        self.double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        return (self.run(self.lif, self.fc1(x), self.fc2(x)).sum(1) - y).square()


def estimate(net: Net, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(*shape, dtype=torch.float64, generator=generator) for shape in ((BATCH, FEATURES), (BATCH,)))
    net.zero_grad()
    loss = slr.Vanilla(net, COPIES, seed=2, **options).backward(net.loss, x, y)
    return {"loss": loss, **gradients(net)}


@pytest.fixture
def with_graph(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes neurons build all graphs from now on."""
    return lambda: monkeypatch.setattr(StoringStep, "sums_scores", False)


RUNS: list[Run] = [
    constant, switching, changing, in_place, altered, altered_in_place, truncated, restarted, from_learned_state,
    reading_the_membrane,
]  # fmt: skip


# Whatever two of a run, a noise and a reset mechanism meet in each mode.
@pytest.mark.parametrize(
    ("run", "kind", "reset", "options"),
    [
        pytest.param(run, kind, RESETS[(i + j + k) % 3], options, id=f"{run.__name__}-{kind}-{options}")
        for i, run in enumerate(RUNS)
        for j, kind in enumerate(KINDS)
        for k, options in enumerate(MODES)
        # Autograd itself refuses a current that is needed later and was changed.
        if run is not in_place or kind == "membrane"
    ],
)
def test_is_the_gradient_of_the_graph(
    run: Run, kind: str, reset: str, options: dict[str, Any], with_graph: Callable[[], None]
) -> None:
    net = Net(run, kind, reset, beta=0.8)
    summed = estimate(net, **options)
    with_graph()
    graph = estimate(net, **options)
    assert graph["fc1.weight"].any()
    assert_same(summed, graph, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_leak_of_each_neuron(kind: str, with_graph: Callable[[], None]) -> None:
    net = Net(constant, kind, "zero", beta=torch.linspace(0.1, 1.1, FEATURES))
    summed = estimate(net)
    with_graph()
    assert_same(summed, estimate(net), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_current_files_once(kind: str) -> None:
    tokens: list[int] = []

    class Counting(Storing):
        def __exit__(self, *error: Any) -> None:
            tokens.append(len(self.tokens))
            super().__exit__(*error)

    net = Net(constant, kind, "subtract", beta=0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slr.Vanilla, "recording_type", Counting)
        estimate(net)
    # The first membrane score is filed before it is known that its current comes again.
    assert tokens == [2 if kind == "membrane" else 1]


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_filed_where_the_user_wants_none(kind: str) -> None:
    def quiet(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
        with torch.no_grad():
            return constant(neuron, one, two)

    net = Net(quiet, kind, "subtract", beta=0.8)
    with pytest.raises(ValueError, match="there is nothing to learn"):
        estimate(net)


@pytest.mark.parametrize("kind", ["gaussian", "logistic"])
def test_spikes_that_decide_the_reset_must_not_be_changed_in_place(kind: str) -> None:
    def dropping(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
        mem = ZERO
        for _ in range(2):
            spikes, mem = neuron(one, mem)
            spikes.mul_(0)
        return spikes

    with pytest.raises(RuntimeError, match=r"Leaky were changed in place.*inplace=True"):
        estimate(Net(dropping, kind, "subtract", beta=0.8))


def test_membrane_noise_resets_by_the_membrane_if_spikes_were_changed_in_place(with_graph: Callable[[], None]) -> None:
    def dropping(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
        mem, total = ZERO, ZERO
        for _ in range(STEPS):
            spikes, mem = neuron(one, mem)
            total = total + mem
            spikes.mul_(0)
        return total

    net = Net(dropping, "membrane", "subtract", beta=0.8)
    altered = estimate(net)
    net.run = reading_only_the_membrane
    assert_same(altered, estimate(net))


def reading_only_the_membrane(neuron: slr.Leaky, one: Tensor, two: Tensor) -> Tensor:
    mem, total = ZERO, ZERO
    for _ in range(STEPS):
        _, mem = neuron(one, mem)
        total = total + mem
    return total
