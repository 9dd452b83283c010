from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from html import unescape
from pathlib import Path

import pytest
import torch

import snntorch_lr
from snntorch_lr.experiments import cli, data
from snntorch_lr.experiments.study import LIKELIHOOD_RATIO, compared
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
    results = json.loads((out / "results.json").read_text())
    measured = {
        (row["network"], row["noise"]): min(row["attacks"][name]["0.1"]["accuracy"] for name in ("FGSM", "PGD-20"))
        for row in results["evaluation"]["rows"]
    }
    for row in results["rows"]:
        assert row["worst case"]["0.1"]["accuracy"] <= measured[row["network"], row["noise"]]
        assert row["worst case"]["0.1"]["images"] == 5
        assert row["clean"]["images"] == 360
        assert row["clean"]["low"] <= row["clean"]["accuracy"] <= row["clean"]["high"]


def test_lines_tell_how_far_it_is_where_there_is_no_terminal(out: Path, tmp_path: Path) -> None:
    said = run("reproduce", *SMALL, "--out", str(out), "--resume").stdout
    pieces = re.findall(r"^attacks: (\d+) of (\d+)(?:, about \d+ (?:s|min) left)?: ", said, re.MULTILINE)
    assert [int(done) for done, _ in pieces] == list(range(1, int(pieces[0][1]) + 1))
    with redirect_stdout(io.StringIO()) as text, cli.watching() as watch:
        seen = watch.training("net", 2, 10)
        for step in range(1, 11):
            seen["after_step"](step, 0.5)
            if step % 5 == 0:
                noisy = {"noisy_test_accuracy": 0.8} if step == 10 else {}
                entry = {"epoch": step // 5, "train_loss": 0.5, "test_accuracy": 0.9, **noisy}
                seen["after_epoch"](entry, torch.nn.Linear(1, 1))
    told = text.getvalue().splitlines()
    assert told[0] == "training: net"
    assert re.fullmatch(r"net: epoch 1 of 2, about \d s left: loss 0.500, accuracy 90.0%", told[1])
    assert told[2].endswith("loss 0.500, accuracy 90.0%, with noise 80.0%")
    assert len(told) == 3


def test_the_last_words_are_what_the_table_says(out: Path) -> None:
    said = run("reproduce", *SMALL, "--out", str(out), "--resume").stdout
    results = json.loads((out / "results.json").read_text())
    clean, worst, gates = results["conclusions"]
    assert said.endswith(f"{clean}\n{worst}\n{gates}\nWritten: " + said.rpartition("Written: ")[2])
    rows = {row["network"]: row for row in results["rows"] if row["noise"] != "on"}
    assert f"likelihood ratio ({100 * rows['likelihood ratio']['clean']['accuracy']:.1f} %)" in clean
    assert f"({100 * rows['likelihood ratio']['worst case']['0.1']['accuracy']:.1f} %)" in worst
    assert gates.startswith("The gates allow no claim of robustness: masking not ruled out (G0, ")
    for text in (out / "table.md").read_text(), unescape((out / "report.html").read_text()):
        assert all(sentence in text for sentence in (clean, worst, gates))


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ([1] * 40 + [0] * 60, [1] + [0] * 99, "likelihood ratio (40.0 %) is more robust than b (1.0 %)"),
        ([0] * 100, [1] * 40 + [0] * 60, "b (40.0 %) is more robust than likelihood ratio (0.0 %)"),
        (
            [1, 0] * 50,
            [0, 1] * 49 + [0, 0],
            "no difference beyond chance between likelihood ratio (50.0 %) and b (49.0 %)",
        ),
        ([1] * 100, [1] * 100, "is no difference beyond chance"),
    ],
)
def test_networks_differ_only_beyond_chance(own: list[int], other: list[int], said: str) -> None:
    masks = {"a": torch.zeros(100).bool(), "b": torch.tensor(other).bool(), LIKELIHOOD_RATIO: torch.tensor(own).bool()}
    assert said in compared("There", "robust", masks)


def test_results_are_all_that_json_prints(out: Path) -> None:
    result = run("reproduce", *SMALL, "--out", str(out), "--resume", "--json")
    assert json.loads(result.stdout) == json.loads((out / "results.json").read_text())
    assert result.stdout.count("\n") == 1
    assert "attacks: 1 of" in result.stderr
    assert "Written:" in result.stderr


def test_table_and_figures_are_written(out: Path) -> None:
    text = (out / "table.md").read_text()
    assert "| clean |" in text
    assert "no robustness claim" in text
    assert "| masking not ruled out (G0" in text
    assert "| G9 budget | PASS |" in (out / "robustness.md").read_text()
    for figure in ("epsilon.png", "steps.png", "surrogates.png"):
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
