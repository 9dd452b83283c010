"""The context in which noisy neurons expand to copies and file their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from .neurons import NoisyNeuron
from .noise import MembraneNoise


@dataclass
class Draw:
    """What one noisy neuron sampled at one time step.

    Attributes:
        mean: mean of what was sampled, given all earlier samples; ``[copies * batch, ...]``, with the graph of one
            block.
        epsilon: the standard noise that was drawn, same shape.
        sigma: noise level, with its graph; broadcasts against the mean.
        noise: where ε came from, for its scores.
    """

    mean: Tensor
    epsilon: Tensor
    sigma: Tensor
    noise: MembraneNoise

    def cotangents(self, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a tensor and the gradient of ``sum(weights * log-likelihood of this draw)`` with respect to it.

        Args:
            weights: one weight per copy and sample, shape ``[copies * batch]``.
        """
        weights = weights.to(self.epsilon.dtype)
        if self.mean.requires_grad:
            score = self.noise.location_score(self.epsilon) / self.sigma.detach()
            yield self.mean, (score * weights.view(-1, *[1] * (score.dim() - 1))).to(self.mean.dtype)
        if self.sigma.requires_grad:
            scores = self.noise.scale_score(self.epsilon)
            total = (weights @ scores.flatten(1)).view(1, *scores.shape[1:])
            yield self.sigma, (total / self.sigma.detach()).sum_to_size(self.sigma.shape).to(self.sigma.dtype)


class Recording:
    """One forward pass of K noise copies: expands inputs, draws noise, keeps what the scores need.

    While it is entered as a context, the given neurons sample for it. Copies are laid out copy-first: row
    ``k * batch + b`` of every tensor belongs to copy k of sample b.

    Args:
        neurons: the neurons that sample, by name.
        copies: K, the number of noise copies of each sample.
        batch: number of samples, or None to take it from the first noisy neuron's input.
        antithetic: the second half of the copies gets the negated noise of the first half.
        generators: random generator of each device; a device without one uses the global generator.
    """

    def __init__(
        self,
        neurons: Mapping[str, NoisyNeuron],
        copies: int,
        batch: int | None = None,
        antithetic: bool = False,
        generators: Mapping[torch.device, torch.Generator] | None = None,
    ) -> None:
        self.neurons = neurons
        self.copies = copies
        self.batch = batch
        self.antithetic = antithetic
        self.generators = generators or {}
        self.draws: list[Draw] = []
        self._sigmas: dict[MembraneNoise, Tensor] = {}
        self._started: set[NoisyNeuron] = set()

    def __enter__(self) -> Recording:
        for neuron in self.neurons.values():
            neuron._recording = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for neuron in self.neurons.values():
            del neuron._recording

    def name(self, neuron: NoisyNeuron) -> str:
        """How errors call a neuron: its place in the network and its class."""
        place = next((name for name, known in self.neurons.items() if known is neuron), "")
        return f"{place} ({type(neuron).__name__})" if place else type(neuron).__name__

    def starts(self, neuron: NoisyNeuron) -> bool:
        """Whether this is the neuron's first time step in this forward pass; says so once."""
        first = neuron not in self._started
        self._started.add(neuron)
        return first

    def fits(self, x: Tensor) -> bool:
        """Whether the first dimension is the batch, or the copies of it."""
        return self.batch is not None and x.shape[0] in (self.batch, self.copies * self.batch)

    def expand(self, x: Tensor, neuron: NoisyNeuron) -> Tensor:
        """Repeats a batch for every copy; leaves what is expanded already as it is.

        Args:
            x: input or state of a noisy neuron, ``[batch, ...]`` or ``[copies * batch, ...]``.
            neuron: who asks.

        Raises:
            ValueError: if the first dimension is neither.
        """
        if self.batch is None and x.dim():
            self.batch = x.shape[0]
        if self.batch is None or not x.dim() or not self.fits(x):
            raise ValueError(
                f"{self.name(neuron)} got an input of shape {tuple(x.shape)}, but there are {self.batch} targets: a "
                "noisy neuron takes one time step with the batch first, and so are targets"
            )
        if x.shape[0] == self.copies * self.batch:
            return x
        return x.unsqueeze(0).expand(self.copies, *x.shape).flatten(0, 1)

    def draw(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """Samples mean + σ ε, files the draw, and returns the sample without a graph."""
        if noise not in self._sigmas:
            self._sigmas[noise] = noise.sigma
        sigma = self._sigmas[noise]
        constant = mean.detach()
        generator = self.generators.get(mean.device)
        if self.antithetic:
            half = noise.sample(constant[: len(constant) // 2], generator)
            epsilon = torch.cat((half, -half))
        else:
            epsilon = noise.sample(constant, generator)
        self.draws.append(Draw(mean, epsilon, sigma, noise))
        return constant + sigma.detach().to(mean.dtype) * epsilon
