from __future__ import annotations

from typing import Any

import pytest
import snntorch as snn
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import network, reset

from . import pages

BLOCKS = pages.blocks(pages.README, "python")


class ExistingModel(nn.Module):
    """A snnTorch model as its tutorials write them, which knows nothing of this package but a reset."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.lif1 = snn.Leaky(beta=0.9)
        self.fc2 = nn.Linear(64, 10)
        self.lif2 = snn.Leaky(beta=0.9)

    def forward(self, images: Tensor) -> Tensor:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        counts = torch.zeros(())
        for _ in range(8):
            spikes, mem1 = self.lif1(self.fc1(images), mem1)
            spikes, mem2 = self.lif2(self.fc2(spikes), mem2)
            counts = counts + spikes
        return counts


@pytest.fixture
def names() -> dict[str, Any]:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images / 16, dtype=torch.float32), torch.as_tensor(labels).long()
    return {
        "net": ExistingModel(), "other_net": ExistingModel(), "x": x, "y": y,
        "loader": list(zip(x.split(64), y.split(64), strict=True)) * 8,
        "test_loader": [(x[:8].view(-1, 1, 8, 8), y[:8])],
    }  # fmt: skip


def test_readme_begins_with_a_few_lines_that_train_as_they_stand(names: dict[str, Any]) -> None:
    first, alone = BLOCKS[0], dict[str, Any]()
    assert len([line for line in first.code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    pages.run(first, alone)
    net = alone["net"]
    assert set(network.noisy_neurons(net)) == {"1"}
    net.eval()
    logits = slr.rollout(net, names["x"], num_steps=8).mean(0)
    assert (logits.argmax(1) == names["y"]).float().mean() > 0.5


def test_every_block_of_the_readme_runs(names: dict[str, Any]) -> None:
    names["loader"] = names["loader"][:2]
    for block in BLOCKS:
        names.get("optimizer") and names["optimizer"]._optimizer_step_pre_hooks.clear()
        pages.run(block, names)
    reset(names["net"])
