"""How far an attack may move an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Budget:
    """Largest perturbation of an image with pixels in [0, 1].

    Attributes:
        epsilon: radius, positive.
        norm: ``"linf"``, of each pixel, or ``"l2"``, of the whole image.

    Raises:
        ValueError: if epsilon is not positive and finite, or the norm is unknown.
    """

    epsilon: float
    norm: str = "linf"

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; choose one of {', '.join(NORMS)}")

    def size(self, images: Tensor, clean: Tensor) -> Tensor:
        """Distance of each image from its clean one in this norm, ``[batch]``."""
        delta = (images - clean).flatten(1)
        return delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Images moved back into the budget, then into [0, 1], which never leads out of the budget again."""
        delta = images - clean
        if self.norm == "linf":
            delta = delta.clamp(-self.epsilon, self.epsilon)
        else:
            delta = delta * (self.epsilon / per_image(delta.flatten(1).norm(dim=1), delta)).clamp(max=1)
        return (clean + delta).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The step of length 1 in this norm that follows the gradient best; zero where the gradient is."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / per_image(gradient.flatten(1).norm(dim=1).clamp(min=1e-30), gradient)

    def random(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Random images within the budget: uniform in the ball, then clipped to [0, 1]."""
        noise = torch.empty_like(clean)
        if self.norm == "linf":
            return self.project(clean + noise.uniform_(-self.epsilon, self.epsilon, generator=generator), clean)
        direction = self.steepest(noise.normal_(generator=generator))
        radius = torch.rand(len(clean), generator=generator, device=clean.device) ** (1 / clean[0].numel())
        return self.project(clean + self.epsilon * direction * per_image(radius, clean), clean)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Values ``[batch]`` in a shape that broadcasts against images ``[batch, ...]``."""
    return values.view(-1, *[1] * (images.dim() - 1))
