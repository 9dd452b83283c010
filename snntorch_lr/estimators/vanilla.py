"""The likelihood-ratio gradient, by one forward pass that keeps its scores or by two that keep nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import positive_integer
from ..baselines import Baseline
from ..left_as_found import Buffers, RandomState
from ..noise import Noise
from ..validate import check_repeats
from .base import Call, Estimator
from .packing import PackedSpikes
from .recording import Copies, Recording
from .storing import Replaying, Scores, Storing, StoringStep, push


class _TopologyStep(StoringStep):
    fuses = True

    def file(self, noise: Noise, mean: Tensor, scores: Scores) -> None:
        """Leaves a token that has no scores."""
        self.recording.file(noise, mean, _no_scores)


class Topology(Storing):
    """A forward pass of whose graph only the nodes remain: to look at in constant memory, and never to go back."""

    step_type = _TopologyStep

    def __init__(self, copies: Copies) -> None:
        super().__init__(copies)
        self.spikes = _SaveNothing()


class _SaveNothing(PackedSpikes):
    """Context in which a graph saves no tensors."""

    def __init__(self) -> None:
        torch.autograd.graph.saved_tensors_hooks.__init__(self, lambda saved: None, lambda _: _no_scores())

    def announce(self, spikes: Tensor) -> None:
        """Nothing is packed."""


class NoTensorsError(RuntimeError):
    """``loss_fn`` goes back through a graph of its own, of which ``Topology`` keeps no tensors."""


def _no_scores() -> Any:
    raise NoTensorsError("the graph of a trial run keeps no tensors: it is there to be looked at")


def look(estimator: Estimator, call: Call) -> tuple[Tensor, Storing]:
    """A trial run in constant memory; with a whole graph if ``loss_fn`` differentiates something itself."""
    try:
        return estimator.trial_run(Topology, call)
    except NoTensorsError:
        return estimator.trial_run(Storing, call)


class Vanilla(Estimator):
    """The likelihood-ratio gradient of weights and noise levels, exact in expectation.

    For J = mean over samples b of E[ℒ_b], with K noise copies and the advantages ℒ̃ of a baseline,

        ∇J ≈ 1/(K·batch) Σ_{k,b} ( ∇ℒ_{k,b} + ℒ̃_{k,b} Σ_t ∇ log p(x_t | everything sampled before t) )

    where x_t is what a neuron samples: its noisy membrane potential (or the distance of that to a threshold that is
    learned), or with escape noise its spike. Samples are detached and everything else stays in the graph, so that each
    graph spans one block between two noisy layers: there is no backward pass through time or depth, and any
    differentiable block works. ∇ℒ is the ordinary gradient of whatever lies after the last sample, such as a readout
    without noise.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample. Only what comes after the first noisy neuron is computed K times.
        baseline: ``"leave-one-out"``, ``"batch-mean"``, ``"none"``, or a function of the losses ``[copies, batch]``
            and of whether they come in antithetic pairs.
        antithetic: the second half of the copies gets the negated noise of the first half.
        memory: ``"store"`` keeps what the scores need until the losses are known, with spikes as bits and noise drawn
            again; ``"replay"`` runs twice and keeps nothing of a time step, except for neurons that carry a graph
            through time (all but ``Leaky``, ``Lapicque`` and ``RLeaky`` with membrane noise).
        chunk: number of copies to run at once; two passes, and memory no longer grows with the copies. What is random
            after the first noisy neuron other than its noise, such as dropout, is shared by the chunks.
        seed: of the noise; None takes it from torch's global generator. The same seed gives the same noise in every
            mode of memory and chunk.

    Raises:
        ValueError: if the network has no noisy neuron, or arguments do not go together.

    Examples:
        >>> estimator = slr.Vanilla(net, copies=16, memory="replay")
        >>> loss = estimator.backward(loss_fn, images, labels)

    Source: the likelihood ratio for weights and noise levels is the method of arXiv 2302.10802, whose formulas we do
    not have; the derivation here is ours, and checked against finite differences.
    """

    recording_type: type[Storing] = Storing

    def __init__(
        self,
        net: nn.Module,
        copies: int = 16,
        baseline: str | Baseline = "leave-one-out",
        antithetic: bool = False,
        memory: str = "store",
        chunk: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(net, copies, baseline, antithetic, seed)
        if memory not in ("store", "replay"):
            raise ValueError(f"memory must be 'store' or 'replay', got {memory!r}")
        self.memory = memory
        self.chunk = self.copies if chunk is None else min(positive_integer("chunk", chunk), self.copies)

    def estimate(self, call: Call) -> Tensor:
        """Adds the gradient of this process into ``.grad``."""
        seed = self.next_seed()
        first, last = self.division.own_copies(self.copies)
        if self.memory == "store" and self.chunk >= last - first:
            recording = self.recording_type(self.make_copies(call, seed))
            losses = self.run_watched(recording, call)
            everyone, weights = self.weigh(losses)
            recording.weights.given = weights.reshape(-1)
            push(losses, everyone.numel(), recording)
            return everyone.mean()
        if not self.inspected:
            look(self, call)
        return self._run_twice(call, seed)

    def _run_twice(self, call: Call, seed: int) -> Tensor:
        """Losses first, then the same passes again with the advantages known."""
        start, end = self.division.own_copies(self.copies)
        chunks = [(first, min(first + self.chunk, end)) for first in range(start, end, self.chunk)]
        before = RandomState.capture()
        parts, repeated, batch = [], [], call.batch
        statistics = None
        for chunk in chunks:
            before.restore()
            recording = Recording(replace(self.make_copies(call, seed, chunk), batch=batch))
            losses = self.run(recording, call, grad=False)
            batch = recording.batch
            parts.append(losses.view(recording.copies, -1))
            statistics = statistics or Buffers(self.net, statistics_only=True)
        after = RandomState.capture()
        everyone, weights = self.weigh(torch.cat(parts))
        try:
            for first, last in chunks:
                before.restore()
                copies = replace(self.make_copies(call, seed, (first, last)), batch=batch)
                share = weights[first - start : last - start].reshape(-1)
                again: Storing
                if self.memory == "replay":
                    again = Replaying(copies, share)
                else:
                    again = Storing(copies)
                    again.weights.given = share
                with again.spikes:
                    losses = self.run(again, call, grad=True)
                repeated.append(losses.detach())
                push(losses, everyone.numel(), again)
            check_repeats(torch.cat([part.flatten() for part in parts]), torch.cat(repeated), self.checks)
        finally:
            after.restore()
            if statistics is not None:
                statistics.restore()
        return everyone.mean()
