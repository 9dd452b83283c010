"""The plain likelihood ratio: the score of every neuron, weighted by the loss of its copy."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import warn
from ..baselines import BASELINES, Baseline
from ..node import Score
from ..noisy_neuron import NoisyNeuron
from ..validate import check_losses, use_running_statistics, warn_about_batch_norm
from . import fused
from .base import Estimator, LossFn, SamplerOfOnePass


class Scores(SamplerOfOnePass):
    """Sampler of a forward pass whose samples have scores: their gradient waits for the losses.

    Attributes:
        tokens: of samples, to go back from.
        weights: holds one number for each row, once the losses are known.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, Tensor] = {}
        self.weights: list[Tensor] = []

    def replace(self, before: Tensor | None, token: Tensor) -> None:
        """Adds a token, from which the one before it is reached, too."""
        if before is not None:
            self.tokens.pop(id(before), None)
        if token.requires_grad:
            self.tokens[id(token)] = token

    def step(self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """A time step of a neuron; see ``snntorch_lr.noisy_neuron.Sampler``."""
        state = fused.going_on(neuron, input_, states)
        if state is None:
            fired = neuron.train_resets(states["mem"])
            plan = fused.planned(neuron, input_, states) if torch.is_grad_enabled() else None
            if plan is None:
                return self._generic_step(neuron, input_, states, fired)
            state = fused.begin(plan, neuron, states, fired, weights=self.weights)
        return state.step(neuron, input_)

    def _generic_step(
        self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor], fired: Tensor | None
    ) -> tuple[Tensor, ...]:
        sample = neuron.sample(input_, states, fired)
        if sample.margin.requires_grad or sample.sigma.requires_grad:
            self.replace(None, Score.apply(sample, self.weights, sample.margin, sample.sigma))
        spikes = neuron.graded(sample.spikes.clone())
        if "spk" in states:
            neuron.spk = spikes
        neuron.carry(sample.spikes)
        return (spikes, *(getattr(neuron, name) for name in neuron.state_names))

    def backward(self, losses: Tensor, advantages: Tensor) -> None:
        """Adds the gradient of the mean loss into ``.grad``.

        Args:
            losses: of the rows, with the graph of what comes after the last sample.
            advantages: of the rows.
        """
        self.weights[:] = [advantages / len(losses)]
        roots = [*self.tokens.values()]
        gradients = [torch.zeros_like(token) for token in roots]
        if losses.requires_grad:
            roots.append(losses)
            gradients.append(torch.full_like(losses, 1 / len(losses)))
        torch.autograd.backward(roots, gradients)


