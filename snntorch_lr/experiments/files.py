"""Results and figures as files that are whole or absent, also after a kill, in a folder of one process."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._files import replacing
from .._messages import listed, versions, warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Windows has none.
fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder until the block ends; leaves no folder in which nothing was written.

    The lock is the system's, which frees it when the process is killed. Where there are none, a warning says so.

    Raises:
        OSError: if no files can be written to the folder; it names the folder.
        ValueError: if another process has it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                os.write(file.fileno(), bytes(4096))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        with ExitStack() as stack:
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{folder} is in use by another process; wait, or choose another --out") from error
            except (OSError, AttributeError):
                warn(f"{folder} cannot be locked on this system: give the same --out to no other process")
            yield
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, with keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_figure(path: Path, figure: Figure, **options: Any) -> None:
    """Writes a figure atomically, with what else ``savefig`` takes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, **{"dpi": 150} | options)


def origin(command: str, device: torch.device) -> dict[str, Any]:
    """The command that makes results, the versions of the packages that they depend on, and the machine."""
    ours, further = ("snntorch-lr", "snntorch", "torch"), ("numpy", "numba", "scikit-learn", "spikingjelly")
    installed = versions(*ours, "torchvision", "torchattacks", *further)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"
    return {"command": command, "versions": installed, "machine": machine}


def origin_note(results: Mapping[str, Any]) -> str:
    """The end of a page: where its results, which have the entries of ``origin``, come from."""
    return (
        f"Command: `{results['command']}`\n\nVersions: {listed(results['versions'])}. Machine: {results['machine']}.\n"
    )
