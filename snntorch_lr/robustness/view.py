"""The network under attack: a module from images to logits, without state, and the ways to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import noise_off, noise_on
from ..gradients.base import surrogate as by_surrogate
from ..network import left_as_found, reset, searched_once
from .surrogates import SpikePooling, Surrogate, make_surrogate

Forward = Callable[[Any, Tensor], Tensor]


def plain(net: nn.Module, images: Tensor) -> Any:
    """What a network returns for images."""
    return net(images)


class AttackableView(nn.Module):
    """Module from images in [0, 1] to logits, for torchattacks and other attack libraries.

    An image is any input with values in [0, 1]: pixels, event frames ``[time, channels, height, width]``, features of
    sound ``[time, features]``.

    Each call resets every neuron's state, draws fresh noise from a generator of its own, averages the logits over the
    draws (which makes its gradient an expectation over transformations, EOT), and leaves the network as it found it. It
    always runs in evaluation mode: ``train()`` of the view, which attack libraries call, does not reach the network.
    Spikes have a surrogate gradient, whatever ``attach`` or ``use_gradient`` chose for training. Max-pooling of spikes
    is differentiated as what a flip of one spike does: torch's derivative hides the gradient. A view whose first pass
    for a gradient pools no spikes looks for none later.

    Args:
        net: the network.
        forward: called as ``forward(net, images)``; returns logits ``[batch, classes]``, or a record
            ``[time, batch, classes]`` of output spikes or membrane potentials. ``net(images)`` by default. A single
            logit ``[batch, 1]`` is that of class 1, beside a 0 of class 0.
        draws: noise draws to average over, in one batch.
        noise: neurons that have noise draw it; without noise one draw is made.
        seed: of the view's generator.
        scale: factor from a record's mean over time to logits: spike counts would saturate the softmax, rates hardly
            move it.
        surrogate: how to differentiate through the spikes, a name of ``SURROGATES`` or an object; by default as the
            network was built.

    Raises:
        ValueError: if draws is below 1 or the surrogate is unknown; at a call, if images are not in [0, 1],
            or the output of ``forward`` is no tensor, has another shape, or is not finite.

    Examples:
        >>> view = AttackableView(nn.Flatten(), lambda net, images: net(images - 0.5), draws=8)
        >>> view(torch.tensor([[[[0.9, 0.2]]]]))
        tensor([[ 0.4000, -0.3000]])
    """

    def __init__(
        self,
        net: nn.Module,
        forward: Forward | None = None,
        draws: int = 1,
        noise: bool = True,
        seed: int = 0,
        scale: float = 10.0,
        surrogate: str | Surrogate = "training",
    ) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.net = net
        self._forward = forward or plain
        self.draws = draws if noise else 1
        self.noise = noise
        self.scale = scale
        self.surrogate = make_surrogate(surrogate)
        self._generator = torch.Generator(device_of(net)).manual_seed(seed)
        self._may_pool_spikes = True

    def train(self, mode: bool = True) -> AttackableView:
        """Sets the view's own mode; the network's stays."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images ``[batch, ...]`` in [0, 1]."""
        # Attacks clamp in float32: allow for rounding, not for another normalisation.
        low, high = images.detach().aminmax()
        if not bool((low >= -1e-5) & (high <= 1 + 1e-5)):
            raise ValueError(
                f"images must be in [0, 1], got {low.item():.3g} to {high.item():.3g}; normalise inside forward="
            )
        rows = images.repeat(self.draws, *[1] * (images.dim() - 1))
        pooling = SpikePooling() if self._may_pool_spikes and torch.is_grad_enabled() else None
        with (
            searched_once(self.net),
            evaluating(self.net),
            noise_on(self.net, self._generator) if self.noise else noise_off(self.net),
            by_surrogate(self.net),
            self.surrogate.applied_to(self.net),
            pooling or nullcontext(),
        ):
            reset(self.net)
            logits = self.run(rows)
            reset(self.net)
        if pooling is not None and images.requires_grad:
            self._may_pool_spikes = pooling.met_spikes
        if logits.dim() != 2 or len(logits) != len(rows):
            raise ValueError(
                f"forward returned shape {tuple(logits.shape)} for {len(rows)} images; logits [batch, classes] or a "
                "record [time, batch, classes] are needed"
            )
        # An argmax of NaN is a class like any other, and no answer of the network.
        broken = int((~logits.isfinite()).any(1).sum())
        if broken:
            raise ValueError(
                f"forward returned NaN or infinite logits for {broken} of {len(rows)} images; look for a division by "
                "zero or the logarithm of zero in forward=, and for weights that are too large"
            )
        if images.requires_grad:
            # Attacks would fail on a network that cuts its graph: they are to see its gradient as it is, zero.
            logits = logits + 0 * rows.flatten(1).mean(1, keepdim=True).to(logits)
        return logits.view(self.draws, len(images), -1).mean(0)

    def run(self, images: Tensor) -> Tensor:
        """Logits of one pass of the network, as it is now; checks neither images nor logits."""
        # Attack libraries may pass images in another precision.
        weight = next((p for p in self.net.parameters() if p.is_floating_point()), images)
        output = self._forward(self.net, images.to(weight.dtype))
        if not isinstance(output, Tensor):
            raise ValueError(
                f"forward returned a {type(output).__name__} where logits or a record are needed; say what to read, "
                "for instance the first of (spikes, membrane potentials) by forward=lambda net, images: net(images)[0]"
            )
        logits = self.scale * output.mean(0) if output.dim() == 3 else output
        if logits.dim() == 2 and logits.shape[1] == 1:
            return torch.cat([torch.zeros_like(logits), logits], 1)
        return logits


@dataclass(frozen=True)
class Target:
    """The network under attack and how it is read, in the words of ``AttackableView``.

    ``sources`` are other networks, by name, whose adversarial images may be tried on this one.

    Examples:
        >>> Target(nn.Flatten(), draws=4).view(noise=False).draws
        1
    """

    net: nn.Module
    forward: Forward | None = None
    noise: bool = True
    draws: int = 8
    scale: float = 10.0
    sources: Mapping[str, Target] = field(default_factory=dict)

    def view(
        self,
        *,
        draws: int | None = None,
        noise: bool | None = None,
        surrogate: str | Surrogate | None = None,
        seed: int = 0,
    ) -> AttackableView:
        """The network as attacks see it; settings that are not given are those of the target."""
        draws, noise = (self.draws if draws is None else draws), (self.noise if noise is None else noise)
        return AttackableView(self.net, self.forward, draws, noise, seed, self.scale, surrogate or "training")


def device_of(net: nn.Module) -> torch.device:
    """Device of a network; the CPU for one without parameters."""
    return next((parameter.device for parameter in net.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Context in which every module of the network is in evaluation mode; each gets its own mode back."""
    with left_as_found(net, modes=True):
        if any(module.training for module in net.modules()):
            net.eval()
        yield
