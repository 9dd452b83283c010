"""Words that errors and reports share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its class, if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def listed(versions: Mapping[str, str]) -> str:
    """Packages and their versions, in a row."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = (header, ["---"] * len(header), *lines)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
