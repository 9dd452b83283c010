"""Training of one network, by surrogate gradients or by the likelihood ratio, with a checkpoint after each epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convert import add_noise
from ..distributed import share
from ..optim import ESTIMATORS, attach, closure
from . import files, models
from .data import Images
from .ranks import ALONE, Ranks

METHODS = ("surrogate", "surrogate, noise", "likelihood ratio")
Progress = Callable[[int, float], None]
"""Called after each step with the number of steps done, resumed ones included, and the loss."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes.

    Attributes:
        method: one of ``METHODS``: surrogate-gradient backpropagation without noise, the same with the noise of the
            likelihood-ratio network, and the likelihood ratio.
        dataset: name of the data set.
        model: name of the network.
        epochs: passes over the training images.
        copies: noise copies of each sample, for the likelihood ratio.
        seed: of weights, order of the images, and noise.
        num_steps: time steps.
        estimator: of the likelihood ratio, ``"vanilla"`` or ``"approximate"``.
        noise: kind of the noise of the hidden neurons, ``"membrane"`` or ``"escape"``.
        distribution: of the noise.
        sigma: initial noise level of the hidden neurons.
        batch_size: images per step.
        learning_rate: of Adam, falling to zero along a cosine.
    """

    method: str
    dataset: str
    model: str
    epochs: int
    copies: int
    seed: int
    estimator: str = "vanilla"
    noise: str = "membrane"
    distribution: str = "gaussian"
    num_steps: int = 8
    sigma: float = 0.5
    batch_size: int = 128
    learning_rate: float = 1e-3


@dataclass
class Trained:
    """A trained network and its history: one entry for each epoch.

    Attributes:
        net: the network.
        history: epoch, train_loss, test_accuracy (noise off), seconds.
    """

    net: models.SpikingClassifier
    history: list[dict[str, float]]

    @property
    def seconds_per_epoch(self) -> float:
        """Median training time of an epoch, without the test."""
        return float(torch.tensor([epoch["seconds"] for epoch in self.history]).median())


def make_network(recipe: Recipe, shape: tuple[int, int, int]) -> models.SpikingClassifier:
    """The untrained network of a recipe; networks of the same seed start from the same weights."""
    torch.manual_seed(recipe.seed)
    net = models.build(recipe.model, shape, num_steps=recipe.num_steps)
    if recipe.method != "surrogate":
        add_noise(net, recipe.sigma, only=net.hidden, kind=recipe.noise, distribution=recipe.distribution)
    return net


def accuracy(net: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 1000) -> float:
    """Fraction of images that the network classifies correctly, in evaluation mode (noise off)."""
    was_training = net.training
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(x).argmax(1) == y).sum())
            for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        )
    net.train(was_training)
    return right / len(images)


def train(
    recipe: Recipe,
    images: Images,
    checkpoint: Path,
    device: torch.device,
    resume: bool = False,
    progress: Progress = lambda done, loss: None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Trains a network, or goes on from its checkpoint.

    The random numbers of an epoch depend on the seed and the epoch alone, so that an interrupted and resumed run ends
    with the same weights as one that was not interrupted, and one shared by ranks with those of one process (up to the
    rounding of sums).

    Args:
        recipe: what to train.
        images: the data, on any device.
        checkpoint: file to write after each epoch.
        device: where to train.
        resume: go on from the checkpoint if it exists.
        progress: called after each step.
        ranks: the processes that call this together and divide the copies of the likelihood ratio. The first alone
            reads and writes the checkpoint, and tests.

    Raises:
        ValueError: if the checkpoint was written with other settings.
    """
    if recipe.method not in METHODS:
        raise ValueError(f"unknown method {recipe.method!r}; choose one of {', '.join(METHODS)}")
    images = images.to(device)
    net = make_network(recipe, images.shape).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    steps = -(-len(images.train) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    history: list[dict[str, float]] = []
    state = ranks.from_first(lambda: _matching(checkpoint, recipe) if resume and checkpoint.exists() else None)
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history = state["history"]
    take_step = stepper(recipe, net, optimizer, ranks)

    def save() -> None:
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        about = {"recipe": asdict(recipe), "shape": list(images.shape), "history": history}
        files.save_checkpoint(checkpoint, about | state)

    for epoch in range(len(history), recipe.epochs):
        torch.manual_seed(1_000_003 * (recipe.seed + 1) + epoch)
        order = torch.randperm(len(images.train)).to(device)
        started, total = time.perf_counter(), 0.0
        for step, rows in enumerate(torch.split(order, recipe.batch_size)):
            loss = take_step(images.train[rows], images.train_labels[rows])
            schedule.step()
            total += loss * len(rows)
            progress(epoch * steps + step + 1, loss)
        seconds = time.perf_counter() - started
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": total / len(images.train),
                "test_accuracy": ranks.from_first(partial(accuracy, net, images.test, images.test_labels)),
                "seconds": seconds,
            }
        )
        ranks.from_first(save)
    return Trained(net, history)


def stepper(
    recipe: Recipe, net: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE
) -> Callable[[Tensor, Tensor], float]:
    """One update from a batch, by the method of the recipe; returns the mean loss."""

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    def likelihood_ratio(x: Tensor, y: Tensor) -> float:
        return float(optimizer.step(closure(loss_fn, x, y)))

    def surrogate(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_fn(x, y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    if recipe.method == "likelihood ratio":
        estimator = ESTIMATORS[recipe.estimator](net, copies=recipe.copies)
        attach(optimizer, net, share(estimator) if ranks.size > 1 else estimator)
        return likelihood_ratio
    return surrogate


def _matching(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    state = files.load_checkpoint(checkpoint)
    wanted, found = asdict(recipe), state.get("recipe", {})
    different = [f"{key}={found.get(key)!r} (now {wanted[key]!r})" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{checkpoint} was written with {', '.join(different)}; use the same settings, or another --out directory"
        )
    return state
