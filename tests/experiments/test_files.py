from __future__ import annotations

import errno
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from snntorch_lr._files import load, save
from snntorch_lr.experiments import files


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "results.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "half \ud800")
    assert '"a": 1' in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save(path, {"a": torch.ones(100_000)}),
        lambda path: files.save_figure(path, Figure()),
        lambda path: files.write_text(path, "x" * 100_000),
    ],
    ids=["checkpoint", "figure", "text"],
)
def test_what_does_not_fit_leaves_the_old_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "results.png"
    path.write_text("old")
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large") as caught:
        write(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["file", "file/a"])
def test_a_folder_that_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OSError, match=r"Not a directory|File exists") as caught,
        files.locked(tmp_path / place),
    ):
        pass
    assert caught.value.filename == str(tmp_path / place)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_broken_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt is not a checkpoint"):
        load(tmp_path / "x.pt")


def test_a_flipped_bit_never_gives_another_checkpoint(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.pt", {"net": {"weight": torch.arange(50.0)}, "epoch": 1}
    save(path, whole)
    content, refused = path.read_bytes(), set()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            state = load(path)
        except ValueError:
            refused.add(place)
        else:
            assert state["epoch"] == 1
            assert torch.equal(state["net"]["weight"], whole["net"]["weight"])
    first = content.index(whole["net"]["weight"].numpy().tobytes())
    assert refused >= set(range(first, first + 200))


def test_the_flag_of_a_folder_does_not_hide_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save(path, {"weight": torch.ones(50)})
    content = bytearray(path.read_bytes())
    # The attributes of a file in the list at the end of an archive stand eight bytes before its name.
    content[content.rindex(b"archive/data/0") - 8] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt is .* damaged \(its checksum is wrong\): take a copy"):
        load(path)


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    with files.locked(out):
        with pytest.raises(ValueError, match=r"a is in use by another process; wait, or choose another --out"):
            files.locked(out).__enter__()
        with files.locked(tmp_path / "runs" / "b"):
            pass
    with files.locked(out):
        (out / "results.json").write_text("x")
    assert list(out.iterdir()) == [out / "results.json"]


def test_a_lock_leaves_no_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for place in (tmp_path / "mine", tmp_path / "a" / "b"):
        with files.locked(place):
            assert place.is_dir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_process_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal; from snntorch_lr.experiments import files\n"
        f"with files.locked(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    with files.locked(tmp_path):
        pass


@pytest.mark.parametrize("system", ["Windows", "a file system without locks"])
def test_without_locks_a_warning_says_so(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "fcntl", None) if system == "Windows" else monkeypatch.setattr(
        files.fcntl, "flock", flock
    )
    with pytest.warns(UserWarning, match="cannot be locked on this system"), files.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
