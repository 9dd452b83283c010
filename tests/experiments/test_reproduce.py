from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import snntorch_lr
from snntorch_lr.experiments import data
from snntorch_lr.experiments.recipe import Recipe, load_trained
from snntorch_lr.experiments.train import validation_accuracy

from .commands import is_one_line, quick_gates, run

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
    return directory


def test_results_hold_everything_that_is_needed_to_repeat_them(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert "--seed 0" in results["command"]
    assert "--epsilon 0.1" in results["command"]
    assert results["versions"]["snntorch-lr"] == snntorch_lr.__version__
    assert [(row["network"], row["noise"]) for row in results["rows"]] == [
        ("surrogate", "none"), ("surrogate, noise", "off"), ("surrogate, noise", "on"),
        ("likelihood ratio", "off"), ("likelihood ratio", "on"), ("surrogate, stopped", "none"),
    ]  # fmt: skip


def test_worst_case_is_no_better_than_any_attack_or_clean(out: Path) -> None:
    for row in json.loads((out / "results.json").read_text())["rows"]:
        shares = {name: share["accuracy"] for name, share in row["attacks"].items()}
        assert shares["worst 0.1"] <= min(shares["FGSM 0.1"], shares["PGD-20 0.1"])
        assert row["attacks"]["FGSM 0.1"]["images"] == 5
        assert row["clean"]["images"] == 360
        assert row["clean"]["low"] <= row["clean"]["accuracy"] <= row["clean"]["high"]


def test_table_and_figures_are_written(out: Path) -> None:
    text = (out / "table.md").read_text()
    assert "| clean |" in text
    assert "no robustness claim" in text
    assert "| gates | masking not ruled out (G0" in text
    assert "| G9 budget | PASS |" in (out / "robustness.md").read_text()
    for figure in ("training.png", "attacks.png", "epsilon.png", "steps.png", "surrogates.png"):
        assert (out / figure).read_bytes()[:4] == b"\x89PNG"


def test_stopped_baseline_stops_where_the_likelihood_ratio_network_is_on_validation_images(out: Path) -> None:
    recipes = json.loads((out / "results.json").read_text())["recipes"]
    _, network = load_trained(out / "likelihood-ratio.pt")
    digits, stopped = data.load("digits"), Recipe(**recipes["surrogate, stopped"])
    assert stopped.validation == len(digits.train) // 10
    assert stopped.stop_at == validation_accuracy(network, stopped, digits)


def test_same_seed_gives_the_same_numbers(out: Path, tmp_path: Path) -> None:
    assert run("reproduce", *SMALL, "--out", str(tmp_path)).exit_code == 0
    first, again = (json.loads((path / "results.json").read_text()) for path in (out, tmp_path))
    assert first["rows"] == again["rows"]


def test_finished_runs_are_kept_and_resumed(out: Path) -> None:
    before = (out / "likelihood-ratio.pt").stat().st_mtime_ns
    refused = run("reproduce", *SMALL, "--out", str(out))
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert run("reproduce", *SMALL, "--out", str(out), "--resume").exit_code == 0
    assert (out / "likelihood-ratio.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar"], "digits, mnist, fashion-mnist"),
        (["--model", "rnn"], "mlp, deep-mlp, conv"),
        (["--estimator", "adam"], "counterfactual, vanilla, approximate"),
        (["--noise", "pink"], "membrane, escape"),
        (["--noise", "escape", "--distribution", "laplace"], "logistic, gaussian"),
        (["--sigma", "0"], "sigma must be positive"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--copies", "0"], "--copies must be at least 1"),
        (["--copies", "1", "--estimator", "vanilla"], "copies >= 2"),
        (["--epsilon", "2"], "--epsilon must be above 0 and at most 1, got 2"),
        (["--suite", "mild"], "quick, paper, standard"),
        (["--device", "gpu"], "cpu or cuda"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("reproduce", *arguments, "--out", str(tmp_path / "x"))
    is_one_line(result, 2, message)
    assert not (tmp_path / "x").exists()
