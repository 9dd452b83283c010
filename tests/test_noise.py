from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.network import noises
from snntorch_lr.noise import DISTRIBUTIONS

from .helpers import DEVICES, LOG_DENSITY, Net, data

# Standard deviation of noise with scale parameter 1.
DEVIATION = {"gaussian": 1.0, "laplace": math.sqrt(2), "logistic": math.pi / math.sqrt(3)}


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: 0.3, lambda: 2, lambda: torch.tensor(0.3), lambda: torch.tensor([0.1, 20.0]),
        lambda: torch.full((2, 1, 1), 0.3), lambda: torch.tensor([1, 2]), lambda: torch.tensor(0.5).double(),
    ],
    ids=["float", "int", "scalar", "per neuron", "per channel", "integers", "double"],
)  # fmt: skip
def test_sigma_is_what_was_given_in_its_dtype_and_in_memory_of_its_own(make: Callable[[], Any], learn: bool) -> None:
    sigma = make()
    noise = slr.MembraneNoise(sigma, learn=learn)
    if isinstance(sigma, Tensor):
        sigma.fill_(3)
    is_double = isinstance(sigma, Tensor) and sigma.dtype == torch.float64
    expected = torch.as_tensor(make(), dtype=torch.float64 if is_double else torch.float32)
    torch.testing.assert_close(noise.sigma, expected)


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


def sample(noise: slr.MembraneNoise, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    noise.generator = torch.Generator().manual_seed(seed)
    return noise.sample(torch.Size((500, 400)), torch.empty((), dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_samples_have_unit_scale_and_are_symmetric(distribution: str, dtype: torch.dtype) -> None:
    epsilon = sample(slr.MembraneNoise(distribution=distribution), 0, dtype)
    assert epsilon.shape == (500, 400)
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
def test_samples_are_reproduced_by_a_generator_which_leaves_the_global_one_alone(
    distribution: str, device: str
) -> None:
    noise, state = slr.MembraneNoise(distribution=distribution), torch.get_rng_state()
    assert torch.equal(sample(noise, 1, device=device), sample(noise, 1, device=device))
    assert not torch.equal(sample(noise, 1, device=device), sample(noise, 2, device=device))
    assert torch.equal(torch.get_rng_state(), state)


def log_probability(kind: str, z: Tensor, spikes: Tensor) -> Tensor:
    x = (2 * spikes - 1) * z
    return torch.special.log_ndtr(x) if kind == "gaussian" else nn.functional.logsigmoid(x)


@pytest.mark.parametrize("spike", [0.0, 1.0])
@pytest.mark.parametrize("kind", slr.EscapeNoise.offered)
def test_scores_of_a_spike_are_derivatives_of_its_log_probability(kind: str, spike: float) -> None:
    noise = slr.EscapeNoise(distribution=kind)
    z = torch.linspace(-40, 40, 801, dtype=torch.float64, requires_grad=True)
    spikes = torch.full_like(z, spike)
    (expected,) = torch.autograd.grad(log_probability(kind, z, spikes).sum(), z)
    z = z.detach()
    location = noise.location_score(z, noise.cdf_and_pdf(z)[0], spikes)
    torch.testing.assert_close(location, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(noise.scale_score(z, location), -z * expected, rtol=1e-6, atol=1e-12)
    few = z.float()
    single = noise.location_score(few, noise.cdf_and_pdf(few)[0], spikes.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("noise", [*map(slr.EscapeNoise, [0.5] * 2, [True] * 2, slr.EscapeNoise.offered)], ids=str)
def test_spikes_have_their_probability(noise: slr.EscapeNoise) -> None:
    z = torch.tensor([-2.0, -0.5, 0.0, 1.0]).expand(100_000, 4)
    noise.generator = torch.Generator().manual_seed(0)
    p, density = noise.cdf_and_pdf(z.contiguous())
    fired = noise.fires(p, noise.sample(z.shape, z)).double()
    expected = log_probability(noise.distribution, z[0].double(), torch.ones(4)).exp()
    torch.testing.assert_close(p[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert ((fired.mean(0) - expected).abs() < 4.5 * (expected * (1 - expected) / len(z)).sqrt()).all()
    step = 1e-4
    slope = (noise.cdf_and_pdf(z[0].double() + step)[0] - noise.cdf_and_pdf(z[0].double() - step)[0]) / (2 * step)
    torch.testing.assert_close(density[0].double(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.25, torch.tensor([0.25, 0.5])], ids=["scalar", "per neuron"])
def test_print_tells_level_and_distribution(sigma: Any) -> None:
    text = repr(slr.Leaky(beta=0.9, noise=slr.MembraneNoise(sigma, learn=False, distribution="laplace")))
    assert "laplace" in text
    assert "learn=False" in text
    assert ("mean 0.375" if isinstance(sigma, Tensor) else "sigma=0.25") in text


class TestSwitches:
    """``noise_on`` and ``noise_off``."""

    @staticmethod
    def active(net: nn.Module) -> list[bool]:
        return [noise.active for noise in noises(net).values()]

    def test_nest_and_restore(self) -> None:
        net = Net()
        with slr.noise_off(net):
            assert self.active(net) == [False, False]
            with slr.noise_on(net.lif2):
                assert self.active(net) == [False, True]
                with slr.noise_off(net):
                    assert self.active(net) == [False, False]
                assert self.active(net) == [False, True]
        assert all(self.active(net))
        assert not any(self.active(net.eval()))

    @pytest.mark.parametrize("switch", [slr.noise_off, slr.noise_on])
    def test_restore_after_an_exception(self, switch: Any) -> None:
        net = Net()
        net.lif2.eval()
        with pytest.raises(KeyError), switch(net):
            raise KeyError
        assert self.active(net) == [True, False]

    @pytest.mark.parametrize("switch", [slr.noise_off, slr.noise_on])
    def test_take_networks_without_noise_and_shared_noise(self, switch: Any) -> None:
        with switch(Net(noise=False)):
            pass
        noise = slr.MembraneNoise()
        with switch(Net(noise=noise)):
            assert noise.active == (switch is slr.noise_on)
        assert noise.forced is None

    def test_noise_that_is_off_draws_nothing(self) -> None:
        net = Net()
        slr.use_gradient(net)
        state = torch.get_rng_state()
        with slr.noise_off(net):
            net(data()[0])
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("gradient", ["surrogate", "counterfactual"])
    @pytest.mark.parametrize("device", DEVICES)
    def test_noise_comes_from_the_generator_that_is_given(self, device: str, gradient: str) -> None:
        net = Net().eval().to(device)
        slr.use_gradient(net, gradient)
        x, _ = data(device=device)

        def outputs(seed: int) -> Tensor:
            with slr.noise_on(net, torch.Generator(device).manual_seed(seed)), torch.no_grad():
                return net(x)

        assert torch.equal(outputs(1), outputs(1))
        assert not torch.equal(outputs(1), outputs(2))
