"""Gradients of the expected loss with respect to the images: without a surrogate, as a yardstick, and through one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..convert import noise_on, reset
from ..estimators import Vanilla
from ..network import noisy_neurons, parameters
from .descent import LOSSES
from .surrogates import Surrogate
from .target import Target
from .view import AttackableView, evaluating


class _Shifted(nn.Module):
    """A network as a function of a shift of its images, which an estimator takes for a parameter."""

    def __init__(self, view: AttackableView, images: Tensor) -> None:
        super().__init__()
        self.view = view
        self.shift = nn.Parameter(torch.zeros_like(images))

    def losses(self, loss: str, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of each sample and copy."""
        net = self.view.net
        reset(net)
        return LOSSES[loss](self.view.read(self.view.net_forward(net, images + self.shift)), labels)


def likelihood_ratio_input_gradient(
    target: Target, x: Tensor, y: Tensor, copies: int = 256, loss: str = "cross-entropy", seed: int = 0, chunk: int = 64
) -> Tensor:
    """Gradient of the expected loss of one noise draw by the likelihood ratio: unbiased, and without a surrogate.

    For noise in the first layer, c_t = W x + σ z_t, it is E[(ℒ − b) Wᵀ Σ_t z_t / σ]; the estimator that trains finds it
    for any network that it can train. Too noisy to attack with, it is the yardstick for surrogates: those of a masked
    network do not point its way.

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
    if not noisy_neurons(target.net):
        raise ValueError("the likelihood-ratio gradient needs noisy neurons; this network has none")
    shifted = _Shifted(target.view(draws=1), x)
    estimator = Vanilla(shifted, copies=copies, chunk=min(chunk, copies), seed=seed)
    with _frozen(target.net), evaluating(target.net), noise_on(target.net):
        estimator.backward(partial(shifted.losses, loss), x, y)
        reset(target.net)
    assert shifted.shift.grad is not None
    return shifted.shift.grad * len(x)


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


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Context in which the network has no parameters to learn, so that their gradients are left alone."""
    learned = [parameter for parameter in parameters(net) if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
