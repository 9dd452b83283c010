"""Training by a recipe, in one process or in the ranks that torchrun starts, with a checkpoint after each epoch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._files import save
from ..distributed import RankError, share
from ..estimators import ESTIMATORS
from ..estimators.recording import per_copy
from ..objectives import OBJECTIVES, vote
from ..optim import attach, closure
from ..robustness import Budget, Descent, Target, gradient_attack, perturb
from . import files
from .data import Images
from .recipe import INCOMPLETE, Recipe, check_recipe, first_sensitivity, make_network, make_optimizer

if TYPE_CHECKING:
    from ..estimators.base import Estimator

T = TypeVar("T")
CHECKS = 20
"""Times in an epoch at which a run with ``stop_at`` looks at its validation accuracy."""
Step = Callable[[Tensor, Tensor], float]
AfterStep = Callable[[int, float], None]
"""Called after each step with the number of steps done, resumed ones included, and the loss."""
AfterEpoch = Callable[[dict[str, float], nn.Module], None]
"""Called after each epoch with its entry of the history, and the network."""


class Observer:
    """Watches a training, and does nothing."""

    def after_step(self, done: int, loss: float) -> None:
        """As ``AfterStep``."""

    def after_epoch(self, entry: dict[str, float], net: nn.Module) -> None:
        """As ``AfterEpoch``."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train a network together.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int
    size: int

    def from_first(self, make: Callable[[], T]) -> T:
        """Result of the first rank, on every rank; for files, which no other rank reads or writes.

        Raises:
            RankError: on the other ranks, if the first failed; there, whatever it failed with.
        """
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        failure = None
        if self.rank == 0:
            try:
                said[1] = make()
            except Exception as error:
                failure = error
                said[0] = f"rank 0 failed with {type(error).__name__}: {error}"
        dist.broadcast_object_list(said)
        if failure is not None:
            raise failure
        if said[0] is not None:
            raise RankError(said[0])
        made: T = said[1]
        return made

    def leave(self) -> None:
        """Ends what the ranks do together, on all of them."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks(0, 1)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, in a process group until the block ends; without torchrun, this one alone.

    Args:
        device: where every rank computes; on CUDA each takes the device of its local rank.

    Raises:
        ValueError: if there are more ranks than CUDA devices on a machine, or ``device`` is one of them for all ranks.
    """
    if not _launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    if device.type == "cuda":
        _take_cuda_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
    finally:
        ranks.leave()


