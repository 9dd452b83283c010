from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr
from snntorch_lr.noise import DISTRIBUTIONS

from .helpers import DEVICES, LOG_DENSITY

# Standard deviation of noise with scale parameter 1.
DEVIATION = {"gaussian": 1.0, "laplace": math.sqrt(2), "logistic": math.pi / math.sqrt(3)}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    "sigma",
    [0.3, 2, torch.tensor(0.3), torch.tensor([0.1, 20.0]), torch.full((2, 1, 1), 0.3), torch.tensor([1, 2])],
    ids=["float", "int", "scalar", "per neuron", "per channel", "integers"],
)
def test_sigma_is_what_was_given(sigma: Any, learn: bool) -> None:
    level = slr.MembraneNoise(sigma, learn=learn).sigma
    torch.testing.assert_close(level, torch.as_tensor(sigma, dtype=torch.float32))


def test_sigma_keeps_the_dtype_of_a_tensor() -> None:
    assert slr.MembraneNoise(torch.tensor(0.5, dtype=torch.float64)).sigma.dtype == torch.float64


def test_does_not_share_memory_with_the_given_sigma() -> None:
    given = torch.tensor(0.5)
    noise = slr.MembraneNoise(given)
    given.fill_(3.0)
    assert noise.sigma.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "sigma",
    [0, -0.1, math.nan, math.inf, torch.tensor([0.5, 0.0]), torch.tensor([0.5, math.nan]), torch.zeros(0)],
    ids=str,
)
def test_refuses_sigma_that_is_not_positive_and_finite(sigma: Any) -> None:
    with pytest.raises(ValueError, match=r"sigma must be positive and finite.*noise=False"):
        slr.MembraneNoise(sigma)


def test_refuses_unknown_distribution() -> None:
    with pytest.raises(ValueError, match=r"'cauchy'.*gaussian, laplace, logistic"):
        slr.MembraneNoise(distribution="cauchy")


@pytest.mark.parametrize("learn", [True, False])
def test_sigma_is_a_parameter_only_if_learned_and_saved_either_way(learn: bool) -> None:
    noise = slr.MembraneNoise(0.3, learn=learn)
    assert len(list(noise.parameters())) == learn
    other = slr.MembraneNoise(0.9, learn=learn)
    other.load_state_dict(noise.state_dict())
    assert torch.equal(other.sigma, noise.sigma)


def test_sigma_stays_positive_under_any_step() -> None:
    noise = slr.MembraneNoise(0.5)
    optimizer = torch.optim.SGD(noise.parameters(), lr=10.0)
    noise.sigma.backward()
    optimizer.step()
    assert 0 < noise.sigma.item() < 0.5


@pytest.mark.parametrize(("at_eval", "training", "expected"), [(False, True, 1), (False, False, 0), (True, False, 1)])
def test_is_on_in_training_and_in_evaluation_if_asked_for(at_eval: bool, training: bool, expected: bool) -> None:
    neuron = slr.Leaky(beta=0.9, noise=slr.MembraneNoise(at_eval=at_eval)).train(training)
    assert neuron.noise.active == expected
    (_, mem), (_, again) = (neuron(torch.ones(2, 3), torch.zeros(2, 3)) for _ in range(2))
    assert torch.equal(mem, again) != expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("at_eval", [True, False])
def test_is_switched_whatever_the_mode(training: bool, at_eval: bool) -> None:
    neuron = slr.Leaky(beta=0.9, noise=slr.MembraneNoise(at_eval=at_eval)).train(training)
    with slr.noise_on(neuron):
        assert neuron.noise.active
    with slr.noise_off(neuron):
        assert not neuron.noise.active


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_scores_are_derivatives_of_the_log_density(distribution: str) -> None:
    noise = slr.MembraneNoise(distribution=distribution)
    epsilon = torch.linspace(-4, 4, 40, dtype=torch.float64)
    mean = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    log_sigma = torch.full((40,), 0.4, dtype=torch.float64, requires_grad=True)
    sigma = log_sigma.exp()
    u = (mean + sigma * epsilon).detach()
    LOG_DENSITY[distribution](u, mean, sigma).sum().backward()
    torch.testing.assert_close(noise.location_score(epsilon) / sigma.detach(), mean.grad)
    torch.testing.assert_close(noise.scale_score(epsilon, noise.location_score(epsilon)), log_sigma.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_samples_have_unit_scale_and_are_symmetric(distribution: str, dtype: torch.dtype) -> None:
    like = torch.empty(500, 400, dtype=dtype)
    epsilon = slr.MembraneNoise(distribution=distribution).sample(like, torch.Generator().manual_seed(0))
    assert epsilon.shape == like.shape
    assert epsilon.dtype == dtype
    # Five standard errors; those of the squares are at most those of the Laplace distribution, kurtosis 6.
    deviation, count = DEVIATION[distribution], epsilon.numel()
    assert abs(epsilon.mean().item()) < 5 * deviation / math.sqrt(count)
    assert abs((epsilon > 0).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(count)
    assert epsilon.square().mean().item() == pytest.approx(deviation**2, rel=5 * math.sqrt(5 / count))
    # The density itself, not only its width: mean log density is minus the entropy.
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    entropy = {"gaussian": 0.5 * math.log(2 * math.pi * math.e), "laplace": 1 + math.log(2), "logistic": 2.0}
    log_density = LOG_DENSITY[distribution](epsilon, zero, one)
    assert -log_density.mean().item() == pytest.approx(entropy[distribution], abs=5 / math.sqrt(count))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_samples_are_reproduced_by_a_generator(distribution: str, device: str) -> None:
    noise = slr.MembraneNoise(distribution=distribution)
    like = torch.empty(10, 10, device=device)

    def sample(seed: int) -> Tensor:
        return noise.sample(like, torch.Generator(device).manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_own_generator_leaves_the_global_one_alone(distribution: str) -> None:
    state = torch.get_rng_state()
    slr.MembraneNoise(distribution=distribution).sample(torch.empty(3), torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sigma", [0.25, torch.tensor([0.25, 0.5])], ids=["scalar", "per neuron"])
def test_print_tells_level_and_distribution(sigma: Any) -> None:
    text = repr(slr.Leaky(beta=0.9, noise=slr.MembraneNoise(sigma, learn=False, distribution="laplace")))
    assert "laplace" in text
    assert "learn=False" in text
    assert ("mean 0.375" if isinstance(sigma, Tensor) else "sigma=0.25") in text
