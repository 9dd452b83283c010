"""Versions of what results depend on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
