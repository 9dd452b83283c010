"""A small spiking classifier of 6 × 6 images, and data that it gets right."""

from __future__ import annotations

from collections.abc import Callable

import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr


class SmallNet(nn.Module):
    """Linear, Leaky, Linear; logits are the mean of the readout over 5 steps."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(36, 24)
        self.lif = snn.Leaky(beta=0.9, init_hidden=True, **options)
        self.out = nn.Linear(24, 3)

    def forward(self, images: Tensor) -> Tensor:
        slr.reset(self)
        return 5 * torch.stack([self.out(self.lif(self.fc(2 * images.flatten(1)))) for _ in range(5)]).mean(0)


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def predictions(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), slr.noise_off(net):
        labels: Tensor = net(x).argmax(1)
    return labels


def counted(rows: list[int]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A ``forward`` that notes how many images it gets."""

    def forward(net: nn.Module, images: Tensor) -> Tensor:
        rows.append(len(images))
        logits: Tensor = net(images)
        return logits

    return forward
