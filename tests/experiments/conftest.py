"""Networks of few digits, trained once for all tests of a module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from snntorch_lr.experiments import data
from snntorch_lr.experiments.train import Recipe, train

RECIPE = Recipe(method="likelihood ratio", epochs=1, copies=2, learning_rate=5e-3, batch_size=32, validation=4)


@pytest.fixture(scope="session")
def few() -> data.Dataset:
    digits = data.load("digits")
    return replace(
        digits, train=digits.train[:512], train_labels=digits.train_labels[:512],
        test=digits.test[:6], test_labels=digits.test_labels[:6],
    )  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(few: data.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks by both methods, and of other data."""
    folder = tmp_path_factory.mktemp("checkpoints")
    changes: dict[str, dict[str, Any]] = {
        "lr": {},
        "base": {"method": "surrogate"},
        "other": {"dataset": "mnist"},
    }
    for name, change in changes.items():
        train(replace(RECIPE, **change), few, folder / f"{name}.pt", torch.device("cpu"))
    return folder
