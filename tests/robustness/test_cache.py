from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snntorch_lr.robustness.cache import Cache, fingerprint


def test_fingerprints_tell_apart_what_differs() -> None:
    x = torch.arange(4.0)
    parts: list[tuple[Any, ...]] = [
        (x,), (x.double(),), (x.view(2, 2),), (x, 1), (x, "1"), (x.flip(0),), ({"a": 1},), ({"a": 2},),
        ("a", "b"), ("ab",),
    ]  # fmt: skip
    assert len({fingerprint(*each) for each in parts}) == len(parts)
    assert fingerprint(x.clone(), {"a": 1, "b": 2}) == fingerprint(x, {"b": 2, "a": 1})


@pytest.mark.parametrize("content", [b"", b"not a file of torch"])
def test_a_file_that_cannot_be_read_is_made_again(tmp_path: Path, content: bytes) -> None:
    cache = Cache(tmp_path)
    cache.once("A/b, 0.1", "mark", lambda: {"right": torch.tensor([True])})
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert cache.once("A/b, 0.1", "mark", lambda: {"right": 2}) == {"right": 2}
    assert cache.once("A/b, 0.1", "mark", lambda: {"right": 3}) == {"right": 2}


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.once("a", "mark", lambda: {"right": torch.ones(100)})
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert cache.once("a", "mark", lambda: {"right": 2}) == {"right": 2}


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).once("a", "mark", fail)
    assert not list(tmp_path.iterdir())
