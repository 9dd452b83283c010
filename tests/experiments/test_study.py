from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snntorch_lr.experiments.study import page
from snntorch_lr.experiments.study.plan import PRESETS, Entry, read_plan
from snntorch_lr.experiments.study.run import Study, finished, result_file, study, work
from snntorch_lr.robustness import SUITES, Descent, gradient_attack

from .commands import quick_gates


def small_plan(folder: Path) -> Path:
    """The plan "digits" with less of everything."""
    text = PRESETS["digits"].read_text()
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
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*") if path.is_file()}
    told: list[str] = []
    assert len(study(done, lambda what, *_: told.append(what))) == len(entries)
    assert told == []
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*") if path.is_file()} == before


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


def test_the_page_is_the_same_bytes_from_the_same_results(done: Study, tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in page.write(done.folder / "results", tmp_path / "one")}
    again = {path.name: path.read_bytes() for path in page.write(done.folder / "results", tmp_path / "two")}
    assert first == again
    assert set(first) == {"index.md", "fronts.png", "results.json"}
    page.write(tmp_path / "one", tmp_path / "three")
    assert {path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()} == first


def test_html_pages_need_nothing(done: Study, tmp_path: Path) -> None:
    written = page.write(done.folder / "results", tmp_path, html=True)
    assert tmp_path / "report.html" in written
    text = (tmp_path / "report.html").read_text()
    assert "<svg" in text
    assert "fronts.png" not in text
    assert "Table B" in text
    reports = [path.read_text() for path in (done.folder / "reports").iterdir()]
    assert any('class="broken"' in each for each in reports)
    assert not any("<img src=" in each for each in [text, *reports])


def test_each_way_of_attacking_has_a_row(done: Study, entries: list[Entry]) -> None:
    for entry in entries:
        result = json.loads(result_file(entry, done.folder).read_text())
        noise = [row["noise"] for row in result.get("rows", [])]
        silent = entry.recipe.method == "surrogate"
        assert noise == (["none"] if silent else ["off", "on"])[: len(entry.evaluations)]
        assert list(result.get("clean", {})) == noise


def test_the_page_says_what_was_found(done: Study) -> None:
    results = [json.loads(path.read_text()) for path in sorted((done.folder / "results").glob("*.json"))]
    text = page.to_markdown(results)
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


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        page.write(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "chess"}, "unknown study 'chess'; choose one of digits, "),
        ({"groups": ("best",)}, "unknown groups 'best'; choose one of source, "),
        ({"jobs": 0}, "--jobs must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        study(replace(Study(plan="digits", out=tmp_path), **change))
    assert not list(tmp_path.iterdir())


def test_processes_share_the_work(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    options = Study(plan=str(small_plan(tmp_path)), groups=("source",), jobs=2, out=tmp_path / "out")
    study(options, lambda what, done, total, left: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
