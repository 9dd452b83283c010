"""Whether a network's own gradient points where the likelihood-ratio gradient does, which has no surrogate."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..convert import add_noise
from ..network import noisy_neurons, reset
from ..noise_stream import mix
from .descent import margin
from .input_gradient import likelihood_ratio_input_gradient
from .scoring import seeded
from .target import Target

TINY = 1e-30
UNMATCHED_SIGMA = 0.5
"""Noise level at which a network without noise is measured."""


@dataclass(frozen=True)
class Alignment:
    """How well two gradients agree.

    Attributes:
        cosine: of the surrogate gradient to the likelihood-ratio gradient, over all images at once, with the noise of
            the latter taken out; may exceed 1 by chance.
        repeatability: cosine between two independent halves of the likelihood-ratio gradient; near 0 nothing is.
    """

    cosine: float
    repeatability: float


def alignment(target: Target, images: Tensor, labels: Tensor, copies: int = 256, seed: int = 0) -> Alignment:
    """Compares the gradient that attacks follow, through the network's own surrogate, with one that needs none.

    The likelihood-ratio gradient is that of the expected margin over the noise of the neurons; a copy of a network
    without noise is given some. It is made twice, independently: the product of the halves is its squared norm without
    the part that is noise.

    Args:
        target: the network and how it is read.
        images: ``[batch, channels, height, width]``, on the network's device.
        labels: ``[batch]``.
        copies: noise draws of each half.
        seed: of the noise.

    Raises:
        ValueError: if the network has no likelihood-ratio gradient.
    """
    noisy = target
    if not noisy_neurons(target.net):
        reset(target.net)
        noisy = replace(target, net=add_noise(deepcopy(target.net), UNMATCHED_SIGMA))
    first, second = (
        likelihood_ratio_input_gradient(noisy, images, labels, copies, "margin", mix(seed, half)) for half in (1, 2)
    )
    x = images.detach().clone().requires_grad_()
    with seeded(seed):
        (surrogate,) = torch.autograd.grad(margin(target.view(seed=seed)(x), labels).sum(), x)
    power = (first * second).sum()
    overlap = (surrogate * (first + second) / 2).sum()
    cosine = overlap / (power.clamp(min=TINY).sqrt() * surrogate.norm()).clamp(min=TINY)
    repeatability = power / (first.norm() * second.norm()).clamp(min=TINY)
    return Alignment(float(cosine), float(repeatability))
