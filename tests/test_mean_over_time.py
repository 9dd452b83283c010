"""The gradient "approximate" in ``rollout``: blocks between neurons go back once, at their mean input over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import snntorch_lr as slr
from snntorch_lr import blocks

from .helpers import assert_same, gradients

STEPS, BATCH, PIECE = 10, 5, 4
GRADIENTS = ["approximate", "counterfactual"]
CLOSE = {"rtol": 1e-8, "atol": 1e-11}


def lif(threshold: float = 0.5, **options: Any) -> slr.Leaky:
    return slr.Leaky(beta=0.8, threshold=threshold, init_hidden=True, noise=slr.EscapeNoise(0.3), **options)


def make(*modules: nn.Module) -> nn.Sequential:
    """In float64, with large weights."""
    net, generator = nn.Sequential(*modules).double(), torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if "noise" not in name:
            nn.init.normal_(parameter, 0.2, 0.8, generator=generator)
    return net


def three_layers(**first: Any) -> nn.Sequential:
    """Blocks and neurons by turns; none of the blocks is linear, but the last one."""
    return make(
        nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh()),
        lif(**first),
        nn.Sequential(nn.Conv1d(3, 3, 3), nn.GELU(), nn.MaxPool1d(2)),
        lif(),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Sigmoid()),
        lif(),
        nn.Linear(4, 2),
    )


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 2, 6, dtype=torch.float64, generator=generator).requires_grad_()


def loss_of(outputs: Tensor) -> Tensor:
    """A loss whose derivative is another one in each time step."""
    weights = torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    return (outputs * weights).square().mean()


def choose(gradient: str, net: nn.Sequential, x: Tensor) -> None:
    """Chooses a gradient; the first presentations after that are watched, step by step."""
    slr.use_gradient(net, gradient, control=0.4)
    for _ in range(2):
        slr.rollout(net, x.detach()).sum().backward()
    net.zero_grad()


def by(gradient: str, net: nn.Sequential, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters and of the input; the noise is always the same."""
    choose(gradient, net, x)
    x.grad = None
    torch.manual_seed(3)
    loss_of(forward(x)).backward()
    return gradients(net) if x.grad is None else gradients(net) | {"input": x.grad}


