"""Finished pieces of an evaluation on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import load, save


def fingerprint(*parts: Any) -> str:
    """Hash of tensors, and of what JSON can hold; other objects count by their ``str``."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().contiguous()
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.numpy().tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"|")
    return digest.hexdigest()


class Cache:
    """A folder with one file for each finished piece; without a folder nothing is kept.

    The fingerprint of everything that a piece depends on is part of its file's name and is checked again when it is
    read, so that nothing stale is used; files of other settings stay beside it.

    Args:
        folder: where the files are, made if it is absent; None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def once(self, name: str, mark: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What an earlier run computed, or else what ``compute`` returns, which is then kept.

        Args:
            name: of the piece, for people who look at the folder.
            mark: fingerprint of everything that the piece depends on.
            compute: returns tensors and plain values in a dict.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{mark[:16]}.pt"
        found = _read(path)
        if found is not None and found.get("fingerprint") == mark:
            value: dict[str, Any] = found["value"]
            return value
        value = compute()
        save(path, {"fingerprint": mark, "value": value})
        return value


def _read(path: Path) -> dict[str, Any] | None:
    """Content of a file; None if there is none, or none that can be read, which is then written anew."""
    try:
        state = load(path)
    except Exception:
        return None
    return state if isinstance(state, dict) else None
