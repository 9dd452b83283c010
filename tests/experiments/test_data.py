"""Data sets: what is read from where, and what is refused with one line."""

from __future__ import annotations

import errno
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from snntorch_lr.experiments import data

PARTS = ("train", "test")


def test_digits_are_images_in_range_and_the_split_is_fixed() -> None:
    first, again = data.load("digits"), data.load("digits")
    assert first.train.shape == (1437, 1, 8, 8)
    assert first.test.shape == (360, 1, 8, 8)
    assert first.train.min() == 0
    assert first.train.max() == 1
    assert torch.equal(first.test, again.test)
    assert torch.bincount(first.test_labels).min() >= 34


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(data.DataError, match=r"digits, mnist, fashion-mnist"):
        data.load("cifar")


def test_missing_data_without_network_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def no_network(self: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried http://example.org, got:\nnothing\n")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    with pytest.raises(data.DataError, match=r"^mnist is not under .*idx3-ubyte.gz\)\. .*MNIST/raw with --data-root$"):
        data.load("mnist", tmp_path)


def test_an_existing_root_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    write_idx(tmp_path / "FashionMNIST" / "raw")
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: pytest.fail("downloaded"))
    images = data.load("fashion-mnist", tmp_path)
    assert images.train.shape == (3, 1, 28, 28)
    assert images.train.max() == 1
    assert images.test_labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"garbage", bytes([0, 0, 8, 3, 0, 0, 0, 9])], ids=["empty", "garbage", "cut"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_data_that_cannot_be_read_are_told_with_the_remedy(name: str, content: bytes, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw)
    (raw / name).write_bytes(content)
    with pytest.raises(data.DataError, match=rf"^mnist under .* cannot be read \(.+\): delete {raw}, and it will be"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_a_download_that_cannot_be_written_is_not_for_want_of_a_network(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    def full(self: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(datasets.MNIST, "download", full)
    with pytest.raises(OSError, match=os.strerror(reason)) as caught:
        data.load("mnist", tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_cifar10_is_in_colour_and_in_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    # A red image, and one that is black.
    pixels = np.zeros((2, 3, 1024), np.uint8)
    pixels[0, 0] = 255
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "labels": [0, 1]}))
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": ["red", "black"]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    images = data.load("cifar10", tmp_path)
    assert (images.train.shape, images.test.shape, images.classes) == ((10, 3, 32, 32), (2, 3, 32, 32), 2)
    assert images.test[0].mean((1, 2)).tolist() == [1, 0, 0]


def write_folder(root: Path, classes: str = "ab", size: tuple[int, int] = (6, 4)) -> None:
    for part in PARTS:
        for index, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", size, (0, 255 * index, 0)).save(root / part / name / "1.png")


def test_a_folder_of_images_is_read_class_by_class(tmp_path: Path) -> None:
    write_folder(tmp_path)
    images = data.load("folder", tmp_path)
    assert images.train.shape == images.test.shape == (2, 3, 4, 6)
    assert images.train_labels.tolist() == images.test_labels.tolist() == [0, 1]
    assert images.train[1].mean((1, 2)).tolist() == [0, 1, 0]
    assert images.classes == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: Image.new("RGB", (6, 5)).save(root / "train/b/1.png"), "has 6 × 5 pixels, .* 6 × 4: bring"),
        (lambda root: (root / "test/b").rename(root / "test/c"), "have different classes"),
        (lambda root: (root / "test/b/1.png").unlink(), "folder needs images in .*/test/<class>/ "),
        (lambda root: (root / "test/b/1.png").write_bytes(b"x"), "1.png is no image"),
        (lambda root: (root / "test").rename(root / "tests"), "folder needs images in .*/test/<class>/ "),
    ],
    ids=["size", "classes", "class without images", "no image", "no test"],
)  # fmt: skip
def test_a_folder_that_is_wrong_is_refused(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(data.DataError, match=message):
        data.load("folder", tmp_path)


@pytest.mark.parametrize("name", ["folder", "file"])
def test_your_own_data_need_a_place(name: str) -> None:
    with pytest.raises(data.DataError, match=rf"say where the {name} is, with --data-root"):
        data.load(name)


def frames() -> dict[str, Any]:
    """What a file of event frames holds."""
    made = {part: torch.ones(6, 5, 2, 4, 4) for part in PARTS}
    labels = {f"{part}_labels": torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32) for part in PARTS}
    return made | labels | {"time": True}


