"""The likelihood ratio with the loss linearised in the spikes as a control variate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import Baseline
from .estimators import LossFn, Vanilla, batch_size, push
from .noise import EscapeNoise, MembraneNoise
from .noisy import NoisyNeuron
from .recording import Copies, Recording
from .repeatable import RandomState, Statistics
from .storing import Storing, Stretch, Weights
from .stream import NoiseStream

Effects = Mapping[NoisyNeuron, list[Tensor | None]]
"""∂loss/∂spike of each neuron and time step, ``[batch, ...]``; None where the loss does not depend on them directly."""


class Controlled(Vanilla):
    """The likelihood-ratio gradient with a control variate: what the loss would be if it were linear in the spikes.

    Most of the variance of a likelihood-ratio gradient is the loss that varies with the noise of all the other
    neurons, and most of that variation is linear in their spikes. With a_t = ∂ℒ/∂s_t from a pass without noise and
    p_t = P(s_t = 1 | everything sampled before t), the variation that a copy's spikes cause is about

        C = Σ_t a_t · (s_t − p_t)

    Each term is zero in expectation, whatever came before, so that ℒ − λC has the same expectation as ℒ and much less
    variance. What C takes away from the gradient is known exactly, and added back:

        ∇J ≈ 1/(K·batch) Σ_{k,b} ( ∇ℒ + (ℒ − λC)̃ Σ_t ∇ log p(x_t | ...) + λ Σ_t a_t ∇p_t )

    The gradient is as unbiased as ``Vanilla``'s. λ is a regression coefficient, one for each layer; that of the even
    copies is fitted on the odd ones and the other way round, so that it is independent of the noise it is applied to.

    a_t comes from backpropagation through what lies between the spikes and the loss without another noisy neuron, as a
    readout does; neurons that act on the loss through other noisy neurons only get no control of their own. Nothing is
    propagated back through a spike. Without a derivative of the loss (the 0-1 loss) this is ``Vanilla``.

    ``loss_fn`` is called once more, without noise, for one copy.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, at least 4. Only what comes after the first noisy neuron is computed K times.
        baseline: as in ``Vanilla``.
        antithetic: as in ``Vanilla``.
        seed: as in ``Vanilla``.

    Raises:
        ValueError: if the network has no noisy neuron, or arguments do not go together.

    Source: a linearised loss as a control variate is the idea of MuProp (Gu, Levine, Sutskever & Mnih, 2016), there
    for feed-forward networks about their mean field; sums of martingale differences in its place are ours.
    """

    least_copies = 4

    def __init__(
        self,
        net: nn.Module,
        copies: int = 16,
        baseline: str | Baseline = "leave-one-out",
        antithetic: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(net, copies, baseline, antithetic, seed=seed)
        if self.copies < self.least_copies:
            raise ValueError(
                f"{self.copies} copies are too few to fit a control variate on one half of them and use it on the "
                f"other: give copies >= {self.least_copies}, or use the vanilla estimator"
            )

    def _estimate(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        effects = self._effects(neurons, loss_fn, inputs, targets)
        first, last = self.division.own_copies(self.copies)
        copies = self._copies(neurons, self._stream(self._next_seed(), first, last), batch_size(targets))
        recording = Controlling(copies, effects)
        losses = self._run_watched(recording, loss_fn, inputs, targets, neurons)
        everyone, _ = self._compare(losses)
        controlled = losses.detach().view(last - first, -1).clone()
        for neuron, control in recording.controls.items():
            fitted = self._fit(everyone, self.division.gather(control.view(last - first, -1)))[first:last]
            controlled -= fitted.unsqueeze(1) * control.view_as(controlled)
            recording.returns[neuron].given = (fitted / everyone.numel()).repeat_interleave(everyone.shape[1])
        _, weights = self._compare(controlled)
        recording.weights.given = weights.reshape(-1)
        push(losses, everyone.numel(), recording)
        return everyone.mean()

    def _effects(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> Effects:
        """What each spike does to the loss, to first order, where the noise is off."""
        random, statistics = RandomState.capture(), Statistics(self.net)
        pilot = Pilot(self._copies(neurons, NoiseStream(0, 1, 0, 1), batch_size(targets)))
        try:
            losses = self._run(pilot, loss_fn, inputs, targets, grad=True)
        finally:
            random.restore()
            statistics.restore()
        spikes = [step for steps in pilot.spikes_of.values() for step in steps]
        if not losses.requires_grad or not spikes:
            return {}
        found = iter(torch.autograd.grad(losses.sum(), spikes, allow_unused=True))
        effects: dict[NoisyNeuron, list[Tensor | None]] = {
            neuron: [next(found) for _ in steps] for neuron, steps in pilot.spikes_of.items()
        }
        return {neuron: steps for neuron, steps in effects.items() if neuron.fires_above_threshold}

    def _fit(self, losses: Tensor, control: Tensor) -> Tensor:
        """Regression coefficient for each copy, from the copies of the other half, ``[copies]``."""
        index = torch.arange(self.copies, device=losses.device)
        # Antithetic copies stay together: they are not independent of each other.
        half = (index % (self.copies // 2) if self.antithetic else index) % 2
        coefficients = torch.zeros(self.copies, dtype=losses.dtype, device=losses.device)
        for own in (0, 1):
            loss, variate = (part[half != own] - part[half != own].mean(0) for part in (losses, control))
            power = variate.square().sum()
            if power > 0:
                coefficients[half == own] = (loss * variate).sum() / power
        return coefficients


class Pilot(Recording):
    """A forward pass without noise, in which every spike is a leaf that the loss is differentiated by."""

    def __init__(self, copies: Copies) -> None:
        super().__init__(copies)
        self.spikes_of: dict[NoisyNeuron, list[Tensor]] = {}

    def builds_graph(self, neuron: NoisyNeuron, mem: Tensor) -> bool:
        """Nothing is propagated back through a neuron."""
        return False

    def draw(self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """The mean."""
        return mean

    def fire(self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """The more probable of spike and no spike."""
        return (margin > 0).to(margin.dtype)

    def emit(self, neuron: NoisyNeuron, spikes: Tensor) -> Tensor:
        """The spikes as a leaf."""
        leaf = spikes.detach().requires_grad_()
        self.spikes_of.setdefault(neuron, []).append(leaf)
        return leaf


class Controlling(Storing):
    """A forward pass that also sums up the control variates, and files what they take away from the gradient."""

    def __init__(self, copies: Copies, effects: Effects) -> None:
        super().__init__(copies)
        self.controls: dict[NoisyNeuron, Tensor] = {}
        self.returns: dict[NoisyNeuron, Weights] = {}
        self._effects = {neuron: iter(steps) for neuron, steps in effects.items()}
        self._shadows: dict[NoisyNeuron, tuple[Stretch, Stretch]] = {}

    def draw(self, neuron: NoisyNeuron, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """Samples, files the draw, and controls the spikes that it decides."""
        effect = self._next_effect(neuron)
        if effect is None:
            return super().draw(neuron, noise, mean)
        # With a learned threshold it is the distance to it that is sampled.
        threshold = 0.0 if neuron.threshold.requires_grad else neuron.threshold
        z = (mean.detach() - threshold) / noise.sigma.detach().to(mean.dtype)
        sampled = super().draw(neuron, noise, mean)
        self._control(neuron, noise, mean, z, (sampled > threshold).to(z.dtype), effect)
        return sampled

    def file_escape(
        self, neuron: NoisyNeuron, noise: EscapeNoise, margin: Tensor, z: Tensor, limit: Tensor, spikes: Tensor
    ) -> None:
        """Files a sampled spike, and controls it."""
        effect = self._next_effect(neuron)
        if effect is not None:
            # Before z is overwritten.
            self._control(neuron, noise, margin, z, spikes, effect)
        super().file_escape(neuron, noise, margin, z, limit, spikes)

    def _next_effect(self, neuron: NoisyNeuron) -> Tensor | None:
        return next(self._effects.get(neuron, iter(())), None)

    def _control(
        self,
        neuron: NoisyNeuron,
        noise: MembraneNoise | EscapeNoise,
        mean: Tensor,
        z: Tensor,
        spikes: Tensor,
        effect: Tensor,
    ) -> None:
        p, density = noise.chances(z)
        pull = density.view(self.copies, *effect.shape).mul_(effect).view_as(z)
        rows = (self.copies, len(effect), -1)
        control = torch.einsum("kbf,bf->kb", (spikes - p).view(rows), effect.reshape(len(effect), -1)).flatten()
        self.controls[neuron] = self.controls.get(neuron, 0) + control
        weights = self.returns.setdefault(neuron, Weights())
        stretch = self._now
        if stretch is not None:
            shadow = self._shadow(neuron, noise, stretch, weights)
            if isinstance(noise, EscapeNoise):
                shadow.gain = neuron.gain_after(stretch.gain)
            shadow.add(pull, lambda: torch.mul(z, pull).neg_())
        elif torch.is_grad_enabled():
            self._file(noise, mean, lambda: (pull, -z * pull), weights)

    def _shadow(
        self, neuron: NoisyNeuron, noise: MembraneNoise | EscapeNoise, stretch: Stretch, weights: Weights
    ) -> Stretch:
        """The sums of what is added back, beside those of the scores."""
        known = self._shadows.get(neuron)
        if known is None or known[0] is not stretch:
            known = self._shadows[neuron] = stretch, Stretch(stretch.current)
            self._file(noise, stretch.current.raw, known[1].sums, weights)
        return known[1]
