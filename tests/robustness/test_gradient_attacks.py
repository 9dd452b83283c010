from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.robustness import Budget, Descent, Target, score
from snntorch_lr.robustness.gradient_attacks import Best, StableAdaptiveSteps, margin

from . import canaries
from .networks import SmallNet, images, predictions


def test_margin_is_positive_where_the_prediction_is_wrong() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, 5.0]])
    assert margin(logits, torch.tensor([0, 1])).tolist() == [-1.0, 6.0]


def test_sa_pgd_by_hand() -> None:
    """One image of two pixels, η = 1, gradients (3, 1) then (−1, 1)."""
    steps = StableAdaptiveSteps(1.0, steps=100)
    # mean|g| = 2, mean g² = 5: m = (1.5, .5), v = (1.8, .2); m/√v = (1.118, 1.118), clipped to 1.
    assert steps(torch.tensor([[3.0, 1.0]])).tolist() == [pytest.approx([1.0, 1.0])]
    # m = (.75 − 1, .25 + 1), v = (1.44 + 1, .16 + 1).
    second = steps(torch.tensor([[-1.0, 1.0]])).tolist()
    assert second == [pytest.approx([-0.25 / math.sqrt(2.44), 1.0])]


def test_sa_pgd_halves_at_its_checkpoints() -> None:
    """S = 100: after 22 steps, then 19, 16, 13, 10, 7, 6, 6 more."""
    steps = StableAdaptiveSteps(1.0, steps=100)
    lengths = []
    for _ in range(100):
        steps(torch.ones(1, 2))
        lengths.append(steps.length)
    halved = [index for index in range(1, 100) if lengths[index] < lengths[index - 1]]
    assert halved == [22, 41, 57, 70, 80, 87, 93, 99]
    assert lengths[-1] == 2**-8


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e25])
def test_sa_pgd_stands_gradients_that_vanish_or_explode(size: float) -> None:
    steps = StableAdaptiveSteps(1.0, steps=10)
    gradient = torch.tensor([[1.0, -2.0], [0.0, 0.0]]) * size
    first, second = steps(gradient), steps(gradient)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert not first[1].any()
    assert first[0].tolist() == ([1.0, -1.0] if size else [0.0, 0.0])


def test_best_keeps_the_largest_margin_of_each_image() -> None:
    best = Best(torch.zeros(2, 1))
    best.offer(torch.tensor([[1.0], [2.0]]), torch.tensor([torch.nan, -3.0]))
    best.offer(torch.tensor([[3.0], [4.0]]), torch.tensor([-9.0, -4.0]))
    best.offer(torch.tensor([[5.0], [6.0]]), torch.tensor([torch.nan, torch.nan]))
    assert best.images.flatten().tolist() == [3.0, 2.0]


class Linear(nn.Module):
    """Two pixels to two logits."""

    weight = torch.tensor([[0.0, 0.0], [-1.0, -3.0]])

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


def test_the_counterfactual_gradient_sees_through_a_masked_surrogate() -> None:
    images, labels = canaries.digits(24)
    target, budget = Target(canaries.with_zero_gradient(), draws=8), Budget(0.15)
    right = {}
    for surrogate in ("training", "counterfactual"):
        found = Descent(surrogate, "margin", steps=10)(target, images, labels, budget, seed=0)
        right[surrogate] = score(target, found, labels).right.double().mean()
    clean = score(target, images, labels).right.double().mean()
    assert right["training"] > 0.8 * clean
    assert right["counterfactual"] < 0.2 * clean


def test_the_counterfactual_gradient_takes_no_targets() -> None:
    with pytest.raises(ValueError, match="targets"):
        Descent("counterfactual", targets=3)


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
@pytest.mark.parametrize(
    ("norm", "corner"), [("linf", [0.4, 0.4]), ("l2", [0.5 - 0.1 / math.sqrt(10), 0.5 - 0.3 / math.sqrt(10)])]
)
def test_finds_the_worst_point_of_a_linear_network(loss: str, norm: str, corner: list[float]) -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    descent = Descent(loss=loss, steps=40)
    found = descent(Target(Linear(), draws=1), x, torch.tensor([0]), Budget(0.1, norm), seed=3)
    torch.testing.assert_close(found.flatten(), torch.tensor(corner), atol=2e-3, rtol=0)


def test_targets_find_what_the_likeliest_wrong_class_hides() -> None:
    class Trap(nn.Module):
        """Class 1 is likelier and out of reach; class 2 wins at the other end."""

        def forward(self, x: Tensor) -> Tensor:
            up = x.flatten(1)[:, :1] - 0.5
            return torch.cat([0 * up, 0.4 * up - 0.2, -up - 0.3], 1)

    x, y, target = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), Target(Trap(), draws=1)
    plain, aimed = (
        Descent(loss="margin", steps=10, random_start=False, targets=count)(target, x, y, Budget(0.4), seed=0)
        for count in (0, 2)
    )
    assert margin(Trap()(plain), y) < 0 < margin(Trap()(aimed), y)


def test_averages_over_draws_and_never_returns_the_clean_image() -> None:
    net, x = slr.add_noise(SmallNet(), sigma=0.5), images()
    y, rows = predictions(net, x), []

    def forward(net: Any, images: Tensor) -> Tensor:
        rows.append(len(images))
        logits: Tensor = net(images)
        return logits

    found = Descent(steps=2, draws=3)(Target(net, forward=forward), x, y, Budget(0.1), seed=0)
    assert set(rows) == {3 * len(x)}
    assert ((found - x).flatten(1).abs().amax(1) > 0).all()


def test_a_network_without_gradient_is_still_attacked_at_random() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return SmallNet()(x).detach()

    x = images()
    found = Descent()(Target(Cut(), draws=1), x, torch.zeros(6, dtype=torch.long), Budget(0.1), seed=0)
    assert ((found - x).flatten(1).abs().amax(1) > 0.05).all()


@pytest.mark.parametrize("wrong", [{"loss": "dlr"}, {"rule": "adam"}, {"surrogate": "no"}, {"steps": 0}, {"length": 0}])
def test_refuses_unknown_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"loss|rule|surrogate|steps"):
        Descent(**wrong)
