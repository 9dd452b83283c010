from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import utils
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.gradients.vanilla import Scores

from .helpers import (
    BATCH,
    CLASSES,
    DEVICES,
    FEATURES,
    POSITIONAL,
    RESETS,
    WITH_DELAY,
    assert_filled,
    build,
    every_noise,
    initial_states,
    inputs_for,
    run,
    sampled,
)


def settings() -> list[Any]:
    """Every class with every reset, state and output convention; reset_delay=False where snnTorch has it."""
    cases = []
    for name, reset, init_hidden, output in itertools.product(CLASSES, RESETS, [False, True], [False, True]):
        options = {"reset_mechanism": reset, "init_hidden": init_hidden, "output": output}
        delays: list[dict[str, Any]] = [{}] + ([{"reset_delay": False}] if name in WITH_DELAY else [])
        for delay in delays:
            marks = f"{'-hidden' * init_hidden}{'-output' * output}{'-no delay' * bool(delay)}"
            cases.append(pytest.param(name, {**options, **delay}, id=f"{name}-{reset}{marks}"))
    return cases


def outputs_and_gradients(neuron: Any, x: Tensor) -> tuple[list[tuple[Tensor, ...]], dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    outputs = run(neuron, x)
    generator = torch.Generator().manual_seed(4)
    flat = [value for output in outputs for value in output]
    loss = sum((value * torch.rand(value.shape, generator=generator)).sum() for value in flat)
    loss.backward()
    return outputs, {"input": x.grad, **{name: p.grad for name, p in neuron.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(("name", "options"), settings())
def test_without_noise_is_snntorchs_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    ours, theirs = build(slr, name, learn=True, **options), build(snn, name, learn=True, **options)
    x = inputs_for(name)
    (out, grads), (expected_out, expected_grads) = outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x)
    spikes = torch.stack([output[0] for output in expected_out])
    assert 0 < spikes.mean() < 1, "a case without spikes or without silence compares little"
    assert [len(output) for output in out] == [len(output) for output in expected_out]
    for got, expected in zip(itertools.chain(*out), itertools.chain(*expected_out), strict=True):
        assert torch.equal(got, expected)
    assert grads.keys() == expected_grads.keys()
    assert all(torch.equal(grads[key], expected_grads[key]) for key in grads)
    state, expected_state = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


@pytest.mark.parametrize("name", CLASSES)
def test_signature_is_snntorchs_with_noise(name: str) -> None:
    *parameters, noise = inspect.signature(getattr(slr, name)).parameters.values()
    assert parameters == list(inspect.signature(getattr(snn, name)).parameters.values())
    assert (noise.name, noise.default) == ("noise", False)
    # Positional arguments too mean the same.
    torch.manual_seed(0)
    ours = getattr(slr, name)(*POSITIONAL[name], noise="membrane")
    torch.manual_seed(0)
    theirs = getattr(snn, name)(*POSITIONAL[name])
    state = ours.state_dict()
    assert state.pop("noise.log_sigma").exp().item() == pytest.approx(0.5)
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    assert {key for key in state if not key.startswith("noise.")} == theirs.state_dict().keys()


def test_class_of_a_user_has_its_own_signature() -> None:
    class Mine(slr.Leaky):
        def __init__(self, size: int) -> None:
            super().__init__(beta=torch.full((size,), 0.9), noise=True)

    assert list(inspect.signature(Mine).parameters) == ["size"]


@pytest.mark.parametrize("name", CLASSES)
def test_is_a_snntorch_neuron(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # snntorch.utils.reset resets the neurons of every network, and fails if some of them cannot be reset.
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])
    neuron = build(slr, name, noise=True, init_hidden=True)
    assert isinstance(neuron, getattr(snn, name))
    run(neuron, inputs_for(name))
    assert neuron.mem.any()
    utils.reset(nn.Sequential(neuron))
    assert not neuron.mem.any()


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", CLASSES)
def test_reset_is_the_last_spike(name: str, reset: str) -> None:
    neuron = build(slr, name, noise=True, reset_mechanism=reset)
    torch.manual_seed(0)
    x = inputs_for(name)
    states = initial_states(neuron)
    last = None
    for step in x:
        output = neuron(step, *states)
        states = output[-len(states) :]
        if last is not None:
            assert 0 < last.mean() < 1
            assert torch.equal(neuron.reset, last)
        last = output[0]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@every_noise
@pytest.mark.parametrize("gradient", ["surrogate", "counterfactual"])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_and_the_gradients_of_every_parameter_and_the_input_have_the_dtype_of_the_membrane(
    name: str, gradient: str, noise: str, dtype: torch.dtype, device: str
) -> None:
    # Each mechanism with each class, noise and gradient.
    reset = RESETS[(DTYPES.index(dtype) + CLASSES.index(name) + (noise == "escape")) % 3]
    options = {"reset_delay": False} if gradient == "surrogate" and name in WITH_DELAY else {}
    neuron = build(slr, name, learn=True, noise=noise, init_hidden=noise == "escape", reset_mechanism=reset, **options)
    neuron = neuron.to(device, dtype)
    x = inputs_for(name, dtype).to(device).requires_grad_()
    torch.manual_seed(0)
    outputs = run(sampled(neuron) if gradient == "counterfactual" else neuron, x)
    assert {value.dtype for output in outputs for value in output} == {dtype}
    assert {value.device.type for output in outputs for value in output} == {device}
    if gradient == "surrogate" or neuron.is_elementwise:
        torch.stack([output[0] for output in outputs]).square().sum().backward()
        assert_filled(neuron, dtype)
        assert x.grad is not None
        assert x.grad.any()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "logistic"])
