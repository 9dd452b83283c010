"""Files that are whole or absent, also after a kill."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block ends without an error.

    Raises:
        OSError: if the file cannot be written; it names ``path``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes files that only their owner can read.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        # A full disk comes without the name of a file, and that of the temporary one means nothing to anybody.
        raise OSError(error.errno, error.strerror, str(path)) from error


def load(path: Path) -> Any:
    """Reads what ``save`` wrote, onto the CPU; code in the file is never run.

    Raises:
        ValueError: if it is another kind of file, or is not as it was written.
        OSError: if it cannot be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            # torch.save writes checksums, and torch.load does not compare them; of a folder it reads nothing at all.
            if archive.testzip() or any(part.external_attr & 0x10 for part in archive.infolist()):
                raise zipfile.BadZipFile("its checksum is wrong")
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise ValueError(
            f"{path} is not a checkpoint of this program, or is damaged ({reason}): take a copy, or delete it and make "
            "it again"
        ) from error


def save(path: Path, state: Any) -> None:
    """Writes what ``load`` reads, with checksums, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    # In memory first: torch's own writer has no OSError for a full disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
