"""Recipes and training: what is refused, what is learned, what is saved, and what a resumed run ends with."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from snntorch_lr import Counterfactual
from snntorch_lr.experiments import data
from snntorch_lr.experiments import train as module
from snntorch_lr.experiments.models import MODELS
from snntorch_lr.experiments.train import (
    METHODS,
    Recipe,
    accuracy,
    load_trained,
    make_network,
    make_optimizer,
    noise_levels,
    right,
    split,
    train,
    validation_accuracy,
)
from snntorch_lr.gradients import ESTIMATORS, CounterfactualCredit

RESULTS = Path(__file__).parents[2] / "docs" / "results"
CPU = torch.device("cpu")
RECIPE = Recipe(method="likelihood ratio", epochs=3, num_steps=8, batch_size=16)
FAST = replace(RECIPE, epochs=2, copies=4, batch_size=32, learning_rate=5e-3)


@pytest.fixture(scope="module")
def images() -> data.Dataset:
    digits = data.load("digits")
    return replace(
        digits, train=digits.train[:256], train_labels=digits.train_labels[:256],
        test=digits.test[:50], test_labels=digits.test_labels[:50],
    )  # fmt: skip


def recordings(images: data.Dataset, side: int) -> data.Dataset:
    """The images, larger, as four frames, of which the last is empty."""
    frames = [
        torch.nn.functional.interpolate(part, (side, side)).unsqueeze(1).repeat(1, 4, 1, 1, 1)
        for part in (images.train, images.test)
    ]
    for part in frames:
        part[:, 3] = 0
    return replace(images, train=frames[0], test=frames[1])


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses of all training steps."""
    made: list[float] = []
    stepper = module.stepper

    def watched(*args: Any) -> module.Step:
        take_step = stepper(*args)

        def step(x: torch.Tensor, y: torch.Tensor) -> float:
            made.append(take_step(x, y))
            return made[-1]

        return step

    monkeypatch.setattr(module, "stepper", watched)
    return made


def losses(recipe: Recipe, images: data.Dataset, path: Path) -> list[float]:
    return [entry["train_loss"] for entry in train(recipe, images, path / "c.pt", CPU).history]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_falls(method: str, model: str, images: data.Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPE, method=method, model=model, learning_rate=1e-2)
    run = train(recipe, images if model != "event-conv" else recordings(images, 16), tmp_path / "c.pt", CPU)
    assert run.history[-1]["train_loss"] < 0.99 * run.history[0]["train_loss"]
    by_credit = isinstance(getattr(run.net.neurons[0], "sampler", None), CounterfactualCredit)
    assert by_credit == (method == "likelihood ratio")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("noise", ["membrane", "escape"])
def test_every_estimator_and_noise_trains(estimator: str, noise: str, images: data.Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPE, model="deep-mlp", copies=4, learning_rate=1e-2, estimator=estimator, noise=noise)
    history = train(recipe, images, tmp_path / "c.pt", CPU).history
    assert history[-1]["train_loss"] < 0.95 * history[0]["train_loss"]


def test_networks_of_a_seed_start_from_the_same_weights() -> None:
    nets = [make_network(replace(RECIPE, method=method), (1, 8, 8), 10) for method in METHODS]
    weights = [net.readout.weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    "change",
    [
        *({"method": method} for method in METHODS),
        {"copies": 2},
        {"copies": 2, "estimator": "vanilla"},
        {"anneal": 0.3},
        {"method": "surrogate, noise", "anneal": 0.3},
        {"method": "surrogate", "anneal": 0.3, "input_noise": 0.3},
    ],
    ids=str,
)
def test_killed_and_resumed_gives_the_same_weights(
    change: dict[str, Any], images: data.Dataset, tmp_path: Path, steps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, **change)
    whole = train(recipe, images, tmp_path / "whole.pt", CPU)
    with monkeypatch.context() as patch:
        # Once all steps of the second epoch are done, after 48 of the whole run, and before it is saved.
        patch.setattr(module, "right", lambda *_, **__: interrupt() if len(steps) == 80 else torch.ones(50).bool())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, images, tmp_path / "cut.pt", CPU)
    torch.rand(5)  # whatever else used the global generator
    steps.clear()
    resumed = train(recipe, images, tmp_path / "cut.pt", CPU, resume=True)
    assert len(steps) == 32
    assert [entry["train_loss"] for entry in resumed.history] == [entry["train_loss"] for entry in whole.history]
    for name, value in resumed.net.state_dict().items():
        assert torch.equal(value, whole.net.state_dict()[name]), name


