"""The command ``reproduce``: four networks, trained, resumed, attacked, and written with all that repeats them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import snntorch_lr
from snntorch_lr.experiments import data
from snntorch_lr.experiments.options import Progress
from snntorch_lr.experiments.train import Recipe, load_trained, validation_accuracy

from .commands import quick_gates, run

SMALL = ["--epochs", "1", "--copies", "2", "--attack-images", "5", "--draws", "1", "--epsilon", "0.1"]


@pytest.fixture(scope="module", autouse=True)
def no_attacks_of_gates() -> Iterator[None]:
    with quick_gates():
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "digits"
    result = run("reproduce", *SMALL, "--out", str(directory))
    assert result.exit_code == 0, result.output
    assert re.search(r"^epochs of likelihood ratio: 1 of 1 done: loss .*%, with noise \d", result.stdout, re.MULTILINE)
    return directory


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "results.json").read_text())
    return read


def test_results_hold_everything_that_is_needed_to_repeat_them(results: dict[str, Any]) -> None:
    assert "--seed 0" in results["command"]
    assert "--epsilon 0.1" in results["command"]
    assert results["versions"]["snntorch-lr"] == snntorch_lr.__version__
    rows = results["evaluation"]["rows"]
    assert [(row["network"], row["noise"]) for row in rows] == [
        ("likelihood ratio", "off"), ("likelihood ratio", "on"), ("surrogate", "none"), ("surrogate, noise", "off"),
        ("surrogate, noise", "on"), ("surrogate, stopped", "none"),
    ]  # fmt: skip
    assert all(row["worst_case"]["0.1"]["images"] == 5 for row in rows)
    assert set(results["training"]) == {row["network"] for row in rows} == set(results["recipes"])


def timeless(results: dict[str, Any]) -> str:
    """Results without what an evaluation took, which is measured anew."""
    return re.sub(r'"seconds": [0-9.]+', "", json.dumps(results["evaluation"]))


def test_a_finished_run_is_kept_resumed_and_printed_as_json(out: Path, results: dict[str, Any]) -> None:
    before = (out / "likelihood-ratio.pt").stat().st_mtime_ns
    refused = run("reproduce", *SMALL, "--out", str(out))
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    resumed = run("reproduce", *SMALL, "--out", str(out), "--resume", "--json")
    again = json.loads(resumed.stdout)
    assert again == json.loads((out / "results.json").read_text())
    assert timeless(again) == timeless(results)
    assert resumed.stdout.count("\n") == 1
    assert "Written:" in resumed.stderr
    shares = re.findall(r"^attacks: (\d+) % done(?:, about \d+ (?:s|min) left)?: ", resumed.stderr, re.MULTILINE)
    assert len(shares) > 3
    assert all(0 <= int(share) <= 100 for share in shares)
    assert (out / "likelihood-ratio.pt").stat().st_mtime_ns == before


def test_tables_and_the_figure_are_written(out: Path) -> None:
    assert "| G9 budget | PASS |" in (out / "robustness.md").read_text()
    assert (out / "epsilon.png").read_bytes()[:4] == b"\x89PNG"


def test_stopped_baseline_stops_where_the_likelihood_ratio_network_is_on_validation_images(
    out: Path, results: dict[str, Any]
) -> None:
    _, network = load_trained(out / "likelihood-ratio.pt")
    digits, stopped = data.load("digits"), Recipe(**results["recipes"]["surrogate, stopped"])
    assert stopped.validation == len(digits.train) // 10
    assert stopped.stop_at == validation_accuracy(network, stopped, digits)


def test_same_seed_gives_the_same_numbers(results: dict[str, Any], tmp_path: Path) -> None:
    assert run("reproduce", *SMALL, "--out", str(tmp_path)).exit_code == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["evaluation"]["rows"] == results["evaluation"]["rows"]


def test_lines_tell_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 10.0, 400.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    tell = Progress("networks")
    for done in (1, 2, 3):
        tell("a", done, 5)
    assert capsys.readouterr().out.splitlines() == [
        "networks: 1 of 5 done: a",
        "networks: 2 of 5 done, about 30 s left: a",
        "networks: 3 of 5 done, about 7 min left: a",
    ]
