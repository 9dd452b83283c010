from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import snntorch_lr
from snntorch_lr.experiments import cli
from snntorch_lr.experiments.options import check, command_line

from .commands import is_one_line, run

COMMANDS = ("benchmark", "diagnose", "evaluate", "report", "reproduce", "study")
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
            # Estimators that were removed.
            if not {"allocated", "controlled"} & set(line.split())
        }
    ),
)
def test_commands_of_committed_results_still_work(line: str) -> None:
    command, *words = shlex.split(line)
    options = cli.COMMANDS[command].parse(command, words)
    check(options)
    again = shlex.split(command_line(command, options))[2:]
    assert cli.COMMANDS[command].parse(command, again) == options


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
        "snntorch-lr: not installed: matplotlib, sklearn; pip install 'snntorch-lr[experiments,attacks]'\n"
    )
