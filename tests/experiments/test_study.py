from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from snntorch_lr.experiments.plans import PLANS, Entry, Evaluation, plan

from snntorch_lr.experiments import study_report
from snntorch_lr.experiments.recipe import check_recipe
from snntorch_lr.experiments.study import finished, result_file, study, work
from snntorch_lr.robustness import Gate
from snntorch_lr.robustness.judge import Findings

DIGITS = PLANS["digits"]


def small() -> list[Entry]:
    evaluation = Evaluation(("FGSM", "EOT-PGD training", "EOT-PGD gaussian"), 12, (0.05, 0.1), corruptions=True)
    return [
        replace(
            entry,
            recipe=replace(entry.recipe, epochs=2, copies=4),
            evaluations=tuple(replace(evaluation, noise=each.noise) for each in entry.evaluations),
        )
        for entry in DIGITS()
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    entries = small()
    with pytest.MonkeyPatch.context() as patch:
        # The gates take most of the time, and have tests of their own.
        found = Findings((Gate("G1 gradients", True, "measured"),))
        patch.setattr("snntorch_lr.robustness.measure.judge", lambda *_: found)
        for entry in entries:
            work(entry, entries, out, None)
    return out


def test_every_network_is_finished(done: Path) -> None:
    assert all(finished(entry, done) for entry in small())
    changed = replace(small()[2], family="another")
    assert not finished(changed, done)


def test_what_is_finished_is_not_done_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "digits", small)
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    told: list[str] = []
    study("digits", done, tell=lambda what, *_: told.append(what))
    assert told == []
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == before


def test_no_network_is_transferred_to_from_itself_and_every_other_is(done: Path) -> None:
    """The stopped one begins like the source, and is another network."""
    for entry in small():
        for row in json.loads(result_file(entry, done).read_text()).get("rows", []):
            lent = "transfer from surrogate" in row["attacks"]
            assert lent == (entry.name != "usual: surrogate"), entry.name


def test_the_stopped_network_matches_the_accuracy(done: Path) -> None:
    entry = next(entry for entry in small() if entry.matches)
    matched = next(other for other in small() if other.name == entry.matches)
    stopped, other = (json.loads(result_file(e, done).read_text()) for e in (entry, matched))
    ended = stopped["history"][-1]["epoch"] < entry.recipe.epochs
    assert stopped["validation"] >= other["validation"] if ended else stopped["validation"] < other["validation"]


def test_the_page_is_the_same_bytes_from_the_same_results(done: Path, tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in study_report.write(done / "results", tmp_path / "one")}
    again = {path.name: path.read_bytes() for path in study_report.write(done / "results", tmp_path / "two")}
    assert first == again
    assert set(first) == {"index.md", "fronts.png", "results.json"}
    study_report.write(tmp_path / "one", tmp_path / "three")
    assert {path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()} == first


def test_each_way_of_attacking_has_a_row(done: Path) -> None:
    for entry in small():
        result = json.loads(result_file(entry, done).read_text())
        noise = [row["noise"] for row in result.get("rows", [])]
        silent = entry.recipe.method == "surrogate"
        assert noise == (["none"] if silent else ["off", "on"])[: len(entry.evaluations)]
        assert list(result.get("clean", {})) == noise


def test_the_page_says_what_was_found(done: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted((done / "results").glob("*.json"))]
    page = study_report.to_markdown(results)
    for part in (
        "Table A",
        "Approximate and vanilla",
        "Table B",
        "Gates",
        "McNemar",
        "Noise levels",
        "corruptions",
        "snntorch-lr study digits",
    ):
        assert part in page
    ratio = next(r for r in results if r["entry"]["name"].startswith("usual: likelihood"))
    worst = ratio["rows"][0]["worst_case"]["0.05"]
    bits = ratio["rows"][0]["right"]["worst"]["0.05"]
    assert bits.count("1") / len(bits) == worst["accuracy"]
    assert f"**{100 * worst['accuracy']:.1f}" in page


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        study_report.write(tmp_path, tmp_path)


@pytest.mark.parametrize("name", PLANS)
def test_plans_can_be_trained(name: str) -> None:
    entries = plan(name)
    assert len({entry.slug for entry in entries}) == len(entries)
    before: set[str] = set()
    for entry in entries:
        check_recipe(entry.recipe)
        assert entry.matches is None or entry.matches in before
        before.add(entry.name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: study("chess", out), "unknown study"),
        (lambda out: study("digits", out, groups=["best"]), "unknown group"),
        (lambda out: study("digits", out, jobs=0), "--jobs"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "digits", small)
    told: list[tuple[int, int]] = []
    study(
        "digits", tmp_path, groups=["source"], jobs=2, tell=lambda what, done, total, left: told.append((done, total))
    )
    assert told == [(1, 2), (2, 2)]
