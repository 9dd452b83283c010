from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.robustness import (
    SUITES,
    Attack,
    Budget,
    Descent,
    Procedure,
    Target,
    gradient_attack,
    perturb,
    score,
    suite,
    worst_of,
)
from snntorch_lr.robustness.attacks import Best, StableAdaptiveSteps
from snntorch_lr.robustness.scoring import margin
from snntorch_lr.robustness.suites import AutoPgd

from . import canaries
from .networks import SmallNet, counted, images, predictions

EVERY = {(attack.name, attack.needs_torchattacks): attack for members in SUITES.values() for attack in members}
BUDGETS = {"linf": Budget(0.1), "l2": Budget(0.4, "l2")}


def quicker(attack: Attack) -> Attack:
    """The same attack with few steps and queries."""
    run: Any = attack.run
    for name, few in (("steps", 3), ("queries", 5)):
        if hasattr(run, name):
            run = replace(run, **{name: few})
    if "steps" in getattr(run, "options", {}):
        run = replace(run, options={**run.options, "steps": 3})
    if hasattr(run, "descent"):
        run = replace(run, descent=Descent(steps=3))
    return replace(attack, run=run)


@pytest.fixture
def target() -> Target:
    return Target(slr.add_noise(SmallNet(), sigma=0.3), draws=2, sources={"plain": Target(SmallNet(), draws=1)})


@pytest.mark.parametrize("key", EVERY, ids=[f"{name}-{'library' if library else 'own'}" for name, library in EVERY])
@pytest.mark.parametrize("norm", BUDGETS)
def test_every_attack_stays_within_its_budget_and_restores_no_image(
    target: Target, key: tuple[str, bool], norm: str
) -> None:
    attack, budget, x = quicker(EVERY[key]), BUDGETS[norm], images()
    assert {"library"} | set(vars(attack.run)) == set(json.loads(json.dumps(dict(attack.settings))))
    if norm not in attack.norms:
        with pytest.raises(ValueError, match="no l2 version"):
            perturb(attack, target, x, predictions(target.net, x), budget, seed=0)
        return
    before = torch.random.get_rng_state()
    adversarial = perturb(attack, target, x, predictions(target.net, x), budget, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not adversarial.requires_grad
    sizes = budget.size(adversarial, x)
    assert (sizes > 0.5 * budget.epsilon).all()
    assert (sizes <= budget.epsilon + 1e-5).all()
    again = perturb(attack, target, x, predictions(target.net, x), budget, seed=0)
    torch.testing.assert_close(again, adversarial, rtol=0, atol=0)


def test_transfer_needs_sources(target: Target) -> None:
    transfer, x, y = suite(["transfer"])[0], images(), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"transfer needs other networks .*baselines"):
        perturb(transfer, Target(target.net), x, y, Budget(0.1), seed=0)
    with pytest.raises(ValueError, match="give the target sources"):
        transfer.run(Target(target.net), x, y, Budget(0.1), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x + 0.2).clamp(0, 1), "left its budget"),
        (lambda x: x - 0.05, r"outside \[0, 1\]"),
        (lambda x: x * torch.nan, "not finite"),
        (lambda x: x[:2], "shape"),
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_that_cheats_is_an_error(target: Target, change: Any, message: str, norm: str) -> None:
    x = images()
    x[:, 0, 0, 0] = 0
    spoiled = Attack("mine", lambda target, x, y, budget, seed: change(x), {}, "white-box", ("linf", "l2"))
    with pytest.raises(RuntimeError, match=f"mine .*{message}"):
        perturb(spoiled, target, x, torch.zeros(6, dtype=torch.long), Budget(0.1, norm), seed=0)


def test_library_and_own_attack_agree() -> None:
    net, x = SmallNet(), images()
    target, y = Target(net, draws=1), predictions(net, x)
    own, library = (perturb(EVERY["FGSM", which], target, x, y, Budget(0.1), seed=0) for which in (False, True))
    torch.testing.assert_close(own, library)


