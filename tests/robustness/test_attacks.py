from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr
from snntorch_lr.robustness import SUITES, Attack, Budget, Descent, Target, gradient_attack, perturb, suite
from snntorch_lr.robustness.suites import AutoPgd

from .networks import SmallNet, images, predictions

EVERY = {(attack.name, attack.needs_torchattacks): attack for members in SUITES.values() for attack in members}
BUDGETS = {"linf": Budget(0.1), "l2": Budget(0.4, "l2")}


def quicker(attack: Attack) -> Attack:
    """The same attack with few steps, samples and queries."""
    run: Any = attack.run
    for name, few in (("steps", 3), ("samples", 4), ("queries", 5)):
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


def spoiled(change: Any) -> Attack:
    def run(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        result: Tensor = change(x)
        return result

    return Attack("mine", run, {}, "white-box", ("linf", "l2"))


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
    with pytest.raises(RuntimeError, match=f"mine .*{message}"):
        perturb(spoiled(change), target, x, torch.zeros(6, dtype=torch.long), Budget(0.1, norm), seed=0)


def test_chunks_bound_the_rows_of_a_forward_pass(target: Target) -> None:
    rows: list[int] = []

    def forward(net: Any, x: Tensor) -> Tensor:
        rows.append(len(x))
        logits: Tensor = net(x)
        return logits

    x = images(10)
    bounded = Target(target.net, forward=forward, draws=2)
    attack = gradient_attack("mine", Descent(steps=1, draws=4))
    assert perturb(attack, bounded, x, predictions(target.net, x), Budget(0.1), seed=0, rows=8).shape == x.shape
    assert max(rows) == 8


def test_library_and_own_attack_agree() -> None:
    net, x = SmallNet(), images()
    target, y = Target(net, draws=1), predictions(net, x)
    own, library = (
        perturb(attack, target, x, y, Budget(0.1), seed=0) for attack in (EVERY["FGSM", False], EVERY["FGSM", True])
    )
    torch.testing.assert_close(own, library)


def test_apgd_returns_its_best_iterate_where_it_fails(target: Target) -> None:
    x = images()
    y = predictions(target.net, x)
    tiny = Budget(1e-4)
    adversarial = perturb(Attack("APGD", AutoPgd(steps=3), {}, "white-box"), target, x, y, tiny, seed=0)
    assert torch.equal(predictions(target.net, adversarial), y)
    assert (tiny.size(adversarial, x) > 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_and_projected_images_are_within(norm: str) -> None:
    budget, generator = Budget(0.3, norm), torch.Generator().manual_seed(0)
    clean = torch.rand(50, 1, 3, 3, generator=generator)
    for moved in (
        budget.random(clean, generator),
        budget.project(clean + torch.randn(clean.shape, generator=generator), clean),
    ):
        sizes = budget.size(moved, clean)
        assert (sizes <= 0.3 + 1e-6).all()
        assert (sizes > 0.1).any()
        assert 0 <= moved.min() <= moved.max() <= 1


def test_what_is_within_stays() -> None:
    clean = torch.full((1, 1, 1, 2), 0.5)
    near = clean + torch.tensor([0.03, -0.04]).view_as(clean)
    for norm in ("linf", "l2"):
        torch.testing.assert_close(Budget(0.1, norm).project(near, clean), near)
        torch.testing.assert_close(Budget(0.1, norm).project(clean, clean), clean)
    far = clean + torch.tensor([0.3, -0.4]).view_as(clean)
    torch.testing.assert_close(Budget(0.1, "l2").project(far, clean).flatten(), torch.tensor([0.56, 0.42]))
    torch.testing.assert_close(Budget(0.1).project(far, clean).flatten(), torch.tensor([0.6, 0.4]))


def test_random_directions_fill_the_ball() -> None:
    """In two dimensions a quarter of the points lies within half the radius."""
    clean = torch.full((4000, 1, 1, 2), 0.5)
    sizes = Budget(0.2, "l2").size(
        Budget(0.2, "l2").random(clean, torch.Generator().manual_seed(0)), clean
    )  # fmt: skip
    assert (sizes < 0.1).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("epsilon", "norm"), [(0.0, "linf"), (-1.0, "l2"), (float("nan"), "l2"), (0.1, "l1")])
def test_refuses_what_is_no_budget(epsilon: float, norm: str) -> None:
    with pytest.raises(ValueError, match=r"epsilon|norm"):
        Budget(epsilon, norm)


def test_steepest_directions_by_hand() -> None:
    gradient = torch.tensor([[3.0, 0.0, -4.0]])
    assert Budget(0.4).steepest(gradient).tolist() == [[1, 0, -1]]
    assert Budget(2.0, "l2").steepest(gradient).tolist() == [pytest.approx([0.6, 0, -0.8])]
    assert Budget(2.0, "l2").steepest(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]
