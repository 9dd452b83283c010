from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from snntorch_lr.experiments import data, diagnose
from snntorch_lr.experiments.recipe import Recipe
from snntorch_lr.experiments.train import train

from .commands import is_one_line, run

SMALL = ["--copies", "2", "--batch", "4", "--repeats", "2", "--reference", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.pt"
    images = data.load("digits")
    small = data.Images("digits", images.train[:32], images.train_labels[:32], images.test[:8], images.test_labels[:8])
    train(
        Recipe(method="likelihood ratio", model="conv", epochs=1, copies=2, seed=3, sigma=0.4),
        small,
        path,
        torch.device("cpu"),
    )
    return path


def test_fresh_network_is_measured_and_written(tmp_path: Path) -> None:
    result = run("diagnose", *SMALL, "--noise", "escape", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "gradients.json").read_text())
    text = (tmp_path / "gradients.md").read_text()
    for name in written["report"]["quality"]:
        assert name in result.output
        assert name in text
    assert "--noise escape" in written["command"]
    assert written["recipe"]["dataset"] == "digits"
    assert "at initialisation" in text
    assert (tmp_path / "gradients.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("noise", ["membrane", "escape"])
def test_checkpoint_decides_data_model_and_noise_level(
    noise: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []
    measure = diagnose.gradient_report

    def spy(net, *args, **options):  # type: ignore[no-untyped-def]
        levels.extend((type(neuron.noise).__name__, neuron.noise.sigma.item()) for neuron in net.neurons)
        return measure(net, *args, **options)

    monkeypatch.setattr(diagnose, "gradient_report", spy)
    arguments = [*SMALL, "--checkpoint", str(checkpoint), "--noise", noise, "--out", str(tmp_path)]
    assert run("diagnose", *arguments).exit_code == 0
    trained = torch.load(checkpoint, weights_only=True)["net"]
    assert levels == [
        (diagnose.KINDS[noise].__name__, pytest.approx(float(trained[f"neurons.{index}.noise.log_sigma"].exp())))
        for index in (0, 1)
    ]
    assert "after 1 epochs by likelihood ratio" in (tmp_path / "gradients.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dataset", "cifar"], 2, "digits, mnist, fashion-mnist"),
        (["--model", "rnn"], 2, "mlp, conv"),
        (["--noise", "pink"], 2, "membrane, escape"),
        (["--batch", "0"], 2, "--batch must be at least 1"),
        (["--repeats", "1"], 2, "repeats must be at least 2"),
        (["--device", "gpu"], 2, "cpu or cuda"),
        (["--checkpoint", "absent.pt"], 1, "absent.pt"),
        (["--checkpoint", "NET", "--model", "mlp"], 2, "leave out --model"),
        (["--checkpoint", "OTHER"], 2, "is not a checkpoint of reproduce"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], status: int, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.pt"
    torch.save({"net": {}}, other)
    places = {"NET": str(checkpoint), "OTHER": str(other)}
    result = run("diagnose", *(places.get(word, word) for word in arguments), "--out", str(tmp_path / "x"))
    is_one_line(result, status, message)
    assert not (tmp_path / "x").exists()
