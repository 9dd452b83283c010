"""Plans that are read or refused, and a small study from its plan to its page."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from snntorch_lr.experiments.page import REDUCED, Page, write
from snntorch_lr.experiments.study import PLANS, Entry, Evaluation, Study, finished, read_plan, result_file, work
from snntorch_lr.experiments.train import Recipe
from snntorch_lr.robustness import SUITES, Descent, gradient_attack

from .. import pages
from .commands import quick_gates, run

# A change of these throws away finished results; see Entry.mark.
MARKS = {
    "digits": "98e22ef7482a", "fashion-mnist": "69217ec1c235", "fashion-mnist-conv": "2ce1847c7837",
    "mnist": "e6aa44efd6e4", "mnist-conv": "6e04aa35273a",
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


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_the_package_are_as_they_were(name: str) -> None:
    marks = " ".join(entry.mark for entry in read_plan(name))
    assert hashlib.sha256(marks.encode()).hexdigest()[:12] == MARKS[name]


def test_a_plan_of_ones_own_is_read(tmp_path: Path) -> None:
    entries = {entry.name: entry for entry in read_plan(written(tmp_path, PLAN))}
    assert list(entries) == [
        "surrogate", "ann", "usual: surrogate", "usual: likelihood ratio", "usual: surrogate, stopped, early"
    ]  # fmt: skip
    off = Evaluation(attacks=REDUCED, images=100, epsilons=(0.1,))
    on = Evaluation(attacks=("FGSM", "EOT-PGD training"), images=10, epsilons=(0.05, 1.0), noise="on")
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
        ('"likelihood ratio"\nnoise', '"magic"\nnoise', "recipes.ratio: unknown method 'magic'; choose one of"),
        ('noise = "escape"', 'nois = "escape"', "recipes.ratio: unknown key 'nois'; use noise"),
        ('noise = "escape"', "sigma = []", r"recipes.ratio: sigma must be of type float, got \[\]"),
        ('like = "surrogate"\nmeth', 'like = "other"\nmeth', "recipes.ratio: 'other' is not among what stands above"),
        ('method = "surrogate"\n', "", "recipes.surrogate: method is missing"),
        (PLAN[: PLAN.index("[usual]")], "", "recipes.surrogate, which attacks are transferred from: method is missing"),
        ("validation = 200", "", "recipes.surrogate: validation must be at least 1"),
        ("[usual]", "[best]", "unknown key 'best'; use one of like, recipes, usual, seed, front, tune"),
        (PLAN[PLAN.index("networks = [") :], "", "usual: networks is missing"),
        (PLAN[PLAN.index("[usual]") :], "", "no network: add one of the tables usual, seed, front, tune"),
        ("[recipes.surrogate]", "[recipes]\nx = 3\n[recipes.surrogate]", "recipes.x: expected a table, got 3"),
        ('attacks = "reduced"', 'attacks = "mild"', "usual, evaluation 1: unknown attack 'mild'; use reduced, quick"),
        ('"reduced"', '"quick"', "evaluation 1: attacks must have one of the reduced suite"),
        ("images = 10,", "images = 201, held_out = true,", "network 1: there are 200 held-out images"),
        ("sigma = 1", 'dataset = "mnist"', "network 2: dataset must be that of recipes.surrogate, digits"),
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


def small_plan(folder: Path) -> Path:
    """The plan "digits" with less of everything."""
    text = PLANS["digits"].read_text()
    for old, new in (
        ("epochs = 20", "epochs = 1\nnum_steps = 3"),
        ("copies = 8", "copies = 2"),
        ('"reduced", images = 200', '["FGSM", "EOT-PGD training"], images = 8'),
    ):
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    options = Study(plan=str(small_plan(folder)), out=folder / "out")
    entries = read_plan(options.plan)
    with pytest.MonkeyPatch.context() as patch, quick_gates():
        short = gradient_attack("EOT-PGD training", Descent(steps=2, draws=2))
        patch.setitem(SUITES, "quick", (SUITES["quick"][0], short))
        for entry in entries:
            work(entry, entries, options)
    return options


@pytest.fixture(scope="module")
def entries(done: Study) -> list[Entry]:
    return read_plan(done.plan)


def test_every_network_is_finished(done: Study, entries: list[Entry]) -> None:
    assert all(finished(entry, done.folder) for entry in entries)
    assert not finished(replace(entries[2], family="another"), done.folder)


def test_finished_networks_are_not_done_again(done: Study, entries: list[Entry]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*/*") if path.is_file()}
    said = run("study", done.plan, "--out", str(done.folder))
    assert "Written: " in said.stdout
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*/*") if path.is_file()} == before


def test_no_network_is_transferred_to_from_itself_and_every_other_is(done: Study, entries: list[Entry]) -> None:
    """The stopped one begins like the source, and is another network."""
    for entry in entries:
        for row in json.loads(result_file(entry, done.folder).read_text()).get("rows", []):
            lent = "transfer from surrogate" in row["attacks"]
            assert lent == (entry.name != "usual: surrogate"), entry.name


def test_the_stopped_network_matches_the_accuracy(done: Study, entries: list[Entry]) -> None:
    entry = next(entry for entry in entries if entry.matches)
    matched = next(other for other in entries if other.name == entry.matches)
    stopped, other = (json.loads(result_file(e, done.folder).read_text()) for e in (entry, matched))
    ended = stopped["history"][-1]["epoch"] < entry.recipe.epochs
    assert stopped["validation"] >= other["validation"] if ended else stopped["validation"] < other["validation"]


def report(results: Path, out: Path) -> dict[str, bytes]:
    result = run("report", str(results), "--out", str(out))
    assert result.exit_code == 0, result.output
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_page_is_the_same_bytes_from_the_same_results(done: Study, tmp_path: Path) -> None:
    first = report(done.folder / "results", tmp_path / "one")
    assert set(first) == {"index.md", "fronts.png", "results.json"}
    assert report(done.folder / "results", tmp_path / "two") == first
    assert report(tmp_path / "one", tmp_path / "three") == first


def test_each_way_of_attacking_has_a_row(done: Study, entries: list[Entry]) -> None:
    for entry in entries:
        result = json.loads(result_file(entry, done.folder).read_text())
        noise = [row["noise"] for row in result.get("rows", [])]
        silent = entry.recipe.method == "surrogate"
        assert noise == (["none"] if silent else ["off", "on"])[: len(entry.evaluations)]
        assert list(result.get("clean", {})) == noise


def test_the_page_says_what_was_found(done: Study) -> None:
    results = [json.loads(path.read_text()) for path in sorted((done.folder / "results").glob("*.json"))]
    text = Page(results).to_markdown()
    for part in (
        "Table A",
        "Table B",
        "Gates",
        "McNemar",
        "Noise levels",
        f"`snntorch-lr study {done.plan}`",
    ):
        assert part in text
    ratio = next(r for r in results if r["entry"]["name"].startswith("usual: likelihood"))
    worst = ratio["rows"][0]["worst_case"]["0.05"]
    bits = ratio["rows"][0]["right"]["worst"]["0.05"]
    assert bits.count("1") / len(bits) == worst["accuracy"]
    assert f"**{100 * worst['accuracy']:.1f}" in text


def test_a_folder_without_results_or_with_two_of_a_network_is_refused(done: Study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        write([], tmp_path, tmp_path)
    twice = [next((done.folder / "results").glob("*.json"))] * 2
    with pytest.raises(ValueError, match="more than one result of"):
        write(twice, tmp_path, tmp_path)


def test_processes_share_the_work(tmp_path: Path) -> None:
    words = [str(small_plan(tmp_path)), "--group", "source", "--jobs", "2", "--out", str(tmp_path / "out")]
    said = run("study", *words).stdout
    told = [line.partition(" done")[0] for line in said.splitlines()]
    assert told[:3] == ["networks: 0 of 2", "networks: 1 of 2", "networks: 2 of 2"]
