"""Training runs: a recipe decides what one computes; network, noise, optimizer and loop follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._files import load, save
from .._messages import warn
from ..calibration import anneal
from ..convert import add_noise, noise_gap, noise_on
from ..gradients import ESTIMATORS
from ..network import noises
from ..noise import KINDS, NoisyInput
from ..optim import attach, closure
from ..robustness import Budget, Descent, Target, gradient_attack, perturb
from . import data
from .data import Dataset
from .models import MODELS, SURROGATES, SpikingClassifier, build
from .options import Options, option

METHODS = ("surrogate", "surrogate, noise", "likelihood ratio")
FITTING = {
    "cifar10": "vgg", "folder": "vgg", "nmnist": "event-conv", "dvs-gesture": "event-conv", "shd": "recurrent"
}  # fmt: skip
"""Models by data set; ``"mlp"`` for the others."""
CHECKS = 20
"""Times in an epoch at which a run with ``stop_at`` looks at its validation accuracy."""
Step = Callable[[Tensor, Tensor], float]
# An option of plans, and not of the command line.
_planned = partial(option, offered=False)
# Errors of a checkpoint that lacks something, or has something else in its place.
_INCOMPLETE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """Everything that decides what a training run computes; ``help`` of a field says what it is.

    Raises:
        ValueError: if it cannot be trained.
    """

    noise: str = option("membrane", "kind of the noise of the hidden neurons", choices=KINDS)
    distribution: str = option("gaussian", "gaussian, logistic; membrane noise also laplace")
    sigma: float = option(0.5, "initial noise level of the hidden neurons")
    dataset: str = option("digits", "data set, digits without a download", choices=data.NAMES)
    model: str = option(None, "network; by default one that fits the data set", choices=(*MODELS, "ann"))
    epochs: int = option(None, "passes over the data; 20 for digits, 4 otherwise", least=1)
    copies: int = option(None, "noise copies of each sample; 1 for counterfactual, else 16", least=1)
    seed: int = option(0, "of everything random")
    estimator: str = option("counterfactual", "estimator of the likelihood ratio", choices=ESTIMATORS)
    learning_rate: float = option(1e-3, "of Adam, for all networks; falls to 0 along a cosine", above=0)
    anneal: float | None = option(
        None, "fraction of the noise levels that is left at the end; by default they do not fall", above=0, most=1
    )
    method: str = _planned(
        help="surrogate gradients without noise, the same with that of the likelihood ratio, or the likelihood ratio",
        choices=METHODS,
    )
    num_steps: int = _planned(None, "time steps of images; recordings have their own; 4 for vgg, else 8", least=1)
    batch_size: int = _planned(128, "images per step", least=1)
    validation: int = _planned(0, "training images held out to choose by, drawn by the seed", least=0)
    stop_at: float | None = _planned(None, "validation accuracy, noise off, at which training stops")
    decay: float = _planned(0.0, "decoupled decay of the first block's weights, in learning rates", least=0)
    input_noise: float = _planned(0.0, "initial level of Gaussian noise on the input; 0 for none", least=0)
    input_noise_each_step: bool = _planned(False, "draw it in each time step, in place of once for each presentation")
    learn_input_noise: bool = _planned(False, "learn its level, down to half of where it starts")
    adversary: float = _planned(0.0, "l∞ budget of adversarial examples in place of images; 0 for none", least=0)
    # Shafahi et al. (2019), "Adversarial Training for Free!".
    free: int = _planned(0, "updates of each batch, whose gradients make the next examples; 0 for an attack", least=0)
    learn_sigma: bool = _planned(True, "noise levels are learned")
    surrogate: str | None = _planned(
        None, "derivative of a spike in surrogate gradients; snnTorch's default is atan", choices=SURROGATES
    )
    late_copies: int = _planned(0, "noise copies once the learning rate has fallen by half; 0 for as before", least=0)

    def __post_init__(self) -> None:
        model = self.model or FITTING.get(str(self.dataset), "mlp")
        defaults = {
            "model": model,
            "epochs": 20 if self.dataset == "digits" else 4,
            "copies": 1 if self.estimator == "counterfactual" else 16,
            "num_steps": 4 if model == "vgg" else 8,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        KINDS[self.noise](self.sigma, distribution=self.distribution)
        silent = self.method == "surrogate" and not self.input_noise
        for wrong, message in (
            (self.late_copies and self.method != "likelihood ratio",
             f"late_copies needs the method likelihood ratio, got {self.method}"),
            (self.surrogate and self.method == "likelihood ratio",
             "surrogate is for the methods surrogate and surrogate, noise: the likelihood ratio has none"),
            (self.free and not self.adversary, "free needs the budget of an adversary"),
            (self.model == "ann" and not silent,
             "the model ann has no spiking neurons: use the method surrogate, without noise"),
            (self.stop_at is not None and not self.validation,
             "stop_at needs validation images, so that the test images decide nothing"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Recipe:
        """The recipe among values; of those that an earlier version saved, nobody used the others."""
        return cls(**{field.name: values[field.name] for field in fields(Recipe) if field.name in values})


def make_network(recipe: Recipe, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The untrained network of a recipe; networks of the same seed start from the same weights."""
    torch.manual_seed(recipe.seed)
    net = build(recipe.model, shape, classes, recipe.num_steps, recipe.surrogate)
    if recipe.input_noise and isinstance(net, SpikingClassifier):
        frozen = not recipe.input_noise_each_step
        net.input = NoisyInput(recipe.input_noise, recipe.learn_input_noise, frozen=frozen)
    if recipe.method == "surrogate" or not isinstance(net, SpikingClassifier):
        return net
    add_noise(net, recipe.sigma, recipe.learn_sigma, net.spiking, recipe.noise, recipe.distribution)
    return net