def rolled_out(net: nn.Sequential, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both gradients, the approximate one first."""
    approximate, exact = (by(gradient, net, partial(slr.rollout, net), x) for gradient in GRADIENTS)
    return approximate, exact


@contextmanager
def pieces_of(steps: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("snntorch_lr.rollout"), "_PIECE", steps)
        yield


def at_mean_input(block: nn.Module, values: Tensor) -> Tensor:
    """The definition, by autograd alone: what is added is zero, and has the derivatives at the mean input."""
    mean = values.detach().mean(0)
    frozen = {name: parameter.detach() for name, parameter in block.named_parameters()}
    outputs = []
    for value in values:
        change = value - value.detach()
        by_input = jvp(lambda x: functional_call(block, frozen, (x,)), (mean,), (change,))[1]
        outputs.append(block(value).detach() + by_input + block(mean) - block(mean).detach())
    return torch.stack(outputs)


def by_hand(net: nn.Sequential, x: Tensor) -> Tensor:
    """Layer by layer, in pieces, each neuron in a loop."""
    slr.reset(net)
    outputs = []
    for values in x.split(PIECE):
        currents = torch.stack([net[0](value) for value in values])
        for neuron, block in zip(net[1:5:2], net[2:5:2], strict=True):
            currents = at_mean_input(block, torch.stack([neuron(current) for current in currents]))
        outputs += [net[6](net[5](current)) for current in currents]
    return torch.stack(outputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_is_the_definition() -> None:
    net, x = three_layers(), inputs()
    expected = by("counterfactual", net, partial(by_hand, net), x)
    with pieces_of(PIECE):
        found = by("approximate", net, partial(slr.rollout, net), x)
    assert all(bool(value.any()) for value in expected.values())
    assert_same(found, expected, **CLOSE)


class Own(nn.Linear):
    """Not known to treat every row alone."""


def test_modules_that_need_each_time_step_are_exact() -> None:
    net = make(lif(), nn.BatchNorm1d(3), lif(), Own(3, 3), lif(), nn.Linear(3, 3), lif())
    # Others want to see each time step.
    net[5].register_forward_hook(lambda *_: None)
    approximate, exact = rolled_out(net, torch.rand(STEPS, BATCH, 3, dtype=torch.float64))
    assert len(exact) == 10
    assert_same(approximate, exact, **CLOSE)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.AvgPool2d(2), lif(), nn.Conv2d(4, 8, 3), nn.AvgPool2d(2), lif(), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip


def flickering(steps: int, batch: int) -> Tensor:
    """Each pixel fires by a rate of its own."""
    return (torch.rand(steps, batch, 1, 14, 14) < torch.rand(batch, 1, 14, 14)).float()


def test_points_the_way_of_the_exact_gradient_of_a_convolutional_network() -> None:
    approximate, exact = rolled_out(convolutions(), flickering(25, 32))
    cosines = {name: torch.cosine_similarity(approximate[name].flatten(), exact[name].flatten(), 0) for name in exact}
    assert min(cosines.values()) > 0.99, cosines


def numbers_kept(gradient: str, steps: int) -> int:
    """How many floating-point numbers are kept for a backward pass, beside inputs; a fused neuron keeps integers."""
    net, x, kept = convolutions(), flickering(steps, 2), {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    choose(gradient, net, x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # A variable, so that no memory is used twice.
        outputs = slr.rollout(net, x)
    return sum(kept.values()) * outputs.requires_grad


def test_memory_does_not_grow_with_time_but_in_the_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    # Under hooks of others spikes are kept as numbers.
    monkeypatch.setattr(blocks, "_is_checkpointed", lambda: False)
    assert 0 < numbers_kept("approximate", 24) == numbers_kept("approximate", 6)
    assert numbers_kept("counterfactual", 24) > 2 * numbers_kept("counterfactual", 6)


def test_without_noise_it_is_the_surrogate_gradient() -> None:
    net, x, found = three_layers().eval(), inputs(), []
    for gradient in ("approximate", "surrogate"):
        net.zero_grad()
        slr.use_gradient(net, gradient)
        loss_of(slr.rollout(net, x)).backward()
        found.append(gradients(net))
    assert_same(*found)


def test_autocast_has_about_the_same_gradient() -> None:
    net, x = convolutions(), flickering(8, 16)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return slr.rollout(net, x).float()

    full, half = (by("approximate", net, forward, x) for forward in (partial(slr.rollout, net), autocast))
    for name in ("0.weight", "3.weight", "7.weight"):
        assert torch.cosine_similarity(half[name].flatten(), full[name].flatten(), 0) > 0.8, name


@pytest.mark.parametrize("after", ["rollout", "reset"])
def test_a_loop_of_ones_own_is_refused_but_for_passes_without_a_graph(after: str) -> None:
    net, x = three_layers(), inputs()
    choose("approximate", net, x)
    slr.rollout(net, x)
    if after == "reset":
        slr.reset(net)
    with torch.no_grad():
        assert net(x[0]).shape == (BATCH, 2)
    with pytest.raises(RuntimeError, match=r"^Leaky: .*slr\.rollout.*slr\.closure.*counterfactual"):
        net(x[0])


def test_an_optimizer_trains_by_it_in_a_plain_loop() -> None:
    net, losses = convolutions(), []
    x, y = torch.rand(30, 1, 14, 14) / 2, torch.arange(30) % 3
    for label in range(3):
        x[label::3, :, 4 * label : 4 * label + 4] += 1
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    slr.attach(optimizer, net, "approximate")
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(slr.rollout(net, x, 8).mean(0), y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0] / 2
