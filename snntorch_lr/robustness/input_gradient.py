"""Likelihood-ratio gradient of the loss by the input: without a surrogate, the yardstick for those attacks follow."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from ..convert import add_noise, noise_on
from ..gradients.base import sampling
from ..gradients.counterfactual import CounterfactualCredit, check_independent
from ..network import noisy_neurons, reset, searched_once
from ..node import Control, Presentation
from ..noisy_neuron import NoisyNeuron
from ..philox import mix
from ..validate import FirstCall
from .scoring import LOSSES, margin, seeded
from .surrogates import SpikePooling
from .view import Target, device_of, evaluating

TINY = 1e-30
FIRST_COPIES, CLEAR = 32, 0.5
"""``alignment`` begins with so many noise draws, and takes more until its halves have this cosine."""
UNMATCHED_SIGMA = 0.5
"""Noise level at which a network without noise is measured."""


class _Apart(CounterfactualCredit):
    """Credit that the network's own λ neither decides nor learns from."""

    def _present(self, neuron: NoisyNeuron) -> Presentation:
        return Presentation(torch.tensor(float(self.control or 0)), self.discount, Control())


def likelihood_ratio_input_gradient(
    target: Target,
    x: Tensor,
    y: Tensor,
    copies: int = 256,
    loss: str = "cross-entropy",
    seed: int = 0,
    chunk: int = 64,
    control: float = 0.0,
) -> Tensor:
    """Gradient of the expected loss of one noise draw by each image, by the likelihood ratio: without a surrogate.

    By counterfactual credit with γ = 1, whatever gradient was chosen for the network. It is the yardstick for
    surrogates: those of a masked network do not point its way.

    Args:
        target: a network with noise in its first spiking layer.
        x: images ``[batch, ...]``.
        y: labels ``[batch]``.
        copies: noise draws of each image; the standard error falls with their root.
        loss: ``"cross-entropy"`` or ``"margin"``.
        seed: of the noise; two seeds make two independent estimates.
        chunk: draws in one forward pass.
        control: λ of counterfactual credit. A yardstick is better off with more variance than with an error of second
            order, and so has 0; an attack the other way round.

    Raises:
        ValueError: if no neuron has noise, a neuron cannot be given this gradient (LSTM cells, inhibition, spikes
            without noise in front of others), or the images do not reach the loss with a graph.

    Examples:
        >>> import snntorch_lr as slr
        >>> net = slr.Leaky(beta=0.9, init_hidden=True, noise=True)
        >>> likelihood_ratio_input_gradient(Target(net), torch.rand(5, 3), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5, 3])
    """
    net, neurons = target.net, noisy_neurons(target.net)
    if not neurons:
        raise ValueError("the likelihood-ratio gradient needs noisy neurons; this network has none")
    check_independent(net)
    view, total = target.view(draws=1), torch.zeros_like(x)
    switch = noise_on(net, torch.Generator(device_of(net)).manual_seed(seed))
    credit = sampling(neurons, _Apart(discount=1.0, control=control))
    with searched_once(net), evaluating(net), switch, credit, FirstCall(net, neurons), SpikePooling(), seeded(seed):
        for done in range(0, copies, chunk):
            reset(net)
            count = min(chunk, copies - done)
            rows = x.detach().repeat(count, *[1] * (x.dim() - 1)).requires_grad_()
            losses = LOSSES[loss](view.run(rows), y.repeat(count)).sum()
            gradient = torch.autograd.grad(losses, rows, allow_unused=True)[0] if losses.requires_grad else None
            if gradient is None:
                raise ValueError("the loss has no derivative by the images: look for a detach() or no_grad in forward=")
            total += gradient.view(count, *x.shape).sum(0)
        reset(net)
    return total / copies


def with_noise(target: Target) -> Target:
    """A target whose neurons have noise: itself, or one with a copy of its network."""
    if noisy_neurons(target.net):
        return target
    reset(target.net)
    return replace(target, net=add_noise(deepcopy(target.net), UNMATCHED_SIGMA))


def alignment(target: Target, images: Tensor, labels: Tensor, copies: int = 256, seed: int = 0) -> tuple[float, float]:
    """Cosine of the gradient through the network's own surrogate to the likelihood-ratio gradient of the margin.

    The latter is made twice: the product of the halves is its squared norm without the part that is noise, so that the
    cosine may exceed 1 by chance. The second number is the cosine between the halves: near 0, nothing can be said.
    ``copies`` bounds the noise draws; fewer are made if they tell enough.
    """
    noisy, done, more = with_noise(target), 0, min(FIRST_COPIES, copies)
    first, second = torch.zeros_like(images), torch.zeros_like(images)
    repeatability = torch.zeros(())
    while done < copies and repeatability < CLEAR:
        for half, total in enumerate((first, second)):
            draw = mix(seed, half, done)
            total += more * likelihood_ratio_input_gradient(noisy, images, labels, more, "margin", draw, chunk=128)
        power = (first * second).sum()
        repeatability = power / (first.norm() * second.norm()).clamp(min=TINY)
        done, more = done + more, min(done + more, copies - done - more)
    first, second, power = first / done, second / done, power / done**2
    x = images.detach().clone().requires_grad_()
    with seeded(seed):
        (surrogate,) = torch.autograd.grad(margin(target.view(seed=seed)(x), labels).sum(), x)
    overlap = (surrogate * (first + second) / 2).sum()
    cosine = overlap / (power.clamp(min=TINY).sqrt() * surrogate.norm()).clamp(min=TINY)
    return float(cosine), float(repeatability)
