"""Trained networks that are attacked by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .commands import is_one_line, run

EVALUATE = ["--suite", "quick", "--images", "6", "--draws", "1", "--votes", "4", "--epsilon", "0.1"]
PNG = b"\x89PNG"


def test_checkpoints_are_compared_and_written(checkpoints: Path, tmp_path: Path) -> None:
    networks = [str(checkpoints / f"{name}.pt") for name in ("lr", "base")]
    command = ["evaluate", *networks, *EVALUATE, "--out", str(tmp_path)]
    result = run(*command)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "robustness.json").read_text())
    rows = [(row["network"], row["noise"]) for row in written["rows"]]
    assert rows == [("lr", "off"), ("lr", "on"), ("base", "none")]
    assert "--suite quick" in (tmp_path / "robustness.md").read_text()
    assert "G9 budget" in result.output
    assert (tmp_path / "epsilon.png").read_bytes()[:4] == PNG
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "attacks").iterdir()}
    again, first = (outcome.stdout.partition("Clean accuracy")[2].splitlines() for outcome in (run(*command), result))
    assert first
    assert {*again} ^ {*first} <= {line for line in (*again, *first) if line.startswith("  time: ")}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "attacks").iterdir()} == pieces


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("evaluate lr.pt --norm l3", 2, "linf, l2"),
        ("evaluate lr.pt --epsilon 0", 2, "epsilons must be positive"),
        ("evaluate lr.pt --votes 0", 2, "votes must be at least 1"),
        ("evaluate lr.pt other.pt", 2, "choose one with --dataset"),
        ("evaluate absent.pt", 1, "absent.pt: No such file or directory"),
    ],
)
def test_what_checkpoints_do_not_allow_is_one_line(
    line: str, status: int, message: str, checkpoints: Path, tmp_path: Path
) -> None:
    words = [str(checkpoints / word) if word.endswith(".pt") else word for word in line.split()]
    is_one_line(run(*words, "--out", str(tmp_path / "x")), status, message)
    assert list(tmp_path.iterdir()) == []
