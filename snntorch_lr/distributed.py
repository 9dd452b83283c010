"""One gradient from many processes: copies or batches divided over the ranks of ``torch.distributed``."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .left_as_found import left_as_found
from .network import parameters
from .noise_stream import mix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

if dist.is_available():
    # The first optimizer imports it anyway. It keeps the default group of that moment in default arguments: if imported
    # after init_process_group, threads of the group outlive destroy_process_group, and abort a process that ends.
    importlib.import_module("torch.distributed.nn.functional")


def apart(net: nn.Module, backward: Callable[[], Tensor]) -> tuple[Tensor, dict[nn.Parameter, Tensor | None]]:
    """The loss that ``backward`` returns, and the gradients that it adds; ``.grad`` stays as it was."""
    with left_as_found(net, gradients=True):
        loss = backward()
        return loss, {parameter: parameter.grad for parameter in parameters(net) if parameter.requires_grad}


def add(gradients: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Adds into ``.grad``, as a backward pass does."""
    for parameter, gradient in gradients.items():
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class SingleProcess:
    """All copies of all samples are run by this process.

    What an estimator asks whenever another process could have a part in the answer; each method answers for one
    process alone.

    Attributes:
        alone: there is no other process.
    """

    alone = True

    def own_copies(self, copies: int) -> tuple[int, int]:
        """First of the copies that are run here, and the end of their range."""
        return 0, copies

    def seed(self, seed: int) -> int:
        """Seed of this process's noise, from the one that it drew."""
        return seed

    def gather(self, losses: Tensor) -> Tensor:
        """Losses that the baseline compares, from those of this process; both ``[copies, batch]``."""
        return losses

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes of what each of them found."""
        return values

    def run(self, net: nn.Module, backward: Callable[[], Tensor]) -> Tensor:
        """Runs the part of this process, and adds the gradients of all processes into ``.grad``.

        An error leaves every ``.grad`` as it was.

        Args:
            net: the network.
            backward: leaves this process's part of the gradient in ``.grad``, and returns its mean loss.

        Returns:
            The mean loss of all processes.
        """
        loss, own = apart(net, backward)
        add(own)
        return loss


class Divisible(Protocol):
    """An estimator, as the division of its work sees it."""

    net: nn.Module
    copies: int
    antithetic: bool
    division: SingleProcess


E = TypeVar("E", bound=Divisible)


class RankError(RuntimeError):
    """Another rank failed, so that this one has no gradient either. ``.grad`` is untouched."""


def share(estimator: E, split: str = "copies", group: ProcessGroup | None = None) -> E:
    """Divides the work of an estimator over the ranks of a process group, in place.

    Every rank makes the same network and estimator, calls this once, and trains as it would alone:

        torch.distributed.init_process_group()  # under torchrun
        estimator = share(snntorch_lr.Vanilla(net, copies=64), split="copies")
        loss = estimator.backward(loss_fn, images, labels)  # or attach(optimizer, net, estimator=estimator)

    1. Weights and buffers of the network are copied from the first rank, now and once.
    2. In each ``backward`` the first rank's seed is everyone's; each rank runs its part.
    3. ``"copies"`` only: the losses of all ranks are gathered, for the baseline.
    4. The gradients of the parts are put together, and added to the ``.grad`` that was there before.

    All ranks then have the same ``.grad`` and the same returned loss, and optimizers that began alike stay alike. An
    error on one rank is raised on all of them, and leaves every ``.grad`` as it was.

    ``DistributedDataParallel`` need not be used, and must not: it averages gradients in its own backward pass, of which
    an estimator may run several, or none that reaches the whole network. Give the estimator, and call in ``loss_fn``,
    the network itself. Parameters of other networks that ``loss_fn`` trains are not put together here, and running
    statistics of BatchNorm are each rank's own.

    Args:
        estimator: made with the same arguments on every rank.
        split: ``"copies"`` if every rank gets the same batch and runs a range of its K copies: the gradient is that of
            one process with the same seed. The baseline compares all K. What is random in ``loss_fn`` besides the
            noise comes from the global generator of each rank: seed these alike to have one input coding.
            ``"batch"`` if every rank gets a batch of its own, of any size, and runs all K copies of it with noise of
            its own: gradient and loss are averages over all samples. The baseline compares samples of one rank.
        group: the ranks; all of them by default. On CUDA (nccl) call ``torch.cuda.set_device`` first.

    Returns:
        The same estimator. Its ``backward`` is collective from now on: all ranks call it equally often.

    Raises:
        ValueError: if there is no process group, the network is wrapped in DistributedDataParallel, the ranks disagree
            about network or estimator, or there are more ranks than copies to split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "there is no process group to share with: call torch.distributed.init_process_group() first, in a script "
            "that torchrun starts"
        )
    ranks = SPLITS[split](group)
    ranks.join(estimator, split)
    estimator.division = ranks
    return estimator


