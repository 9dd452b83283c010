from __future__ import annotations

import shlex
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from snntorch_lr.experiments.options import (
    add_options,
    check,
    command_line,
    from_arguments,
    from_table,
    made,
    option,
    recorded,
)

REGISTRY = ["red"]


@dataclass(frozen=True, kw_only=True)
class Base:
    count: int = option(3, "how many", least=1)


@dataclass(frozen=True, kw_only=True)
class Some(Base):
    files: tuple[Path, ...] = option(help="to read", positional=True)
    color: str | None = option(None, "of it, 100 % sure", choices=REGISTRY)
    shares: tuple[float, ...] = option((0.5, 1.0), "of it", above=0, most=1, flag="--share")
    quick: bool = option(False, "do less")
    out: Path | None = option(None, "folder", recorded=False)


SOME = Some(files=(Path("a b"), Path("c")), color="red", shares=(0.25,), quick=True, count=2, out=Path("x"))


def parse(line: str) -> Some:
    parser = ArgumentParser(allow_abbrev=False)
    add_options(parser, Some)
    assert "of it, 100 % sure: red" in " ".join(parser.format_help().split())
    return from_arguments(Some, parser.parse_intermixed_args(shlex.split(line)))


def test_a_command_line_gives_the_options_that_it_came_from() -> None:
    line = command_line("do", SOME)
    assert line == "snntorch-lr do 'a b' c --count 2 --color red --share 0.25 --quick"
    assert parse(line.removeprefix("snntorch-lr do ")) == replace(SOME, out=None)
    assert parse("a") == Some(files=(Path("a"),))
    assert parse("--count 4 a --share 0.1 --share 1 b").files == (Path("a"), Path("b"))


def test_results_keep_what_they_depend_on() -> None:
    assert {*recorded(SOME)} == {"count", "files", "color", "shares", "quick"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"shares": (0.5, 0.0)}, "--share must be above 0 and at most 1, got 0.0"),
        ({"shares": (float("nan"),)}, "--share must be above 0 and at most 1, got nan"),
        ({"color": "blue"}, "unknown color 'blue'; choose one of red"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], message: str) -> None:
    check(SOME)
    with pytest.raises(ValueError, match=message):
        check(replace(SOME, **change))


def test_choices_may_grow() -> None:
    REGISTRY.append("blue")
    try:
        check(replace(SOME, color="blue"))
    finally:
        REGISTRY.remove("blue")


def test_tables_have_the_types_of_the_fields() -> None:
    found = from_table(Some, {"shares": [1, 0.5], "count": 2, "color": "red"})
    assert found == {"shares": (1.0, 0.5), "count": 2, "color": "red"}
    assert [type(share) for share in found["shares"]] == [float, float]
    for table, message in (
        ({"count": True}, "count must be an integer, got True"),
        ({"shares": 0.5}, "shares must be a list, each a number, got 0.5"),
        ({"colour": "red"}, "unknown key 'colour'; use color"),
        ([], r"expected a table, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            from_table(Some, table)
    with pytest.raises(ValueError, match="files is missing"):
        made(Some, {})
    with pytest.raises(ValueError, match="count must be at least 1"):
        made(Base, {"count": 0})