@pytest.mark.parametrize("method", ["surrogate, noise", "likelihood ratio"])
def test_noise_levels_fall_to_a_fraction_which_is_saved(method: str, images: data.Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPE, method=method, anneal=0.25, learn_sigma=False)
    seen: list[float] = []
    run = train(
        recipe, images, tmp_path / "c.pt", CPU,
        after_epoch=lambda _, net: seen.append(float(net.neurons[0].noise.sigma)),
    )  # fmt: skip
    # Geometrically, from one half.
    assert seen == pytest.approx([0.5 * 0.25 ** (part / 3) for part in (1, 2, 3)])
    recipe, loaded = load_trained(tmp_path / "c.pt")
    assert recipe.anneal == 0.25
    assert noise_levels(loaded) == noise_levels(run.net) == {"neurons.0": [pytest.approx(0.125)]}


def test_both_accuracies_of_a_network_with_noise_are_recorded(images: data.Dataset, tmp_path: Path) -> None:
    for method in METHODS:
        run = train(replace(RECIPE, method=method, sigma=2.0, epochs=1), images, tmp_path / f"{method}.pt", CPU)
        entry = run.history[-1]
        assert entry["test_accuracy"] == accuracy(run.net, images.test, images.test_labels)
        draws = torch.stack([right(run.net, images.test, images.test_labels, noise=True) for _ in range(50)]).double()
        if method == "surrogate":
            assert "noisy_test_accuracy" not in entry
            assert (draws == draws[0]).all()
        else:
            mean, spread = float(draws.mean()), float(draws.mean(1).std())
            assert entry["noisy_test_accuracy"] == pytest.approx(mean, abs=5 * spread)
            assert mean != entry["test_accuracy"]
            assert run.net.neurons[0].noise.forced is None


@pytest.mark.parametrize(("off", "on", "told"), [(10, 30, True), (28, 30, False), (30, 10, False)])
def test_a_network_that_is_another_one_without_its_noise_is_warned_of_at_the_end(
    off: int, on: int, told: bool, images: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        module, "right", lambda net, images, labels, noise=False: torch.arange(50) < (on if noise else off)
    )
    train(replace(RECIPE, epochs=2), images, tmp_path / "net.pt", CPU)
    said = [str(caught.message) for caught in recwarn if "another one" in str(caught.message)]
    assert len(said) == told
    assert not told or said[0].startswith("net: accuracy is 20.0 % without the noise, as after net.eval(), and 60.0 %")


def test_training_stops_where_the_held_out_images_are_right_often_enough(
    images: data.Dataset, tmp_path: Path, steps: list[float]
) -> None:
    recipe = replace(RECIPE, method="surrogate", validation=64, learning_rate=5e-3, stop_at=0.5)
    run = train(recipe, images, tmp_path / "c.pt", CPU)
    assert validation_accuracy(run.net, recipe, images) >= 0.5
    assert 0 < run.history[-1]["epoch"] < recipe.epochs
    stopped = [*steps]
    assert len(stopped) == round(12 * run.history[-1]["epoch"])
    steps.clear()
    train(replace(recipe, stop_at=None), images, tmp_path / "whole.pt", CPU)
    assert stopped == steps[: len(stopped)]
    again = train(recipe, images, tmp_path / "c.pt", CPU, resume=True)
    assert again.history == run.history


def test_held_out_images_are_not_trained_on(images: data.Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPE, method="surrogate", epochs=1, validation=64)
    rows, held_out = split(recipe, images)
    assert sorted([*rows.tolist(), *held_out.tolist()]) == list(range(256))
    spoilt = replace(images, train=images.train.index_fill(0, held_out, 1.0))
    nets = [train(recipe, part, tmp_path / f"{index}.pt", CPU).net for index, part in enumerate((images, spoilt))]
    assert torch.equal(nets[0].readout.weight, nets[1].readout.weight)
    with pytest.raises(ValueError, match=r"\[0, 256\)"):
        train(replace(recipe, validation=256), images, tmp_path / "x.pt", CPU)


def test_a_checkpoint_of_other_settings_is_refused(images: data.Dataset, tmp_path: Path) -> None:
    train(replace(RECIPE, epochs=1), images, tmp_path / "c.pt", CPU)
    with pytest.raises(ValueError, match=r"copies=1 \(now 4\)"):
        train(replace(RECIPE, epochs=1, copies=4), images, tmp_path / "c.pt", CPU, resume=True)


