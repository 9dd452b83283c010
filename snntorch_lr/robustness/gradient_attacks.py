"""White-box attacks by projected gradient: through a chosen surrogate, with the noise averaged out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .attacks import LOSSES, NORMS, Attack, Budget, margin, per_image
from .input_gradient import likelihood_ratio_input_gradient, with_noise
from .scoring import ROWS
from .surrogates import make_surrogate
from .view import AttackableView, Target

RULES = ("steepest", "sa-pgd")
COUNTERFACTUAL = "counterfactual"
CONTROL = 0.5
"""λ of the counterfactual gradient: near where its variance is least, for most neurons."""
_LOOKS = 4
_FRESH = 2**32


class StableAdaptiveSteps:
    """Steps of stable adaptive projected gradient descent (SA-PGD), for l∞.

    For the gradient g of one image: m ← 0.5 m + g / mean|g|, v ← 0.8 v + g² / mean(g²), and the step is
    clip(η m / (√v + 1e-12), −η, η). η starts at epsilon and is halved after ⌊0.22 S⌋ of S steps, then each time after
    k ← max(k − ⌊0.03 S⌋, ⌊0.06 S⌋) more. An image without a gradient adds nothing to m and v.

    Args:
        epsilon: of the budget.
        steps: S.

    Source: arXiv 2512.22522, "Towards Reliable Evaluation of Adversarial Robustness for Spiking Neural Networks".
    """

    def __init__(self, epsilon: float, steps: int) -> None:
        self.length, self.steps = epsilon, steps
        self.until_halved = self.left = max(int(0.22 * steps), 1)
        self.mean = self.square = torch.zeros(())

    def __call__(self, gradient: Tensor) -> Tensor:
        """The next step, in the shape of the gradient."""
        if self.left == 0:
            self.length /= 2
            self.until_halved = max(self.until_halved - int(0.03 * self.steps), int(0.06 * self.steps), 1)
            self.left = self.until_halved
        self.left -= 1
        # Both quotients are those of the gradient over its largest element, whose square cannot underflow.
        g = gradient / per_image(gradient.flatten(1).abs().amax(1).clamp(min=1e-30), gradient)
        size = per_image(g.flatten(1).abs().mean(1), g)
        power = per_image(g.flatten(1).square().mean(1), g)
        self.mean = 0.5 * self.mean.to(g) + torch.where(size > 0, g / size, 0)
        self.square = 0.8 * self.square.to(g) + torch.where(power > 0, g.square() / power, 0)
        return (self.length * self.mean / (self.square.sqrt() + 1e-12)).clamp(-self.length, self.length)


class Best:
    """The perturbed version of each image with the largest margin."""

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.margins = torch.full((len(clean),), -torch.inf, device=clean.device)

    def offer(self, images: Tensor, margins: Tensor) -> None:
        """Takes those images that are better than what is kept, or the first."""
        margins = margins.detach().to(self.margins.dtype)
        margins = torch.where(margins.isnan(), -torch.inf, margins)
        better = (margins > self.margins) | self.margins.isneginf()
        self.images[better] = images.detach()[better]
        self.margins[better] = margins[better]


@dataclass(frozen=True)
class Descent:
    """Projected gradient attack through a surrogate, with the logits averaged over noise draws (EOT-PGD).

    Image by image it returns the last iterate or the one with the largest margin on the way, whichever has the larger
    one in four more looks: what looked best among many noisy looks may only have been lucky. Never the clean image.

    Attributes:
        surrogate: as ``make_surrogate`` takes it; made afresh for each run. ``"counterfactual"`` for the gradient of
            ``likelihood_ratio_input_gradient``, which goes through no surrogate and which no surrogate can mask.
        loss: to ascend: ``"cross-entropy"``, ``"margin"``.
        steps: number of steps.
        draws: noise draws of each step; None for the target's.
        length: of a step, as a share of the budget's epsilon.
        rule: ``"steepest"``, along the sign of the gradient for l∞ and its direction for l2; or ``"sa-pgd"`` for
            ``StableAdaptiveSteps``, which sets its own length.
        random_start: start at a random image within the budget, instead of the clean one.
        targets: number of wrong classes to aim at, one after the other from the likeliest, with the margin of that
            class over the right one as the loss; 0 for any wrong class, with ``loss``.

    Source: Athalye, Carlini & Wagner (2018), "Obfuscated Gradients Give a False Sense of Security", for the expectation
    over draws; Gowal et al. (2019), "An Alternative Surrogate Loss for PGD-based Adversarial Testing", for targets.

    Examples:
        >>> x, y = torch.tensor([[[[0.6, 0.4]]]]), torch.tensor([0])  # of two pixels, which are the logits
        >>> Descent("training", steps=40)(Target(nn.Flatten()), x, y, Budget(0.2), seed=0)
        tensor([[[[0.4000, 0.6000]]]])
    """

    surrogate: str = "training"
    loss: str = "cross-entropy"
    steps: int = 20
    draws: int | None = None
    length: float = 0.25
    rule: str = "steepest"
    random_start: bool = True
    targets: int = 0

    def __post_init__(self) -> None:
        if self.surrogate != COUNTERFACTUAL:
            make_surrogate(self.surrogate)
        elif self.targets:
            raise ValueError("the counterfactual gradient takes no targets: use the loss 'margin'")
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; choose one of {', '.join(LOSSES)}")
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; choose one of {', '.join(RULES)}")
        if self.steps < 1 or self.length <= 0 or self.targets < 0:
            raise ValueError("steps must be at least 1, length positive and targets not negative")

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
        generator = torch.Generator(x.device).manual_seed(seed)
        # Draws that the iterates have not seen.
        referee, chosen = target.view(draws=self.draws, seed=seed + _FRESH), Best(x)
        for aim in self._aims(target, x, y, seed):
            counterfactual = self.surrogate == COUNTERFACTUAL
            find = self._counterfactual(target, seed) if counterfactual else self._differentiated
            surrogate = None if counterfactual else self.surrogate
            view = target.view(draws=self.draws, surrogate=surrogate, seed=seed)
            steps, passed = self._steps(budget), Best(x)
            z = budget.random(x, generator) if self.random_start else x.clone()
            for step in range(self.steps):
                gradient, margins = find(view, z, y, aim)
                if step > 0 or self.random_start:
                    passed.offer(z, margins)
                z = budget.project(z + steps(gradient), x)
            chosen.offer(z, _settled_margin(referee, z, y))
            if self.steps > 1 or self.random_start:
                chosen.offer(passed.images, _settled_margin(referee, passed.images, y))
        return chosen.images

    def _aims(self, target: Target, x: Tensor, y: Tensor, seed: int) -> list[Tensor | None]:
        if self.targets == 0:
            return [None]
        with torch.no_grad():
            logits = target.view(draws=self.draws, seed=seed)(x)
        ranked = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
        return list(ranked[:, : min(self.targets, logits.shape[1] - 1)].unbind(1))

    def _counterfactual(self, target: Target, seed: int) -> Callable[..., tuple[Tensor, Tensor]]:
        noisy, seeds = with_noise(target), torch.Generator().manual_seed(seed)

        def find(view: nn.Module, z: Tensor, y: Tensor, aim: None) -> tuple[Tensor, Tensor]:
            draw, chunk = int(torch.randint(2**62, (), generator=seeds)), max(1, ROWS // len(z))
            copies = self.draws or target.draws
            gradient = likelihood_ratio_input_gradient(noisy, z, y, copies, self.loss, draw, chunk, CONTROL)
            with torch.no_grad():
                return gradient, margin(view(z), y)

        return find

    def _differentiated(self, view: nn.Module, z: Tensor, y: Tensor, aim: Tensor | None) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        logits = view(z)
        if aim is None:
            losses = LOSSES[self.loss](logits, y)
        else:
            losses = (logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        return gradient, margin(logits, y)

    def _steps(self, budget: Budget) -> Callable[[Tensor], Tensor]:
        """From the gradient to the next step, in its shape."""
        if self.rule == "sa-pgd":
            return StableAdaptiveSteps(budget.epsilon, self.steps)
        return lambda gradient: self.length * budget.epsilon * budget.steepest(gradient)


@torch.no_grad()
def _settled_margin(view: AttackableView, x: Tensor, y: Tensor) -> Tensor:
    looks = _LOOKS if view.noise else 1
    return margin(torch.stack([view(x) for _ in range(looks)]).mean(0), y)


def gradient_attack(name: str, descent: Descent) -> Attack:
    """White-box attack of this package under a name of its own.

    Examples:
        >>> gradient_attack("steep", Descent("atan:8", steps=5)).settings["surrogate"]
        'atan:8'
    """
    norms = ("linf",) if descent.rule == "sa-pgd" else NORMS
    return Attack(name, descent, {"library": "snntorch_lr"} | asdict(descent), "white-box", norms)
