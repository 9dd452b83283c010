"""Results, checkpoints and figures as files that are whole or absent, also after a kill."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from .._files import load, replacing
from .._messages import listed, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Windows has none.
fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None


def check_writable(directory: Path) -> None:
    """Refuses, before hours of work, a directory that no files can be written to; makes none."""
    try:
        nearest = next(place for place in (directory, *directory.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from error


@contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Keeps other processes out of a folder until the block ends; leaves no folder in which nothing was written.

    The lock is the system's, which frees it when the process is killed. Where there are none, a warning says so.
    Other processes are told the command.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _lock(folder / ".lock")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}: {command}")
        file.flush()
        yield
    finally:
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
            holder = file.read() or "another process"
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


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of tensors and plain values; code in the file is never run."""
    state = load(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of this program")
    return state


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


def share_text(share: Mapping[str, float] | None) -> str:
    """An accuracy in percent with the half-width of its interval, for tables; "-" if there is none."""
    if share is None:
        return "-"
    return f"{100 * share['accuracy']:.1f} ± {50 * (share['high'] - share['low']):.1f}"


def run_name(dataset: str, model: str, seed: int) -> str:
    """Name of the folder of a run whose user gives none; another run has another."""
    return f"{dataset}-{model}-seed{seed}"
