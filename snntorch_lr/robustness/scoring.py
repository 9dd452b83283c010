"""Accuracy of a network on images, clean or attacked, with noise draws that no attack has seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..left_as_found import left_as_found
from ..noise_stream import mix
from .view import Target, device_of

ROWS = 4000
"""Images times draws that a network sees at once, by default; bounds the memory."""


@dataclass(frozen=True)
class Scores:
    """Correct predictions of a network, on the CPU.

    Attributes:
        right: True where the majority of the votes is right, ``[images]``.
        single: expected accuracy of a single noise draw: fraction of the draws that are right, ``[images]``.
    """

    right: Tensor
    single: Tensor


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with torch's global generators seeded, for networks that draw from them; their state comes back."""
    with left_as_found(random=True):
        torch.manual_seed(seed)
        yield


def score(target: Target, images: Tensor, labels: Tensor, votes: int = 32, seed: int = 0, rows: int = ROWS) -> Scores:
    """Accuracy of a network on images with fresh noise draws: of their majority, and of each draw alone.

    Each draw votes for its class; a tie goes to the class with the larger mean probability among those tied. A network
    that gives the same logits whatever the noise is run once.

    Args:
        target: the network and how it is read.
        images: ``[n, channels, height, width]`` in [0, 1].
        labels: ``[n]``.
        votes: noise draws for each image.
        seed: of the draws.
        rows: images times draws that the network sees at once.

    Raises:
        ValueError: if a label is none of the network's classes, or its output is not finite or no logits.

    Examples:
        >>> images = torch.tensor([[[[0.9, 0.2]]], [[[0.9, 0.2]]]])  # of two pixels, which are the logits
        >>> score(Target(torch.nn.Flatten()), images, torch.tensor([0, 1])).right
        tensor([ True, False])
    """
    if not len(images):
        return Scores(torch.zeros(0, dtype=torch.bool), torch.zeros(0))
    votes = votes if is_random(target, images) else 1
    right, single = [], []
    for index, (x, y) in enumerate(pieces(target, images, labels, max(1, rows // votes))):
        piece_seed = mix(seed, index)
        with torch.no_grad(), seeded(piece_seed):
            logits = target.view(draws=1, seed=piece_seed)(x.repeat(votes, *[1] * (x.dim() - 1)))
        logits = logits.view(votes, len(x), -1).float()
        classes = logits.shape[2]
        strange = y[(y < 0) | (y >= classes)]
        if len(strange):
            raise ValueError(
                f"labels must be from 0 to {classes - 1}, for the {classes} logits of an image, got {int(strange[0])}; "
                "look at the labels, and at what forward= returns"
            )
        chosen = logits.argmax(2)
        tally = torch.zeros_like(logits[0]).scatter_add_(1, chosen.T, torch.ones_like(chosen.T, dtype=logits.dtype))
        # Mean probabilities differ by less than a vote, and so decide ties only.
        right.append(((tally + logits.softmax(2).mean(0)).argmax(1) == y).cpu())
        single.append((chosen == y).double().mean(0).cpu())
    return Scores(torch.cat(right), torch.cat(single))


def is_random(target: Target, images: Tensor) -> bool:
    """True if another seed gives other logits: noise is on, or the network draws random numbers itself."""
    x = images[:8].to(device_of(target.net))
    return not torch.equal(logits_of(target, x, 1), logits_of(target, x, 2))


def logits_of(target: Target, images: Tensor, seed: int) -> Tensor:
    """Logits of a single noise draw ``[n, classes]``, with all noise frozen by the seed."""
    with torch.no_grad(), seeded(seed):
        logits: Tensor = target.view(draws=1, seed=seed)(images)
    return logits


def pieces(target: Target, images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of at most ``size`` images, on the network's device; none of no images."""
    device = device_of(target.net)
    if not len(images):
        return
    for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        yield x.to(device), y.to(device)


def batch_size(target: Target, rows: int, draws: int | None = None) -> int:
    """Number of images, each with its noise draws (the target's by default), that make that many rows; at least one."""
    return max(1, rows // ((draws or target.draws) if target.noise else 1))
