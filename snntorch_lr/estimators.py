"""Likelihood-ratio estimators of the gradient: in place of ``loss.backward()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .baselines import BASELINES, Baseline
from .recording import Recording
from .validate import NoiseFreeNeurons, check_losses, check_network, warn_about_batch_norm

LossFn = Callable[[Any, Any], Tensor]


class Vanilla:
    """The likelihood-ratio gradient of weights and noise levels, exact in expectation.

    For J = mean over samples b of E[ℒ_b], with K noise copies and the advantages ℒ̃ of a baseline,

        ∇J ≈ 1/(K·batch) Σ_{k,b} ( ∇ℒ_{k,b} + ℒ̃_{k,b} Σ_t ∇ log p(u_t | everything sampled before t) )

    where u_t is a noisy membrane potential (or its distance to a threshold that is learned). Samples are detached and
    everything else stays in the graph, so that each graph spans one block between two noisy layers: there is no
    backward pass through time or depth, and any differentiable block works. ∇ℒ is the ordinary gradient of whatever
    lies after the last sample, such as a readout without noise.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample. Only what comes after the first noisy neuron is computed K times.
        baseline: ``"leave-one-out"``, ``"batch-mean"``, ``"none"``, or a function of the losses ``[copies, batch]``
            and of whether they come in antithetic pairs.
        antithetic: the second half of the copies gets the negated noise of the first half.
        seed: of the noise; None draws it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, or copies, baseline and antithetic do not go together.

    Source: the likelihood ratio for weights and noise levels is the method of arXiv 2302.10802, whose formulas we do
    not have; the derivation here is ours, and checked against finite differences.
    """

    def __init__(
        self,
        net: nn.Module,
        copies: int = 16,
        baseline: str | Baseline = "leave-one-out",
        antithetic: bool = False,
        seed: int | None = None,
    ) -> None:
        if not isinstance(copies, int) or copies < 1:
            raise ValueError(f"copies must be a positive integer, got {copies!r}")
        if isinstance(baseline, str) and baseline not in BASELINES:
            raise ValueError(f"unknown baseline {baseline!r}; choose one of {', '.join(BASELINES)}")
        if antithetic and copies % 2:
            raise ValueError(f"antithetic pairs need an even number of copies, got {copies}")
        least = 4 if antithetic else 2
        if baseline == "leave-one-out" and copies < least:
            raise ValueError(
                f"{copies} {'copies leave' if copies > 1 else 'copy leaves'} nothing to compare with: baseline="
                f"'leave-one-out'{' with antithetic pairs' if antithetic else ''} needs copies >= {least}; "
                "otherwise use baseline='batch-mean' or 'none'"
            )
        check_network(net)
        self.net = net
        self.copies = copies
        self.baseline: Baseline = BASELINES[baseline] if isinstance(baseline, str) else baseline
        self.antithetic = antithetic
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._inspected = False

    def backward(self, loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Adds the estimated gradient into ``.grad`` of the parameters, as ``loss.backward()`` does.

        1. Runs ``loss_fn`` once; noisy neurons expand to K copies, sample, and file their scores.
        2. Turns the losses into advantages.
        3. Runs one backward pass through the blocks between samples.

        Args:
            loss_fn: forward pass and loss, called as ``loss_fn(inputs, targets)``; returns one loss per row of the
                targets that it is given. It must start from fresh states (``reset(net)``, or ``init_leaky()``).
            inputs: passed on as they are.
            targets: tensor, or nested lists, tuples and dicts of tensors, batch first; passed on repeated K times.
                None if there are none.

        Returns:
            Mean loss over samples and copies, detached.

        Raises:
            ValueError: if the network or the losses would make the gradient wrong. ``.grad`` is untouched then.
        """
        neurons = check_network(self.net)
        if not self._inspected:
            warn_about_batch_norm(self.net)
        recording = Recording(neurons, self.copies, _batch_size(targets), self.antithetic, self._make_generators())
        watch = NoiseFreeNeurons(self.net, {} if self._inspected else neurons)
        with torch.enable_grad(), recording:
            if self._inspected:
                losses = loss_fn(inputs, self._repeat(targets))
            else:
                with watch:
                    losses = loss_fn(inputs, self._repeat(targets))
        losses = check_losses(losses, self.copies, recording.batch or 0, self.net)
        if not self._inspected:
            watch.check([draw.mean for draw in recording.draws], losses)
            self._inspected = True
        self._accumulate(losses, recording)
        return losses.detach().mean()

    def _accumulate(self, losses: Tensor, recording: Recording) -> None:
        advantages = self.baseline(losses.detach().view(self.copies, -1), self.antithetic)
        weights = advantages.reshape(-1) / losses.numel()
        roots, gradients = [], []
        if losses.requires_grad:
            roots.append(losses)
            gradients.append(torch.full_like(losses, 1 / losses.numel()))
        for draw in recording.draws:
            for tensor, gradient in draw.cotangents(weights):
                roots.append(tensor)
                gradients.append(gradient)
        if roots:
            torch.autograd.backward(roots, gradients)

    def _repeat(self, targets: Any) -> Any:
        def repeat(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            return value.repeat(self.copies, *[1] * (value.dim() - 1))

        return tree_map(repeat, targets)

    def _make_generators(self) -> dict[torch.device, torch.Generator]:
        if self.seed is not None:
            for parameter in self.net.parameters():
                if parameter.device not in self._generators:
                    generator = torch.Generator(parameter.device)
                    self._generators[parameter.device] = generator.manual_seed(self.seed)
        return self._generators


ESTIMATORS = {"vanilla": Vanilla}


def _batch_size(targets: Any) -> int | None:
    sizes = [len(leaf) for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.dim()]
    return sizes[0] if sizes else None
