"""Command lines: options, help, tables that fit, and mistakes that are one line and touch nothing."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

import snntorch_lr
from snntorch_lr.experiments import cli
from snntorch_lr.experiments.options import Command, option
from snntorch_lr.experiments.train import METHODS

from .commands import is_one_line, run

COMMANDS = ("benchmark", "evaluate", "report", "reproduce", "study")
REGISTRY = ["red"]


@dataclass(frozen=True, kw_only=True)
class Do(Command):
    """Do it, 100 % sure."""

    place = "runs/{color}-{count}"
    count: int = option(3, "how many", least=1)
    files: tuple[Path, ...] = option(help="to read", positional=True)
    color: str | None = option(None, "of it, 100 % sure", choices=REGISTRY)
    shares: tuple[float, ...] = option((0.5, 1.0), "of it", above=0, most=1, flag="--share")
    quick: bool = option(False, "do less")
    secret: int = option(0, "of plans", offered=False)


SOME = Do(files=(Path("a b"), Path("c")), color="red", shares=(0.25,), quick=True, count=2, out=Path("x"), secret=4)


def test_a_command_line_gives_the_options_that_it_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    line = SOME.command_line()
    assert line == "snntorch-lr do 'a b' c --count 2 --color red --share 0.25 --quick"
    assert Do.parse(shlex.split(line)[2:]) == replace(SOME, out=None, secret=0)
    assert Do.parse(["a"]) == Do(files=(Path("a"),))
    assert Do.parse(shlex.split("--count 4 a --share 0.1 --share 1 b")).files == (Path("a"), Path("b"))
    assert {*SOME.recorded()} == {"count", "files", "color", "shares", "quick"}
    assert (SOME.folder, replace(SOME, out=None).folder) == (Path("x"), Path("runs/red-2"))
    with pytest.raises(SystemExit):
        Do.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "of it, 100 % sure: red" in said
    assert "by default runs/{color}-{count}" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": True}, "count must be of type int, got True"),
        ({"shares": (0.5, 0.0)}, "shares must be above 0 and at most 1, got 0.0"),
        ({"shares": (float("nan"),)}, "shares must be above 0 and at most 1, got nan"),
        ({"shares": 0.5}, r"shares must be of type tuple\[float, ...\], got 0.5"),
        ({"color": "blue"}, "unknown color 'blue'; choose one of red"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SOME, **change)


def test_choices_may_grow() -> None:
    REGISTRY.append("blue")
    try:
        assert replace(SOME, color="blue").color == "blue"
    finally:
        REGISTRY.remove("blue")


def test_tables_have_the_types_of_the_fields() -> None:
    made = Do.from_table({"files": [], "shares": [1, 0.5], "count": 2})
    assert made == Do(files=(), shares=(1.0, 0.5), count=2)
    assert [type(share) for share in made.shares] == [float, float]
    for table, message in (
        ({"colour": "red"}, "'colour'; use color"),
        ([], r"a table, got \[\]"),
        ({}, "files is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            Do.from_table(table)


def test_there_are_these_commands() -> None:
    assert tuple(sorted(cli.COMMANDS)) == COMMANDS
    assert all(f"\n{command} " in run("--help").stdout for command in COMMANDS)
    assert run().stdout == run("--help").stdout
    assert run("--version").output == f"snntorch-lr {snntorch_lr.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_and_an_example_that_works(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    (example,) = re.findall(r"Example: (.*)", result.stdout)
    program, name, *words = shlex.split(example)
    assert (program, name) == ("snntorch-lr", command)
    options = cli.COMMANDS[command].parse(words)
    assert cli.COMMANDS[command].parse(shlex.split(options.command_line())[2:]).recorded() == options.recorded()
    for field in (field for field in fields(options) if field.metadata["offered"]):
        assert field.metadata["help"]
        assert (field.metadata["flag"] or field.name.replace("_", "-")) in result.stdout


def test_examples_name_files_that_other_examples_write() -> None:
    lines = {name: re.findall(r"Example: snntorch-lr \w+ (.*)", run(name, "--help").stdout)[0] for name in COMMANDS}
    options: dict[str, Any] = {name: cli.COMMANDS[name].parse(shlex.split(line)) for name, line in lines.items()}
    checkpoints = options["evaluate"].checkpoints
    assert [path.parent for path in checkpoints] == [options["reproduce"].folder] * 2
    assert {path.stem for path in checkpoints} <= {name.replace(" ", "-") for name in METHODS}
    assert options["report"].results == options["study"].folder


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_tables_fit_the_terminal_and_lose_nothing(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    header = ["", *(f"surrogate, noise {index}" for index in range(7))]
    lines = [["PGD 0.05", *(f"{index}7.5 ± 13.3 ?" for index in range(7))]]
    cli.show("Accuracy", header, lines)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert all(cell in printed for cell in (*header, *lines[0]))
    assert printed.count("PGD 0.05") == {40: 7, 80: 3, 100: 2, 200: 1}[width]


def test_all_columns_that_name_the_lines_are_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    cli.show("Tests", ["pair", "images", "first", "second"], [["a / b", "clean", "1", "2"], ["a / b", "ε", "3", "4"]])
    printed = capsys.readouterr().out.split("\n\n")
    assert [line.split()[-2:] for table in printed[:2] for line in table.splitlines()[-2:]] == [
        ["clean", "1"], ["ε", "3"], ["clean", "2"], ["ε", "4"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "argument command: invalid choice: 'train'"),
        ("reproduce --epoch 3", "unrecognized arguments: --epoch 3; see snntorch-lr reproduce --help"),
        ("reproduce --epochs many", "argument --epochs: invalid int value: 'many'"),
        ("reproduce --dataset cifar", "digits, mnist, fashion-mnist"),
        ("reproduce --model rnn", "mlp, wide-mlp, deep-mlp, spiking-mlp, recurrent, conv"),
        ("reproduce --estimator adam", "counterfactual, vanilla, approximate"),
        ("reproduce --noise escape --distribution laplace", "logistic, gaussian"),
        ("reproduce --copies 1 --estimator vanilla", "copies >= 2"),
        ("reproduce --anneal 0", "anneal must be above 0 and at most 1"),
        ("reproduce --epsilon 2", "epsilons must be above 0 and at most 1, got 2"),
        ("reproduce --suite mild", "quick, paper, standard"),
        ("benchmark --part speed", "steps, kernels, deep, memory, growth, accuracy"),
        ("benchmark --device gpu", "unknown device"),
        ("evaluate", "required: CHECKPOINTS"),
        ("evaluate mnist/lr mnist/lr", "more than once"),
        ("study chess", "unknown study 'chess'; choose one of digits, "),
        ("study digits --group best", "unknown groups 'best'; choose one of source, "),
    ],
)
def test_a_mistake_is_one_line_and_touches_nothing(line: str, message: str, tmp_path: Path) -> None:
    is_one_line(run(*line.split(), "--out", str(tmp_path / "x")), 2, message)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("sklearn", "matplotlib") else name)
    result = run("reproduce", "--out", str(tmp_path / "x"))
    assert result.exit_code == 1
    assert result.stderr == (
        "snntorch-lr: not installed: matplotlib, sklearn; pip install 'snntorch-lr[experiments,attacks]', "
        "or in a clone pip install '.[experiments,attacks]'\n"
    )
