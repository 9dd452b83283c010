from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import snntorch_lr
from snntorch_lr.experiments import cli

from .test_reproduce import run

COMMANDS = ("benchmark", "diagnose", "evaluate", "report", "reproduce", "study")
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def check(line: str) -> None:
    """A command line that would start, as far as its words can tell."""
    program, name, *words = shlex.split(line)
    assert program == "snntorch-lr"
    group = typer.main.get_command(cli.app)
    group.commands[name].make_context(name, words)  # type: ignore[attr-defined]


def test_there_are_these_commands() -> None:
    assert tuple(sorted(typer.main.get_command(cli.app).commands)) == COMMANDS  # type: ignore[attr-defined]


def test_version() -> None:
    assert run("--version").output == f"snntorch-lr {snntorch_lr.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_works(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: snntorch-lr {command} " in " ".join(result.output.split())
    (function,) = (each.callback for each in cli.app.registered_commands if each.name == command)
    (example,) = re.findall(r"Example: (.*)", function.__doc__ or "")
    check(example)


@pytest.mark.parametrize("line", re.findall(rf"snntorch-lr (?:{'|'.join(COMMANDS)})(?:[^`\n]|\n(?=-))*", README))
def test_commands_of_the_readme_work(line: str) -> None:
    check(line)


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