class RowLosses(Estimator):
    """Base of the estimators that weight the scores of each row with the loss of that row.

    Args:
        net: the network.
        copies: K, noise copies of each sample.
        baseline: ``"leave-one-out"``, ``"batch-mean"``, ``"none"``, or a function of the losses ``[copies, batch]``.
        seed: of the noise.
    """

    def __init__(
        self,
        net: nn.Module,
        copies: int = 16,
        baseline: str | Baseline = "leave-one-out",
        seed: int | None = None,
    ) -> None:
        super().__init__(net, copies, seed)
        self.baseline = chosen_baseline(baseline, self.copies)
        self._warned: set[str] = set()

    def check(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        """Warns of BatchNorm, and in the first call refuses losses that couple rows.

        Raises:
            ValueError: see ``check_rows``.
        """
        self._warned |= warn_about_batch_norm(self.net, self._warned)
        if not self._inspected:
            self.check_rows(neurons, loss_fn, inputs, targets)

    def check_rows(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        """Refuses losses of rows that change with the spikes of other rows.

        Each row's loss meets the score of that row alone: a term over all rows would get no gradient, or a wrong one.
        Looks at the losses of one of two copies, while all neurons of the other one fire, or none.

        Raises:
            ValueError: if they differ.
        """

        def losses(fires: bool) -> Tensor | None:
            copies, self.copies = self.copies, 2
            try:
                with suppress(Exception), self.aside():
                    use_running_statistics(self.net)
                    torch.manual_seed(0)
                    returned, made = self.run(neurons, _SecondCopyForced(fires), loss_fn, inputs, targets)
                    return check_losses(returned, 2, made.batch or 0, self.net).view(2, -1)[0].double()
            finally:
                self.copies = copies
            return None

        never, always = losses(False), losses(True)
        if never is None or always is None or torch.allclose(never, always, rtol=1e-5, atol=1e-30, equal_nan=True):
            return
        again = losses(False)
        if again is not None and torch.allclose(never, again, rtol=1e-5, atol=1e-30, equal_nan=True):
            raise ValueError(
                "the loss of a sample changes with the spikes of other rows: the plain likelihood ratio gives a term "
                "over all rows, such as clamp(spikes.mean() - 0.15, min=0), no gradient or a wrong one. Give each row "
                "its own, a mean over time and neurons only (snntorch_lr.objectives.rate_above), or use "
                'estimator="counterfactual"'
            )


class Vanilla(RowLosses):
    """The likelihood-ratio gradient of weights and noise levels, exact in expectation.

    For J = mean over samples b of E[ℒ_b], with K noise copies and the advantages ℒ̃ of a baseline,

        ∇J ≈ 1/(K·batch) Σ_{k,b} ( ∇ℒ_{k,b} + ℒ̃_{k,b} Σ_t ∇ log p(x_t | everything sampled before t) )

    where x_t is what a neuron samples: its noisy membrane potential (or the distance of that to a threshold that is
    learned), or with escape noise its spike. Samples are detached and everything else stays in the graph, so that each
    graph spans one block between two noisy layers: there is no backward pass through time or depth, any differentiable
    block works, and the loss needs no derivative. ∇ℒ is the ordinary gradient of whatever lies after the last sample,
    such as a readout without noise.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample. Only what comes after the first noisy neuron is computed K times.
        baseline: ``"leave-one-out"``, ``"batch-mean"``, ``"none"``, or a function of the losses ``[copies, batch]``.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, or arguments do not go together.

    Examples:
        >>> estimator = slr.Vanilla(net, copies=16)
        >>> loss = estimator.backward(loss_fn, images, labels)

    Source: the likelihood ratio for weights and noise levels is the method of arXiv 2302.10802, whose formulas we do
    not have; the derivation here is ours, and checked against finite differences.
    """

    def estimate(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Adds the gradient into ``.grad``."""
        self.check(neurons, loss_fn, inputs, targets)
        scores = Scores()
        with self.first_call(neurons) as first:
            returned, copies = self.run(neurons, scores, loss_fn, inputs, targets)
            losses = check_losses(returned, self.copies, copies.batch or 0, self.net)
            if first is not None:
                first.check_losses(losses, *scores.tokens.values())
        scores.backward(losses, weigh(losses, self.copies, self.baseline, first=first is not None))
        return losses.detach().mean()


class _SecondCopyForced(Scores):
    """Of two copies, the second one's neurons all fire in every step, or never."""

    def __init__(self, fires: bool) -> None:
        super().__init__()
        self._value = float(fires)

    def step(self, neuron: NoisyNeuron, input_: Tensor, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """A time step of a neuron; see ``snntorch_lr.noisy_neuron.Sampler``."""
        outputs = super().step(neuron, input_, states)
        for output in outputs:
            output[len(output) // 2 :] = self._value
        return outputs


def chosen_baseline(baseline: str | Baseline, copies: int) -> Baseline:
    """A baseline from its name.

    Raises:
        ValueError: if it is unknown, or there are too few copies for it.
    """
    if callable(baseline):
        return baseline
    if not isinstance(baseline, str) or baseline not in BASELINES:
        raise ValueError(f"unknown baseline {baseline!r}; choose one of {', '.join(BASELINES)}, or a function")
    if baseline == "leave-one-out" and copies < 2:
        raise ValueError(
            "1 copy leaves nothing to compare with: baseline='leave-one-out' needs copies >= 2; otherwise use "
            "baseline='batch-mean' or 'none'"
        )
    return BASELINES[baseline]


def weigh(losses: Tensor, copies: int, baseline: Baseline, first: bool) -> Tensor:
    """Advantages of the rows, from their losses ``[copies * batch]``.

    Raises:
        ValueError: if the baseline returns something else than a finite number for each loss.
    """
    table = losses.detach().view(copies, -1)
    if first and copies > 1 and bool((table == table[0]).all()):
        warn(
            "all copies of a sample have the same loss in the first call: the noise decides nothing, and what is "
            "before a noisy neuron learns nothing. Do its spikes reach the loss? Raise the noise level or the "
            "scale of the weights, or take a loss that tells more"
        )
    advantages = baseline(table)
    if advantages.shape != table.shape or not bool(advantages.isfinite().all()):
        raise ValueError(
            f"the baseline must return a finite number for each loss, {tuple(table.shape)}, but returned "
            f"{tuple(advantages.shape)}, {int((~advantages.isfinite()).sum())} of them not finite"
        )
    return advantages.reshape(-1)
