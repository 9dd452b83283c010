"""The README of the gradients is so: its drawing is the path of a step, and its examples are short and right."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import kernels, neurons
from snntorch_lr.robustness import Budget, Target, perturb

from . import pages
from .statistical import test_counterfactual as tiny

LINES = 60
PACKAGE = Path(slr.__file__).parent
EXAMPLES = re.findall(r"\]\(([^)#]+)#([\w-]+)\) \| (\d+) \|$", pages.text_of(pages.GRADIENTS), flags=re.MULTILINE)
FUSED, GENERIC = (
    re.findall(r"^ +([\w.]+) {2,}([\w/]+\.py)", block.code, flags=re.MULTILINE)
    for block in pages.blocks(pages.GRADIENTS, "text")
)


def example(page: str, anchor: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": __name__}
    pages.run(pages.first_block(pages.ROOT / "docs" / page, anchor), names)
    return names


with mock.patch.dict(neurons.NOISY):
    NEURON = example("contributing-neuron.md", "worked-example-a-threshold-that-adapts")
Adaptive, Plain = NEURON["Adaptive"], NEURON["PlainAdaptive"]
Brightness = example("contributing-attack.md", "worked-example-brightness")["Brightness"]


class Forgetful(Adaptive):
    """A mistake of its author."""

    shared_states = ("adapt",)


@pytest.mark.parametrize(("page", "anchor", "lines"), EXAMPLES)
def test_examples_are_as_short_as_the_readme_says(page: str, anchor: str, lines: str) -> None:
    code = pages.first_block(pages.leads_to(pages.GRADIENTS, page), anchor).code
    assert code.count("\n") == int(lines) <= LINES


@pytest.mark.parametrize(("drawn", "learn_beta"), [(FUSED, False), (GENERIC, True)], ids=["fused", "generic"])
def test_a_training_step_takes_the_path_that_is_drawn(drawn: list[tuple[str, str]], learn_beta: bool) -> None:
    if kernels.fused_on(torch.device("cpu"), torch.float32) is None:
        pytest.skip("without Numba nothing is fused")
    lif = slr.Leaky(beta=0.9, learn_beta=learn_beta, noise="escape", init_hidden=True)
    net = nn.Sequential(nn.Linear(4, 8), lif, nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    called: dict[tuple[str, str], None] = {}

    def watch(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            called.setdefault((frame.f_code.co_name, path.relative_to(PACKAGE).as_posix()))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        slr.attach(optimizer, net)
        slr.reset(net)
        sum(net(torch.ones(3, 4)) for _ in range(3)).square().mean().backward()
        optimizer.step()
    finally:
        sys.setprofile(before)
    path = [(name.rpartition(".")[2], file) for name, file in drawn]
    assert path == [call for call in called if call in path]


def net_of(neuron: type[nn.Module], noise: Callable[[], Any]) -> tiny.Tiny:
    """Two neurons of a class, with all their numbers learned."""

    def make(reset_mechanism: str, **options: Any) -> nn.Module:
        made = neuron(beta=0.7, learn_beta=True, **options)
        for name, value in (("rho", 0.8), ("kappa", 0.3)):
            delattr(made, name)
            setattr(made, name, nn.Parameter(torch.tensor(value)))
        return made

    return tiny.Tiny(make, "subtract", noise, tiny.of_states)


@pytest.mark.statistical
def test_the_gradient_of_the_new_neuron_is_the_exact_one_for_escape_noise() -> None:
    net = net_of(Adaptive, tiny.escape())
    found, expected = tiny.estimate(net), tiny.exact(net)
    assert found.distance(expected) < tiny.OF_MANY
    assert found.bias(expected)[1] < 0.02, "too noisy to tell"


@pytest.mark.statistical
def test_a_state_that_the_rule_forgets_biases_the_gradient() -> None:
    """So the page says; and the test above would notice."""
    net = net_of(Forgetful, tiny.escape())
    assert tiny.estimate(net).bias(tiny.exact(net))[0] > 0.1


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("estimator", "options", "error"), [(slr.Counterfactual, {"discount": 1.0}, 0.08), (slr.Vanilla, {}, 0.15)]
)
def test_the_gradient_of_the_new_neuron_is_right_for_membrane_noise(
    estimator: Any, options: dict[str, float], error: float
) -> None:
    net = net_of(Adaptive, lambda: slr.MembraneNoise(0.5))
    tiny.assert_agrees(net, estimator(net, 4000, **options), error)


def over_time(neuron: Any, x: Tensor) -> list[Tensor]:
    """Spikes and states of all steps, flat."""
    states, outputs = neuron.reset_mem(), []
    for current in x:
        spikes, *states = neuron(current, *states)
        outputs += [spikes, *states]
    return outputs


def test_the_threshold_of_the_new_neuron_rises_and_falls() -> None:
    outputs = over_time(Plain(beta=0.0, rho=0.5, kappa=1.0), torch.full((4, 1), 1.6))
    spikes, adapt, mem = (torch.cat(outputs[i::3]).flatten() for i in range(3))
    # Reset by 1 after each spike; the threshold is 1, 2, 1.5, 2.25.
    assert spikes.tolist() == [1, 0, 1, 0]
    assert adapt.tolist() == [0, 1, 0.5, 1.25]
    assert torch.allclose(mem, torch.tensor([1.6, 0.6 - 1, 1.6 - 0.5, 0.6 - 1.25]))


def test_the_new_neuron_without_noise_is_the_plain_one() -> None:
    x = 2 * torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    outputs = [over_time(neuron(beta=0.9), x) for neuron in (Plain, Adaptive)]
    assert sum(outputs[0][::3]).any()
    assert all(torch.equal(plain, noisy) for plain, noisy in zip(*outputs, strict=True))


def test_a_neuron_without_a_rule_takes_the_generic_node_and_without_a_noisy_class_it_is_refused_by_name() -> None:
    noisy = Adaptive(beta=0.9, noise=True)
    slr.use_gradient(noisy)
    x = torch.ones(2, 3, requires_grad=True)
    assert type(noisy(x)[0].grad_fn).__name__ == "CounterfactualSpikeBackward"
    with pytest.raises(ValueError, match=r"0 \(PlainAdaptive\).*class of your own"):
        slr.add_noise(nn.Sequential(Plain(beta=0.9)))
    with mock.patch.dict(neurons.NOISY, {Plain: Adaptive}):
        net = slr.add_noise(nn.Sequential(Plain(beta=0.9)))
        assert type(net[0]) is Adaptive
        assert type(slr.remove_noise(net)[0]) is Plain


class Sum(nn.Module):
    """Says 1 for bright images."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).mean(1)
        return torch.stack([0.5 - total, total - 0.5], 1)


@pytest.mark.parametrize("label", [0, 1])
def test_the_new_attack_finds_the_shift_that_harms_most(label: int) -> None:
    x = 0.3 + 0.4 * torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    target = Target(Sum(), draws=1)
    images = perturb(Brightness().named("brightness"), target, x, torch.full((4,), label), Budget(0.1), seed=0)
    assert torch.allclose(images, x + (0.1 if label == 0 else -0.1))
