"""Results and figures as files that are whole or absent, also after a kill, in a folder of one process."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from .._files import replacing
from .._messages import listed, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..robustness import RobustnessReport

# Windows has none.
fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None


@contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Keeps other processes out of a folder until the block ends; leaves no folder in which nothing was written.

    The lock is the system's, which frees it when the process is killed. Where there are none, a warning says so.
    Other processes are told the command.

    Raises:
        OSError: if no files can be written to the folder; it names the folder.
        ValueError: if another process has it.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    file = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _lock(folder / ".lock")
            file.truncate(0)
            # More than what a full disk still takes; at once, and not when the file is closed.
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}: {command}".ljust(4096).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        yield
    finally:
        if file is not None:
            if fcntl is None:  # Windows, which deletes no open file
                file.close()
            # Before it is free: who waits for it would lock a file that is gone.
            Path(file.name).unlink(missing_ok=True)
            file.close()
        with suppress(OSError):
            for place in made:
                place.rmdir()


def _lock(path: Path) -> TextIO:
    """A file, open and locked where the system has locks."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"{path.parent} is in use by {holder}; wait, or choose another --out") from error
        except (OSError, AttributeError):
            said = f"{path.parent} cannot be locked on this system: give the same --out to no other process"
            warnings.warn(said, stacklevel=4)
        # The process that had it may have deleted it since it was opened here.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


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


def write_evaluation(
    evaluation: RobustnessReport, out: Path, note: str, title: str = "Robustness", head: str = ""
) -> None:
    """Writes ``robustness.md``, ``robustness.json``, figures, and ``report.html`` with all of it."""
    write_text(out / "robustness.md", f"# Robustness\n\n{evaluation.to_markdown()}\n{note}")
    write_json(out / "robustness.json", evaluation.to_json())
    for name, figure in evaluation.figures().items():
        save_figure(out / f"{name}.png", figure)
    evaluation.html(out / "report.html", title, head, note)
