"""Certified robustness by randomized smoothing: radii within which no perturbation changes a prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import markdown, positive_integer
from ..network import left_as_found
from ..philox import mix
from .scoring import ROWS, Share, clopper_pearson, logits_of, share_of
from .view import Forward, Target, device_of, plain

ABSTAINED = -1
"""In place of a class, where the draws do not tell."""
Progress = Callable[[int, int], None]
"""Called with the number of images done, and of all."""


@dataclass(frozen=True)
class Certificate:
    """Certified predictions of a smoothed network.

    Attributes:
        sigma, draws, selection, alpha: as of ``certify``.
        predictions: classes, ``ABSTAINED`` (−1) where the draws do not tell, ``[images]``.
        radii: l2 radii within which the prediction is constant, 0 where it abstains, ``[images]``.
        right: the predictions that are right, Boolean, ``[images]``.

    Examples:
        >>> certificate = Certificate(0.5, 100, 10, 0.001, predictions=torch.tensor([3, -1]),
        ...                           radii=torch.tensor([0.4, 0.0]), right=torch.tensor([True, False]))
        >>> print(certificate.accuracy(0.25))
        50.0 ± 40.5
    """

    sigma: float
    draws: int
    selection: int
    alpha: float
    predictions: Tensor
    radii: Tensor
    right: Tensor

    def accuracy(self, radius: float = 0.0) -> Share:
        """Certified accuracy: the fraction of images that are right within an l2 radius, with its interval."""
        return share_of(self.right & (self.radii >= radius) & (self.predictions != ABSTAINED))

    def table(self, radii: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> str:
        """Certified accuracy by radius, as Markdown."""
        lines = [[f"{radius:g}", str(self.accuracy(radius))] for radius in radii]
        return markdown(["l2 radius", "certified accuracy, %"], lines)

    __str__ = table

    def to_json(self) -> dict[str, Any]:
        """Settings and results as plain numbers, ready for ``json.dump``."""
        names = ("sigma", "draws", "selection", "alpha")
        tensors = {name: getattr(self, name).tolist() for name in ("predictions", "radii", "right")}
        return {name: getattr(self, name) for name in names} | tensors


def certify(
    net: nn.Module | Target,
    loader: Iterable[tuple[Tensor, Tensor]],
    sigma: float,
    draws: int = 10_000,
    selection: int = 100,
    alpha: float = 0.001,
    forward: Forward | None = None,
    seed: int = 0,
    rows: int = ROWS,
    progress: Progress = lambda done, total: None,
) -> Certificate:
    """Certified l2 radii by randomized smoothing, which no masked gradient can fake.

    What is certified is the smoothed network: the class that most noise draws choose. No attack within the radius
    changes it, whatever it knows, except with probability ``alpha``. ``selection`` draws choose the class of each
    image, and ``draws`` others bound its probability p from below (Clopper-Pearson). If the bound is above one half,
    the radius is Φ⁻¹(p) · σ; otherwise the network abstains.

    Args:
        net: any network; its neurons' noise is off. A ``Target`` for other ways to read it.
        loader: batches of images ``[batch, ...]`` in [0, 1] and labels ``[batch]``.
        sigma: standard deviation of Gaussian noise on the input.
        draws: noise draws that bound the probability; 10,000 allow radii up to 3.2 σ, 1,000 up to 2.5 σ.
        selection: draws that choose the class.
        alpha: probability that a certificate is wrong, for each image.
        forward: as ``AttackableView``'s. It must take images outside [0, 1], which noise makes.
        seed: of the noise.
        rows: images times draws that the network sees at once.
        progress: called after each image.

    Raises:
        ValueError: if an argument is out of range, or there are no images.

    Examples:
        >>> images = torch.tensor([[[[0.9, 0.2]]], [[[0.1, 0.8]]]])  # of two pixels, which are the logits
        >>> certify(nn.Flatten(), [(images, torch.tensor([0, 1]))], sigma=0.25, draws=1000).accuracy(0.25).accuracy
        1.0

    Source: Cohen, Rosenfeld & Kolter (2019), "Certified Adversarial Robustness via Randomized Smoothing".
    """
    positive_integer("draws", draws)
    positive_integer("selection", selection)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be in (0, 0.5), got {alpha}")
    if sigma is None or not 0 < sigma < math.inf:
        raise ValueError(f"sigma, the noise on the input, must be positive and finite, got {sigma}")
    target = net if isinstance(net, Target) else Target(net, forward)
    batches = [(x.float(), torch.as_tensor(y)) for x, y in loader]
    if not batches:
        raise ValueError("the loader gives no images")
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with left_as_found(target.net, modes=True, states=True, random=True):
        predictions, radii = torch.full((len(images),), ABSTAINED), torch.zeros(len(images))
        for index, image in enumerate(images):
            own = mix(seed, index)
            chosen = int(_votes(target, image, sigma, selection, mix(own, 0), rows).argmax())
            count = int(_votes(target, image, sigma, draws, mix(own, 1), rows)[chosen])
            # Of a two-sided interval of 1 - 2 alpha, the lower end.
            low = clopper_pearson(count, draws, 1 - 2 * alpha).low
            if low > 0.5:
                predictions[index] = chosen
                radii[index] = sigma * float(torch.special.ndtri(torch.tensor(low).double()))
            progress(index + 1, len(images))
    return Certificate(sigma, draws, selection, alpha, predictions, radii, predictions == labels)


def _votes(target: Target, image: Tensor, sigma: float, draws: int, seed: int, rows: int) -> Tensor:
    """Number of draws that choose each class, ``[classes]``."""
    generator = torch.Generator(device_of(target.net)).manual_seed(seed)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        noise = torch.empty(x.shape, device=x.device).normal_(0, sigma, generator=generator)
        return (target.forward or plain)(net, x + noise)

    noisy, total = replace(target, noise=False, forward=forward), torch.zeros(())
    for done in range(0, draws, rows):
        x = image.to(device_of(target.net)).expand(min(rows, draws - done), *image.shape)
        logits = logits_of(noisy, x, mix(seed, done))
        total = total.to(logits) + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return total
