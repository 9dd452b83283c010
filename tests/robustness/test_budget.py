from __future__ import annotations

import pytest
import torch

from snntorch_lr.robustness import Budget


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_and_projected_images_are_within(norm: str) -> None:
    budget, generator = Budget(0.3, norm), torch.Generator().manual_seed(0)
    clean = torch.rand(50, 1, 3, 3, generator=generator)
    for images in (
        budget.random(clean, generator),
        budget.project(clean + torch.randn(clean.shape, generator=generator), clean),
    ):
        sizes = budget.size(images, clean)
        assert (sizes <= 0.3 + 1e-6).all()
        assert (sizes > 0.1).any()
        assert 0 <= images.min() <= images.max() <= 1


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
