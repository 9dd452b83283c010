"""Results, checkpoints and figures as files that are whole or absent, also after a kill."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..atomic import load, replacing, save


def check_writable(directory: Path) -> None:
    """Finds out before hours of work whether files can be written to a directory; makes none.

    Raises:
        OSError: if they cannot.
    """
    try:
        nearest = next(place for place in (directory, *directory.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, with keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically."""
    save(path, state)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of tensors and plain values; code in the file is never run.

    Raises:
        ValueError: if the file is not a checkpoint, or is damaged.
        OSError: if it cannot be read.
    """
    state = load(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of this program")
    return state


def save_figure(path: Path, draw: Callable[[Path], None]) -> None:
    """Writes a figure atomically; ``draw`` saves it to the path it is given."""
    with replacing(path) as temporary:
        draw(temporary)
