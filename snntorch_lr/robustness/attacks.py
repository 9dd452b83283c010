"""Attack and budget; ``perturb`` runs an attack and checks every image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .scoring import batch_size
from .view import Target

NORMS = ("linf", "l2")
ACCESS = ("white-box", "black-box", "transfer")


@dataclass(frozen=True)
class Budget:
    """Largest perturbation of an image with pixels in [0, 1]: ``"linf"`` of each pixel, ``"l2"`` of the whole image.

    Examples:
        >>> Budget(0.1).project(torch.tensor([[0.2, 0.9]]), torch.tensor([[0.5, 0.95]]))
        tensor([[0.4000, 0.9000]])
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


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit − the right one, ``[batch]``; positive where the prediction is wrong.

    Its gradient does not vanish where a network is sure, as that of the cross-entropy does.
    """
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": partial(F.cross_entropy, reduction="none"), "margin": margin,
}  # fmt: skip
Run = Callable[[Target, Tensor, Tensor, Budget, int], Tensor]


@dataclass(frozen=True)
class Attack:
    """Attack with its settings. A user's own attack is one such object.

    Attributes:
        name: unique within a suite.
        run: from target, images in [0, 1], labels, budget and seed to adversarial images of the same shape.
        settings: every hyper-parameter, for the report; numbers, text, lists and dicts, as JSON has them.
        access: to the network: ``"white-box"``, ``"black-box"`` or ``"transfer"``.
        norms: of the budgets that it keeps to, ``"linf"``, ``"l2"``.
        needs_torchattacks: True if it runs only with the extra ``attacks``.
        needs_sources: True if it runs only on a target with ``sources``.

    Raises:
        ValueError: if access or a norm is unknown.

    Examples:
        >>> darker = Attack("darker", lambda target, x, y, budget, seed: budget.project(0 * x, x), {}, "black-box")
    """

    name: str
    run: Run
    settings: Mapping[str, Any]
    access: str
    norms: tuple[str, ...] = ("linf",)
    needs_torchattacks: bool = False
    needs_sources: bool = False

    def __post_init__(self) -> None:
        if self.access not in ACCESS:
            raise ValueError(f"{self.name}: unknown access {self.access!r}; choose one of {', '.join(ACCESS)}")
        if not self.norms or any(norm not in NORMS for norm in self.norms):
            raise ValueError(f"{self.name}: norms must be among {', '.join(NORMS)}, got {self.norms}")


def perturb(
    attack: Attack, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int, rows: int = 2048
) -> Tensor:
    """Adversarial images of an attack, checked: in the budget, in [0, 1], finite, of the right shape.

    torch's random state is as it was afterwards, whatever the attack did to it. An attack that failed on an image
    returns the image that it tried.

    Args:
        attack: to run.
        target: the network.
        x: images in [0, 1], ``[batch, channels, height, width]``, on the network's device.
        y: labels ``[batch]``.
        budget: how far.
        seed: of everything random.
        rows: images times noise draws in one forward pass, for the memory that there is.

    Raises:
        ValueError: if the attack cannot run on this target within this budget, or images and labels do not fit.
        RuntimeError: if it returned images that it must not.

    Examples:
        >>> darker = Attack("darker", lambda target, x, y, budget, seed: budget.project(0 * x, x), {}, "black-box")
        >>> perturb(darker, Target(torch.nn.Flatten()), torch.ones(1, 1, 1, 2), torch.tensor([0]), Budget(0.1), seed=0)
        tensor([[[[0.9000, 0.9000]]]])
    """
    if budget.norm not in attack.norms:
        raise ValueError(f"{attack.name} has no {budget.norm} version")
    if attack.needs_sources and not target.sources:
        raise ValueError(f"{attack.name} needs other networks to start from (baselines)")
    if x.dim() != 4 or len(x) != len(y):
        raise ValueError(
            "images [batch, channels, height, width] and one label each are needed, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    chunk = batch_size(target, rows, max(target.draws, attack.settings.get("draws") or 1))
    parts = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
        for index, (images, labels) in enumerate(zip(torch.split(x, chunk), torch.split(y, chunk), strict=True)):
            torch.manual_seed(seed + index)
            adversarial = attack.run(target, images.detach(), labels, budget, seed + index).detach()
            _check(attack.name, adversarial, images, budget)
            parts.append(adversarial)
    return torch.cat(parts) if parts else x.clone()


def _check(name: str, adversarial: Tensor, clean: Tensor, budget: Budget) -> None:
    if adversarial.shape != clean.shape:
        raise RuntimeError(f"{name} made images of shape {tuple(adversarial.shape)} from {tuple(clean.shape)}")
    if not bool(adversarial.isfinite().all()):
        raise RuntimeError(f"{name} made images that are not finite")
    low, high = (value.item() for value in adversarial.aminmax())
    if low < -1e-6 or high > 1 + 1e-6:
        raise RuntimeError(f"{name} made images outside [0, 1]: {low:.3g} to {high:.3g}")
    size = budget.size(adversarial, clean).max().item()
    # Half precision apart, sums of images and steps are off by no more than this.
    if size > budget.epsilon + 1e-5 * math.sqrt(1 + budget.epsilon):
        raise RuntimeError(f"{name} left its budget: {budget.norm} {size:.6g} where {budget.epsilon:.6g} is allowed")
