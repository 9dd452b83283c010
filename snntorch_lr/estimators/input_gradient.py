"""Gradient of the expected loss with respect to the input, through no surrogate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import positive_integer
from ..network import parameters
from ..noise_stream import mix
from . import ESTIMATORS
from .base import LossFn


def input_gradient(
    net: nn.Module,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Any,
    copies: int = 32,
    chunk: int = 8,
    estimator: str = "counterfactual",
    kept: dict[int, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Gradient of each sample's expected loss with respect to its input: for attacks that no surrogate masks.

    The estimator that trains the weights finds it too: ∂E[ℒ]/∂input is what comes back through the block in front of
    the first noisy layer. Nothing else gets a gradient.

    Args:
        net: the network; its noise must be on (``net.train()``, or ``noise_on(net)``).
        loss_fn: forward pass and loss, called as ``loss_fn(inputs, targets)``; returns one loss per sample.
        inputs: floating point, in the shape that ``loss_fn`` takes.
        targets: batch first, as ``Estimator.backward`` takes them.
        copies: noise copies of each sample; the standard error falls with their root.
        chunk: copies in one forward pass. λ is fitted from one to the next.
        estimator: ``"counterfactual"``, or ``"vanilla"`` for networks that it refuses, at many times the variance.
        kept: an empty dictionary, for calls that follow with the same network and loss and another seed: estimators
            stay in it, and what only a first call looks for is not looked for again.
        **options: further arguments of the estimator (``over_time=``, ``seed=``, ...).

    Returns:
        In the shape of the inputs.

    Raises:
        TypeError: if the inputs are not a floating-point tensor.
        ValueError: if the network or the losses would make the gradient wrong, or do not depend on the inputs.

    Examples:
        >>> gradient = slr.input_gradient(net, loss_fn, images, labels)
        >>> adversarial = (images + 0.1 * gradient.sign()).clamp(0, 1)
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor to have a gradient, got {kind}")
    positive_integer("copies", copies)
    chunk = min(positive_integer("chunk", chunk), copies)
    x = inputs.detach().clone().requires_grad_()
    samples = 0

    def counted(x: Any, y: Any) -> Tensor:
        nonlocal samples
        losses = loss_fn(x, y)
        samples = losses.shape[0] if isinstance(losses, Tensor) and losses.dim() else 0
        return losses

    total = torch.zeros_like(x)
    made = {} if kept is None else kept
    for count, each in made.items():
        each.reseed(mix(options["seed"], count))
    with _frozen(net):
        for done in range(0, copies, chunk):
            count = min(chunk, copies - done)
            if count not in made:
                given = {"seed": mix(options["seed"], count)} if options.get("seed") is not None else {}
                made[count] = ESTIMATORS[estimator](net, copies=count, **options | given)
            made[count].backward(counted, x, targets)
            if x.grad is None:
                raise ValueError("the losses do not depend on the inputs: does loss_fn use the inputs passed to it?")
            # The estimators differentiate the mean over all losses.
            total += x.grad * samples
            x.grad = None
    return total / copies


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
