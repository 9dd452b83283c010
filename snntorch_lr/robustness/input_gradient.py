"""Gradients of the expected loss with respect to the images: without a surrogate, as a yardstick, and through one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..convert import noise_on
from ..estimators.input_gradient import input_gradient
from ..network import noisy_neurons, reset
from .descent import LOSSES
from .surrogates import Surrogate
from .target import Target
from .view import evaluating


def likelihood_ratio_input_gradient(
    target: Target, x: Tensor, y: Tensor, copies: int = 256, loss: str = "cross-entropy", seed: int = 0, chunk: int = 64
) -> Tensor:
    """Gradient of the expected loss of one noise draw by the likelihood ratio: without a surrogate.

    By counterfactual credit (``slr.input_gradient``) with λ = 0, or by ``vanilla`` for networks with LSTM cells or
    inhibition. It is the yardstick for surrogates: those of a masked network do not point its way.

    Args:
        target: a network with noise in its first spiking layer.
        x: images ``[batch, ...]``.
        y: labels ``[batch]``.
        copies: noise draws of each image; the standard error falls with their root.
        loss: ``"cross-entropy"`` or ``"margin"``.
        seed: of the noise; two seeds make two independent estimates.
        chunk: draws in one forward pass.

    Returns:
        Gradient of the loss of each image with respect to it, in the shape of x.

    Raises:
        ValueError: if no neuron has noise, or the network cannot be trained by the likelihood ratio.
    """
    neurons = noisy_neurons(target.net)
    if not neurons:
        raise ValueError("the likelihood-ratio gradient needs noisy neurons; this network has none")
    view = target.view(draws=1)

    def losses(images: Tensor, labels: Tensor) -> Tensor:
        reset(target.net)
        return LOSSES[loss](view.read(view.net_forward(target.net, images)), labels)

    alone = all(neuron.is_elementwise and not neuron.inhibition for neuron in neurons.values())
    # λ = 0: a yardstick is better off with more noise than with an error of second order.
    options: dict[str, Any] = {"control": 0.0} if alone else {"estimator": "vanilla"}
    with evaluating(target.net), noise_on(target.net):
        found = input_gradient(target.net, losses, x, y, copies, chunk, seed=seed, **options)
        reset(target.net)
    return found


def surrogate_input_gradient(
    target: Target,
    x: Tensor,
    y: Tensor,
    surrogate: str | Surrogate | None = None,
    draws: int = 256,
    loss: str = "cross-entropy",
    seed: int = 0,
    chunk: int = 64,
) -> Tensor:
    """Gradient of the same expected loss of one noise draw through a surrogate.

    Attacks follow the gradient of the loss of the mean logits instead; this is what compares with the likelihood ratio.

    Args:
        target: the network.
        x: images ``[batch, ...]``.
        y: labels ``[batch]``.
        surrogate: as ``make_surrogate`` takes it; by default that of the network.
        draws: noise draws of each image.
        loss: ``"cross-entropy"`` or ``"margin"``.
        seed: of the noise.
        chunk: draws in one forward pass.

    Returns:
        Gradient of the loss of each image with respect to it, in the shape of x.
    """
    view = target.view(draws=1, surrogate=surrogate, seed=seed)
    total = torch.zeros_like(x)
    for done in range(0, draws, chunk):
        copies = min(chunk, draws - done)
        rows = x.repeat(copies, *[1] * (x.dim() - 1)).requires_grad_()
        (gradient,) = torch.autograd.grad(LOSSES[loss](view(rows), y.repeat(copies)).sum(), rows)
        total += gradient.view(copies, *x.shape).sum(0)
    return total / draws
