"""The experiments of this package: training, evaluation, and the command ``snntorch-lr``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_FOLDER = Path(__file__).parent / "networks"
NETWORKS = dict(sorted((f"{path.parent.name}/{path.stem}", path) for path in _FOLDER.glob("*/*.pt")))
"""Trained networks that come with the package, by name."""


def load(name: str) -> nn.Module:
    """A trained network of the study, to be attacked: logits ``[batch, classes]`` from images in [0, 1].

    Args:
        name: one of ``NETWORKS``.

    Returns:
        The network in evaluation mode, noise off.

    Raises:
        ValueError: if there is no such network.

    Examples:
        >>> net = load("mnist/lr-noisy-input")
        >>> net(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    from .train import load_trained

    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; choose one of {', '.join(NETWORKS)}")
    return load_trained(NETWORKS[name])[1].eval()
