from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.network import spiking_neurons

from .helpers import DEVICES, inputs_for
from .test_convert import drive, make


def active(net: nn.Module) -> list[bool]:
    return [neuron.noise.active for _, neuron in spiking_neurons(net)]


def test_switches_nest_and_restore() -> None:
    net = slr.add_noise(make("nested"))
    with slr.noise_off(net):
        assert not any(active(net))
        with slr.noise_on(net.head):
            assert active(net) == [False, False, True]
            with slr.noise_off(net):
                assert not any(active(net))
            assert active(net) == [False, False, True]
        assert not any(active(net))
    assert all(active(net))
    assert not any(active(net.eval()))


@pytest.mark.parametrize("switch", [slr.noise_off, slr.noise_on])
def test_switches_restore_after_an_exception(switch: Callable[[nn.Module], Any]) -> None:
    net = slr.add_noise(make("nested"))
    net.head.eval()
    with pytest.raises(KeyError), switch(net):
        raise KeyError
    assert active(net) == [True, True, False]


@pytest.mark.parametrize("switch", [slr.noise_off, slr.noise_on])
def test_switches_accept_networks_without_noise_and_shared_noise(switch: Callable[[nn.Module], Any]) -> None:
    with switch(make("nested")):
        pass
    noise = slr.MembraneNoise()
    net = nn.Sequential(slr.Leaky(beta=0.9, noise=noise), slr.Leaky(beta=0.9, noise=noise))
    with switch(net):
        pass
    assert noise.forced is None


def test_noise_that_is_off_draws_nothing() -> None:
    net = slr.add_noise(make("nested"))
    state = torch.get_rng_state()
    with slr.noise_off(net):
        drive(net)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("device", DEVICES)
def test_noise_comes_from_the_given_generator(device: str) -> None:
    net = slr.add_noise(make("nested")).eval().to(device)

    def outputs(seed: int) -> Tensor:
        slr.reset(net)
        with slr.noise_on(net, torch.Generator(device).manual_seed(seed)), torch.no_grad():
            return torch.stack([net(step.to(device)) for step in inputs_for("Leaky")])

    assert torch.equal(outputs(1), outputs(1))
    assert not torch.equal(outputs(1), outputs(2))
