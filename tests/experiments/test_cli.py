from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import snntorch_lr
from snntorch_lr.experiments import cli, terminal
from snntorch_lr.experiments.options import check, command_line
from snntorch_lr.experiments.recipe import METHODS, MODELS

from .commands import is_one_line, run

COMMANDS = ("benchmark", "certify", "diagnose", "evaluate", "report", "reproduce", "study")
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_there_are_these_commands() -> None:
    assert tuple(sorted(cli.COMMANDS)) == COMMANDS
    assert all(f"\n{command} " in run("--help").stdout for command in COMMANDS)
    assert run().stdout == run("--help").stdout


def test_version() -> None:
    assert run("--version").output == f"snntorch-lr {snntorch_lr.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_and_an_example_that_works(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    (example,) = re.findall(r"Example: (.*)", result.stdout)
    program, name, *words = shlex.split(example)
    assert (program, name) == ("snntorch-lr", command)
    options = cli.COMMANDS[command].parse(command, words)
    for field in fields(options):
        assert field.metadata["help"]
        assert (field.metadata["flag"] or field.name.replace("_", "-")) in result.stdout


@pytest.mark.parametrize(
    "line",
    sorted(
        {
            line
            for page in RESULTS.rglob("*.md")
            for line in re.findall(r"Command: `snntorch-lr ([^`]+)`", page.read_text(encoding="utf-8"))
            # Estimators that were removed, and the benchmark of 0.2.
            if not {"allocated", "controlled", "benchmark"} & set(line.split())
        }
    ),
)
def test_commands_of_committed_results_still_work(line: str) -> None:
    command, *words = shlex.split(line)
    options = cli.COMMANDS[command].parse(command, words)
    check(options)
    again = shlex.split(command_line(command, options))[2:]
    assert cli.COMMANDS[command].parse(command, again) == options


def test_help_has_all_models() -> None:
    for command in "reproduce", "diagnose":
        assert ", ".join(MODELS) in " ".join(run(command, "--help").stdout.split())


def test_examples_name_files_that_other_examples_write() -> None:
    found = {name: re.findall(r"Example: snntorch-lr \w+ (.*)", run(name, "--help").stdout)[0] for name in COMMANDS}
    made = cli.COMMANDS["reproduce"].parse("reproduce", shlex.split(found["reproduce"])).folder
    checkpoints = cli.COMMANDS["evaluate"].parse("evaluate", shlex.split(found["evaluate"])).checkpoints
    assert [path.parent for path in checkpoints] == [made] * 2
    assert {path.stem for path in checkpoints} <= {name.replace(" ", "-") for name in METHODS}
    study = cli.COMMANDS["study"].parse("study", shlex.split(found["study"])).folder
    assert cli.COMMANDS["report"].parse("report", shlex.split(found["report"])).results == study


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_tables_fit_the_terminal_and_lose_nothing(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.console, "width", width)
    header = ["", *(f"surrogate, noise [{index}] (noise off at test)" for index in range(7))]
    lines = [
        ["PGD 0.05", *(f"{index}7.5 ± 13.3 ?" for index in range(7))],
        ["gates", *(f"masking suspected{index} (G1 failed)" for index in range(7))],
    ]
    terminal.show(header, lines, "Accuracy")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for line in lines:
        for cell in line:
            assert cell in printed if "±" in cell else {*cell.split()} <= {*printed.split()}
    assert {word for cell in header for word in cell.split()} <= {*printed.split()}
    assert printed.count("0.05") == {40: 7, 80: 2, 100: 2, 140: 1}[width]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "argument command: invalid choice: 'train'"),
        (["reproduce", "--epoch", "3"], "unrecognized arguments: --epoch 3; see snntorch-lr reproduce --help"),
        (["reproduce", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["evaluate"], "required: CHECKPOINTS"),
    ],
)
def test_command_lines_that_make_no_sense_are_one_line(words: list[str], message: str) -> None:
    is_one_line(run(*words), 2, message)


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_packages_are_told_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("sklearn", "matplotlib") else name)
    result = run(command, "--out", str(tmp_path / "x"))
    assert result.exit_code == 1
    assert result.stderr == (
        "snntorch-lr: not installed: matplotlib, sklearn; pip install 'snntorch-lr[experiments,attacks]', "
        "or in a clone pip install '.[experiments,attacks]'\n"
    )
