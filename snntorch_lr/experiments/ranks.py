"""One training by many processes: what the ranks that torchrun starts do together, and what the first does alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..distributed import RankError

T = TypeVar("T")


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
    # Imported by torch later on, it would hold the group in default arguments of its functions: the group's threads
    # outlive ``leave`` then, and a process that ends with them may abort.
    importlib.import_module("torch.distributed.nn.functional")
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
