"""Losses per sample, beside torch's own, that the likelihood ratio can minimise: it never differentiates a spike.

Logits are ``[batch, classes]``, targets class indices ``[batch]``, losses ``[batch]``. Spikes are
``[time, rows, ...]``, as ``torch.stack`` of all time steps; limits are in spikes per neuron and time step.

``loss_fn`` may return any of them. Backpropagation gets stuck on the first, whose gradient vanishes for samples that
are confidently wrong, and gets no gradient at all from the second. What is to be added to a loss, such as a limit of
the spike rate, must be one number per row too, as ``rate_above`` is: terms over the whole batch are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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

    It has no gradient: whatever is learned by it must come before a noisy neuron, the readout's weights included.

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


def vote(logits: Tensor, targets: Tensor, draws: int) -> Tensor:
    """The 0-1 loss of a majority: 1 where the class with the most of a few predictions is wrong.

    Each image is there ``draws`` times in a row, ``images.repeat_interleave(draws, 0)``, each with noise of its own:
    the likelihood ratio then minimises the error of the vote. Its gradient is that of the mean error,
    divided by ``draws``: the loss of a row meets the score of that row alone. Of tied classes the first is elected.

    Examples:
        >>> vote(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 0]), draws=3)
        tensor([1., 1., 1.])
    """
    if draws < 1 or len(logits) % draws:
        raise ValueError(f"{len(logits)} rows cannot be votes of {draws} draws each: repeat_interleave the images")
    ballots = F.one_hot(logits.argmax(1), logits.shape[1]).view(-1, draws, logits.shape[1])
    elected = ballots.sum(1).argmax(1).repeat_interleave(draws)
    return (elected != targets).to(logits.dtype)


def spike_rate(spikes: Tensor) -> Tensor:
    """Mean over time and neurons, one number per row: for regularisers that couple no rows.

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


def rate_below(spikes: Tensor, limit: float) -> Tensor:
    """By how much the rate of each row falls short of a limit; the counterpart of ``rate_above``.

    Examples:
        >>> rate_below(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), 0.2)
        tensor([0.0000, 0.2000])
    """
    return (limit - spike_rate(spikes)).clamp(min=0)


def sensitivity(mem: Tensor, threshold: float | Tensor, sigma: float | Tensor) -> Tensor:
    """Sensitivity of a layer to its input: the mean of φ(z) / σ, z = (membrane − threshold) / σ, to be penalised.

    It is the slope of the probability of a spike under Gaussian noise: by how much a small change of the current
    changes the spikes. As a term of a loss it needs no gradient from later layers, and goes back through the membrane
    potential it is given.

    Args:
        mem: membrane potentials, ``[time, rows, ...]``.
        threshold: of the neurons.
        sigma: noise level, or the width within which an attack may move the membrane potential.

    Returns:
        Positive, ``[rows]``.

    Examples:
        >>> sensitivity(torch.tensor([[[1.0, 9.0]]]), threshold=1.0, sigma=0.5)
        tensor([0.3989])

    Source: a penalty on membrane potentials where the surrogate gradient is large is MPD-SGR (arXiv 2511.12199); this
    form is ours.
    """
    z = (mem - threshold) / sigma
    return spike_rate((-z.square() / 2).exp() / (math.sqrt(2 * math.pi) * sigma))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, ``[batch]``.

    Examples:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])
    """
    return F.cross_entropy(logits, targets, reduction="none")


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "true-class": true_class,
    "zero-one": zero_one,
    "clipped-margin": clipped_margin,
}
"""By name, as the experiments call them."""
