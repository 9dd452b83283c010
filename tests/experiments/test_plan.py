from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from snntorch_lr.experiments.recipe import Recipe
from snntorch_lr.experiments.study.plan import PRESETS, REDUCED, Evaluation, read_plan

from .. import pages

# A change of these throws away finished results; see Entry.mark.
MARKS = {
    "digits": "7e14dd14b918", "fashion-mnist": "fb6486440d03", "fashion-mnist-conv": "6c788363c8d6",
    "mnist": "14811e69155c", "mnist-conv": "e69f65c566b4",
}  # fmt: skip
PLAN = """
[recipes.surrogate]
method = "surrogate"
validation = 200

[recipes.ratio]
like = "surrogate"
method = "likelihood ratio"
noise = "escape"

[usual]
evaluations = [
  { attacks = "reduced", images = 100, epsilons = [0.1] },
  { attacks = ["FGSM", "EOT-PGD training"], images = 10, epsilons = [0.05, 1], noise = "on" },
]
networks = [
  { family = "surrogate", like = "surrogate" },
  { family = "likelihood ratio", like = "ratio", sigma = 1 },
  { family = "surrogate, stopped", label = "early", like = "surrogate", matches = "usual: likelihood ratio" },
]
"""


def written(folder: Path, text: str) -> str:
    path = folder / "my-plan.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", PRESETS)
def test_plans_of_the_package_are_as_they_were(name: str) -> None:
    marks = " ".join(entry.mark for entry in read_plan(name))
    assert hashlib.sha256(marks.encode()).hexdigest()[:12] == MARKS[name]


def test_a_plan_of_ones_own_is_read(tmp_path: Path) -> None:
    entries = {entry.name: entry for entry in read_plan(written(tmp_path, PLAN))}
    assert list(entries) == [
        "surrogate", "ann", "usual: surrogate", "usual: likelihood ratio", "usual: surrogate, stopped, early"
    ]  # fmt: skip
    off = Evaluation(REDUCED, 100, (0.1,))
    on = Evaluation(("FGSM", "EOT-PGD training"), 10, (0.05, 1.0), "on")
    ratio = entries["usual: likelihood ratio"]
    assert ratio.recipe == Recipe(method="likelihood ratio", noise="escape", sigma=1.0, validation=200)
    assert ratio.evaluations == (off, on)
    # Without noise there is none to turn on.
    assert entries["usual: surrogate"].evaluations == (off,)
    assert entries["usual: surrogate, stopped, early"].matches == ratio.name
    assert entries["ann"].recipe == Recipe(method="surrogate", model="ann", validation=200)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("validation = 200", "validation = ", "Invalid value"),
        ('"likelihood ratio"\nnoise', '"magic"\nnoise', "usual, network 2: unknown method 'magic'; choose one of"),
        ('noise = "escape"', 'nois = "escape"', "recipes.ratio: unknown key 'nois'; use noise"),
        ('noise = "escape"', "sigma = []", r"recipes.ratio: sigma must be a number, got \[\]"),
        ('noise = "escape"', "epochs = 1.5", "recipes.ratio: epochs must be an integer, got 1.5"),
        ('like = "surrogate"\nmeth', 'like = "other"\nmeth', "recipes.ratio: 'other' is not among what stands above"),
        ("surrogate", "plain", "recipes.surrogate, which attacks are transferred from: method is missing"),
        ("validation = 200", "", "recipes.surrogate, .*: validation must be at least 1"),
        ("[usual]", "[best]", "unknown key 'best'; use one of like, recipes, usual, seed, front, tune"),
        ("networks = [", "nets = [", "usual: unknown key 'nets'; use networks"),
        ("networks = [", "networks = 3\nx = [", "usual: networks must be a list, each a table, got 3"),
        (PLAN[PLAN.index("networks = [") :], "", "usual: networks is missing"),
        (PLAN[PLAN.index("[usual]") :], "", "no network: add one of the tables tune, usual, front, seed"),
        ("\n[recipes.surr", "\nfront = 3\n[recipes.surr", "front must be a table, got 3"),
        ("[recipes.surrogate]", "[recipes]\nx = 3\n[recipes.surrogate]", "recipes.x: expected a table, got 3"),
        ('attacks = "reduced"', 'attacks = "mild"', "usual, evaluation 1: unknown attack 'mild'; use reduced, quick"),
        ('"EOT-PGD training"', '"PGD-9"', "usual, evaluation 2: unknown attack 'PGD-9'; use reduced, quick"),
        ('"reduced"', '"quick"', "evaluation 1: attacks must have one of the reduced suite"),
        ("images = 100", "images = 0", "evaluation 1: images must be at least 1, got 0"),
        ("images = 100, ", "", "evaluation 1: images is missing"),
        ("[0.05, 1]", "[0.05, 2]", "evaluation 2: epsilons must be above 0 and at most 1, got 2"),
        ("images = 10,", "images = 201, held_out = true,", "network 1: there are 200 held-out images"),
        ('{ family = "surrogate", ', "{ ", "network 1: family is missing"),
        ("sigma = 1", 'dataset = "mnist"', "network 2: dataset must be that of recipes.surrogate, digits"),
        ("sigma = 1", "sigma = 0", "network 2: sigma must be positive"),
        ('ratio", sigma', 'rato", sigma', "network 2: 'rato' is not among what stands above: surrogate, ratio"),
        ('"usual: likelihood ratio"', '"usual: x"', "network 3: 'usual: x' is not among what stands above: surrog"),
        (', stopped", label = "early"', '"', "network 3: there is a network 'usual: surrogate' above: give this"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_file_its_place_and_the_remedy(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in PLAN
    plan = written(tmp_path, PLAN.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(plan)
    assert str(caught.value).startswith(f"{plan}: ")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"my-plan\.toml"):
        read_plan(str(tmp_path / "my-plan.toml"))


def test_the_example_of_the_documentation_is_a_plan(tmp_path: Path) -> None:
    (block,) = pages.blocks(pages.ROOT / "docs" / "results" / "index.md", "toml")
    assert len(read_plan(written(tmp_path, block.code))) > 3
