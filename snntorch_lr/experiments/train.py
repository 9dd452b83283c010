"""Training by a recipe, with a checkpoint after each epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import save
from .._messages import warn
from ..anneal import anneal, noise_gap
from ..convert import noise_on
from ..gradients import ESTIMATORS
from ..network import noises
from ..objectives import OBJECTIVES
from ..optim import attach, closure
from ..robustness import Budget, Descent, Target, gradient_attack, perturb
from . import files
from .data import Images
from .recipe import INCOMPLETE, Recipe, check_recipe, make_network, make_optimizer

CHECKS = 20
"""Times in an epoch at which a run with ``stop_at`` looks at its validation accuracy."""
Step = Callable[[Tensor, Tensor], float]


class Observer:
    """Watches a training, and does nothing."""

    def after_step(self, done: int, loss: float) -> None:
        """Called after each step with the number of steps done, resumed ones included, and the loss."""

    def after_epoch(self, entry: dict[str, float], net: nn.Module) -> None:
        """Called after each epoch, when its checkpoint is written, with its entry of the history."""


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
        found = [
            net(x).argmax(1) == y
            for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        ]
    net.train(was_training)
    return torch.cat(found)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of images that the network classifies correctly, in evaluation mode (noise off)."""
    return float(right(net, images, labels).double().mean())


def split(recipe: Recipe, images: Images) -> tuple[Tensor, Tensor]:
    """Rows of the training images to train on, and those held out; the same for all recipes of a seed."""
    if not 0 <= recipe.validation < len(images.train):
        raise ValueError(f"validation must be in [0, {len(images.train)}), got {recipe.validation}")
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(recipe.seed))
    order = order.to(images.train.device)
    return order[recipe.validation :].sort().values, order[: recipe.validation]


def validation_accuracy(net: nn.Module, recipe: Recipe, images: Images) -> float:
    """Accuracy on the training images that were held out, noise off."""
    _, held_out = split(recipe, images)
    return accuracy(net, images.train[held_out], images.train_labels[held_out])


def train(
    recipe: Recipe,
    images: Images,
    checkpoint: Path,
    device: torch.device,
    resume: bool = False,
    after_step: Callable[[int, float], None] = lambda done, loss: None,
    after_epoch: Callable[[dict[str, float], nn.Module], None] = lambda entry, net: None,
) -> Trained:
    """Trains a network, or goes on from its checkpoint, which is written after each epoch.

    The random numbers of an epoch depend on the seed and the epoch alone, so that an interrupted and resumed run ends
    with the same weights as one that was not interrupted. A warning says at the end if the network is another one
    without its noise.

    Raises:
        ValueError: if the recipe cannot be trained, or the checkpoint was written with other settings.
    """
    check_recipe(recipe)
    images = images.to(device)
    net = make_network(recipe, images.shape).to(device)
    optimizer = make_optimizer(recipe, net)
    rows, _ = split(recipe, images)
    steps = -(-len(rows) // recipe.batch_size)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer}
    parts["schedule"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    schedules = [parts["schedule"]]
    if recipe.anneal is not None and noises(net):
        parts["anneal"] = anneal(net, recipe.epochs * steps, recipe.anneal)
        schedules.append(parts["anneal"])
    history: list[dict[str, float]] = []
    stopped = False
    if resume and checkpoint.exists():
        state = _matching(checkpoint, recipe)
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            history, stopped = state["history"], state.get("stopped", False)
        except INCOMPLETE as error:
            raise ValueError(f"{checkpoint} is not a checkpoint of reproduce ({type(error).__name__})") from error
    take_step = stepper(recipe, net, optimizer)
    tests: list[Tensor] = []
    while len(history) < recipe.epochs and not stopped:
        epoch = len(history)
        torch.manual_seed(1_000_003 * (recipe.seed + 1) + epoch)
        order = rows[torch.randperm(len(rows)).to(device)]
        started, losses = time.perf_counter(), []
        for step, batch in enumerate(torch.split(order, recipe.batch_size), start=1):
            losses.append(take_step(images.train[batch], images.train_labels[batch]) * len(batch))
            for schedule in schedules:
                schedule.step()
            after_step(epoch * steps + step, losses[-1] / len(batch))
            looks = step == steps or step % max(1, steps // CHECKS) == 0
            if recipe.stop_at is not None and looks:
                stopped = validation_accuracy(net, recipe, images) >= recipe.stop_at
            if stopped:
                break
        seconds = time.perf_counter() - started
        switches = (False, True) if noises(net) else (False,)
        tests = [right(net, images.test, images.test_labels, noise) for noise in switches]
        measured = [float(test.double().mean()) for test in tests]
        entry = {
            "epoch": epoch + 1 if step == steps else epoch + step / steps,
            "train_loss": sum(losses) / min(step * recipe.batch_size, len(rows)),
            **dict(zip(("test_accuracy", "noisy_test_accuracy"), measured, strict=False)),
            "seconds": seconds,
        }
        history.append(entry)
        about = {"recipe": asdict(recipe), "shape": list(images.shape), "history": history, "stopped": stopped}
        save(checkpoint, about | {name: part.state_dict() for name, part in parts.items()})
        after_epoch(entry, net)
    # A single draw that costs accuracy is nothing to mend.
    gap = noise_gap(*tests) if len(tests) == 2 and tests[0].sum() < tests[1].sum() else None
    if gap is not None:
        warn(f"{checkpoint.stem}: {gap}")
    return Trained(net, history)


def stepper(recipe: Recipe, net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """One update from a batch, by the method of the recipe; returns the mean loss."""
    objective = OBJECTIVES[recipe.objective]

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return objective(net(x), y)

    def loop(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_fn(x, y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    if recipe.method != "likelihood ratio":
        return _disturbed(recipe, net, loop)
    counts = [copies for copies in (recipe.copies, recipe.late_copies) if copies]
    estimators = [ESTIMATORS[recipe.estimator](net, copies=copies) for copies in counts]
    hook = attach(optimizer, net, estimators[0])
    if recipe.estimator == "counterfactual" and counts == [1]:
        return _disturbed(recipe, net, loop)

    def by_copies(x: Tensor, y: Tensor) -> float:
        if optimizer.param_groups[0]["lr"] < recipe.learning_rate / 2:
            hook.estimator = estimators[-1]
        return float(optimizer.step(closure(loss_fn, x, y)))

    return _disturbed(recipe, net, by_copies)


def _disturbed(recipe: Recipe, net: nn.Module, step: Step) -> Step:
    """A step from adversarial images in place of clean ones, if the recipe asks for that."""
    if not recipe.adversary:
        return step
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


def _matching(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    state = files.load_checkpoint(checkpoint)
    wanted, found = asdict(recipe), state.get("recipe", {})
    different = [f"{key}={found.get(key)!r} (now {wanted[key]!r})" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{checkpoint} was written with {', '.join(different)}; use the same settings, or another --out directory"
        )
    return state
