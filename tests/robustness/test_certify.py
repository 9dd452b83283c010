"""Certificates: against closed forms, and against attacks inside the radius."""

from __future__ import annotations

import math
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr.experiments import data
from snntorch_lr.robustness import Certificate, Protocol, Target, certify, evaluate

PIXELS = torch.tensor([[[[0.9, 0.2]]], [[[0.5, 0.55]]], [[[0.3, 0.7]]]])
LABELS = torch.tensor([0, 1, 0])


def test_radius_of_a_linear_classifier_comes_up_to_its_distance_to_the_boundary() -> None:
    """The logits are the pixels: p = Φ(d / σ) at a distance d to the boundary, and σ Φ⁻¹(p) is d."""
    certificate = certify(nn.Flatten(), [(PIXELS, LABELS)], sigma=0.3, draws=40_000)
    distance = (PIXELS[:, 0, 0, 0] - PIXELS[:, 0, 0, 1]).abs() / math.sqrt(2)
    assert certificate.predictions.tolist() == [0, 1, 1]
    assert (certificate.radii <= distance).all()
    assert (certificate.radii >= distance - 0.03).all()
    assert certificate.accuracy().accuracy == pytest.approx(2 / 3)
    assert certificate.accuracy(0.25).accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(("draws", "radius"), [(1000, 2.4633), (10_000, 3.1991), (100_000, 3.8115)])
def test_the_largest_radius_is_that_of_the_published_bound(draws: int, radius: float) -> None:
    """Where all draws agree p is α^(1/n): Cohen et al. certify up to 3.8 σ with α = .001 and n = 100,000."""
    sure = torch.tensor([[[[1.0, 0.0]]]])
    certificate = certify(nn.Flatten(), [(sure, torch.tensor([0]))], sigma=0.01, draws=draws)
    assert float(certificate.radii) / 0.01 == pytest.approx(radius, abs=1e-3)


def test_abstains_where_the_draws_do_not_tell() -> None:
    even = torch.full((1, 1, 1, 2), 0.5)
    certificate = certify(nn.Flatten(), [(even, torch.tensor([0]))], sigma=0.3, draws=200)
    assert (certificate.predictions.tolist(), certificate.radii.tolist()) == ([-1], [0.0])
    assert certificate.accuracy().accuracy == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sigma": 0.0}, "sigma"), ({"alpha": 0.5}, "alpha"), ({"draws": 0}, "draws"), ({"sigma": None}, "sigma")],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify(nn.Flatten(), [(PIXELS, LABELS)], **({"sigma": 0.3} | options))


def test_the_network_is_left_as_it_was_and_a_seed_decides() -> None:
    net = nn.Sequential(nn.Flatten(), slr.Leaky(beta=0.9, init_hidden=True, noise=True)).train()
    state = torch.get_rng_state()
    first, again = (certify(net, [(PIXELS, LABELS)], 0.3, draws=50, seed=3).radii for _ in range(2))
    assert torch.equal(first, again)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)


class Smoothed(nn.Module):
    """Digits with noise on the input, 64-32-10."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noise = slr.NoisyInput(sigma, learn=False, frozen=True)
        self.layers = nn.Sequential(nn.Linear(64, 32), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        return slr.rollout(self.layers, self.noise(x.flatten(1)), num_steps=4).mean(0) * 4


def test_no_l2_attack_breaks_a_certified_image_inside_its_radius() -> None:
    sigma, radius = 0.35, 0.2
    net, images = Smoothed(sigma), data.load("digits")
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(150):
        rows = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(step))[:128]
        optimizer.zero_grad()
        F.cross_entropy(net(images.train[rows]), images.train_labels[rows]).backward()
        optimizer.step()
    x, y = images.test[:40], images.test_labels[:40]
    certificate = certify(net.layers, [(x, y)], sigma, 2000, forward=lambda _, x: Smoothed.forward(net.eval(), x))
    protocol = Protocol(norm="l2", noise="on", votes=256, gates=False)
    report = evaluate(net, [(x, y)], radius, ["EOT-PGD training", "margin EOT-PGD-40x8"], protocol=protocol)
    held = certificate.right & (certificate.radii > radius)
    assert 10 < int(held.sum()) < 40
    right = report.rows[0].worst(radius)
    assert right[held].all()
    assert not right[~held].all()


def test_a_certificate_is_a_table_and_plain_numbers() -> None:
    certificate = Certificate(0.5, 10, 5, 0.01, torch.tensor([1]), torch.tensor([0.3]), torch.tensor([True]))
    assert "| 0.25 | 100.0" in str(certificate)
    assert "| 0.5 | 0.0" in str(certificate)
    assert certificate.to_json()["radii"] == [pytest.approx(0.3)]
    assert certify(Target(nn.Flatten()), [(PIXELS, LABELS)], 0.3, 10).to_json()["draws"] == 10
