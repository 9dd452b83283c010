"""Attacks within a budget: what an attack is, ``perturb``, which checks its images, and projected gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .input_gradient import likelihood_ratio_input_gradient, with_noise
from .scoring import LOSSES, ROWS, batch_size, margin
from .surrogates import make_surrogate
from .view import AttackableView, Target

NORMS = ("linf", "l2")
ACCESS = ("white-box", "black-box", "transfer")
RULES = ("steepest", "sa-pgd")
COUNTERFACTUAL = "counterfactual"
CONTROL = 0.5
"""λ of the counterfactual gradient: near where its variance is least, for most neurons."""
_LOOKS = 4
_FRESH = 2**32


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
        in_turn: in an evaluation it runs on the images that the attacks in turn before it left, as those of
            ``"standard"`` do; otherwise on all that are right clean, as papers report attacks.

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
    in_turn: bool = False

    def __post_init__(self) -> None:
        if self.access not in ACCESS:
            raise ValueError(f"{self.name}: unknown access {self.access!r}; choose one of {', '.join(ACCESS)}")
        if not self.norms or any(norm not in NORMS for norm in self.norms):
            raise ValueError(f"{self.name}: norms must be among {', '.join(NORMS)}, got {self.norms}")

    def passes(self, target: Target) -> float:
        """About how many forward and backward passes it takes an image, by its settings."""
        said: dict[str, Any] = {**self.settings, **self.settings.get("options", {}), **self.settings.get("descent", {})}
        draws = (said.get("draws") or target.draws) * said.get("eot_iter", 1) if target.noise else 1
        # A query has no backward pass.
        return float(draws * said.get("steps", 1) * max(1, said.get("targets", 0)) + said.get("queries", 0) / 3)


@dataclass(frozen=True)
class Procedure:
    """Base of attacks that are dataclasses of their settings; ``named`` makes an ``Attack`` of one.

    Examples:
        >>> class Darker(Procedure):
        ...     def __call__(self, target, x, y, budget, seed):
        ...         return budget.project(0 * x, x)
        >>> Darker().named("darker").access
        'black-box'
    """

    package: ClassVar[str] = "snntorch_lr"
    access: ClassVar[str] = "black-box"
    norms: ClassVar[tuple[str, ...]] = NORMS

    def __call__(self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        """Adversarial images, in the shape of x."""
        raise NotImplementedError

    def named(self, name: str) -> Attack:
        """The attack, under a name of its own."""
        settings = {"library": self.package} | asdict(self)
        with_torchattacks, with_sources = self.package == "torchattacks", self.access == "transfer"
        return Attack(name, self, settings, self.access, self.norms, with_torchattacks, with_sources)


def perturb(
    attack: Attack, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int, rows: int = 2048
) -> Tensor:
    """Adversarial images of an attack, checked: in the budget, in [0, 1], finite, of the right shape.

    torch's random state is as it was afterwards, whatever the attack did to it. An attack that failed on an image
    returns the image that it tried.

    Args:
        attack: to run.
        target: the network.
        x: images in [0, 1], ``[batch, ...]``, on the network's device.
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
    if x.dim() < 2 or len(x) != len(y):
        raise ValueError(
            f"images [batch, ...] and one label each are needed, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not len(x):
        return x.clone()
    chunk = batch_size(target, rows, max(target.draws, attack.settings.get("draws") or 1))
    parts = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
        for index, (images, labels) in enumerate(zip(torch.split(x, chunk), torch.split(y, chunk), strict=True)):
            torch.manual_seed(seed + index)
            adversarial = attack.run(target, images.detach(), labels, budget, seed + index).detach()
            _check(attack.name, adversarial, images, budget)
            parts.append(adversarial)
    return torch.cat(parts)


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
        """Keeps those of the images that have a larger margin than what is kept, or are the first."""
        margins = margins.detach().to(self.margins.dtype)
        margins = torch.where(margins.isnan(), -torch.inf, margins)
        better = (margins > self.margins) | self.margins.isneginf()
        self.images[better] = images.detach()[better]
        self.margins[better] = margins[better]


@torch.no_grad()
def worst_of(candidates: Iterable[Tensor], view: AttackableView, x: Tensor, y: Tensor, looks: int = 1) -> Tensor:
    """Of several perturbed versions of each image the one with the largest margin, by the mean of so many looks.

    Examples:
        >>> x, view = torch.tensor([[[[0.6, 0.4]]]]), AttackableView(torch.nn.Flatten())  # pixels are the logits
        >>> worst_of([x + 0.1, x.flip(3)], view, x, torch.tensor([0]))
        tensor([[[[0.4000, 0.6000]]]])
    """
    best = Best(x)
    for images in candidates:
        best.offer(images, margin(torch.stack([view(images) for _ in range(looks)]).mean(0), y))
    return best.images


@dataclass(frozen=True)
class Descent(Procedure):
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
        >>> Descent("training", steps=40)(Target(torch.nn.Flatten()), x, y, Budget(0.2), seed=0)
        tensor([[[[0.4000, 0.6000]]]])
    """

    access = "white-box"

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
        candidates = self.candidates(target, x, y, budget, seed, until_wrong=not target.noise)
        if len(candidates) == 1:
            return candidates[0]
        # Draws that no iterate has seen.
        referee = target.view(draws=self.draws, seed=seed + _FRESH)
        return worst_of(candidates, referee, x, y, _LOOKS if referee.noise else 1)

    def candidates(
        self, target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int, until_wrong: bool = False
    ) -> list[Tensor]:
        """The last iterate and the best on the way, for each class that is aimed at.

        ``until_wrong`` stops at images that have been wrong on the way: no more is to be learned if nothing is random.
        """
        generator = torch.Generator(x.device).manual_seed(seed)
        candidates = []
        for aim in self._aims(target, x, y, seed):
            gradient_and_margins = self._gradient(target, y, aim, seed)
            next_step, best = self._steps(budget), Best(x)
            z = budget.random(x, generator) if self.random_start else x.clone()
            left = torch.arange(len(x), device=x.device)
            for step in range(self.steps):
                gradient, of_left = gradient_and_margins(z[left], left)
                if step > 0 or self.random_start:
                    margins = torch.full_like(best.margins, -torch.inf)
                    margins[left] = of_left.to(margins)
                    best.offer(z, margins)
                    right = best.margins <= 0
                    if until_wrong and not bool(right.any()):
                        break
                    # These have averages for the whole batch.
                    if until_wrong and self.rule != "sa-pgd" and not self.surrogate.startswith("assg"):
                        gradient, left = gradient[right[left]], right.nonzero()[:, 0]
                z[left] = budget.project(z[left] + next_step(gradient), x[left])
            else:
                candidates.append(z)
            if self.steps > 1 or self.random_start:
                candidates.append(best.images)
        return candidates

    def _aims(self, target: Target, x: Tensor, y: Tensor, seed: int) -> list[Tensor | None]:
        if self.targets == 0:
            return [None]
        with torch.no_grad():
            logits = target.view(draws=self.draws, seed=seed)(x)
        ranked = logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
        return list(ranked[:, : min(self.targets, logits.shape[1] - 1)].unbind(1))

    def _gradient(
        self, target: Target, y: Tensor, aim: Tensor | None, seed: int
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """From images and their places in the batch to the gradient that is followed, and to their margins."""
        counterfactual = self.surrogate == COUNTERFACTUAL
        view = target.view(draws=self.draws, surrogate=None if counterfactual else self.surrogate, seed=seed)
        if counterfactual:
            noisy, seeds, copies = with_noise(target), torch.Generator().manual_seed(seed), self.draws or target.draws

            def by_likelihood_ratio(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
                draw, chunk = int(torch.randint(2**62, (), generator=seeds)), max(1, ROWS // len(z))
                gradient = likelihood_ratio_input_gradient(noisy, z, y[at], copies, self.loss, draw, chunk, CONTROL)
                with torch.no_grad():
                    return gradient, margin(view(z), y[at])

            return by_likelihood_ratio

        def by_surrogate(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            z = z.detach().requires_grad_()
            logits = view(z)
            if aim is None:
                losses = LOSSES[self.loss](logits, y[at])
            else:
                losses = (logits.gather(1, aim[at, None]) - logits.gather(1, y[at, None])).squeeze(1)
            (gradient,) = torch.autograd.grad(losses.sum(), z)
            return gradient, margin(logits, y[at])

        return by_surrogate

    def _steps(self, budget: Budget) -> Callable[[Tensor], Tensor]:
        """From the gradient to the next step, in its shape."""
        if self.rule == "sa-pgd":
            return StableAdaptiveSteps(budget.epsilon, self.steps)
        return lambda gradient: self.length * budget.epsilon * budget.steepest(gradient)


def gradient_attack(name: str, descent: Descent) -> Attack:
    """White-box attack of this package under a name of its own.

    Examples:
        >>> gradient_attack("steep", Descent("atan:8", steps=5)).settings["surrogate"]
        'atan:8'
    """
    return replace(descent.named(name), norms=("linf",) if descent.rule == "sa-pgd" else NORMS)
