from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter

from snntorch_lr.robustness import CORRUPTIONS
from snntorch_lr.robustness.corruptions import _blur, contrast, gaussian_noise, glass_blur, impulse_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = torch.rand(3, 2, 12, 12, generator=generator(9))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stay_in_range_and_get_worse(name: str) -> None:
    before, distances = X.clone(), []
    for severity in range(1, 6):
        corrupted = CORRUPTIONS[name](X, severity, generator())
        assert corrupted.shape == X.shape
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        torch.testing.assert_close(CORRUPTIONS[name](X, severity, generator()), corrupted, rtol=0, atol=0)
        distances.append((corrupted - X).square().mean().item())
    assert torch.equal(before, X)
    assert distances[0] < distances[2] < distances[4]


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "contrast"])
def test_depend_on_the_generator_alone(name: str) -> None:
    first, second = (CORRUPTIONS[name](X, 3, generator(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("severity", "deviation", "share", "factor"), [
    (1, 0.08, 0.03, 0.4), (2, 0.12, 0.06, 0.3), (3, 0.18, 0.09, 0.2), (4, 0.26, 0.17, 0.1), (5, 0.38, 0.27, 0.05),
])  # fmt: skip
def test_severities(severity: int, deviation: float, share: float, factor: float) -> None:
    grey = torch.full((20, 1, 50, 50), 0.5)
    # Clipping leaves the central two thirds of a normal distribution as they are.
    noise = (gaussian_noise(grey, severity, generator()) - 0.5).abs().flatten().quantile(0.5).item()
    assert noise == pytest.approx(0.6745 * deviation, rel=0.02)
    impulses = impulse_noise(grey, severity, generator())
    assert (impulses != 0.5).float().mean().item() == pytest.approx(share, rel=0.05)
    assert impulses[impulses != 0.5].mean().item() == pytest.approx(0.5, abs=0.03)
    flat = contrast(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), severity, generator()).flatten().tolist()
    assert flat == pytest.approx([0.5 - factor / 2, 0.5 + factor / 2])


def test_blur_is_that_of_scipy() -> None:
    expected = gaussian_filter(X[0, 1].double().numpy(), 1.1, mode="nearest", truncate=4)
    torch.testing.assert_close(_blur(X.double(), 1.1)[0, 1], torch.from_numpy(expected))


def test_glass_swaps_pixels_within_its_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snntorch_lr.robustness.corruptions._blur", lambda images, width: images.clone())
    swapped = glass_blur(X, 2, generator())
    torch.testing.assert_close(swapped.flatten(2).sort(2).values, X.flatten(2).sort(2).values)
    dot = torch.zeros(64, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    # One round, each swap reaches two pixels; later swaps can carry a pixel on.
    moved = glass_blur(dot, 2, generator()).mean(0)[0]
    assert moved[4, 4] < 0.5
    assert moved[2:7, 2:7].sum() > 0.6


@pytest.mark.parametrize("severity", [0, 6])
def test_refuses_other_severities(severity: int) -> None:
    with pytest.raises(ValueError, match="severity must be from 1 to 5"):
        gaussian_noise(X, severity, generator())
