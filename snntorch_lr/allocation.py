"""Copies where they are needed: more of them for samples whose loss varies more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .approximate import Approximate
from .baselines import Baseline
from .control import Controlled
from .convert import noise_off
from .estimators import Estimator, LossFn, Vanilla, batch_size
from .network import parameters
from .noisy import NoisyNeuron
from .repeatable import RandomState, Statistics
from .validate import check_losses
from .warn import warn

_KINDS: dict[str, Callable[..., Vanilla | Approximate]] = {
    "vanilla": Vanilla,
    "approximate": Approximate,
    "controlled": Controlled,
}


class Allocated(Estimator):
    """The likelihood ratio with K copies on average, more for hard samples and fewer for easy ones.

    The variance of the gradient is a sum over samples b of v_b / K_b, where v_b grows with the variance of the loss.
    For a given number of copies in all it is least where K_b is proportional to √v_b. Once a network is trained, most
    samples have next to no loss and need next to no copies.

    1. A forward pass without noise gives a loss for each sample, which stands for √v_b: it is larger where the loss
       varies more.
    2. Each sample gets the level, a multiple of K, that is nearest to its share of the losses.
    3. The samples of each level are run as a batch of their own, and weighted by their number.

    The allocation is a function of weights and data alone and not of the noise, so that the gradient is as unbiased as
    the estimator that runs the batches. With equal losses everything gets K copies.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, the mean number of noise copies of a sample; levels round to it only roughly. Where every sample
            needs as many as that, there is nothing to allocate, and a warning says so.
        baseline: as in ``Vanilla``.
        antithetic: as in ``Vanilla``.
        seed: as in ``Vanilla``.
        estimator: ``"vanilla"``, ``"approximate"`` or ``"controlled"``.
        levels: multiples of K that a sample may get.
        batch_dim: dimension of the tensors among the inputs that is the batch. Targets have it first.
        **options: further arguments of the estimator (``memory=``, ``chunk=``).

    Raises:
        ValueError: if the network has no noisy neuron, or arguments do not go together.

    Source: copies allocated by the variance of the loss are the idea of FLOPS, arXiv 2410.05966; the rule is ours.
    """

    def __init__(
        self,
        net: nn.Module,
        copies: int = 16,
        baseline: str | Baseline = "leave-one-out",
        antithetic: bool = False,
        seed: int | None = None,
        estimator: str = "vanilla",
        levels: Sequence[float] = (0.25, 1, 4),
        batch_dim: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(net, copies, baseline, antithetic, seed)
        if estimator not in _KINDS:
            raise ValueError(f"unknown estimator {estimator!r}; choose one of {', '.join(_KINDS)}")
        if not levels or min(levels) <= 0:
            raise ValueError(f"levels must be positive multiples of the number of copies, got {list(levels)}")
        step = 2 if antithetic else 1
        # Leave-one-out needs another copy, or pair, to compare with.
        least = 2 * step if baseline == "leave-one-out" else step
        least = max(least, Controlled.least_copies if estimator == "controlled" else 1)
        counts = sorted({max(least, step * round(level * copies / step)) for level in levels})
        if len(levels) > 1 and counts[0] >= copies:
            warn(
                f"Allocated: {copies} copies leave nothing to allocate, because each sample needs at least {counts[0]}"
                f"{' to fit its control variate' if estimator == 'controlled' else ''}; give more copies"
            )
        self.batch_dim = batch_dim
        self.parts = {
            count: _KINDS[estimator](net, copies=count, baseline=baseline, antithetic=antithetic, **options)
            for count in counts
        }

    def allocate(self, losses: Tensor) -> Tensor:
        """Number of copies of each sample.

        Args:
            losses: of a forward pass without noise, ``[batch]``.

        Returns:
            Integers among the levels, ``[batch]``, whose mean is about K.
        """
        counts = torch.tensor(sorted(self.parts), dtype=torch.float64, device=losses.device)
        share = losses.double().clamp(min=torch.finfo(torch.float32).tiny)
        share = share / share.mean()

        def nearest(factor: float) -> Tensor:
            wanted = (self.copies * factor * share).log()
            return counts[(wanted.unsqueeze(1) - counts.log()).abs().argmin(1)]

        # The mean grows with the factor: the levels cut off what is wanted, so that a factor of one misses K.
        low, high = 1e-3, 1e3
        for _ in range(30):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if nearest(middle).mean() <= self.copies else (low, middle)
        return nearest(low).long()

    def _estimate(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        given = self.allocate(self._pilot(loss_fn, inputs, targets))
        before = [(parameter, parameter.grad) for parameter in parameters(self.net)]
        for parameter, _ in before:
            parameter.grad = None
        try:
            loss = self._run_levels(given, neurons, loss_fn, inputs, targets)
        except BaseException:
            # One level may have been run when another one fails.
            for parameter, gradient in before:
                parameter.grad = gradient
            raise
        for parameter, gradient in before:
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        return loss

    def _run_levels(
        self, given: Tensor, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any
    ) -> Tensor:
        """The samples of each level as a batch of their own; returns the mean loss."""
        parts = []
        for count, part in self.parts.items():
            rows = (given == count).nonzero().squeeze(1)
            if not len(rows):
                continue
            share = len(rows) / len(given)
            part.division = self.division
            part._inspected, part._seeds = self._inspected, self._seeds

            def weighted(x: Any, y: Any, share: float = share) -> Tensor:
                return loss_fn(x, y) * share

            own = self._take(inputs, rows, self.batch_dim), self._take(targets, rows, 0)
            parts.append(part._estimate(neurons, weighted, *own))
        return torch.stack(parts).sum()

    def _pilot(self, loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Losses without noise, of any size: negative ones are shifted."""
        size = batch_size(targets)
        if size is None:
            raise ValueError("copies are allocated to samples, but there are no targets that say how many there are")
        random, statistics = RandomState.capture(), Statistics(self.net)
        try:
            with torch.no_grad(), noise_off(self.net):
                losses = check_losses(loss_fn(inputs, targets), 1, size, self.net).double()
        finally:
            random.restore()
            statistics.restore()
        return losses - losses.min().clamp(max=0)

    def _take(self, values: Any, rows: Tensor, dim: int) -> Any:
        size = int(rows.max()) + 1
        for leaf in tree_flatten(values)[0]:
            if isinstance(leaf, Tensor) and leaf.dim() and (leaf.dim() <= dim or leaf.shape[dim] < size):
                raise ValueError(
                    f"dimension {dim} of a tensor of shape {tuple(leaf.shape)} is not the batch: copies are allocated "
                    "to samples; give batch_dim="
                )

        def take(value: Any) -> Any:
            return (
                value.index_select(dim, rows.to(value.device)) if isinstance(value, Tensor) and value.dim() else value
            )

        return tree_map(take, values)
