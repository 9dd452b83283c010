"""Words for users: lists and tables, warnings, versions, and checks of plain arguments."""

from __future__ import annotations

import contextlib
import operator
import platform
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def first_line(error: BaseException) -> str:
    """First line of an error's message; its class, if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def place(name: str, module: object) -> str:
    """A module in messages: its name in the network, and its class, for a name like 1 reads as a number."""
    kind = type(module).__name__
    return f"{name} ({kind})" if name else kind


def places(modules: Mapping[str, object]) -> str:
    """Modules in messages, in a row."""
    return ", ".join(place(name, module) for name, module in modules.items())


def listed(versions: Mapping[str, str]) -> str:
    """Packages and their versions, in a row."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = (header, ["---"] * len(header), *lines)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table as plain text, its first ``left`` columns flush left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def install(extra: str) -> str:
    """How to install an extra of this package."""
    return f"pip install 'snntorch-lr[{extra}]', or in a clone pip install '.[{extra}]'"


# A context manager's frames are its own and contextlib's.
_INSIDE = (*(str(Path(file).parent) for file in (__file__, torch.__file__)), contextlib.__file__)


def warn(message: str) -> None:
    """A ``UserWarning`` at the innermost frame outside this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    installed = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def positive_integer(name: str, value: Any) -> int:
    """The value as an int, also from NumPy.

    Raises:
        ValueError: if it is not a positive integer.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number
