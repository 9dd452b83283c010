"""The control variate changes the variance of the gradient, and not its expectation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import snntorch_lr as slr
from snntorch_lr import control

from .networks import TwoLayers, data, groups
from .objective import Measured, along, directions, estimates, finite_difference
from .test_unbiased import LIMIT, ConvNet, assert_unbiased, escaping

pytestmark = pytest.mark.statistical


def compare(net: Any, x: torch.Tensor, y: torch.Tensor, **options: Any) -> dict[str, tuple[Measured, Measured]]:
    along_groups = directions(net, groups(net))
    gradients = estimates(slr.Controlled(net, **{"copies": 4000, **options}), net.loss, x, y)
    return {kind: (finite_difference(net, net.loss, x, y, v), along(gradients, v)) for kind, v in along_groups.items()}


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"baseline": "none"}], ids=["plain", "pairs", "none"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_is_unbiased_with_membrane_noise(reset: str, options: dict[str, Any]) -> None:
    assert_unbiased(compare(TwoLayers("Leaky", reset), *data(), **options))


@pytest.mark.parametrize("distribution", ["gaussian", "logistic"])
@pytest.mark.parametrize("neuron", ["Leaky", "Synaptic", "RLeaky"])
def test_is_unbiased_with_escape_noise(neuron: str, distribution: str) -> None:
    assert_unbiased(compare(escaping(TwoLayers(neuron, "subtract"), distribution), *data()))


@pytest.mark.parametrize("distribution", ["laplace", "logistic"])
def test_is_unbiased_with_every_distribution(distribution: str) -> None:
    net = TwoLayers("Leaky", "subtract")
    for lif in (net.lif1, net.lif2):
        lif.noise = slr.MembraneNoise(0.5, distribution=distribution).double()
    assert_unbiased(compare(net, *data()))


def test_is_unbiased_with_graded_spikes_through_convolution() -> None:
    net = ConvNet()
    del net.lif2.graded_spikes_factor
    net.lif2.graded_spikes_factor = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    x = torch.rand(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    assert_unbiased(compare(net, x, data()[1]))


def test_is_unbiased_with_few_copies() -> None:
    net = escaping(TwoLayers("Leaky", "subtract"), "logistic")
    x, y = data()
    direction = directions(net, {"bias": groups(net)["bias"]})["bias"]
    expected = finite_difference(net, net.loss, x, y, direction)
    gradients = estimates(slr.Controlled(net, copies=4), net.loss, x.repeat(1000, 1, 1), y.repeat(1000, 1))
    assert along(gradients, direction).distance(expected) < LIMIT


def _keep_what_was_taken(patch: pytest.MonkeyPatch) -> None:
    original = control.Controlling._file

    def file(self: Any, noise: Any, mean: Any, scores: Any, weights: Any = None) -> None:
        if weights is None:
            original(self, noise, mean, scores)

    patch.setattr(control.Controlling, "_file", file)


def _halve_density(patch: pytest.MonkeyPatch) -> None:
    original = slr.EscapeNoise.chances

    def chances(self: Any, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, density = original(self, z)
        return p, density / 2

    patch.setattr(slr.EscapeNoise, "chances", chances)


def _drop_probability(patch: pytest.MonkeyPatch) -> None:
    original = slr.EscapeNoise.chances
    patch.setattr(slr.EscapeNoise, "chances", lambda self, z: (torch.zeros_like(z), original(self, z)[1]))


@pytest.mark.parametrize("mutate", [_keep_what_was_taken, _halve_density, _drop_probability])
def test_notices_a_dropped_term(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    net = escaping(TwoLayers("Leaky", "subtract"), "logistic")
    direction = directions(net, {"bias": groups(net)["bias"]})["bias"]
    expected = finite_difference(net, net.loss, *data(), direction)
    mutate(monkeypatch)
    gradients = estimates(slr.Controlled(net, copies=4000), net.loss, *data())
    assert along(gradients, direction).distance(expected) > LIMIT
