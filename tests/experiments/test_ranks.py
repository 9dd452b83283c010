from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copy

import pytest
import torch

from snntorch_lr.experiments import cli, data
from snntorch_lr.experiments.recipe import Recipe
from snntorch_lr.experiments.train import ALONE, joined, train

from . import commands

CPU = torch.device("cpu")
PATIENCE = 120  # seconds, so that a deadlock fails instead of hanging
SMALL = ["--epochs", "2", "--copies", "3", "--attack-images", "5", "--draws", "1", "--epsilon", "0.1"]
RECIPE = Recipe(method="likelihood ratio", epochs=2, copies=3, batch_size=32, validation=143)

LEFT = """
import weakref, torch, torch.distributed as dist
from snntorch_lr.experiments.train import joined

with joined(torch.device("cpu")):
    group = weakref.ref(dist.group.WORLD)
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
print("group left:", group() is not None)
"""


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CI": "1"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one process, after the first epoch and after the second."""
    directory = tmp_path_factory.mktemp("alone")
    images, steps = data.load("digits"), 41

    def keep_first(done: int, loss: float) -> None:
        if done == steps + 1:
            (directory / "whole.pt").rename(directory / "first.pt")

    train(RECIPE, images, directory / "whole.pt", CPU, after_step=keep_first)
    return directory


@pytest.fixture(scope="module")
def shared(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The second epoch by two ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    copy(alone / "first.pt", directory / "likelihood-ratio.pt")
    return directory, torchrun(commands.__file__, "reproduce", *SMALL, "--out", str(directory), "--resume")


def test_two_ranks_go_on_like_one_process(shared: tuple[Path, subprocess.CompletedProcess[str]], alone: Path) -> None:
    out, result = shared
    assert result.returncode == 0, result.stderr
    paths = (alone / "first.pt", alone / "whole.pt", out / "likelihood-ratio.pt")
    first, expected, found = (torch.load(path, weights_only=True)["net"] for path in paths)
    for name in ("blocks.0.1.weight", "neurons.0.noise.log_sigma", "readout.weight"):
        # The rounding of sums flips a spike now and then; other noise would differ by a fifth of this and more.
        assert (found[name] - expected[name]).norm() < 0.03 * (expected[name] - first[name]).norm(), name


def test_the_first_rank_alone_prints_and_says_how_many_there_were(
    shared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, result = shared
    assert result.stdout.count("training: likelihood ratio") == 1
    assert result.stdout.count("training: surrogate, noise") == 1
    assert result.stdout.count("Written:") == 1
    assert json.loads((out / "results.json").read_text())["ranks"] == 2
    assert "Ranks: 2." in (out / "table.md").read_text()


def test_nothing_of_the_group_is_left_when_a_process_ends(tmp_path: Path) -> None:
    script = tmp_path / "left.py"
    script.write_text(LEFT)
    result = torchrun(str(script))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("group left: False") == 2


def test_an_error_of_the_first_rank_ends_all_with_one_line(alone: Path, tmp_path: Path) -> None:
    copy(alone / "first.pt", tmp_path / "likelihood-ratio.pt")
    result = torchrun("-m", "snntorch_lr.experiments.cli", "reproduce", *SMALL, "--out", str(tmp_path))
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("snntorch-lr:")]
    assert len(said) == 1
    assert "--resume" in said[0]
    assert "RankError" not in result.stderr
    assert not result.stdout


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int = 2) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": 1}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("argument", ["--epochs=many", "--epochs=0", "--device=tpu-pod"])
@pytest.mark.parametrize(("rank", "lines"), [(0, True), (1, False)])
def test_wrong_arguments_are_told_by_the_first_rank(
    argument: str, rank: int, lines: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, rank, size=1)
    monkeypatch.setattr(sys, "argv", ["snntorch-lr", "reproduce", argument])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert any(capsys.readouterr()) == lines


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "--device cuda each takes its own"), ("cuda", "2 ranks have 1 GPUs on this machine")],
)
def test_every_rank_takes_a_gpu_of_its_own(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=message), joined(torch.device(device)):
        pass


def test_without_torchrun_there_is_no_process_group() -> None:
    with joined(CPU) as team:
        assert team == ALONE
        assert not torch.distributed.is_initialized()
        assert team.from_first(lambda: 3) == 3
