"""Files that are whole or absent, also after a kill."""

from __future__ import annotations

import io
import os
import tempfile
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


def save(path: Path, state: Any) -> None:
    """Writes what ``torch.load`` reads, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    # In memory first: torch's own writer has no OSError for a full disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