class _Ranks(SingleProcess):
    """Base of both divisions of the work: meetings of the ranks, and the sum of their gradients.

    Attributes:
        samples: number of samples in this rank's batch.
        averages: whether ranks have samples of their own, so that gradients are averaged and not summed.
    """

    alone = False
    samples = 0
    averages = False

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group that it is to share with")

    def join(self, estimator: Divisible, split: str) -> None:
        """Checks that all ranks have the same task, and gives them the same weights."""
        state = estimator.net.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        task = (type(estimator).__name__, split, estimator.copies, estimator.antithetic, shapes)
        error = None
        if any(isinstance(module, DistributedDataParallel) for module in estimator.net.modules()):
            error = ValueError(
                "the network is wrapped in DistributedDataParallel, which would average gradients a second time: make "
                "the estimator of its .module, and call that in loss_fn"
            )
        tasks = self.meet(task, error)
        if error is not None:
            raise error
        if any(other != task for other in tasks):
            raise ValueError(
                "the ranks disagree about the estimator's class, split, copies or antithetic, or about the shapes in "
                "the network's state_dict(): build the same on every rank"
            )
        self.own_copies(estimator.copies)
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        for name in shapes:
            value = state[name].contiguous()
            dist.broadcast(value, source, group=self.group)
            state[name].copy_(value)

    def meet(self, fact: Any = None, error: Exception | None = None) -> list[Any]:
        """Messages of all ranks, in their order.

        All that ranks exchange begins with this one call, so that a rank that failed can say so to others wherever
        they are.

        Raises:
            RankError: if another rank failed.
        """
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, (None if error is None else f"{type(error).__name__}: {error}", fact), self.group)
        failed = {rank: failure for rank, (failure, _) in enumerate(said) if failure is not None}
        if failed and error is None:
            raise RankError("; ".join(f"rank {rank} failed with {failure}" for rank, failure in failed.items()))
        return [fact for _, fact in said]

    def seed(self, seed: int) -> int:
        """The first rank's seed."""
        return int(self.meet(seed)[0])

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same on all of them."""
        return torch.stack([part.to(values.device) for part in self.meet(values.cpu())]).sum(0)

    def run(self, net: nn.Module, backward: Callable[[], Tensor]) -> Tensor:
        """Runs the part of this rank, and adds the gradients of all ranks into ``.grad``."""
        try:
            loss, own = apart(net, backward)
        except RankError:
            raise
        except Exception as error:
            self.meet(error=error)
            raise
        facts = self.meet((self.samples, loss.item(), [gradient is not None for gradient in own.values()]))
        total = sum(samples for samples, _, _ in facts)
        scale = self.samples / total if self.averages else 1.0
        reached = [any(flags) for flags in zip(*(flags for _, _, flags in facts), strict=True)]
        parts = {
            parameter: torch.zeros_like(parameter) if gradient is None else gradient * scale
            for (parameter, gradient), anywhere in zip(own.items(), reached, strict=True)
            if anywhere
        }
        add(self._sum(parts))
        return torch.full_like(loss, sum(samples * value for samples, value, _ in facts) / total)

    def _sum(self, parts: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Sums over the ranks, one call for all gradients of a kind."""
        kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for parameter, part in parts.items():
            kinds[part.device, part.dtype].append(parameter)
        sums: dict[nn.Parameter, Tensor] = {}
        for kind in kinds.values():
            flat = torch.cat([parts[parameter].flatten() for parameter in kind])
            dist.all_reduce(flat, group=self.group)
            for parameter, piece in zip(kind, torch.split(flat, [p.numel() for p in kind]), strict=True):
                # Memory of its own: a view would keep the gradients of all parameters alive.
                sums[parameter] = piece.view_as(parameter).clone()
        return sums


class _Copies(_Ranks):
    """Every rank runs a range of the copies of the same batch."""

    def own_copies(self, copies: int) -> tuple[int, int]:
        """The range of this rank; sizes differ by one at most."""
        if copies < self.size:
            raise ValueError(
                f"{copies} copies cannot be split over {self.size} ranks; use more copies, or split='batch'"
            )
        return copies * self.rank // self.size, copies * (self.rank + 1) // self.size

    def gather(self, losses: Tensor) -> Tensor:
        """Losses of all copies, in their order.

        Raises:
            ValueError: if the batches differ in size.
        """
        self.samples = losses.shape[1]
        parts = self.meet(losses.cpu())
        sizes = [part.shape[1] for part in parts]
        if len(set(sizes)) > 1:
            raise ValueError(f"split='copies' needs the same batch on every rank, but they have {sizes} samples")
        return torch.cat(parts).to(losses)


class _Batches(_Ranks):
    """Every rank runs all copies of a batch of its own."""

    averages = True

    def seed(self, seed: int) -> int:
        """A seed for each rank, so that no two have the same noise."""
        return mix(super().seed(seed), self.rank)

    def gather(self, losses: Tensor) -> Tensor:
        """The losses of this rank: other samples are not compared with."""
        self.samples = losses.shape[1]
        return losses


SPLITS: dict[str, type[_Ranks]] = {"copies": _Copies, "batch": _Batches}
