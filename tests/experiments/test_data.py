from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from snntorch_lr.experiments import data


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


def write_idx(raw: Path) -> None:
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = bytes([0, 255]) * (3 * 28 * 14)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28)) + pixels
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([0, 1, 2]))
