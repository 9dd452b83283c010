"""Image data sets: scikit-learn's digits, which need no download, and MNIST and Fashion-MNIST through torchvision."""

from __future__ import annotations

import errno
import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._messages import first_line

NAMES = ("digits", "mnist", "fashion-mnist")
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class DataError(RuntimeError):
    """A data set that cannot be read or downloaded; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """A data set in memory, one of ``NAMES``: grey images ``[n, 1, height, width]`` in [0, 1], labels ``[n]``."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        return Images(
            self.name, *(part.to(device) for part in (self.train, self.train_labels, self.test, self.test_labels))
        )


def load(name: str, root: Path | None = None) -> Images:
    """Reads ``"digits"``, ``"mnist"`` or ``"fashion-mnist"``; the latter are downloaded if they are not under ``root``.

    The digits are 1,797 images of 8 × 8 pixels, a fifth of them for testing; the others 60,000 and 10,000 images of
    28 × 28 pixels. ``root`` is that of torchvision, ``data`` by default.

    Raises:
        DataError: if the name is unknown, or the data are neither there nor downloadable, or cannot be read.
        OSError: if a download cannot be written.
    """
    if name == "digits":
        return _digits()
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}; choose one of {', '.join(NAMES)}")
    return _torchvision(name, Path("data") if root is None else root)


def _digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    train, test, train_labels, test_labels = (torch.as_tensor(part) for part in split)
    return _images("digits", 16, train, train_labels, test, test_labels)


def _torchvision(name: str, root: Path) -> Images:
    from torchvision import datasets

    kind: Any = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
    try:
        return _images(name, 255, *_read(kind, root, True), *_read(kind, root, False))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise OSError(error.errno, error.strerror, str(root)) from error
        raise DataError(_unavailable(name, kind, root, first_line(error).rstrip(":"))) from error


def _images(name: str, white: int, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Images:
    """Images ``[n, 1, height, width]`` in [0, 1] from pixels ``[n, height, width]`` up to ``white``."""
    train, test = ((pixels.float() / white).unsqueeze(1) for pixels in (train, test))
    return Images(name, train, train_labels.long(), test, test_labels.long())


def _read(kind: Any, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    try:
        dataset = kind(str(root), train=train, download=False)
    except RuntimeError:
        # What it prints about a failure is in its error.
        with redirect_stdout(io.StringIO()):
            dataset = kind(str(root), train=train, download=True)
    return dataset.data, dataset.targets


def _unavailable(name: str, kind: Any, root: Path, reason: str) -> str:
    raw = root / kind.__name__ / "raw"
    if all((raw / Path(file).stem).is_file() for file, _ in kind.resources):
        return f"{name} under {root} cannot be read ({reason}): delete {raw}, and it will be downloaded again"
    return (
        f"{name} is not under {root} and could not be downloaded ({reason}). Connect to the internet, or give the "
        f"folder that holds {kind.__name__}/raw with --data-root"
    )