def test_copies_change_once_the_learning_rate_has_fallen(
    images: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    backward = Counterfactual.backward

    def watched(self: Counterfactual, *args: Any) -> torch.Tensor:
        used.append(self.copies)
        return backward(self, *args)

    monkeypatch.setattr(Counterfactual, "backward", watched)
    losses(replace(FAST, epochs=4, late_copies=8), images, tmp_path)
    assert used == sorted(used)
    assert used.count(4) == pytest.approx(16, abs=1) == used.count(8)


def test_noise_levels_are_fixed_on_request(images: data.Dataset, tmp_path: Path) -> None:
    recipe = replace(FAST, learn_sigma=False)
    net = train(recipe, images, tmp_path / "c.pt", CPU).net
    assert noise_levels(net) == noise_levels(make_network(recipe, images.shape, 10))
    learned = train(FAST, images, tmp_path / "d.pt", CPU).net
    assert noise_levels(learned) != noise_levels(net)


def test_decay_shrinks_the_first_weights_only() -> None:
    recipe = replace(FAST, decay=2.0, learning_rate=0.1)
    net = make_network(recipe, (1, 8, 8), 10)
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer = make_optimizer(recipe, net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] * (0.8 if name == "blocks.0.1.weight" else 1))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("study-*/results.json")), ids=lambda path: path.parent.name)
def test_recipes_of_earlier_versions_are_read(path: Path) -> None:
    for result in json.loads(path.read_text(encoding="utf-8")):
        saved = result["entry"]["recipe"]
        recipe = asdict(Recipe.of(saved))
        assert recipe == {name: saved.get(name) for name in recipe}


def test_defaults_depend_on_the_data_and_the_estimator() -> None:
    assert (Recipe(method="surrogate").epochs, Recipe(method="surrogate").copies) == (20, 1)
    other = Recipe(method="surrogate", dataset="mnist", estimator="vanilla")
    assert (other.epochs, other.copies) == (4, 16)
    assert (replace(other, dataset="digits", estimator="counterfactual").copies) == 16


@pytest.mark.parametrize("method", ["surrogate", "likelihood ratio"])
def test_training_images_are_disturbed(method: str, images: data.Dataset, tmp_path: Path) -> None:
    plain = losses(replace(FAST, method=method), images, tmp_path / "plain")[-1]
    changes = [{"adversary": 0.2}, {"adversary": 0.2, "free": 2}, {"input_noise": 1.0}]
    changes += [{"input_noise": 1.0, "input_noise_each_step": True}, {"input_noise": 0.2, "adversary": 0.2}]
    for number, change in enumerate(changes):
        assert losses(replace(FAST, method=method, **change), images, tmp_path / str(number))[-1] > plain


@pytest.mark.parametrize("method", ["surrogate", "likelihood ratio"])
def test_the_level_of_noise_on_the_input_is_learned(method: str, images: data.Dataset, tmp_path: Path) -> None:
    recipe = replace(FAST, method=method, input_noise=0.5, learn_input_noise=True)
    net = train(recipe, images, tmp_path / "c.pt", CPU).net
    assert 0.25 < noise_levels(net)["input"][0] != pytest.approx(0.5, abs=1e-4)
    _, loaded = load_trained(tmp_path / "c.pt")
    assert noise_levels(loaded) == noise_levels(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"model": "rnn"}, "mlp, wide-mlp, deep-mlp, spiking-mlp, recurrent, conv, event-conv, vgg, ann"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"late_copies": -1}, "late_copies"),
        ({"late_copies": 8, "method": "surrogate"}, "late_copies"),
        ({"decay": -1.0}, "decay"),
        ({"free": 4}, "free needs the budget"),
        ({"model": "ann"}, "no spiking neurons"),
        ({"surrogate": "atan"}, "the likelihood ratio has none"),
        ({"surrogate": "straight", "method": "surrogate"}, "choose one of atan, fast-sigmoid"),
        ({"dataset": ["mnist"]}, "dataset must be of type str"),
        ({"stop_at": 0.5}, "validation"),
        ({"anneal": 2.0}, "anneal must be above 0 and at most 1"),
    ],
)
def test_a_wrong_recipe_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FAST, **change)