def test_surrogate_gradient_of_sigma_is_the_reparameterised_one(distribution: str) -> None:
    noise = slr.MembraneNoise(torch.tensor([0.5, 1.0, 2.0]), distribution=distribution)
    neuron = slr.Leaky(beta=0.9, reset_mechanism="none", noise=noise)
    mem = neuron(torch.ones(BATCH, FEATURES), torch.zeros(BATCH, FEATURES))[1]
    mem.sum().backward()
    torch.testing.assert_close(noise.log_sigma.grad, (mem - 1).sum(0).detach())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sigma", [0.7, torch.tensor([0.2, 0.7, 3.0])], ids=["scalar", "per neuron"])
def test_membrane_scatters_by_sigma_and_carries_it_on(sigma: Any, steps: int) -> None:
    beta, rows = 0.8, 40_000
    neuron = slr.Leaky(beta=beta, reset_mechanism="none", init_hidden=True, noise=slr.MembraneNoise(sigma))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(steps):
            neuron(torch.ones(rows, FEATURES))
    gain = sum(beta**t for t in range(steps))
    spread = sum(beta ** (2 * t) for t in range(steps)) ** 0.5 * torch.as_tensor(sigma).expand(FEATURES)
    assert ((neuron.mem.mean(0) - gain).abs() < 5 * spread / rows**0.5).all()
    assert ((neuron.mem.std(0) / spread - 1).abs() < 5 / (2 * rows) ** 0.5).all()


@pytest.mark.parametrize("name", CLASSES)
def test_state_dict_round_trip(name: str) -> None:
    neuron = build(slr, name, learn=True, noise=slr.MembraneNoise(0.2))
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.mul_(0.9)
    other = build(slr, name, learn=True, noise=slr.MembraneNoise(3.0))
    other.load_state_dict(neuron.state_dict())
    x = inputs_for(name)
    torch.manual_seed(0)
    expected = run(neuron, x)
    torch.manual_seed(0)
    for got, want in zip(itertools.chain(*run(other, x)), itertools.chain(*expected), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("noise", [True, "membrane", slr.MembraneNoise(0.2)], ids=["True", "membrane", "object"])
def test_noise_is_made_from_every_way_to_ask_for_it(noise: Any) -> None:
    neuron = slr.Leaky(beta=0.9, noise=noise)
    assert isinstance(neuron.noise, slr.MembraneNoise)
    assert neuron.noise.sigma.item() == pytest.approx(0.2 if isinstance(noise, slr.MembraneNoise) else 0.5)
    assert neuron.noise.log_sigma in set(neuron.parameters())


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: slr.RSynaptic(0.7, 0.6, linear_features=3, reset_delay=False), "RSynaptic.*reset_delay=True"),
        (lambda: slr.Lapicque(0.8, learn_beta=True), "Lapicque.*use Leaky"),
        (lambda: slr.SLSTM(3, 4), "input_size == hidden_size.*Linear"),
        (lambda: slr.SLSTM(3, 4, noise=True), "input_size == hidden_size.*Linear"),
    ],
)
def test_what_is_broken_in_snntorch_is_warned_of_where_it_is_not_refused(make: Any, remedy: str) -> None:
    with pytest.warns(UserWarning, match=remedy):
        make()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("noise", [False, True])
def test_sound_options_are_not_warned_of(name: str, noise: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(slr, name, learn=True, noise=noise)


def test_the_membrane_potential_is_free_of_escape_noise() -> None:
    neuron = slr.Leaky(beta=0.9, reset_mechanism="none", noise=slr.EscapeNoise(3.0))
    mem = torch.zeros(4, 5)
    for _ in range(3):
        _, mem = neuron(torch.ones(4, 5), mem)
    torch.testing.assert_close(mem, torch.full((4, 5), 1 + 0.9 + 0.81))


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("sampler", [None, Scores])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inhibition_leaves_one_spike(dtype: torch.dtype, sampler: type[Scores] | None) -> None:
    neuron = slr.Leaky(beta=0.9, inhibition=True, noise=True).to(dtype)
    neuron.sampler = sampler and sampler()
    spikes, _ = neuron(torch.full((BATCH, FEATURES), 9.0, dtype=dtype), neuron.reset_mem())
    assert torch.equal(spikes.sum(1), torch.ones(BATCH, dtype=dtype))
    assert spikes.dtype == dtype
    assert sampler is None or len(neuron.sampler.tokens) == 1


@pytest.mark.parametrize("gradient", ["surrogate", "counterfactual"])
@every_noise
def test_graded_spikes_keep_their_size_and_the_size_learns(noise: str, gradient: str) -> None:
    neuron = slr.Leaky(beta=0.9, noise=noise, graded_spikes_factor=2.5, learn_graded_spikes_factor=True)
    slr.use_gradient(neuron, gradient)
    torch.manual_seed(0)
    spikes, _ = neuron(torch.ones(50, FEATURES), neuron.reset_mem())
    assert spikes.unique().tolist() == [0.0, 2.5]
    spikes.sum().backward()
    assert neuron.graded_spikes_factor.grad == spikes.count_nonzero()
