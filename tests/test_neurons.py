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
from snntorch_lr.noisy_neuron import UNSUPPORTED

from .helpers import (
    BATCH,
    CLASSES,
    DEVICES,
    FEATURES,
    POSITIONAL,
    RESETS,
    assert_filled,
    build,
    every_noise,
    has_option,
    initial_states,
    inputs_for,
    run,
)

WITH_DELAY = [name for name in CLASSES if has_option(name, "reset_delay") and name != "RSynaptic"]


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
def test_takes_positional_arguments_as_snntorch(name: str) -> None:
    torch.manual_seed(0)
    ours = getattr(slr, name)(*POSITIONAL[name], noise="membrane")
    torch.manual_seed(0)
    theirs = getattr(snn, name)(*POSITIONAL[name])
    state = ours.state_dict()
    assert state.pop("noise.log_sigma").exp().item() == pytest.approx(0.5)
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    assert {key for key in state if not key.startswith("noise.")} == theirs.state_dict().keys()


@pytest.mark.parametrize("name", CLASSES)
def test_signature_is_snntorchs_with_noise(name: str) -> None:
    *ours, noise = inspect.signature(getattr(slr, name)).parameters.values()
    assert ours == list(inspect.signature(getattr(snn, name)).parameters.values())
    assert (noise.name, noise.default) == ("noise", False)


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


@every_noise
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", CLASSES)
def test_surrogate_training_reaches_every_parameter_and_sigma(name: str, reset: str, noise: str) -> None:
    neuron = build(slr, name, learn=True, noise=noise, reset_mechanism=reset, init_hidden=noise == "escape")
    torch.manual_seed(0)
    outputs = run(neuron, inputs_for(name).requires_grad_())
    torch.stack([output[0] for output in outputs]).square().sum().backward()
    assert_filled(neuron)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_everything_has_the_dtype_of_the_membrane(name: str, dtype: torch.dtype, device: str) -> None:
    options = {"reset_delay": False} if name in WITH_DELAY else {}
    neuron = build(slr, name, learn=True, noise=True, **options)
    neuron = neuron.to(device, dtype)
    outputs = run(neuron, inputs_for(name, dtype).to(device))
    assert {value.dtype for output in outputs for value in output} == {dtype}
    assert {value.device.type for output in outputs for value in output} == {device}
    outputs[-1][0].sum().backward()


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


@pytest.mark.parametrize("noise", ["membran", 0.5, torch.tensor(0.5), slr.MembraneNoise], ids=str)
def test_refuses_what_is_no_noise(noise: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a noise; use True, False, .*MembraneNoise"):
        slr.Leaky(beta=0.9, noise=noise)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_class_is_refused_by_name_with_what_to_use(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no {name}: .*; use "):
        getattr(slr, name)


def test_other_missing_attributes_are_ordinary_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Leeky'"):
        slr.Leeky  # noqa: B018


DEFECTS = {
    "RSynaptic": ({"alpha": 0.7, "beta": 0.6, "linear_features": 3, "reset_delay": False}, "reset_delay=True"),
    "Lapicque": ({"beta": 0.8, "learn_beta": True}, "use Leaky"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_option_that_is_broken_in_snntorch_is_refused_with_noise_and_warned_of_without(name: str) -> None:
    options, remedy = DEFECTS[name]
    with pytest.raises(ValueError, match=f"{name}.*{remedy}"):
        getattr(slr, name)(**options, noise=True)
    with pytest.warns(UserWarning, match=f"{name}.*{remedy}"):
        getattr(slr, name)(**options)


@pytest.mark.parametrize("noise", [False, True])
def test_alpha_with_learned_alpha_is_refused(noise: bool) -> None:
    with pytest.raises(ValueError, match="learn_alpha=True; use "):
        slr.Alpha(alpha=0.8, beta=0.5, learn_alpha=True, noise=noise)


@pytest.mark.parametrize("noise", [False, True])
def test_slstm_of_unequal_sizes_is_warned_of(noise: bool) -> None:
    with pytest.warns(UserWarning, match="input_size == hidden_size.*Linear"):
        slr.SLSTM(3, 4, noise=noise)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("noise", [False, True])
def test_sound_options_are_not_warned_of(name: str, noise: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(slr, name, learn=True, noise=noise)


@pytest.mark.parametrize("make", [
    lambda: slr.Leaky(beta=0.9, inhibition=True, noise="escape"),
    lambda: slr.SConv2dLSTM(1, 1, 3, max_pool=2, noise="escape"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_escape_noise_is_refused_where_neurons_do_not_decide_alone(make: Any) -> None:
    with pytest.raises(ValueError, match="escape noise decides for each neuron alone"):
        make()


def test_the_membrane_potential_is_free_of_escape_noise() -> None:
    neuron = slr.Leaky(beta=0.9, reset_mechanism="none", noise=slr.EscapeNoise(3.0))
    mem = torch.zeros(4, 5)
    for _ in range(3):
        _, mem = neuron(torch.ones(4, 5), mem)
    torch.testing.assert_close(mem, torch.full((4, 5), 1 + 0.9 + 0.81))


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inhibition_leaves_one_spike(dtype: torch.dtype) -> None:
    neuron = slr.Leaky(beta=0.9, inhibition=True, noise=True).to(dtype)
    spikes, _ = neuron(torch.full((BATCH, FEATURES), 9.0, dtype=dtype), neuron.reset_mem())
    assert torch.equal(spikes.sum(1), torch.ones(BATCH, dtype=dtype))
    assert spikes.dtype == dtype


def test_graded_spikes_keep_their_size() -> None:
    neuron = slr.Leaky(beta=0.9, graded_spikes_factor=2.5, init_hidden=True, noise=True)
    torch.manual_seed(0)
    assert neuron(torch.ones(50, FEATURES)).unique().tolist() == [0.0, 2.5]
