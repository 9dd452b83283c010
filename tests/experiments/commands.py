"""Command lines, run in this process as a terminal would; as a program, the command with gates that measure nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from unittest import mock

from snntorch_lr.experiments import cli
from snntorch_lr.robustness import Protocol


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run(*words: str) -> Result:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.call(words)
        except SystemExit as error:
            code = int(error.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def is_one_line(result: Result, status: int, *words: str) -> None:
    assert result.exit_code == status, result.output
    # A first run on a machine also says that it compiles.
    said = [line for line in result.stderr.splitlines() if "compiles its time steps" not in line]
    assert len(said) == 1
    assert said[0].startswith("snntorch-lr: ")
    assert not [word for word in words if word not in result.stderr], result.stderr


@contextmanager
def quick_gates() -> Iterator[None]:
    """Evaluations whose gates make no attacks: they take most of the time, and have tests of their own."""
    with ExitStack() as stack:
        for module in "measure", "study":
            name = f"snntorch_lr.experiments.{module}.Protocol"
            stack.enter_context(mock.patch(name, partial(Protocol, gates=False)))
        yield


if __name__ == "__main__":
    with quick_gates():
        cli.main()
