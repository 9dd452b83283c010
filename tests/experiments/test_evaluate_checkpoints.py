from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from snntorch_lr.experiments import data
from snntorch_lr.experiments.recipe import Recipe
from snntorch_lr.experiments.train import train

from .commands import is_one_line, run

SMALL = ["--suite", "quick", "--images", "6", "--draws", "1", "--votes", "4", "--epsilon", "0.1"]
RECIPE = Recipe(method="likelihood ratio", epochs=1, copies=2, learning_rate=5e-3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, images = tmp_path_factory.mktemp("checkpoints"), data.load("digits")
    small = replace(images, train=images.train[:512], train_labels=images.train_labels[:512])
    for name, recipe in (("lr", RECIPE), ("base", replace(RECIPE, method="surrogate"))):
        train(recipe, small, folder / f"{name}.pt", torch.device("cpu"))
    train(replace(RECIPE, dataset="mnist"), small, folder / "other.pt", torch.device("cpu"))
    return folder


def test_checkpoints_are_compared_and_written(checkpoints: Path, tmp_path: Path) -> None:
    command = [
        "evaluate",
        *(str(checkpoints / f"{name}.pt") for name in ("lr", "base")),
        *SMALL,
        "--out",
        str(tmp_path),
    ]
    result = run(*command)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "robustness.json").read_text())
    assert [(row["network"], row["noise"]) for row in written["rows"]] == [
        ("lr", "off"),
        ("lr", "on"),
        ("base", "none"),
    ]
    assert "--suite quick" in (tmp_path / "robustness.md").read_text()
    assert "G9 budget" in result.output
    assert max(map(len, result.stdout.partition("Clean accuracy")[2].splitlines()[:-1])) <= 80
    assert 'class="broken"' in (tmp_path / "report.html").read_text()
    for figure in ("epsilon.png", "steps.png", "surrogates.png"):
        assert (tmp_path / figure).read_bytes()[:4] == b"\x89PNG"
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "attacks").iterdir()}
    again, first = (each.stdout.partition("Clean accuracy")[2] for each in (run(*command), result))
    assert again == first != ""
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "attacks").iterdir()} == pieces


def test_checkpoints_are_certified_and_written(checkpoints: Path, tmp_path: Path) -> None:
    networks = [str(checkpoints / f"{name}.pt") for name in ("lr", "base")]
    settings = ["--sigma", "0.1", "--sigma", "0.4", "--images", "5", "--draws", "50", "--out", str(tmp_path)]
    result = run("certify", *networks, *settings)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "certificates.json").read_text())["certificates"]
    assert list(written) == ["lr, σ = 0.1", "lr, σ = 0.4", "base, σ = 0.1", "base, σ = 0.4"]
    assert all(len(each["radii"]) == 5 and max(each["radii"]) < 0.9 for each in written.values())
    assert "--sigma 0.1 --sigma 0.4" in (tmp_path / "certificates.md").read_text()
    assert (tmp_path / "certificates.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["lr.pt", "--images", "0"], 2, "--images must be at least 1"),
        (["lr.pt", "--suite", "mild"], 2, "quick, paper, standard"),
        (["lr.pt", "--norm", "l3"], 2, "linf, l2"),
        (["lr.pt", "--epsilon", "0"], 2, "epsilons must be positive"),
        (["lr.pt", "--votes", "0"], 2, "votes must be at least 1"),
        (["lr.pt", "lr.pt"], 2, "more than once"),
        (["lr.pt", "other.pt"], 2, "choose one with --dataset"),
        (["absent.pt"], 1, "absent.pt"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], status: int, message: str, checkpoints: Path, tmp_path: Path
) -> None:
    words = [str(checkpoints / word) if word.endswith(".pt") else word for word in arguments]
    result = run("evaluate", *words, "--out", str(tmp_path / "x"))
    is_one_line(result, status, message)
    assert not (tmp_path / "x").exists()
