from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import snntorch_lr as slr
from snntorch_lr import network

from . import pages

BLOCKS = pages.blocks(pages.README, "python")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would paste them, with nothing of the repository."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def names() -> dict[str, Any]:
    return {"__name__": "__main__"}


def test_is_short() -> None:
    assert len(pages.text_of(pages.README).splitlines()) <= 120


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_every_block_runs_alone(block: pages.Block, capsys: pytest.CaptureFixture[str]) -> None:
    alone = names()
    pages.run(block, alone)
    assert re.fullmatch(r"loss \d\.\d\d\n", capsys.readouterr().out)
    assert network.noisy_neurons(alone["net"])


@pytest.mark.filterwarnings("error")
def test_blocks_run_one_after_the_other() -> None:
    together = names()
    for block in BLOCKS:
        pages.run(block, together)


def test_begins_with_a_few_lines_that_train() -> None:
    first, alone = BLOCKS[0], names()
    assert len([line for line in first.code.splitlines() if line.strip()]) <= 16
    pages.run(first, alone)
    net: nn.Module = alone["net"].eval()
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    logits = slr.rollout(net, images.float() / 16, num_steps=8).mean(0)
    assert (logits.argmax(1) == labels).float().mean() > 0.8