def make_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    """Adam, with decoupled decay of the first block's weights if the recipe has any."""
    first = [p for name, p in net.named_parameters() if name.startswith("blocks.0.") and p.dim() > 1]
    rest = [p for p in net.parameters() if all(p is not other for other in first)]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": first, "weight_decay": recipe.decay}]
    return torch.optim.AdamW([group for group in groups if group["params"]], recipe.learning_rate, weight_decay=0.0)


def noise_levels(net: nn.Module) -> dict[str, list[float]]:
    """Noise levels σ by neuron and input, as plain numbers."""
    levels = {name: noise.sigma.detach().flatten().tolist() for name, noise in noises(net).items()}
    return {name.removesuffix(".noise"): level for name, level in levels.items()}


def load_trained(checkpoint: Path) -> tuple[Recipe, nn.Module]:
    """Recipe and network of a checkpoint."""
    state = load(checkpoint)
    try:
        recipe = Recipe.of(state["recipe"])
        # Earlier versions had images of ten classes alone.
        net = make_network(recipe, tuple(state["shape"]), state.get("classes", 10))
        net.load_state_dict(state["net"])
    except _INCOMPLETE as error:
        raise _not_a_checkpoint(checkpoint, error) from error
    return recipe, net


def _not_a_checkpoint(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a checkpoint of reproduce ({type(error).__name__})")


@dataclass
class Trained:
    """A trained network and its history, one entry for each epoch.

    An entry has epoch (a fraction where training stopped within one), train_loss, test_accuracy (noise off), seconds,
    and noisy_test_accuracy (noise on, one draw) of networks with noise.
    """

    net: nn.Module
    history: list[dict[str, float]]

    @property
    def seconds_per_epoch(self) -> float:
        """Mean training time of an epoch, without the test."""
        return sum(entry["seconds"] for entry in self.history) / self.history[-1]["epoch"]


def right(net: nn.Module, images: Tensor, labels: Tensor, noise: bool = False, batch_size: int = 1000) -> Tensor:
    """Images that the network classifies correctly in evaluation mode, without or with its noise, ``[images]``."""
    was_training = net.training
    net.eval()
    with torch.no_grad(), noise_on(net) if noise else nullcontext():
        masks = [
            net(x).argmax(1) == y
            for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        ]
    net.train(was_training)
    return torch.cat(masks)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of images that the network classifies correctly, in evaluation mode (noise off)."""
    return float(right(net, images, labels).double().mean())


def split(recipe: Recipe, images: Dataset) -> tuple[Tensor, Tensor]:
    """Rows of the training images to train on, and those held out; the same for all recipes of a seed."""
    if not 0 <= recipe.validation < len(images.train):
        raise ValueError(f"validation must be in [0, {len(images.train)}), got {recipe.validation}")
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(recipe.seed))
    order = order.to(images.train.device)
    return order[recipe.validation :].sort().values, order[: recipe.validation]


def validation_accuracy(net: nn.Module, recipe: Recipe, images: Dataset) -> float:
    """Accuracy on the training images that were held out, noise off."""
    _, held_out = split(recipe, images)
    return accuracy(net, images.train[held_out], images.train_labels[held_out])


def train(
    recipe: Recipe,
    images: Dataset,
    checkpoint: Path,
    device: torch.device,
    resume: bool = False,
    after_epoch: Callable[[dict[str, float], nn.Module], None] = lambda entry, net: None,
) -> Trained:
    """Trains a network, or goes on from its checkpoint, which is written after each epoch.

    The random numbers of an epoch depend on the seed and the epoch alone, so that an interrupted and resumed run ends
    with the same weights as one that was not interrupted. A warning says at the end if the network is another one
    without its noise.

    Raises:
        ValueError: if the recipe cannot be trained, or the checkpoint was written with other settings.
    """
    images = images.to(device)
    net = make_network(recipe, images.shape, images.classes).to(device)
    optimizer = make_optimizer(recipe, net)
    rows, _ = split(recipe, images)
    steps = -(-len(rows) // recipe.batch_size)
    schedules: dict[str, Any] = {
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    }
    if recipe.anneal is not None and noises(net):
        schedules["anneal"] = anneal(net, recipe.epochs * steps, recipe.anneal)
    parts = {"net": net, "optimizer": optimizer, **schedules}
    history: list[dict[str, float]] = []
    stopped = False
    if resume and checkpoint.exists():
        history, stopped = _go_on(checkpoint, recipe, parts)
    take_step = stepper(recipe, net, optimizer)
    tests: dict[str, Tensor] = {}
    while len(history) < recipe.epochs and not stopped:
        epoch = len(history)
        torch.manual_seed(1_000_003 * (recipe.seed + 1) + epoch)
        order = rows[torch.randperm(len(rows)).to(device)]
        started, losses = time.perf_counter(), []
        for step, batch in enumerate(torch.split(order, recipe.batch_size), start=1):
            losses.append(take_step(images.train[batch], images.train_labels[batch]) * len(batch))
            for schedule in schedules.values():
                schedule.step()
            looks = step == steps or step % max(1, steps // CHECKS) == 0
            if recipe.stop_at is not None and looks:
                stopped = validation_accuracy(net, recipe, images) >= recipe.stop_at
            if stopped:
                break
        seconds = time.perf_counter() - started
        tests = {"test_accuracy": right(net, images.test, images.test_labels)}
        if noises(net):
            tests["noisy_test_accuracy"] = right(net, images.test, images.test_labels, noise=True)
        entry = {
            "epoch": epoch + 1 if step == steps else epoch + step / steps,
            "train_loss": sum(losses) / min(step * recipe.batch_size, len(rows)),
            **{name: float(test.double().mean()) for name, test in tests.items()},
            "seconds": seconds,
        }
        history.append(entry)
        about = {"recipe": asdict(recipe), "shape": list(images.shape), "classes": images.classes}
        states = {name: part.state_dict() for name, part in parts.items()}
        save(checkpoint, about | {"history": history, "stopped": stopped} | states)
        after_epoch(entry, net)
    off, on = tests.get("test_accuracy"), tests.get("noisy_test_accuracy")
    # A single draw that costs accuracy is nothing to mend.
    if off is not None and on is not None and off.sum() < on.sum() and (gap := noise_gap(off, on)):
        warn(f"{checkpoint.stem}: {gap}")
    return Trained(net, history)


def stepper(recipe: Recipe, net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """One update from a batch, by the method of the recipe; returns the mean loss."""

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    def loop(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = losses(x, y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    def by_copies(x: Tensor, y: Tensor) -> float:
        if optimizer.param_groups[0]["lr"] < recipe.learning_rate / 2:
            hook.estimator = estimators[-1]
        return float(optimizer.step(closure(losses, x, y)))

    step = loop
    if recipe.method == "likelihood ratio":
        counts = [copies for copies in (recipe.copies, recipe.late_copies) if copies]
        estimators = [ESTIMATORS[recipe.estimator](net, copies=copies) for copies in counts]
        hook = attach(optimizer, net, estimators[0])
        step = loop if recipe.estimator == "counterfactual" and counts == [1] else by_copies
    return _disturbed(recipe, net, step) if recipe.adversary else step


def _disturbed(recipe: Recipe, net: nn.Module, step: Step) -> Step:
    """A step from adversarial images in place of clean ones."""
    epsilon = recipe.adversary
    target = Target(net, noise=True, draws=1)
    attack = gradient_attack("adversary", Descent("training", steps=7, length=0.25))

    def attacked(x: Tensor, y: Tensor) -> float:
        seed = int(torch.randint(2**31, ()))
        return step(perturb(attack, target, x, y, Budget(epsilon), seed, len(x)), y)

    def free(x: Tensor, y: Tensor) -> float:
        moved, loss = torch.empty_like(x).uniform_(-epsilon, epsilon), 0.0
        for _ in range(recipe.free):
            images = (x + moved).clamp(0, 1).requires_grad_()
            loss = step(images, y)
            assert images.grad is not None
            moved = (moved + epsilon * images.grad.sign()).clamp(-epsilon, epsilon)
        return loss

    return free if recipe.free else attacked


def _go_on(checkpoint: Path, recipe: Recipe, parts: dict[str, Any]) -> tuple[list[dict[str, float]], bool]:
    """Puts the states of a checkpoint into the parts of a run; returns its history, and whether it has stopped."""
    state = load(checkpoint)
    try:
        saved = state["recipe"]
        different = [f"{k}={saved.get(k)!r} (now {v!r})" for k, v in asdict(recipe).items() if saved.get(k) != v]
        if not different:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            return state["history"], state.get("stopped", False)
    except _INCOMPLETE as error:
        raise _not_a_checkpoint(checkpoint, error) from error
    raise ValueError(
        f"{checkpoint} was written with {', '.join(different)}; use the same settings, or another --out directory"
    )
