from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

# The tensors here are small: threads would wait for each other longer than they work, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(params=[True, False], ids=["OpenMP", "own threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of either kind, each of which is worth it."""
    pytest.importorskip("numba")
    from snntorch_lr.kernels import cpu

    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    if not request.param:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
