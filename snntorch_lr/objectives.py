"""Losses per sample, beside torch's own, that the likelihood ratio can minimise: it never differentiates a spike.

Logits are ``[batch, classes]``, targets class indices ``[batch]``, losses ``[batch]``. Spikes are
``[time, rows, ...]``, as ``torch.stack`` of all time steps; limits are in spikes per neuron and time step.

``loss_fn`` may return any of them. Backpropagation gets stuck on ``true_class``, whose gradient vanishes for samples
that are confidently wrong, and gets no gradient from ``zero_one``. A term that is added to a loss, such as a limit of
the spike rate, must be one number per row too, as ``rate_above`` is: ``Vanilla`` refuses terms over the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def true_class(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the softmax probability of the true class: the expected error of a prediction drawn from it.

    Examples:
        >>> true_class(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.7500])
    """
    return 1 - logits.softmax(1).gather(1, targets[:, None])[:, 0]


def zero_one(logits: Tensor, targets: Tensor) -> Tensor:
    """The 0-1 loss: 1 where the prediction is wrong.

    It has no gradient: only weights in front of a noisy neuron learn by it, so let the network end in noisy neurons.

    Examples:
        >>> zero_one(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor([1., 0.])
    """
    return (logits.argmax(1) != targets).to(logits.dtype)


def clipped_margin(logits: Tensor, targets: Tensor, margin: float = 1.0) -> Tensor:
    """The hinge loss of the margin to the best wrong class, clipped so that no outlier counts more than an error.

    It is ``(margin − lead) / (2 margin)`` clipped to [0, 1]; ``margin`` is positive, in units of the logits.

    Examples:
        >>> clipped_margin(torch.tensor([[0.0, 0.5]]), torch.tensor([1]))
        tensor([0.2500])
    """
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}")
    right = F.one_hot(targets, logits.shape[1]).bool()
    lead = logits[right] - logits.masked_fill(right, -torch.inf).amax(1)
    return ((margin - lead) / (2 * margin)).clamp(0, 1)


def spike_rate(spikes: Tensor) -> Tensor:
    """Spike rate of each row, the mean over time and neurons ``[rows]``: for regularisers that couple no rows.

    Examples:
        >>> spike_rate(torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]]))
        tensor([0.7500, 0.2500])
    """
    if spikes.dim() < 3:
        raise ValueError(
            f"spikes must be [time, rows, neurons...], got shape {tuple(spikes.shape)}: torch.stack the steps"
        )
    return spikes.transpose(0, 1).flatten(1).mean(1)


def rate_above(spikes: Tensor, limit: float) -> Tensor:
    """By how much the rate of each row exceeds a limit, to be added to the losses of the rows.

    Examples:
        >>> rate_above(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), 0.2)
        tensor([0.3000, 0.0000])
    """
    return (spike_rate(spikes) - limit).clamp(min=0)