@contextmanager
def first_prints() -> Iterator[None]:
    """Silences all ranks but the first. The traceback of an error that leaves the block is printed nevertheless."""
    if not _launched() or os.environ["RANK"] == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _take_cuda_device(device: torch.device) -> None:
    ranks, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device != torch.device("cuda"):
        raise ValueError(f"--device {device} would put all ranks on one GPU: with --device cuda each takes its own")
    if ranks > devices:
        raise ValueError(f"{ranks} ranks have {devices} GPUs on this machine: give torchrun --nproc-per-node {devices}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@dataclass
class Trained:
    """A trained network and its history: one entry for each epoch.

    Attributes:
        net: the network.
        history: epoch (a fraction where training stopped within one), train_loss, test_accuracy (noise off), seconds.
    """

    net: nn.Module
    history: list[dict[str, float]]

    @property
    def seconds_per_epoch(self) -> float:
        """Median training time of an epoch, without the test."""
        ends = [0.0, *(entry["epoch"] for entry in self.history)]
        paces = [
            entry["seconds"] / (end - start) for entry, start, end in zip(self.history, ends, ends[1:], strict=False)
        ]
        return statistics.median(paces)


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


def split(recipe: Recipe, images: Images) -> tuple[Tensor, Tensor]:
    """Rows of the training images to train on, and those held out; the same for all recipes of a seed.

    Raises:
        ValueError: if nothing is left to train on.
    """
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
    after_step: AfterStep = lambda done, loss: None,
    ranks: Ranks = ALONE,
    after_epoch: AfterEpoch = lambda entry, net: None,
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
        after_step: called after each step.
        ranks: the processes that call this together and divide the copies of the likelihood ratio. The first alone
            reads and writes the checkpoint, and tests.
        after_epoch: called after each epoch, when its checkpoint is written.

    Raises:
        ValueError: if the recipe cannot be trained, or the checkpoint was written with other settings.
    """
    check_recipe(recipe)
    images = images.to(device)
    net = make_network(recipe, images.shape).to(device)
    optimizer = make_optimizer(recipe, net)
    rows, _ = split(recipe, images)
    steps = -(-len(rows) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    history: list[dict[str, float]] = []
    stopped = False
    estimators = make_estimators(recipe, net, ranks)
    state = ranks.from_first(lambda: _matching(checkpoint, recipe) if resume and checkpoint.exists() else None)
    if state is not None:
        try:
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            history, stopped = state["history"], state.get("stopped", False)
            # Version 0.1 had no estimator with anything to keep.
            for each, kept in zip(estimators, state.get("estimators", ()), strict=False):
                each.load_state_dict(kept)
        except INCOMPLETE as error:
            raise ValueError(f"{checkpoint} is not a checkpoint of reproduce ({type(error).__name__})") from error
    take_step = stepper(recipe, net, optimizer, estimators)

    def save_state() -> None:
        state: dict[str, Any] = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"schedule": schedule.state_dict(), "estimators": [each.state_dict() for each in estimators]}
        about = {"recipe": asdict(recipe), "shape": list(images.shape), "history": history, "stopped": stopped}
        save(checkpoint, about | state)

    while len(history) < recipe.epochs and not stopped:
        epoch = len(history)
        torch.manual_seed(1_000_003 * (recipe.seed + 1) + epoch)
        order = rows[torch.randperm(len(rows)).to(device)]
        started, losses = time.perf_counter(), []
        for step, batch in enumerate(torch.split(order, recipe.batch_size), start=1):
            losses.append(take_step(images.train[batch], images.train_labels[batch]) * len(batch))
            schedule.step()
            after_step(epoch * steps + step, losses[-1] / len(batch))
            looks = step == steps or step % max(1, steps // CHECKS) == 0
            if recipe.stop_at is not None and looks:
                stopped = validation_accuracy(net, recipe, images) >= recipe.stop_at
            if stopped:
                break
        seconds = time.perf_counter() - started
        history.append(
            {
                "epoch": epoch + 1 if step == steps else epoch + step / steps,
                "train_loss": sum(losses) / min(step * recipe.batch_size, len(rows)),
                "test_accuracy": ranks.from_first(partial(accuracy, net, images.test, images.test_labels)),
                "seconds": seconds,
            }
        )
        ranks.from_first(save_state)
        after_epoch(history[-1], net)
    return Trained(net, history)


def make_estimators(recipe: Recipe, net: nn.Module, ranks: Ranks = ALONE) -> list[Estimator]:
    """The likelihood ratio's, in the order of their use: one, and one with ``late_copies`` if there are any."""

    def make(copies: int) -> Estimator:
        made = ESTIMATORS[recipe.estimator](net, copies=copies)
        return share(made) if ranks.size > 1 else made

    if recipe.method != "likelihood ratio":
        return []
    return [make(copies) for copies in (recipe.copies, recipe.late_copies) if copies]


def stepper(recipe: Recipe, net: nn.Module, optimizer: torch.optim.Optimizer, estimators: list[Estimator]) -> Step:
    """One update from a batch, by the method of the recipe; returns the mean loss."""
    voted = partial(vote, draws=recipe.votes)
    objective = voted if recipe.objective == "vote" else OBJECTIVES[recipe.objective]

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses = objective(net(x), y)
        return losses + recipe.penalty * per_copy(first_sensitivity(recipe, net, x)) if recipe.penalty else losses

    def surrogate(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_fn(x, y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    if not estimators:
        return _disturbed(recipe, net, surrogate)
    hook = attach(optimizer, net, estimators[0])

    def likelihood_ratio(x: Tensor, y: Tensor) -> float:
        if optimizer.param_groups[0]["lr"] < recipe.learning_rate / 2:
            hook.estimator = estimators[-1]
        if recipe.votes > 1:
            # Rows of the same image are draws of one vote.
            x, y = x.repeat_interleave(recipe.votes, 0), y.repeat_interleave(recipe.votes, 0)
        return float(optimizer.step(closure(loss_fn, x, y)))

    return _disturbed(recipe, net, likelihood_ratio)


def _disturbed(recipe: Recipe, net: nn.Module, step: Step) -> Step:
    """A step from adversarial images in place of clean ones, if the recipe asks for that."""
    if not recipe.adversary:
        return step
    epsilon = recipe.adversary
    counterfactual = recipe.attacker == "counterfactual"
    target = Target(net, noise=recipe.attacker_noise, draws=recipe.copies if counterfactual else 1)
    descent = Descent("counterfactual" if counterfactual else "training", steps=recipe.attacker_steps, length=0.25)
    attack = gradient_attack("adversary", descent)

    def attacked(x: Tensor, y: Tensor) -> float:
        seed, rows = int(torch.randint(2**31, ())), len(x) * target.draws
        return step(perturb(attack, target, x, y, Budget(epsilon), seed, rows), y)

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
    wanted, found = asdict(recipe), state.get("recipe")
    if not isinstance(found, dict):
        raise ValueError(f"{checkpoint} is not a checkpoint of reproduce")
    different = [f"{key}={found.get(key)!r} (now {wanted[key]!r})" for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{checkpoint} was written with {', '.join(different)}; use the same settings, or another --out directory"
        )
    return state
