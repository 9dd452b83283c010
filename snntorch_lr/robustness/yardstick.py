"""The input gradient by the likelihood ratio: unbiased without any surrogate, and so a yardstick for those that have one."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..convert import add_noise, noise_on, reset
from ..estimators import Vanilla
from ..network import noisy_neurons
from ..stream import mix
from .descent import margin
from .scoring import seeded
from .target import Target

UNMATCHED_SIGMA = 0.5
"""Noise level at which a network without noise is measured."""


@dataclass(frozen=True)
class Alignment:
    """How well two gradients agree.

    Attributes:
        cosine: of the surrogate gradient to the likelihood-ratio gradient, over all images at once, with the noise of
            the latter taken out; may exceed 1 by chance.
        repeatability: cosine between two independent halves of the likelihood-ratio gradient; near 0 nothing is resolved.
    """

    cosine: float
    repeatability: float


def likelihood_ratio_input_gradient(
    target: Target, images: Tensor, labels: Tensor, copies: int = 256, calls: int = 1, seed: int = 0
) -> Tensor:
    """Gradient of the expected margin loss with respect to the images, in their shape; no surrogate is involved.

    The noise of the neurons smooths the expectation; a network without noise is given some, in a copy. Too noisy to
    attack with.

    Args:
        target: the network and how it is read.
        images: ``[batch, channels, height, width]``.
        labels: ``[batch]``.
        copies: noise copies of each call.
        calls: of the estimator, over which the gradient is averaged.
        seed: of the noise.

    Raises:
        ValueError: if the network has no snnTorch neuron that can have noise.
    """
    reset(target.net)
    net = deepcopy(target.net).eval()
    if not noisy_neurons(net):
        add_noise(net, UNMATCHED_SIGMA)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return margin(_logits(net, target, x), y)

    total = torch.zeros_like(images)
    for call in range(calls):
        x = images.detach().clone().requires_grad_()
        with noise_on(net), seeded(mix(seed, call)):
            Vanilla(net, copies=copies, antithetic=True, seed=mix(seed, call)).backward(losses, x, labels)
        assert x.grad is not None
        total += x.grad
    # The estimator differentiates the mean loss of the batch.
    return total * len(images) / calls


def alignment(target: Target, images: Tensor, labels: Tensor, calls: int = 4, seed: int = 0) -> Alignment:
    """Cosine between the gradient that attacks follow, through the network's own surrogate, and the yardstick.

    The likelihood-ratio gradient is made twice, independently: the product of the halves is its squared norm without
    the part that is noise.
    """
    first, second = (
        likelihood_ratio_input_gradient(target, images, labels, calls=calls, seed=mix(seed, half)) for half in (1, 2)
    )
    x = images.detach().clone().requires_grad_()
    with seeded(seed):
        (surrogate,) = torch.autograd.grad(margin(target.view(seed=seed)(x), labels).sum(), x)
    power = (first * second).sum()
    repeatability = float(power / (first.norm() * second.norm()).clamp(min=1e-30))
    overlap = (surrogate * (first + second) / 2).sum()
    cosine = overlap / (power.clamp(min=1e-30).sqrt() * surrogate.norm().clamp(min=1e-30))
    return Alignment(float(cosine), repeatability)


def _logits(net: nn.Module, target: Target, images: Tensor) -> Tensor:
    """As the view reads them, but with as many rows as the estimator makes of the images."""
    reset(net)
    record: Tensor = net(images) if target.forward is None else target.forward(net, images)
    return target.scale * record.mean(0) if record.dim() == 3 else record