def images() -> dict[str, Any]:
    return frames() | {part: torch.full((6, 1, 4, 4), 0.5) for part in PARTS} | {"time": False}


@pytest.mark.parametrize(
    "content",
    [
        frames(),
        images(),
        frames() | {part: torch.ones(6, 5, 7) for part in PARTS},
        images() | {part: torch.ones(6, 7, dtype=torch.float64) for part in PARTS},
    ],
)
def test_tensors_of_a_file_are_as_they_were_saved(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "mine.pt")
    dataset = data.load("file", tmp_path / "mine.pt")
    assert torch.equal(dataset.train, content["train"].float())
    assert dataset.test_labels.dtype == torch.long
    assert dataset.classes == 3
    assert data.has_time(dataset.shape) == content["time"]


def changed(content: dict[str, Any], part: str, change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return content | {part: change(content[part])}


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Puts a value into sample 4."""
    return lambda samples: samples.index_fill(0, torch.tensor([4]), value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(changed(frames(), "train_labels", lambda y: y + 1), "test_labels", lambda y: y + 1),
         "train_labels begin at 1, and classes at 0: subtract 1 from all labels"),
        (changed(frames(), "train_labels", lambda y: y - 1), "train_labels have -1, and classes begin at 0"),
        (changed(frames(), "train_labels", lambda y: y.float()), r"train_labels must be whole numbers \[n\], got"),
        (changed(frames(), "test_labels", lambda y: y.unsqueeze(1)), r"whole numbers \[n\], got \[6, 1\]"),
        (changed(frames(), "test_labels", lambda y: y + 1), "have the class 3, of which train has no sample"),
        (changed(frames(), "test_labels", lambda y: y[:0]), "test_labels are empty"),
        (changed(frames(), "test_labels", lambda y: y[:4]), "test has 6 samples, and there are 4 labels"),
        (changed(frames(), "train", filled(float("nan"))), "train has NaN or infinite values, first in sample 4"),
        (changed(frames(), "test", filled(float("inf"))), "test has NaN or infinite values, first in sample 4"),
        (changed(frames(), "train", filled(0)), "train has 1 empty recordings, first in sample 4"),
        (changed(frames(), "train", lambda x: 3 * x), "values from 3 to 3: scale them"),
        (changed(images(), "test", lambda x: x - 1), "values from -0.5 to -0.5: scale them"),
        (changed(frames(), "train", lambda x: x.byte()), r"uint8: save floats in \[0, 1\]"),
        (changed(frames(), "train", lambda x: x.transpose(0, 1)), "its time axis in front"),
        (frames() | {part: torch.ones(6, 2, 5, 4, 4) for part in PARTS}, "its time axis after the channels"),
        (frames() | {part: torch.ones(6, 5, 4, 4, 2) for part in PARTS}, "its channels last"),
        (images() | {part: torch.ones(6, 5, 5, 3) for part in PARTS}, "its channels last"),
        (frames() | {"time": False}, r"\[6, 5, 2, 4, 4\] does not fit time=False"),
        (images() | {part: torch.ones(6, 4, 4) for part in PARTS}, r"\[6, 4, 4\] does not fit time=False"),
        (images() | {"time": True}, r"\[6, 1, 4, 4\] does not fit time=True"),
        (changed(frames(), "test", lambda x: x[..., :3]), r"different shapes, \[5, 2, 4, 4\] and \[5, 2, 4, 3\]"),
        (images() | {"train": torch.rand(6)}, r"train has the shape \[6\]"),
        (images() | {"train": [0.5]}, "something else than tensors"),
        ({"train": torch.rand(6, 1, 4, 4)}, r"cannot be read .*write it by torch.save\(\{train, train_labels"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_one_line(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("file", tmp_path / "mine.pt")
    assert "\n" not in str(caught.value)


def write_recordings(root: Path, events: int = 40) -> None:
    """Recordings in the format of N-MNIST: digit d has its events at x = d, in time order."""
    for part in PARTS:
        for digit in range(3):
            folder = root / part.title() / str(digit)
            folder.mkdir(parents=True)
            times = [1000 * index for index in range(events)]
            rows = [[digit, 7, 128 * (index % 2) + (t >> 16), t >> 8 & 255, t & 255] for index, t in enumerate(times)]
            (folder / "00001.bin").write_bytes(bytes(byte for row in rows for byte in row))


def test_a_part_of_nmnist_becomes_frames_which_are_kept(tmp_path: Path) -> None:
    tonic = pytest.importorskip("tonic")
    write_recordings(tmp_path)
    dataset = data.load("nmnist", tmp_path)
    assert dataset.train.shape == (3, 10, 2, 34, 34)
    assert dataset.train_labels.tolist() == [0, 1, 2]
    # In each bin there are events of both polarities, at one place, and several count as one.
    assert dataset.train.sum((1, 2, 3, 4)).tolist() == [20, 20, 20]
    assert all(dataset.train[digit, :, :, 7, digit].eq(1).all() for digit in range(3))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tonic.io, "read_mnist_file", lambda *_, **__: pytest.fail("read again"))
        assert torch.equal(data.load("nmnist", tmp_path).test, dataset.test)
    (tmp_path / "Train" / "2" / "00002.bin").write_bytes((tmp_path / "Train" / "2" / "00001.bin").read_bytes())
    assert len(data.load("nmnist", tmp_path).train) == 4
    (kept,) = tmp_path.glob("nmnist-4-3-*.pt")
    kept.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"nmnist-4-3-.*.pt is .* damaged .*: take a copy, or delete it"):
        data.load("nmnist", tmp_path)


def test_recordings_that_are_wrong_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("tonic")
    write_recordings(tmp_path)
    (tmp_path / "Test" / "1" / "00001.bin").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"Test/1/00001.bin holds no event"):
        data.load("nmnist", tmp_path)
    assert not [*tmp_path.glob("*.pt")]
    (tmp_path / "Test").rename(tmp_path / "Rest")
    with pytest.raises(data.DataError, match=r"/Test holds no <digit>/\*.bin"):
        data.load("nmnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "events", "shape"),
    [
        ("dvs-gesture", [(x, 8, t, t % 2) for t, x in enumerate(range(0, 96, 2))], (16, 2, 32, 32)),
        ("shd", [(t, 3 * t, 1) for t in range(200)], (100, 140)),
    ],
)
def test_recordings_of_tonic_become_frames_of_fewer_places(
    name: str, events: Any, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tonic = pytest.importorskip("tonic")
    kind = getattr(tonic.datasets, data.EVENTS[name].tonic)
    fields = "xytp" if name == "dvs-gesture" else "txp"
    dtype = np.dtype([(field, kind.dtype[field]) for field in fields])

    class Few:
        sensor_size = kind.sensor_size

        def __init__(self, root: str, train: bool) -> None:
            assert root == str(tmp_path)
            self.recordings = [(np.array(events, dtype), label) for label in ((0, 1, 0) if train else (1, 0))]

        def __len__(self) -> int:
            return len(self.recordings)

        def __getitem__(self, index: int) -> Any:
            return self.recordings[index]

    monkeypatch.setattr(tonic.datasets, data.EVENTS[name].tonic, Few)
    dataset = data.load(name, tmp_path)
    assert dataset.shape == shape
    assert dataset.test_labels.tolist() == [1, 0]
    assert 0 < dataset.train.mean() < dataset.train.max() <= 1
    monkeypatch.setattr(Few, "__getitem__", lambda *_: pytest.fail("read again"))
    assert torch.equal(data.load(name, tmp_path).train, dataset.train)


def test_recordings_that_cannot_be_downloaded_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tonic = pytest.importorskip("tonic")

    def no_network(*args: Any, **options: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(tonic.datasets.NMNIST, "__init__", no_network)
    with pytest.raises(data.DataError, match=r"^nmnist is not under .* \(Network is unreachable\)\. Connect to"):
        data.load("nmnist", tmp_path)


def test_tonic_that_is_missing_is_told_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tonic", None)
    with pytest.raises(data.DataError, match=r"^shd needs tonic: pip install 'snntorch-lr\[events\]'"):
        data.load("shd", tmp_path)


def write_idx(raw: Path) -> None:
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = bytes([0, 255]) * (3 * 28 * 14)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28)) + pixels
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([0, 1, 2]))
