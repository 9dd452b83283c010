"""Time steps whose spikes are sampled: what comes out is snnTorch's, and the spike that was sampled resets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.gradients import CounterfactualCredit
from snntorch_lr.gradients.vanilla import Scores
from snntorch_lr.noisy_neuron import CARRIED

from .helpers import (
    CLASSES,
    RESETS,
    WITH_DELAY,
    Net,
    build,
    data,
    every_noise,
    initial_states,
    inputs_for,
    run,
    sampled,
)

CONVENTIONS: dict[str, dict[str, bool]] = {
    "by hand": {},
    "hidden": {"init_hidden": True},
    "output": {"init_hidden": True, "output": True},
}


def make_noise(kind: str, sigma: float) -> slr.MembraneNoise | slr.EscapeNoise:
    return slr.EscapeNoise(sigma) if kind == "escape" else slr.MembraneNoise(sigma)


@every_noise
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    ("name", "delay"), [*((name, True) for name in CLASSES), *((name, False) for name in WITH_DELAY)]
)
def test_a_train_with_hardly_any_noise_is_snntorchs(name: str, delay: bool, reset: str, noise: str) -> None:
    if not delay and noise == "escape" and reset == "subtract":
        pytest.skip("snnTorch resets a membrane that is above the threshold even after its reset once more")
    # Each convention with each class and each mechanism.
    convention = [*CONVENTIONS][(CLASSES.index(name) + RESETS.index(reset) + (noise == "escape")) % 3]
    options: dict[str, Any] = {"reset_mechanism": reset, **CONVENTIONS[convention]}
    if not delay:
        options["reset_delay"] = False
    x = inputs_for(name)
    expected = run(build(snn, name, **options), x)
    assert 0 < torch.stack([output[0] for output in expected]).mean() < 1
    neuron = sampled(build(slr, name, noise=make_noise(noise, 1e-6), **options))
    outputs = run(neuron, x.requires_grad_())
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert all(output[0].requires_grad == neuron.is_elementwise for output in outputs)


@every_noise
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", [name for name in CLASSES if "LSTM" not in name])
def test_a_train_does_not_depend_on_its_shadow(name: str, reset: str, noise: str) -> None:
    neuron = sampled(build(slr, name, noise=make_noise(noise, 0.7), reset_mechanism=reset))
    trains = []
    for graph in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(graph):
            trains.append(run(neuron, inputs_for(name).requires_grad_()))
    for ours, theirs in zip(itertools.chain(*trains[0]), itertools.chain(*trains[1]), strict=True):
        # With a graph it may be fused, and rounded otherwise.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@every_noise
def test_the_shadow_has_noise_of_its_own_and_the_same_currents(noise: str) -> None:
    neuron = sampled(slr.Leaky(beta=0.9, noise=make_noise(noise, 0.5)))
    with kernels.off():
        _, mem = neuron(torch.full((100, 5), 0.5, requires_grad=True), neuron.reset_mem())
    carried = getattr(mem, CARRIED)
    train, shadow = carried.fired if noise == "escape" else carried.inside["mem"] > 1
    assert 0.05 < (train != shadow).float().mean() < 0.95
    assert (train.float().mean() - shadow.float().mean()).abs() < 0.2
    assert torch.equal(carried.inside["mem"][0], mem)


def mask(like: Tensor) -> Tensor:
    return (torch.arange(len(like)) % 2).view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


HANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "hidden": lambda mem: mem,
    "passed": lambda mem: mem,
    "detached": lambda mem: mem.detach(),
    "detached in place": lambda mem: mem.detach_(),
    "copied": lambda mem: mem.clone(),
    "detached and copied": lambda mem: mem.detach().clone(),
    "scaled": lambda mem: 0.9 * mem,
    "changed in place": lambda mem: mem.detach().mul_(0.9),
    "masked": lambda mem: mem * mask(mem),
    "detached and masked": lambda mem: mem.detach() * mask(mem),
}


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("gradient", ["surrogate", "counterfactual", "scores"])
@pytest.mark.parametrize(
    ("name", "handed"),
    [*itertools.product(CLASSES[1:], ["hidden", "passed", "detached and copied"]), *(("Leaky", h) for h in HANDED)],
)
def test_the_spike_of_escape_noise_that_was_sampled_resets(name: str, handed: str, gradient: str, graph: bool) -> None:
    options: dict[str, Any] = {"init_hidden": handed == "hidden", "output": True, "reset_mechanism": "subtract"}
    neuron, never = build(slr, name, noise=slr.EscapeNoise(2.0), **options), build(snn, name, reset_mechanism="none")
    if gradient != "surrogate":
        neuron.sampler = CounterfactualCredit() if gradient == "counterfactual" and neuron.is_elementwise else Scores()
    torch.manual_seed(0)
    x = inputs_for(name)[0].requires_grad_()
    # Not zeros, from which the membrane potential of Alpha is zero again after a step.
    states = tuple(torch.full_like(neuron(x)[-1].detach(), 0.1) for _ in initial_states(neuron))
    neuron.reset_mem()
    last = None
    with torch.set_grad_enabled(graph):
        for _ in range(6):
            spikes, *_ = output = neuron(x) if handed == "hidden" else neuron(x, *states)
            # A fused step does not say what it reset.
            fused = name in ("Leaky", "Lapicque", "Synaptic")
            reset = (never(x, *states)[-1] - output[-1]) / neuron.threshold if fused else neuron.reset
            if last is not None:
                assert last.any()
                torch.testing.assert_close(reset.detach(), last, rtol=0, atol=1e-4)
            # Where the mask has made zeros, the presentation is a new one.
            last = spikes.detach() * (mask(spikes) if "masked" in handed else 1)
            *others, mem = output[-len(states) :]
            states = (*others, HANDED[handed](mem))


@pytest.mark.parametrize("gradient", ["surrogate", "counterfactual"])
@pytest.mark.parametrize(
    "fresh", [lambda lif: lif.reset_mem(), lambda lif: torch.zeros(50, 20)], ids=["reset", "zeros"]
)
def test_a_new_presentation_does_not_begin_with_a_reset(fresh: Callable[[Any], Tensor], gradient: str) -> None:
    neuron = slr.Leaky(beta=0.9, noise=slr.EscapeNoise(5.0))
    slr.use_gradient(neuron, gradient)
    x = torch.zeros(50, 20, requires_grad=True)
    for _ in range(3):
        spikes, mem = neuron(x, fresh(neuron))
        assert spikes.any()
        assert not mem.any()
        _, mem = neuron(x, mem)
        assert mem.any()


@pytest.mark.parametrize("gradient", ["surrogate", "counterfactual", "scores"])
@every_noise
def test_spikes_may_be_changed_in_place(noise: str, gradient: str) -> None:
    def gradients(inplace: bool) -> list[Tensor]:
        net = Net(noise=noise)
        estimator = slr.Vanilla(net, 4, seed=0) if gradient == "scores" else None
        if gradient != "scores":
            slr.use_gradient(net, gradient)

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            slr.reset(net)
            out = torch.zeros(())
            for t in range(x.shape[1]):
                spikes = F.dropout(net.lif1(net.fc1(x[:, t])), inplace=inplace)
                spikes = F.dropout(net.lif2(net.fc2(spikes)), inplace=inplace)
                out = out + net.readout(spikes)
            return F.cross_entropy(out, y, reduction="none")

        torch.manual_seed(0)
        if estimator is None:
            loss_fn(*data()).mean().backward()
        else:
            estimator.backward(loss_fn, *data())
        return [parameter.grad for parameter in net.parameters()]

    for changed, copied in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(changed, copied)
        assert changed.any()


@every_noise
@pytest.mark.parametrize("name", CLASSES)
def test_states_that_are_passed_are_gone_on_from(name: str, noise: str) -> None:
    x, generator = inputs_for(name), torch.Generator().manual_seed(5)
    plain, neuron = build(snn, name), sampled(build(slr, name, noise=make_noise(noise, 1e-6)))
    run(plain, x)
    states = tuple(3 * torch.rand(state.shape, generator=generator) for state in plain(x[0], *initial_states(plain)))
    states = states[-len(initial_states(plain)) :]
    expected = plain(x[0], *states)
    torch.testing.assert_close(neuron(x[0], *states), expected, rtol=0, atol=1e-4)
    neuron.reset_mem()
    by_name = dict(zip(neuron.all_states, states, strict=True))
    torch.testing.assert_close(neuron(x[0], **by_name), expected, rtol=0, atol=1e-4)


def test_states_of_another_batch_are_fresh_ones() -> None:
    lif = sampled(slr.Leaky(beta=0.9, noise=slr.MembraneNoise(1e-6)))
    _, mem = lif(torch.ones(3, 2), torch.full((4, 2), 5.0))
    torch.testing.assert_close(mem, torch.ones(3, 2), rtol=0, atol=1e-4)


@every_noise
@pytest.mark.parametrize("name", CLASSES)
def test_noise_that_is_off_leaves_snntorchs_forward_and_surrogate_gradient(name: str, noise: str) -> None:
    ours, theirs = sampled(build(slr, name, learn=True, noise=noise)).eval(), build(snn, name, learn=True)
    x = inputs_for(name)
    outputs = []
    for neuron in (ours, theirs):
        outputs.append(run(neuron, x))
        torch.stack([output[0] for output in outputs[-1]]).sum().backward()
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for parameter, value in theirs.named_parameters():
        gradient = ours.get_parameter(parameter).grad
        assert (gradient is None) == (value.grad is None)
        assert gradient is None or torch.equal(gradient, value.grad)


def test_no_samples_are_no_problem() -> None:
    neuron = nn.Sequential(sampled(slr.Leaky(beta=0.9, noise=True, init_hidden=True)))
    assert slr.rollout(neuron, torch.zeros(0, 3), num_steps=2).shape == (2, 0, 3)


class _Own(torch.autograd.Function):
    """A step with a derivative of the user's own."""

    @staticmethod
    def forward(ctx: Any, margin: torch.Tensor) -> torch.Tensor:
        return (margin > 0).float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@pytest.mark.parametrize(
    ("function", "is_step"),
    [(_Own.apply, True), (lambda margin: 2 * (margin > 0).float(), False), (torch.sigmoid, False)],
)
def test_a_spike_function_of_the_users_own_is_known_by_what_it_does(function: Any, is_step: bool) -> None:
    def gradient(spike_grad: Any) -> torch.Tensor:
        torch.manual_seed(0)
        layer, neuron = torch.nn.Linear(4, 3), slr.Leaky(beta=0.8, threshold=0.3, spike_grad=spike_grad, noise=True)
        slr.use_gradient(neuron, control=0.0, discount=1.0)
        mem, total = neuron.reset_mem(), 0.0
        for _ in range(3):
            spikes, mem = neuron(layer(torch.ones(50, 4)), mem)
            total = total + spikes.sum()
        total.backward()
        return layer.weight.grad

    assert slr.Leaky(beta=0.8, spike_grad=function, noise=True).is_step_function == is_step
    expected = gradient(None)
    if is_step:
        torch.testing.assert_close(gradient(function), expected)
    elif function is not torch.sigmoid:
        # Spikes of two are worth twice as much to the loss; resets do not change with them where there are none.
        assert gradient(function).norm() > 1.2 * expected.norm()
