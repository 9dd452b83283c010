"""Trained networks that are attacked, certified, or whose gradients are measured, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from snntorch_lr.experiments import measure

from .commands import is_one_line, run

EVALUATE = ["--suite", "quick", "--images", "6", "--draws", "1", "--votes", "4", "--epsilon", "0.1"]
DIAGNOSE = ["--copies", "2", "--batch", "4", "--repeats", "2", "--reference", "3"]
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
    assert max(map(len, result.stdout.partition("Clean accuracy")[2].splitlines()[:-1])) <= 80
    assert 'class="broken"' in (tmp_path / "report.html").read_text()
    for figure in ("epsilon.png", "steps.png", "surrogates.png"):
        assert (tmp_path / figure).read_bytes()[:4] == PNG
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
    assert (tmp_path / "certificates.png").read_bytes()[:4] == PNG


def test_a_fresh_network_is_measured_and_written(tmp_path: Path) -> None:
    result = run("diagnose", *DIAGNOSE, "--noise", "escape", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "gradients.json").read_text())
    text = (tmp_path / "gradients.md").read_text()
    for name in written["report"]["quality"]:
        assert name in result.output
        assert name in text
    assert "--noise escape" in written["command"]
    assert (written["recipe"]["dataset"], written["recipe"]["epochs"]) == ("digits", 0)
    assert "at initialisation" in text
    assert (tmp_path / "gradients.png").read_bytes()[:4] == PNG
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("noise", ["membrane", "escape"])
def test_a_checkpoint_decides_data_model_and_noise_level(
    noise: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []
    gradient_report = measure.gradient_report

    def spy(net, *args, **options):  # type: ignore[no-untyped-def]
        levels.extend((type(neuron.noise).__name__, neuron.noise.sigma.item()) for neuron in net.neurons)
        return gradient_report(net, *args, **options)

    monkeypatch.setattr(measure, "gradient_report", spy)
    net = checkpoints / "conv.pt"
    assert run("diagnose", *DIAGNOSE, "--checkpoint", str(net), "--noise", noise, "--out", str(tmp_path)).exit_code == 0
    trained = torch.load(net, weights_only=True)["net"]
    assert levels == [
        (measure.KINDS[noise].__name__, pytest.approx(float(trained[f"neurons.{index}.noise.log_sigma"].exp())))
        for index in (0, 1)
    ]
    assert "after 1 epochs by likelihood ratio" in (tmp_path / "gradients.md").read_text()


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("evaluate lr.pt --norm l3", 2, "linf, l2"),
        ("evaluate lr.pt --epsilon 0", 2, "epsilons must be positive"),
        ("evaluate lr.pt --votes 0", 2, "votes must be at least 1"),
        ("evaluate lr.pt other.pt", 2, "choose one with --dataset"),
        ("evaluate absent.pt", 1, "absent.pt: No such file or directory"),
        ("diagnose --checkpoint absent.pt", 1, "absent.pt: No such file or directory"),
        ("diagnose --checkpoint conv.pt --model mlp", 2, "leave out --model"),
    ],
)
def test_what_checkpoints_do_not_allow_is_one_line(
    line: str, status: int, message: str, checkpoints: Path, tmp_path: Path
) -> None:
    words = [str(checkpoints / word) if word.endswith(".pt") else word for word in line.split()]
    is_one_line(run(*words, "--out", str(tmp_path / "x")), status, message)
    assert list(tmp_path.iterdir()) == []
