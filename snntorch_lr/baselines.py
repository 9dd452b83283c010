"""Baselines, subtracted from the loss of a copy to lower the variance, without changing the expected gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Baseline = Callable[[Tensor], Tensor]
"""From losses ``[copies, batch]`` to advantages of the same shape."""


def none(losses: Tensor) -> Tensor:
    """No baseline: the losses themselves.

    Args:
        losses: per-sample losses, shape ``[copies, batch]``.

    Examples:
        >>> none(torch.tensor([[1.0], [3.0]])).shape
        torch.Size([2, 1])
    """
    return losses


def leave_one_out(losses: Tensor) -> Tensor:
    """Advantages against the mean loss of the other copies of the same sample.

    Args:
        losses: per-sample losses, shape ``[copies, batch]``, copies >= 2.

    Returns:
        Advantages of the same shape; they sum to zero over the copies.

    Raises:
        ValueError: if no copy remains to compare with.

    Examples:
        >>> leave_one_out(torch.tensor([[1.0], [3.0]]))
        tensor([[-2.],
                [ 2.]])

    Source: Kool, van Hoof & Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free".
    """
    if len(losses) < 2:
        raise ValueError("the baseline leaves out a copy: use more copies of each sample")
    # Where all are equal, Adam would blow up the rounding errors to full steps.
    advantages = losses - (losses.sum(0) - losses) / (len(losses) - 1)
    return advantages.masked_fill((losses == losses[0]).all(0), 0)


def batch_mean(losses: Tensor) -> Tensor:
    """Advantages against the mean loss of all other copies of all samples.

    Args:
        losses: per-sample losses, shape ``[copies, batch]``, at least two of them.

    Raises:
        ValueError: if no other loss remains to compare with.

    Examples:
        >>> batch_mean(torch.tensor([[0.0, 3.0]]))
        tensor([[-3.,  3.]])
    """
    if losses.numel() < 2:
        raise ValueError("the baseline leaves out a copy: use more samples")
    return losses - (losses.sum() - losses) / (losses.numel() - 1)


BASELINES: dict[str, Baseline] = {"none": none, "batch-mean": batch_mean, "leave-one-out": leave_one_out}