def test_apgd_returns_its_best_iterate_where_it_fails(target: Target) -> None:
    x, tiny = images(), Budget(1e-4)
    y = predictions(target.net, x)
    adversarial = perturb(Attack("APGD", AutoPgd(steps=3), {}, "white-box"), target, x, y, tiny, seed=0)
    assert torch.equal(predictions(target.net, adversarial), y)
    assert (tiny.size(adversarial, x) > 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_and_projected_images_are_within(norm: str) -> None:
    budget, generator = Budget(0.3, norm), torch.Generator().manual_seed(0)
    clean = torch.rand(50, 1, 3, 3, generator=generator)
    far = clean + torch.randn(clean.shape, generator=generator)
    for moved in budget.random(clean, generator), budget.project(far, clean):
        sizes = budget.size(moved, clean)
        assert (sizes <= 0.3 + 1e-6).all()
        assert (sizes > 0.1).any()
        assert 0 <= moved.min() <= moved.max() <= 1
    near = clean + 0.05 * (moved - clean)
    torch.testing.assert_close(budget.project(near, clean), near)


def test_projections_and_steepest_directions_by_hand() -> None:
    clean = torch.full((1, 1, 1, 2), 0.5)
    far = clean + torch.tensor([0.3, -0.4]).view_as(clean)
    torch.testing.assert_close(Budget(0.1, "l2").project(far, clean).flatten(), torch.tensor([0.56, 0.42]))
    torch.testing.assert_close(Budget(0.1).project(far, clean).flatten(), torch.tensor([0.6, 0.4]))
    gradient = torch.tensor([[3.0, 0.0, -4.0]])
    assert Budget(0.4).steepest(gradient).tolist() == [[1, 0, -1]]
    assert Budget(2.0, "l2").steepest(gradient).tolist() == [pytest.approx([0.6, 0, -0.8])]
    assert Budget(2.0, "l2").steepest(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_random_directions_fill_the_ball() -> None:
    """In two dimensions a quarter of the points lies within half the radius."""
    clean, budget = torch.full((4000, 1, 1, 2), 0.5), Budget(0.2, "l2")
    sizes = budget.size(budget.random(clean, torch.Generator().manual_seed(0)), clean)
    assert (sizes < 0.1).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("epsilon", "norm"), [(0.0, "linf"), (-1.0, "l2"), (float("nan"), "l2"), (0.1, "l1")])
def test_refuses_what_is_no_budget(epsilon: float, norm: str) -> None:
    with pytest.raises(ValueError, match=r"epsilon|norm"):
        Budget(epsilon, norm)


def test_sa_pgd_by_hand() -> None:
    """One image of two pixels, η = 1, gradients (3, 1) then (−1, 1)."""
    steps = StableAdaptiveSteps(1.0, steps=100)
    # mean|g| = 2, mean g² = 5: m = (1.5, .5), v = (1.8, .2); m/√v = (1.118, 1.118), clipped to 1.
    assert steps(torch.tensor([[3.0, 1.0]])).tolist() == [pytest.approx([1.0, 1.0])]
    # m = (.75 − 1, .25 + 1), v = (1.44 + 1, .16 + 1).
    assert steps(torch.tensor([[-1.0, 1.0]])).tolist() == [pytest.approx([-0.25 / math.sqrt(2.44), 1.0])]
    # S = 100: halved after 22 steps, then 19, 16, 13, 10, 7, 6, 6 more.
    steps, lengths = StableAdaptiveSteps(1.0, steps=100), [1.0]
    for _ in range(100):
        steps(torch.ones(1, 2))
        lengths.append(steps.length)
    assert [index for index in range(100) if lengths[index + 1] < lengths[index]] == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e25])
def test_sa_pgd_stands_gradients_that_vanish_or_explode(size: float) -> None:
    steps, gradient = StableAdaptiveSteps(1.0, steps=10), torch.tensor([[1.0, -2.0], [0.0, 0.0]]) * size
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


def test_the_counterfactual_gradient_sees_through_a_masked_surrogate() -> None:
    images, labels = canaries.digits(24)
    target, budget = Target(canaries.with_zero_gradient(), draws=8), Budget(0.15)
    right = {}
    for surrogate in ("training", "counterfactual"):
        adversarial = Descent(surrogate, "margin", steps=10)(target, images, labels, budget, seed=0)
        right[surrogate] = score(target, adversarial, labels).right.double().mean()
    clean = score(target, images, labels).right.double().mean()
    assert right["training"] > 0.8 * clean
    assert right["counterfactual"] < 0.2 * clean


