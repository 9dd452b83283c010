"""Natural corruptions at five severities: Gaussian and impulse noise, glass blur, contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Level = TypeVar("Level")
Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
"""From images ``[batch, channels, height, width]`` in [0, 1], a severity from 1 to 5 and a generator on their
device to corrupted images."""

_GAUSSIAN = (0.08, 0.12, 0.18, 0.26, 0.38)
_IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)
_GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)


def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise on each pixel, of standard deviation 0.08, 0.12, 0.18, 0.26, 0.38."""
    noise = torch.empty_like(images).normal_(generator=generator)
    return (images + _level(_GAUSSIAN, severity) * noise).clamp(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A share of 0.03, 0.06, 0.09, 0.17, 0.27 of the pixels turned black or white."""
    chance = torch.empty_like(images).uniform_(generator=generator)
    share = _level(_IMPULSE, severity)
    return torch.where(chance < share, (chance < share / 2).to(images), images)


def glass_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian blur, then pixels swapped with random neighbours, then blur again.

    Widths of the blur in pixels, largest distances of a swap and rounds of swaps: (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3),
    (1.1, 3, 2), (1.5, 4, 2).
    """
    width, reach, rounds = _level(_GLASS, severity)
    batch, _, height, full = images.shape
    blurred, rows = _blur(images, width), torch.arange(batch, device=images.device)
    for _ in range(rounds):
        shape = (2, height, full, batch)
        offsets = torch.randint(-reach, reach + 1, shape, generator=generator, device=images.device)
        for i in range(height):
            for j in range(full):
                other_i = (i + offsets[0, i, j]).clamp(0, height - 1)
                other_j = (j + offsets[1, i, j]).clamp(0, full - 1)
                here, there = blurred[:, :, i, j].clone(), blurred[rows, :, other_i, other_j]
                blurred[:, :, i, j] = there
                blurred[rows, :, other_i, other_j] = here
    return _blur(blurred, width).clamp(0, 1)


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Distance of each pixel from the mean of its image's channel, times 0.4, 0.3, 0.2, 0.1, 0.05."""
    mean = images.mean((2, 3), keepdim=True)
    return ((images - mean) * _level(_CONTRAST, severity) + mean).clamp(0, 1)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": gaussian_noise,
    "impulse noise": impulse_noise,
    "glass blur": glass_blur,
    "contrast": contrast,
}
"""Corruptions by name, with the severities of MNIST-C.

Source: Hendrycks & Dietterich (2019), "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations";
Mu & Gilmer (2019), "MNIST-C: A Robustness Benchmark for Computer Vision".
"""


def _level(levels: Sequence[Level], severity: int) -> Level:
    if not 1 <= severity <= len(levels):
        raise ValueError(f"severity must be from 1 to {len(levels)}, got {severity}")
    return levels[severity - 1]


def _blur(images: Tensor, width: float) -> Tensor:
    """Gaussian blur, with the border pixels repeated outwards."""
    radius = int(4 * width + 0.5)
    positions = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-((positions / width) ** 2) / 2)
    kernel = (kernel / kernel.sum()).repeat(images.shape[1], 1, 1, 1)
    padded = F.pad(images, [radius] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=images.shape[1])
