"""``DistributedDataParallel`` on two gloo ranks under torchrun: a plain loop, and no code of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

from .helpers import FEATURES, NOISES, STEPS, assert_same, every_noise, gradients

RANKS, BATCH, CLASSES = 2, 8, 3
Result = dict[str, Any]


def network(noise: str) -> nn.Sequential:
    torch.manual_seed(1)
    lif = [slr.Leaky(beta=0.8, threshold=0.5, init_hidden=True, noise=noise) for _ in range(2)]
    return nn.Sequential(nn.Linear(FEATURES, 12), lif[0], nn.BatchNorm1d(12), nn.Linear(12, CLASSES), lif[1])


class Presentation(nn.Module):
    """All time steps of a network, for DistributedDataParallel, which wants one forward pass for a backward pass."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self.net)
        return torch.stack([self.net(x) for _ in range(STEPS)]).mean(0)


def data(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of a rank's own; the last one is smaller."""
    size = BATCH if step < 3 else BATCH // 2
    x = 2 * torch.rand(size, FEATURES, generator=torch.Generator().manual_seed(10 * step + rank))
    return x, torch.arange(size) % CLASSES


def spikes_of(model: nn.Module, lif: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with lif.register_forward_hook(lambda *args: seen.append(args[2].detach())):
        model(x)
    return torch.stack(seen)


def train(rank: int, noise: str) -> Result:
    """What a rank sees: its spikes for the same inputs as the other one's, a gradient, and weights after some steps."""
    net = network(noise)
    model = nn.parallel.DistributedDataParallel(Presentation(net))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    # A λ that stays, so that a gradient can be computed twice.
    slr.attach(optimizer, net, control=0.4)
    # The same on all ranks, as in most scripts.
    torch.manual_seed(0)
    result: Result = {"spikes": spikes_of(model.module, net[1], data(0, 0)[0])}
    for step in range(4):
        optimizer.zero_grad()
        x, y = data(rank, step)
        random = torch.get_rng_state()
        F.cross_entropy(model(x), y).backward()
        if step == 0:
            result["averaged"] = gradients(net)
            optimizer.zero_grad()
            torch.set_rng_state(random)
            F.cross_entropy(model.module(x), y).backward()
            result["alone"] = gradients(net)
            for name, gradient in result["averaged"].items():
                net.get_parameter(name).grad = gradient.clone()
        optimizer.step()
    return result | {"weights": {name: value.detach() for name, value in net.named_parameters()}}


def accumulate(rank: int) -> Result:
    """Gradients of two micro-batches, of which the first one is not averaged by itself."""
    net = network("escape")
    model = nn.parallel.DistributedDataParallel(Presentation(net))
    slr.attach(torch.optim.SGD(net.parameters(), 0.1), net)
    with model.no_sync():
        F.cross_entropy(model(data(rank, 0)[0]), data(rank, 0)[1]).backward()
    F.cross_entropy(model(data(rank, 1)[0]), data(rank, 1)[1]).backward()
    return gradients(net)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    results = {noise: train(rank, noise) for noise in NOISES} | {"accumulate": accumulate(rank)}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    subprocess.run(
        [*command, "-m", __name__, str(folder)],
        check=True, timeout=200, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@every_noise
def test_ranks_keep_the_same_weights(ranks: list[Result], noise: str) -> None:
    first, second = (rank[noise]["weights"] for rank in ranks)
    assert_same(first, second)
    before = dict(network(noise).named_parameters())
    assert all((first[name] - value).abs().max() > 1e-4 for name, value in before.items() if value.requires_grad)


@every_noise
def test_ranks_that_were_seeded_alike_have_different_noise(ranks: list[Result], noise: str) -> None:
    first, second = (rank[noise]["spikes"] for rank in ranks)
    assert 0.1 < float(first.mean()) < 0.9
    assert float((first != second).float().mean()) > 0.1


@every_noise
def test_gradients_are_the_mean_of_those_of_the_ranks(ranks: list[Result], noise: str) -> None:
    alone = [rank[noise]["alone"] for rank in ranks]
    for rank in ranks:
        expected = {name: (alone[0][name] + alone[1][name]) / RANKS for name in alone[0]}
        assert_same(rank[noise]["averaged"], expected, rtol=1e-4, atol=1e-7)
    assert not torch.equal(alone[0]["0.weight"], alone[1]["0.weight"])


def test_micro_batches_are_accumulated_without_synchronisation(ranks: list[Result]) -> None:
    assert_same(ranks[0]["accumulate"], ranks[1]["accumulate"])
    assert ranks[0]["accumulate"]["0.weight"].any()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
