from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from snntorch_lr.experiments.recipe import Recipe
from snntorch_lr.experiments.study.plan import PRESETS, REDUCED, Evaluation, read_plan

from .. import pages

# A change of these throws away finished results; see Entry.mark.
MARKS = {
    "digits": "97588e417ddf", "fashion-mnist": "944d6b9aed01", "mnist": "5a366f670c31", "mnist-conv": "44a726b9f850"
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
  { family = "surrogate" },
  { family = "likelihood ratio", recipe = "ratio", sigma = 1 },
  { family = "surrogate, stopped", label = "early", matches = "usual: likelihood ratio" },
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
        ("validation = 200", "validation = ", "my-plan.toml: Invalid value"),
        ('"likelihood ratio"\nnoise', '"magic"\nnoise', "usual: networks, row 2: unknown method 'magic'; choose"),
        ('noise = "escape"', 'nois = "escape"', "recipes.ratio: unknown key 'nois'; use noise"),
        ('noise = "escape"', "sigma = []", r"recipes.ratio: sigma must be float, got \[\]"),
        ('noise = "escape"', "epochs = 1.5", "recipes.ratio: epochs must be int, got 1.5"),
        ('like = "surrogate"', 'like = "other"', "recipes.ratio: like names 'other', which stands nowhere above"),
        ("surrogate", "plain", "a recipe 'surrogate' is missing"),
        ("validation = 200", "", "recipes.surrogate: validation must be at least 1"),
        ("[usual]", "[best]", "best: unknown group; use one of tune, usual, front, seed"),
        ("networks = [", "nets = [", "usual: unknown key 'nets'; a group has evaluations and networks"),
        ('attacks = "reduced"', 'attacks = "mild"', "usual: evaluations, row 1: unknown attacks 'mild'; use reduced, "),
        ('"reduced"', '"quick"', "evaluations, row 1: attacks must have one of the reduced suite"),
        ("images = 100", "images = 0", "evaluations, row 1: images must be at least 1, got 0"),
        ("images = 100, ", "", "evaluations, row 1: images is missing"),
        ("[0.05, 1]", "[0.05, 2]", "evaluations, row 2: epsilons must be above 0 and at most 1, got 2"),
        ("images = 10,", "images = 201, held_out = true,", "networks, row 1: there are 200 held-out images"),
        ('{ family = "surrogate" }', "{ epochs = 2 }", "networks, row 1: family is missing"),
        ("sigma = 1", 'dataset = "mnist"', "networks, row 2: dataset must be digits"),
        ("sigma = 1", "sigma = 0", "networks, row 2: sigma must be positive"),
        ("ratio\", sigma", "rato\", sigma", "networks, row 2: recipe names 'rato', which stands nowhere above"),
        ('"usual: likelihood ratio"', '"usual: x"', "networks, row 3: matches names 'usual: x'"),
        ('stopped", label = "early"', 'stopped", label = ""', None),
        (', stopped", label = "early"', '"', "networks, row 3: there is a network 'usual: surrogate' already"),
        ("networks = [", "networks = 3\nx = [", "usual: unknown key 'x'"),
        ("\n[recipes.surr", "\nfront = 3\n[recipes.surr", "front: expected tables, got"),
        (PLAN[PLAN.index("[usual]") :], "", "there is no network: add a table of the groups tune, usual, front, seed"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_file_its_place_and_the_remedy(
    old: str, new: str, message: str | None, tmp_path: Path
) -> None:
    assert old in PLAN
    plan = written(tmp_path, PLAN.replace(old, new))
    if message is None:
        read_plan(plan)
        return
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(plan)
    assert str(caught.value).startswith(f"{plan}: ")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"my-plan\.toml"):
        read_plan(str(tmp_path / "my-plan.toml"))


def test_the_example_of_the_documentation_is_a_plan(tmp_path: Path) -> None:
    (block,) = pages.blocks(pages.ROOT / "docs" / "results" / "index.md", "toml")
    assert len(read_plan(written(tmp_path, block.code))) > 3
