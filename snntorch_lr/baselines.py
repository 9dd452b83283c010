"""Baselines: what is subtracted from the loss of a copy without changing the expected gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Baseline = Callable[[Tensor, bool], Tensor]
"""From losses ``[copies, batch]`` and whether they come in antithetic pairs, to advantages of the same shape."""


def none(losses: Tensor, antithetic: bool = False) -> Tensor:
    """No baseline: the losses themselves.

    Args:
        losses: per-sample losses, shape ``[copies, batch]``.
        antithetic: whether copy k and copy k + copies/2 share their noise with opposite signs.

    Examples:
        >>> none(torch.tensor([[1.0], [3.0]])).shape
        torch.Size([2, 1])
    """
    return losses


def leave_one_out(losses: Tensor, antithetic: bool = False) -> Tensor:
    """Advantages against the mean loss of the other copies of the same sample.

    Args:
        losses: per-sample losses, shape ``[copies, batch]``, copies >= 2.
        antithetic: whether copy k and copy k + copies/2 share their noise with opposite signs. Then both are left
            out: the score of σ is even in the noise, so that the partner's loss is no valid baseline. Copies >= 4.

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
    own = _own_group(losses, antithetic)
    others = losses.shape[0] - (2 if antithetic else 1)
    if others < 1:
        raise ValueError(_too_few(antithetic, "copies of each sample"))
    # Rounding would leave dust where all are equal, which Adam blows up to full steps.
    return (losses - (losses.sum(0) - own) / others).masked_fill((losses == losses[0]).all(0), 0)


def batch_mean(losses: Tensor, antithetic: bool = False) -> Tensor:
    """Advantages against the mean loss of all other copies of all samples.

    Args:
        losses: per-sample losses, shape ``[copies, batch]``, at least two of them.
        antithetic: whether copy k and copy k + copies/2 share their noise with opposite signs; both are left out then.

    Raises:
        ValueError: if no other loss remains to compare with.

    Examples:
        >>> batch_mean(torch.tensor([[0.0, 3.0]]))
        tensor([[-3.,  3.]])
    """
    own = _own_group(losses, antithetic)
    others = losses.numel() - (2 if antithetic else 1)
    if others < 1:
        raise ValueError(_too_few(antithetic, "samples"))
    return losses - (losses.sum() - own) / others


BASELINES: dict[str, Baseline] = {"none": none, "batch-mean": batch_mean, "leave-one-out": leave_one_out}


def _own_group(losses: Tensor, antithetic: bool) -> Tensor:
    return losses + losses.roll(losses.shape[0] // 2, 0) if antithetic else losses


def _too_few(antithetic: bool, what: str) -> str:
    return f"the baseline leaves out a copy{' and its antithetic partner' if antithetic else ''}: use more {what}"
