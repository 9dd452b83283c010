"""Data sets in memory: images, recordings of events as frames, tensors of your own; checked before they are trained."""

from __future__ import annotations

import errno
import io
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._files import load as read
from .._files import save
from .._messages import first_line, install, warn

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_PARTS = ("train", "test")
_TENSORS = ("train", "train_labels", "test", "test_labels")


class _Frames(NamedTuple):
    """The class of tonic; time bins; neighbours along an axis whose events are summed; the count that becomes 1."""

    tonic: str
    bins: int
    side: int
    most: int


EVENTS = {
    "nmnist": _Frames("NMNIST", bins=10, side=1, most=1),
    "dvs-gesture": _Frames("DVSGesture", bins=16, side=4, most=4),
    "shd": _Frames("SHD", bins=100, side=5, most=1),
}
"""Recordings of events, by name."""
NAMES = ("digits", *_TORCHVISION, "folder", *EVENTS, "file")


class DataError(RuntimeError):
    """A data set that cannot be read or downloaded, or is wrong; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, one of ``NAMES``: numbers in [0, 1], for attacks clip to this range, and labels from 0.

    A sample is an image ``[channels, height, width]`` or a row of features ``[features]``. With a time axis in front
    it is a recording: ``[time, channels, height, width]`` or ``[time, features]``.

    Attributes:
        name: of the data set.
        train: samples to train on, ``[n, ...]``.
        train_labels: their classes, ``[n]``.
        test: samples to test on, ``[m, ...]``.
        test_labels: their classes, ``[m]``.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample."""
        return tuple(self.train.shape[1:])

    @property
    def classes(self) -> int:
        """Number of classes: those that are trained."""
        return int(self.train_labels.max()) + 1

    def to(self, device: torch.device) -> Dataset:
        """The same data on another device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in _TENSORS})


def has_time(shape: tuple[int, ...]) -> bool:
    """Whether samples of a shape are recordings, with a time axis in front."""
    return len(shape) in (2, 4)


def load(name: str, root: Path | None = None) -> Dataset:
    """Reads one of ``NAMES``, and checks it.

    ``digits`` are 1,797 images of 8 × 8 pixels, a fifth of them for testing. Recordings of events become frames:
    events of each polarity are counted in time bins of equal length, 10 for N-MNIST, 16 for DVS-Gesture (4 × 4 pixels
    summed), 100 for SHD (5 channels summed). Counts are clipped at 1, 4 and 1, and divided, so that frames are in
    [0, 1]. They are kept under ``root`` as a ``.pt`` file; those of all of N-MNIST take 7 GB of memory.

    Args:
        name: of the data set.
        root: of torchvision or tonic, where data are downloaded if absent, ``data`` by default; of ``folder``, where
            ``train/<class>/*`` and ``test/<class>/*`` are; of ``nmnist`` also where a part of it is, in the original
            layout, ``Train/<digit>/*.bin`` and ``Test/<digit>/*.bin``; of ``file`` the file: a dict with ``train``,
            ``train_labels``, ``test``, ``test_labels``, and ``time=True`` if samples are recordings.

    Returns:
        The data set.

    Raises:
        DataError: if the name is unknown; the data are neither there nor downloadable, cannot be read, or are wrong.
        OSError: if a download cannot be written.

    Examples:
        >>> load("digits").shape
        (1, 8, 8)
    """
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}; choose one of {', '.join(NAMES)}")
    if name in ("folder", "file") and root is None:
        raise DataError(f"say where the {name} is, with --data-root")
    place = Path("data") if root is None else root
    if name == "digits":
        dataset = _digits()
    elif name in _TORCHVISION:
        dataset = _torchvision(name, place)
    else:
        dataset = {"folder": _folder, "file": _file}.get(name, _events)(name, place)
    _check(dataset)
    return replace(dataset, train_labels=dataset.train_labels.long(), test_labels=dataset.test_labels.long())


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    train, test, train_labels, test_labels = (torch.as_tensor(part) for part in split)
    return _images("digits", 16, train, train_labels, test, test_labels)


def _images(name: str, white: int, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Dataset:
    """Images from pixels up to ``white``: ``[n, height, width]`` or ``[n, height, width, channels]``."""
    train, test = (p.unsqueeze(1) if p.dim() == 3 else p.permute(0, 3, 1, 2).contiguous() for p in (train, test))
    return Dataset(name, train.float() / white, train_labels, test.float() / white, test_labels)


def _torchvision(name: str, root: Path) -> Dataset:
    from torchvision import datasets

    kind: Any = getattr(datasets, _TORCHVISION[name])
    try:
        return _images(name, 255, *_read(kind, root, True), *_read(kind, root, False))
    except Exception as error:
        if name == "cifar10":
            folder, parts = kind.base_folder, [part for part, _ in kind.train_list + kind.test_list]
        else:
            folder, parts = f"{kind.__name__}/raw", [Path(part).stem for part, _ in kind.resources]
        _unavailable(name, root, folder, all((root / folder / part).is_file() for part in parts), error)


def _read(kind: Any, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    try:
        dataset = kind(str(root), train=train, download=False)
    except RuntimeError:
        # What it prints about a failure is in its error.
        with redirect_stdout(io.StringIO()):
            dataset = kind(str(root), train=train, download=True)
    return torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)


def _unavailable(name: str, root: Path, folder: str, there: bool, error: Exception) -> NoReturn:
    """Says what to do after an error of a library that reads or downloads."""
    if isinstance(error, DataError):
        raise error
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        raise OSError(error.errno, error.strerror, str(root)) from error
    reason = first_line(error).rstrip(":")
    if there:
        remedy = f"delete {root / folder}, and it will be downloaded again"
        raise DataError(f"{name} under {root} cannot be read ({reason}): {remedy}") from error
    raise DataError(
        f"{name} is not under {root} and could not be downloaded ({reason}). Connect to the internet, or give the "
        f"folder that holds {folder} with --data-root"
    ) from error


def _folder(name: str, root: Path) -> Dataset:
    from torchvision.datasets import ImageFolder

    try:
        folders = {part: ImageFolder(str(root / part)) for part in _PARTS}
    except OSError as error:
        wanted = f"images in {root}/train/<class>/ and {root}/test/<class>/"
        raise DataError(f"folder needs {wanted} ({first_line(error)})") from error
    if folders["train"].classes != folders["test"].classes:
        raise DataError(f"{root}/train and {root}/test have different classes: name their folders alike")
    pixels: dict[str, Tensor] = {}
    for part, folder in folders.items():
        arrays: list[Any] = []
        for path, _ in folder.samples:
            try:
                arrays.append(np.asarray(folder.loader(path)))
            except OSError as error:
                raise DataError(f"{path} is no image that can be read ({first_line(error)})") from error
            if arrays[-1].shape != arrays[0].shape:
                (height, width), (high, wide) = arrays[-1].shape[:2], arrays[0].shape[:2]
                size = f"{width} × {height} pixels, {folder.samples[0][0]} {wide} × {high}"
                raise DataError(f"{path} has {size}: bring all images to one size")
        pixels[part] = torch.as_tensor(np.stack(arrays))
    labels = {part: torch.tensor(folder.targets) for part, folder in folders.items()}
    return _images(name, 255, pixels["train"], labels["train"], pixels["test"], labels["test"])


def _file(name: str, path: Path) -> Dataset:
    wanted = f"torch.save({{{', '.join(_TENSORS)}}}, path), all of them tensors"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = [content[part] for part in _TENSORS]
    except Exception as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}): write it by {wanted}") from error
    if not all(isinstance(part, Tensor) for part in tensors):
        raise DataError(f"{path} holds something else than tensors: write it by {wanted}")
    dataset = Dataset(name, *(part.float() if part.is_floating_point() else part for part in tensors))
    told = bool(content.get("time", False))
    if told != has_time(dataset.shape):
        raise DataError(
            f"{path}: train {_shape(dataset.train)} does not fit time={told}: images are [n, channels, height, width], "
            "[n, features]; recordings, with time=True, [n, time, channels, height, width] or [n, time, features]"
        )
    return dataset


def _events(name: str, root: Path) -> Dataset:
    try:
        import tonic
    except ImportError as error:
        raise DataError(f"{name} needs tonic: {install('events')}") from error

    how = EVENTS[name]
    kind: Any = getattr(tonic.datasets, how.tonic)
    try:
        sources = [(_NMNIST if name == "nmnist" else kind)(str(root), train=part == "train") for part in _PARTS]
    except Exception as error:
        _unavailable(name, root, kind.__name__, False, error)
    # A part of the data, or all of it that comes later, has frames of its own.
    numbers = "-".join(str(len(source)) for source in sources)
    path = root / f"{name}-{numbers}-frames-{how.bins}-{how.side}-{how.most}.pt"
    if path.is_file():
        parts = read(path)
    else:
        parts = [tensor for source in sources for tensor in _frames(source, kind.sensor_size, how)]
        try:
            save(path, parts)
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror}): the frames are made again at the next start")
    train, train_labels, test, test_labels = parts
    return Dataset(name, train.float() / how.most, train_labels, test.float() / how.most, test_labels)


class _NMNIST:
    """Recordings of N-MNIST in its original layout, also a part of them; downloaded where there are none."""

    def __init__(self, root: str, train: bool) -> None:
        from tonic.datasets import NMNIST

        here = [folder for folder in (Path(root), Path(root) / "NMNIST") if (folder / "Train").is_dir()]
        if not here:
            for part in (True, False):
                NMNIST(root, train=part)
        folder = (here or [Path(root) / "NMNIST"])[0] / ("Train" if train else "Test")
        self.paths = sorted(folder.glob("[0-9]/*.bin"))
        if not self.paths:
            raise DataError(f"{folder} holds no <digit>/*.bin: it has to be there beside the other part")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from tonic import datasets, io

        path = self.paths[index]
        events = io.read_mnist_file(str(path), dtype=datasets.NMNIST.dtype)
        if not len(events):
            raise DataError(f"{path} holds no event: take a whole copy, or delete it")
        return events, int(path.parent.name)


def _frames(recordings: Any, sensor_size: tuple[int, int, int], how: _Frames) -> tuple[Tensor, Tensor]:
    """Counts ``[n, time, polarities, height, width]`` or ``[n, time, channels]``, and labels."""
    from tonic.transforms import ToFrame

    to_frame = ToFrame(sensor_size=sensor_size, n_time_bins=how.bins)
    frames, labels = [], []
    for events, label in (recordings[index] for index in range(len(recordings))):
        counts = torch.as_tensor(to_frame(events), dtype=torch.float32)
        # A row of channels is an image of one line, without polarity.
        sides = (how.side, how.side) if counts.dim() == 4 else (1, how.side)
        counts = F.avg_pool2d(counts, sides, divisor_override=1).clamp(max=how.most).byte()
        frames.append(counts if counts.dim() == 4 else counts.squeeze(1))
        labels.append(int(label))
    return torch.stack(frames), torch.tensor(labels)


def _check(dataset: Dataset) -> None:
    """Refuses what a network would learn nothing from, or something else than is meant.

    Raises:
        DataError: if something is wrong.
    """
    name = dataset.name
    for part in _PARTS:
        samples, labels = getattr(dataset, part), getattr(dataset, f"{part}_labels")
        if reason := _wrong_labels(labels):
            raise DataError(f"{name}: {part}_labels {reason}")
        if reason := _wrong_samples(samples, len(labels)):
            raise DataError(f"{name}: {part} {reason}")
    if dataset.train.shape[1:] != dataset.test.shape[1:]:
        shapes = f"{_shape(dataset.train[0])} and {_shape(dataset.test[0])}"
        raise DataError(f"{name}: samples of train and test have different shapes, {shapes}")
    if first := int(dataset.train_labels.min()):
        raise DataError(f"{name}: train_labels begin at {first}, and classes at 0: subtract {first} from all labels")
    if (last := int(dataset.test_labels.max())) >= dataset.classes:
        raise DataError(f"{name}: test_labels have the class {last}, of which train has no sample")


def _wrong_labels(labels: Tensor) -> str:
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        return f"must be whole numbers [n], got {_shape(labels)} of type {labels.dtype}"
    if not len(labels):
        return "are empty"
    return f"have {int(labels.min())}, and classes begin at 0" if labels.min() < 0 else ""


def _wrong_samples(samples: Tensor, count: int) -> str:
    shape = _shape(samples)
    if not samples.is_floating_point():
        scales = "pixels.float() / 255, counts.clamp(max=1).float()"
        return f"is of type {samples.dtype}: save floats in [0, 1], such as {scales}"
    if not 2 <= samples.dim() <= 5:
        return f"has the shape {shape}: see snntorch_lr.experiments.data.Dataset for those that can be trained"
    if len(samples) != count and samples.shape[1] == count:
        return f"of shape {shape} has its time axis in front: [n, time, ...] is needed, as by transpose(0, 1)"
    if len(samples) != count:
        return f"has {len(samples)} samples, and there are {count} labels"
    if samples.dim() > 3 and samples.shape[-1] <= 3 < samples.shape[-3]:
        return f"of shape {shape} has its channels last: [..., channels, height, width] is needed, by movedim(-1, -3)"
    if samples.dim() == 5 and samples.shape[1] <= 3 < samples.shape[2]:
        return f"of shape {shape} has its time axis after the channels: [n, time, channels, height, width] is needed"
    rows = samples.flatten(1)
    if not (finite := rows.isfinite().all(1)).all():
        return f"has NaN or infinite values, first in sample {int(finite.byte().argmin())}"
    if rows.min() < 0 or rows.max() > 1:
        return f"has values from {rows.min():.3g} to {rows.max():.3g}: scale them to [0, 1], to which attacks clip"
    if has_time(samples.shape[1:]) and not (filled := rows.any(1)).all():
        return (
            f"has {int((~filled).sum())} empty recordings, first in sample {int(filled.byte().argmin())}: leave it out"
        )
    return ""


def _shape(samples: Tensor) -> str:
    return str([*samples.shape])
