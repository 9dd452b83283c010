"""Layers that compute a constant input once: the same numbers and gradients as torch's, and never a stale one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from snntorch_lr import blocks
from snntorch_lr.blocks import SPIKES, Emitted, forget_constant_inputs, remember_constant_inputs
from snntorch_lr.graph import version

from .helpers import COPIERS

X = torch.rand(3, 6)


def make() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def remembering() -> nn.Linear:
    layer = make()
    remember_constant_inputs(layer)
    return layer


def test_the_same_input_gives_the_same_output_and_one_backward_pass() -> None:
    layer, plain = remembering(), make()
    outputs = [layer(X) for _ in range(3)]
    assert outputs[0] is outputs[1] is outputs[2]
    sum((step + 1) * out.square().sum() for step, out in enumerate(outputs)).backward()
    sum((step + 1) * plain(X).square().sum() for step in range(3)).backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def _weight_in_place(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        layer.weight.mul_(2)
    return x


def _other_weight(layer: nn.Linear, x: Tensor) -> Tensor:
    layer.weight = nn.Parameter(layer.weight.detach() * 3)
    return x


CHANGES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "another tensor": lambda layer, x: x.clone(),
    "the input in place": lambda layer, x: x.add_(1),
    "a weight in place": _weight_in_place,
    "another weight": _other_weight,
    "an input that is learned now": lambda layer, x: x.requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_output_is_noticed(change: str) -> None:
    layer, x = remembering(), X.clone()
    first = layer(x)
    x = CHANGES[change](layer, x)
    second = layer(x)
    assert second is not first
    torch.testing.assert_close(second, nn.functional.linear(x, layer.weight, layer.bias))
    assert second.requires_grad


def test_an_output_that_was_changed_in_place_is_computed_again() -> None:
    layer = remembering()
    expected = layer(X).detach().clone()
    layer(X).relu_()
    torch.testing.assert_close(layer(X).detach(), expected)


def test_after_a_backward_pass_the_graph_is_new() -> None:
    layer = remembering()
    for _ in range(2):
        layer(X).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 6.0))


def test_without_a_graph_nothing_is_taken_from_a_pass_with_one() -> None:
    layer = remembering()
    for graph in (False, True, False):
        with torch.set_grad_enabled(graph):
            assert layer(X).requires_grad == graph


def test_copies_and_pickles_hold_no_output() -> None:
    layer = remembering()
    layer(X)
    for copier in COPIERS.values():
        made = copier(layer)
        assert made(X) is not layer(X)
        torch.testing.assert_close(made(X), layer(X))


def test_checkpointing_runs_it_again() -> None:
    def run(layer: nn.Linear, x: Tensor) -> Tensor:
        return (layer(x).tanh() * layer(x)).sum()

    layer, plain = remembering(), make()
    torch.utils.checkpoint.checkpoint(run, layer, X, use_reentrant=False).backward()
    run(plain, X).backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_only_layers_of_torch_itself_are_changed_and_they_come_back() -> None:
    class Own(nn.Linear):
        pass

    net = nn.Sequential(make(), Own(4, 4), nn.Conv2d(1, 1, 3), nn.ReLU())
    shown = repr(net)
    remember_constant_inputs(net)
    assert type(net[1]) is Own
    assert isinstance(net[0], nn.Linear)
    assert repr(net) == shown
    forget_constant_inputs(net)
    assert [type(layer) for layer in net] == [nn.Linear, Own, nn.Conv2d, nn.ReLU]


@pytest.mark.parametrize("convolution", [False, True])
def test_spikes_kept_as_bits_give_the_same_gradients(convolution: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WORTH_KEEPING_AS_BITS", 0)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1) if convolution else nn.Linear(6, 4)
    plain = copy.deepcopy(layer)
    remember_constant_inputs(layer)
    x = (torch.rand(5, 2, 6, 6) < 0.4).float() if convolution else (torch.rand(20, 6) < 0.4).float()
    results = []
    for net in (layer, plain):
        spikes = x.clone().requires_grad_()
        emitted = spikes * 1
        code = (x.to(torch.int16) + 2 * torch.randint(50, x.shape, dtype=torch.int16)).to(torch.int16)
        setattr(emitted, SPIKES, Emitted(code, version(emitted), 10))
        output = net(emitted)
        output.square().sum().backward()
        results.append((output.detach(), spikes.grad, net.weight.grad, net.bias.grad))
        names = [node.name() for node, _ in output.grad_fn.next_functions if node is not None]
        kept = "OfSpikes" in output.grad_fn.name()
        assert kept == (net is layer), names
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_spikes_that_were_changed_in_place_are_kept_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WORTH_KEEPING_AS_BITS", 0)
    layer, x = remembering(), torch.ones(2, 6)
    setattr(x, SPIKES, Emitted(torch.ones(2, 6, dtype=torch.int16), version(x), 10))
    x.mul_(0.5)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones(4, 6))