class Linear(nn.Module):
    """Two pixels to two logits."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ torch.tensor([[0.0, 0.0], [-1.0, -3.0]]).T


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
@pytest.mark.parametrize(
    ("norm", "corner"), [("linf", [0.4, 0.4]), ("l2", [0.5 - 0.1 / math.sqrt(10), 0.5 - 0.3 / math.sqrt(10)])]
)
def test_finds_the_worst_point_of_a_linear_network(loss: str, norm: str, corner: list[float]) -> None:
    x, descent = torch.full((1, 1, 1, 2), 0.5), Descent(loss=loss, steps=40)
    worst = descent(Target(Linear(), draws=1), x, torch.tensor([0]), Budget(0.1, norm), seed=3)
    torch.testing.assert_close(worst.flatten(), torch.tensor(corner), atol=2e-3, rtol=0)


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
    assert margin(torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, 5.0]]), torch.tensor([0, 1])).tolist() == [-1.0, 6.0]


def test_averages_over_draws_and_never_returns_the_clean_image() -> None:
    net, x, rows = slr.add_noise(SmallNet(), sigma=0.5), images(), []
    target = Target(net, forward=counted(rows), draws=2)
    adversarial = Descent(steps=2, draws=3)(target, x, predictions(net, x), Budget(0.1), seed=0)
    assert set(rows) == {3 * len(x)}
    rows.clear()
    attack = gradient_attack("mine", Descent(steps=1, draws=4))
    assert perturb(attack, target, x, predictions(net, x), Budget(0.1), seed=0, rows=8).shape == x.shape
    assert max(rows) == 8
    assert ((adversarial - x).flatten(1).abs().amax(1) > 0).all()


def test_a_network_without_gradient_is_still_attacked_at_random() -> None:
    x, cut = images(), Target(SmallNet(), lambda net, images: net(images).detach(), draws=1)
    adversarial = Descent()(cut, x, torch.zeros(6, dtype=torch.long), Budget(0.1), seed=0)
    assert ((adversarial - x).flatten(1).abs().amax(1) > 0.05).all()


@pytest.mark.parametrize(
    "wrong",
    [{"loss": "dlr"}, {"rule": "adam"}, {"surrogate": "no"}, {"steps": 0}, {"length": 0},
     {"surrogate": "counterfactual", "targets": 3}],
)  # fmt: skip
def test_refuses_unknown_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"loss|rule|surrogate|steps|targets"):
        Descent(**wrong)


def test_suites_are_what_the_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [attack.name for attack in suite("quick")] == ["FGSM", "PGD-20"]
    assert [attack.name for attack in suite("paper")] == ["FGSM", "RFGSM", "PGD", "MIFGSM"]
    assert not any(attack.needs_torchattacks for attack in suite("quick"))
    assert all(attack.needs_torchattacks for attack in suite("paper"))
    own = gradient_attack("mine", Descent(steps=2))
    assert suite(["FGSM", own]) == (SUITES["quick"][0], own)
    assert suite(["quick", "Square"])[-1].name == "Square"
    for wrong, message in (["PGDD"], "unknown attack"), ([], "no attack"), (["FGSM"] * 2, "FGSM"):
        with pytest.raises(ValueError, match=message):
            suite(wrong)
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ImportError, match=r"pip install 'snntorch-lr\[attacks\]'"):
        suite("paper")
    assert suite("quick")


def test_a_procedure_of_ones_own_returns_the_worst_of_its_candidates() -> None:
    @dataclass(frozen=True)
    class Shift(Procedure):
        levels: int = 3

        def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
            shifts = torch.linspace(-budget.epsilon, budget.epsilon, self.levels)
            return worst_of((budget.project(x + shift, x) for shift in shifts), target.view(seed=seed), x, y)

    attack, x = Shift().named("shift"), torch.full((1, 1, 1, 2), 0.5)
    assert (attack.settings, attack.access) == ({"library": "snntorch_lr", "levels": 3}, "black-box")
    adversarial = perturb(attack, Target(Linear(), draws=1), x, torch.tensor([0]), Budget(0.1, "linf"), seed=0)
    torch.testing.assert_close(adversarial, x - 0.1)
