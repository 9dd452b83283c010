"""The networks of the experiments, as plain snnTorch models: noise is added by ``add_noise`` like to any other."""

from __future__ import annotations

import snntorch as snn
import torch
from torch import Tensor, nn

from ..network import reset

NAMES = ("mlp", "wide-mlp", "deep-mlp", "conv")
"""Spiking networks. There is also ``"ann"``, with rectified linear units, to transfer adversarial images from."""


class SpikingClassifier(nn.Module):
    """Blocks with leaky neurons between them, and a readout by the mean membrane potential.

    The image is the constant input current of every time step (direct coding), so the first block runs once.

    Args:
        blocks: modules in front of the hidden neurons, in order.
        readout: module in front of the output neurons, which integrate and never reset.
        num_steps: time steps.
        beta: leak of all neurons.
    """

    def __init__(self, blocks: list[nn.Module], readout: nn.Module, num_steps: int = 8, beta: float = 0.9) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.neurons = nn.ModuleList(snn.Leaky(beta=beta, init_hidden=True) for _ in blocks)
        self.readout = readout
        self.output = snn.Leaky(beta=beta, init_hidden=True, output=True, reset_mechanism="none")
        self.num_steps = num_steps

    @property
    def hidden(self) -> list[str]:
        """Names of the hidden neurons: those that get noise."""
        return [f"neurons.{index}" for index in range(len(self.neurons))]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` from images ``[batch, channels, height, width]``."""
        reset(self)
        current = self.blocks[0](images)
        total = torch.zeros((), device=images.device)
        for _ in range(self.num_steps):
            spikes = self.neurons[0](current)
            for block, neuron in zip(list(self.blocks)[1:], list(self.neurons)[1:], strict=True):
                spikes = neuron(block(spikes))
            _, mem = self.output(self.readout(spikes))
            total = total + mem
        return total / self.num_steps


def build(model: str, shape: tuple[int, int, int], classes: int = 10, num_steps: int = 8) -> nn.Module:
    """A network for images of a given shape.

    Args:
        model: ``"mlp"`` (256 hidden neurons), ``"wide-mlp"`` (1000), ``"deep-mlp"`` (256 and 128), ``"conv"``
            (8 and 16 channels, 5 × 5 kernels, each with max pooling by 2), or ``"ann"`` (256 rectified linear units).
        shape: channels, height, width.
        classes: number of outputs.
        num_steps: time steps.

    Raises:
        ValueError: if the model is unknown.
    """
    channels, height, width = shape
    pixels = channels * height * width
    if model == "ann":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, classes))
    if model in ("mlp", "wide-mlp", "deep-mlp"):
        hidden = 1000 if model == "wide-mlp" else 256
        first = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden))
        if model != "deep-mlp":
            return SpikingClassifier([first], nn.Linear(hidden, classes), num_steps)
        return SpikingClassifier([first, nn.Linear(256, 128)], nn.Linear(128, classes), num_steps)
    if model == "conv":
        blocks: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(channels, 8, 5, padding=2), nn.MaxPool2d(2)),
            nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 5, padding=2)),
        ]
        features = 16 * (height // 2 // 2) * (width // 2 // 2)
        return SpikingClassifier(blocks, nn.Sequential(nn.Flatten(), nn.Linear(features, classes)), num_steps)
    raise ValueError(f"unknown model {model!r}; choose one of {', '.join(NAMES)}")
