"""Networks of the experiments: dense, recurrent and convolutional, for images and recordings of any shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import snntorch as snn
from torch import Tensor, nn

from ..rollout import rollout
from .data import has_time

HIDDEN = {"mlp": (256,), "wide-mlp": (1000,), "deep-mlp": (256, 128), "spiking-mlp": (256,), "recurrent": (256,)}
"""Numbers of hidden neurons of networks without convolutions."""
SMALLEST = {"conv": 4, "event-conv": 16, "vgg": 8}
"""Convolutional networks, and the least height and width of their images, in pixels."""
MODELS = (*HIDDEN, *SMALLEST)
"""Spiking networks. There is also ``"ann"``, with rectified linear units, to transfer adversarial images from."""
SURROGATES: dict[str, Callable[[], Any]] = {
    "atan": snn.surrogate.atan, "fast-sigmoid": partial(snn.surrogate.fast_sigmoid, slope=25)
}  # fmt: skip
"""Derivatives of a spike: snnTorch's default, and that of its tutorials."""


class SpikingClassifier(nn.Module):
    """Blocks with spiking neurons between them, and a readout by the mean membrane potential or by spike counts.

    An image is the constant input current of every time step (direct coding), so the first block runs once, unless
    the module ``input`` in front of it draws noise in each time step. A recording has its own time steps.

    BatchNorm has one mean and variance for all time steps of a batch, as at test. Within ``rollout`` those of training
    are of single time steps, and the network without its running statistics is another one.

    Args:
        blocks: modules in front of the hidden neurons.
        neurons: the hidden neurons, one after each block.
        readout: the module in front of the output neurons.
        num_steps: time steps of an image; None for recordings.
        beta: leak of the output neurons.
        counts: spikes as logits; otherwise the output neurons integrate and never reset.
        spike_grad: surrogate derivative of the output neurons; snnTorch's default if None.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], neurons: Sequence[nn.Module], readout: nn.Module, num_steps: int | None = 8,
        beta: float = 0.9, counts: bool = False, spike_grad: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.neurons = nn.ModuleList(neurons)
        self.input: nn.Module = nn.Identity()
        self.readout = readout
        reset = "subtract" if counts else "none"
        self.output = snn.Leaky(beta, spike_grad=spike_grad, init_hidden=True, output=True, reset_mechanism=reset)
        self.num_steps = num_steps
        self.counts = counts
        self.normalised = any(isinstance(module, nn.BatchNorm2d) for module in self.blocks.modules())

    @property
    def spiking(self) -> list[str]:
        """Names of the neurons whose spikes count: those that get noise."""
        hidden = [f"neurons.{index}" for index in range(len(self.neurons))]
        return [*hidden, "output"] if self.counts else hidden

    def forward(self, samples: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` from images ``[batch, ...]`` or recordings ``[batch, time, ...]``."""
        value, steps = (samples.transpose(0, 1), None) if self.num_steps is None else (samples, self.num_steps)
        pairs = [*zip(self.blocks, self.neurons, strict=True)]
        layers = [self.input, *(module for pair in pairs for module in pair)]
        if self.normalised:
            value, steps, layers = rollout(nn.Sequential(self.input), value, steps), None, []
            for block, neuron in pairs:
                currents = block(value.flatten(0, 1)).unflatten(0, value.shape[:2])
                value = rollout(nn.Sequential(neuron), currents)
        spikes, mem = rollout(nn.Sequential(*layers, self.readout, self.output), value, steps)
        logits: Tensor = spikes.sum(0) if self.counts else mem.mean(0)
        return logits


def build(
    model: str, shape: tuple[int, ...], classes: int, num_steps: int = 8, surrogate: str | None = None
) -> nn.Module:
    """A network for samples of a shape, as of ``data.Dataset``.

    The models are those of ``HIDDEN``: dense networks, of which ``"spiking-mlp"`` has a readout by spike counts and
    ``"recurrent"`` a hidden layer with all-to-all connections; ``"conv"`` (8 and 16 channels, 5 × 5 kernels, each with
    max pooling by 2); ``"event-conv"`` (12 and 32 channels, the same, as in snnTorch's tutorial 7); ``"vgg"`` (six
    3 × 3 convolutions with 16 to 64 channels, each with BatchNorm); and ``"ann"`` (256 rectified linear units).

    Args:
        model: its name.
        shape: of a sample.
        classes: number of logits.
        num_steps: time steps of an image; recordings have their own.
        surrogate: one of ``SURROGATES``; None for snnTorch's default.

    Returns:
        The network.

    Raises:
        ValueError: if the model cannot take such samples.
    """
    if model == "ann":
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), 256), nn.ReLU(), nn.Linear(256, classes))
    time = has_time(shape)
    frame = shape[1:] if time else shape
    spike_grad = SURROGATES[surrogate]() if surrogate else None
    neuron = partial(snn.Leaky, spike_grad=spike_grad, init_hidden=True)
    classifier = partial(SpikingClassifier, num_steps=None if time else num_steps, spike_grad=spike_grad)
    if model in HIDDEN:
        sizes = HIDDEN[model]
        blocks: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(prod(frame), sizes[0]))]
        blocks += [nn.Linear(*pair) for pair in pairwise(sizes)]
        neurons: list[nn.Module] = [neuron(0.9) for _ in sizes]
        if model == "recurrent":
            neurons = [snn.RLeaky(0.9, linear_features=n, spike_grad=spike_grad, init_hidden=True) for n in sizes]
        return classifier(blocks, neurons, nn.Linear(sizes[-1], classes), counts=model == "spiking-mlp")
    if len(frame) != 3 or min(frame[1:]) < SMALLEST[model]:
        size = f"{SMALLEST[model]} × {SMALLEST[model]}"
        raise ValueError(
            f"the model {model} needs images or frames [channels, height, width] of at least {size} pixels, and these "
            f"samples are {[*shape]}: choose one of {', '.join(HIDDEN)}"
        )
    channels, *sides = frame
    if model == "conv":
        width, beta, sides = 16, 0.9, [side // 4 for side in sides]
        blocks = [
            nn.Sequential(nn.Conv2d(channels, 8, 5, padding=2), nn.MaxPool2d(2)),
            nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, width, 5, padding=2)),
        ]
    elif model == "event-conv":
        width, beta, sides = 32, 0.5, [((side - 4) // 2 - 4) // 2 for side in sides]
        convolutions = [nn.Conv2d(*pair, 5) for pair in pairwise((channels, 12, width))]
        # Events are few: with torch's weights hardly a neuron would fire.
        for convolution in convolutions:
            convolution.weight.data *= 3
        blocks = [nn.Sequential(convolution, nn.MaxPool2d(2)) for convolution in convolutions]
    else:
        width, beta, sides = 64, 0.5, [side // 8 for side in sides]
        blocks = []
        for number, pair in enumerate(pairwise((channels, 16, 16, 32, 32, width, width))):
            pool = [nn.AvgPool2d(2)] if number % 2 else []
            blocks.append(nn.Sequential(nn.Conv2d(*pair, 3, padding=1, bias=False), nn.BatchNorm2d(pair[1]), *pool))
    readout = nn.Sequential(nn.Flatten(), nn.Linear(width * prod(sides), classes))
    return classifier(blocks, [neuron(beta) for _ in blocks], readout, beta=beta)
