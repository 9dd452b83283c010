"""Command lines, run in this process as a terminal would; as a program, the command with gates that measure nothing."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from unittest import mock

from snntorch_lr.experiments import cli
from snntorch_lr.robustness import Gate
from snntorch_lr.robustness.judge import Findings


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
    assert result.stderr.startswith("snntorch-lr: ")
    assert result.stderr.count("\n") == 1
    assert not [word for word in words if word not in result.stderr], result.stderr


# The gates take most of the time, and have tests of their own.
QUICK_GATES = partial(
    mock.patch, "snntorch_lr.robustness.measure.judge", lambda *_: Findings((Gate("G9 budget", True, "not measured"),))
)

if __name__ == "__main__":
    with QUICK_GATES():
        cli.main()
