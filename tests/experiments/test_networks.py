"""Trained networks that come with the package are those of the committed study."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from snntorch_lr.experiments import NETWORKS, data, load
from snntorch_lr.experiments.train import load_trained, noise_levels

ROOT = Path(__file__).parents[2]
RESULTS: list[dict[str, Any]] = json.loads((ROOT / "docs/results/study-mnist/results.json").read_text(encoding="utf-8"))
FAMILIES = {
    "mnist/surrogate": "surrogate",
    "mnist/surrogate-same-noise": "surrogate, same noise",
    "mnist/surrogate-noisy-input": "surrogate, noisy input",
    "mnist/surrogate-adversarial": "surrogate, adversarial training",
    "mnist/lr": "likelihood ratio",
    "mnist/lr-noisy-input": "likelihood ratio, noisy input",
    "mnist/lr-adversarial": "likelihood ratio, adversarial training",
}


def result(name: str) -> dict[str, Any]:
    return next(result for result in RESULTS if result["entry"]["name"] == f"usual: {FAMILIES[name]}")


def test_there_are_the_networks_of_the_study() -> None:
    assert set(NETWORKS) == set(FAMILIES)
    assert all(path.stat().st_size < 1_000_000 for path in NETWORKS.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_the_one_of_the_results(name: str) -> None:
    recipe, net = load_trained(NETWORKS[name])
    entry = result(name)
    # Options that are newer than the network are as if they were not there, and older ones are gone.
    assert asdict(recipe) == {name: entry["entry"]["recipe"].get(name) for name in asdict(recipe)}
    assert noise_levels(net) == entry["sigma"]["after"]


def test_a_network_has_the_accuracy_of_the_results() -> None:
    if not [*(ROOT / "data" / "MNIST" / "raw").glob("t10k-images*")]:
        pytest.skip("MNIST is not in data/")
    images = data.load("mnist", ROOT / "data")
    committed = result("mnist/lr-adversarial")["clean"]["off"]["majority vote"]["accuracy"]
    with torch.no_grad():
        right = load("mnist/lr-adversarial")(images.test).argmax(1) == images.test_labels
    # A spike more or less at a threshold, where another processor rounds otherwise, changes one image.
    assert float(right.float().mean()) == pytest.approx(committed, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist/lr", [-4.126, -3.614, 2.468, 3.724, -15.55, 4.272, -0.75, 1.396, -5.903, -8.02]),
        ("mnist/lr-noisy-input", [-1.346, -2.986, -0.016, 0.058, -1.399, -0.395, 0.1, -4.136, 2.525, -0.666]),
    ],
)
def test_a_network_computes_what_it_did_in_version_0_2(name: str, expected: list[float]) -> None:
    image = ((torch.arange(784) * 7919) % 256 / 255).view(1, 1, 28, 28)
    with torch.no_grad():
        assert load(name)(image)[0].tolist() == pytest.approx(expected, abs=2e-3)


def test_an_unknown_network_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="choose one of mnist/lr, mnist/lr-adversarial"):
        load("mnist/best")
