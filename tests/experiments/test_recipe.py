from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from snntorch_lr import Counterfactual
from snntorch_lr.experiments import data
from snntorch_lr.experiments.recipe import (
    Recipe,
    load_trained,
    make_network,
    make_optimizer,
    noise_levels,
)
from snntorch_lr.experiments.train import train

RESULTS = Path(__file__).parents[2] / "docs" / "results"
CPU = torch.device("cpu")
RECIPE = Recipe(method="likelihood ratio", epochs=2, copies=4, batch_size=32, learning_rate=5e-3)
VANILLA = replace(RECIPE, estimator="vanilla")


@pytest.fixture(scope="module")
def images() -> data.Images:
    digits = data.load("digits")
    return replace(digits, train=digits.train[:256], train_labels=digits.train_labels[:256])


def losses(recipe: Recipe, images: data.Images, path: Path) -> list[float]:
    return [entry["train_loss"] for entry in train(recipe, images, path / "c.pt", CPU).history]


@pytest.mark.parametrize("objective", ["true-class", "zero-one", "clipped-margin"])
def test_every_objective_trains(objective: str, images: data.Images, tmp_path: Path) -> None:
    first, last = losses(replace(VANILLA, objective=objective, copies=16), images, tmp_path)
    assert last < first


def test_copies_change_once_the_learning_rate_has_fallen(
    images: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    backward = Counterfactual.backward

    def watched(self: Counterfactual, *args: Any) -> torch.Tensor:
        used.append(self.copies)
        return backward(self, *args)

    monkeypatch.setattr(Counterfactual, "backward", watched)
    losses(replace(RECIPE, epochs=4, late_copies=8), images, tmp_path)
    assert used == sorted(used)
    assert used.count(4) == pytest.approx(16, abs=1) == used.count(8)


def test_a_flat_objective_moves_the_readout(images: data.Images, tmp_path: Path) -> None:
    recipe = replace(VANILLA, objective="zero-one")
    before = dict(make_network(recipe, images.shape).named_parameters())
    after = dict(train(recipe, images, tmp_path / "c.pt", CPU).net.named_parameters())
    assert not torch.equal(before["readout.weight"], after["readout.weight"])


def test_noise_levels_are_fixed_on_request(images: data.Images, tmp_path: Path) -> None:
    recipe = replace(RECIPE, learn_sigma=False)
    net = train(recipe, images, tmp_path / "c.pt", CPU).net
    assert noise_levels(net) == noise_levels(make_network(recipe, images.shape))
    learned = train(RECIPE, images, tmp_path / "d.pt", CPU).net
    assert noise_levels(learned) != noise_levels(net)


def test_decay_shrinks_the_first_weights_only() -> None:
    recipe = replace(RECIPE, decay=2.0, learning_rate=0.1)
    net = make_network(recipe, (1, 8, 8))
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer = make_optimizer(recipe, net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] * (0.8 if name == "blocks.0.1.weight" else 1))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("study-*/results.json")), ids=lambda path: path.parent.name)
def test_recipes_of_earlier_versions_are_read(path: Path) -> None:
    for each in json.loads(path.read_text(encoding="utf-8")):
        saved = each["entry"]["recipe"]
        recipe = asdict(Recipe.of(saved))
        assert recipe == {name: saved.get(name) for name in recipe}


def test_defaults_depend_on_the_data_and_the_estimator() -> None:
    assert (Recipe(method="surrogate").epochs, Recipe(method="surrogate").copies) == (20, 1)
    other = Recipe(method="surrogate", dataset="mnist", estimator="vanilla")
    assert (other.epochs, other.copies) == (4, 16)
    assert (replace(other, dataset="digits", estimator="counterfactual").copies) == 16


@pytest.mark.parametrize("method", ["surrogate", "likelihood ratio"])
def test_training_images_are_disturbed(method: str, images: data.Images, tmp_path: Path) -> None:
    plain = losses(replace(RECIPE, method=method), images, tmp_path / "plain")[-1]
    changes = [{"adversary": 0.2}, {"adversary": 0.2, "free": 2}, {"input_noise": 1.0}]
    changes += [{"input_noise": 1.0, "input_noise_each_step": True}, {"input_noise": 0.2, "adversary": 0.2}]
    for number, change in enumerate(changes):
        assert losses(replace(RECIPE, method=method, **change), images, tmp_path / str(number))[-1] > plain


@pytest.mark.parametrize("method", ["surrogate", "likelihood ratio"])
def test_the_level_of_noise_on_the_input_is_learned(method: str, images: data.Images, tmp_path: Path) -> None:
    recipe = replace(RECIPE, method=method, input_noise=0.5, learn_input_noise=True)
    net = train(recipe, images, tmp_path / "c.pt", CPU).net
    assert 0.25 < noise_levels(net)["input"][0] != pytest.approx(0.5, abs=1e-4)
    _, loaded = load_trained(tmp_path / "c.pt")
    assert noise_levels(loaded) == noise_levels(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"objective": "fame"}, "unknown objective"),
        ({"objective": "zero-one", "method": "surrogate"}, "no gradient"),
        ({"objective": "zero-one"}, "no derivative by a spike: use the estimator vanilla"),
        ({"model": "rnn"}, "unknown model"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"late_copies": -1}, "late_copies"),
        ({"late_copies": 8, "method": "surrogate"}, "late_copies"),
        ({"decay": -1.0}, "decay"),
        ({"free": 4}, "free needs the budget"),
        ({"model": "ann"}, "no spiking neurons"),
        ({"stop_at": 0.5}, "validation"),
        ({"anneal": 0.0}, "anneal must be above 0 and at most 1"),
        ({"anneal": 2.0}, "anneal must be above 0 and at most 1"),
    ],
)
def test_a_wrong_recipe_is_refused_before_training(
    change: dict[str, object], message: str, images: data.Images, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(RECIPE, **change), images, tmp_path / "c.pt", CPU)  # type: ignore[arg-type]
    assert not (tmp_path / "c.pt").exists()
