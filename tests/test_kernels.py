"""What kernels of a CPU are made of: functions that shape numbers, a cache for compiled code, and memory."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.kernels import memory

from .helpers import Net, assert_same, data, gradients

numba = pytest.importorskip("numba")


# One njit function for each, because nothing of them can be called from Python.
def mapped(name: str) -> Callable[[np.ndarray], np.ndarray]:
    from snntorch_lr.kernels import numba_numbers

    chance = numba.njit(lambda z: numba_numbers.logistic_chance(z)[0])
    function = chance if name == "chance" else getattr(numba_numbers, name)

    @numba.njit(error_model="numpy")
    def apply(x: Any) -> Any:
        out = np.empty_like(x)
        for i in range(len(x)):
            out[i] = function(x[i])
        return out

    return apply


def test_errors_of_polynomials_are_as_stated() -> None:
    special = torch.special
    x = np.linspace(-87, 0, 400_001, dtype=np.float32)
    assert np.abs(mapped("exp")(x) / np.exp(x.astype(np.float64)) - 1).max() < 1e-6
    x = np.geomspace(2.0**-25, 2, 400_001).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    assert (np.abs(mapped("_log")(x) - exact) <= 2e-7 * np.maximum(np.abs(exact), 1)).all()
    z = np.linspace(-40, 40, 400_001, dtype=np.float32)
    assert np.abs(mapped("chance")(z) - special.expit(torch.from_numpy(z).double()).numpy()).max() < 3e-7
    ends = np.arange(-(2**23), -(2**23) + 1000)
    k = np.concatenate([ends, np.linspace(-(2**23), 2**23 - 1, 300_001).astype(np.int64)])
    u = ((k + 0.5) / 2.0**23).astype(np.float32)
    exact = special.erfinv(torch.from_numpy(u).double()).numpy() * math.sqrt(2)
    assert np.abs(mapped("normal_quantile")(u) / exact - 1).max() < 2e-6


def test_compiled_code_is_not_taken_from_the_cache_if_another_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snntorch_lr.kernels import numba_steps

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    hits = [numba_steps.noise(np.float32, 0).cache_hits for _ in range(2)]
    monkeypatch.setattr(numba_steps, "_SOURCES", numba_steps._SOURCES + 1)
    assert [*hits, numba_steps.noise(np.float32, 0).cache_hits] == [0, 1, 0]


def test_code_from_the_cache_computes_what_code_just_compiled_did(tmp_path: Path) -> None:
    script = """
import hashlib, sys, torch, snntorch_lr
assert "numba" not in sys.modules, "it takes long to import, and is only needed now"
from snntorch_lr.kernels import cpu

def random(*shape):
    return torch.rand(*shape, generator=generator)

generator = torch.Generator().manual_seed(0)
steps = cpu.TimeSteps(0, 0, random(64), random(64), None, random(64), random(64) + 0.1)
z, fired = random(3, 1, 32, 64) * 4 - 2, random(3, 1, 32, 64) > 0.5
code = ((z.view(torch.int32) >> 16) & ~1).to(torch.int16) | fired.to(torch.int16)
trace, current, sums = torch.zeros(1, 32, 64), torch.zeros(3, 32, 64), steps.sums_of(32)
steps.backward(
    32, 1, 3, 3, None, None, None, code, None, None, None, None, random(32), None, 0, trace, 1, None, current, False,
    sums,
)
print(hashlib.md5(b"".join(x.numpy().tobytes() for x in (trace, current, *sums))).hexdigest())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = partial(subprocess.run, [sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    first, second = run(), run()
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout


def test_compiled_functions_share_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken from the cache calls other functions by their name: of another one it would be other code."""
    from snntorch_lr.kernels import numba_steps

    names: list[str] = []

    def named(*_: Any, **options: Any) -> Callable[[Any], Any]:
        return lambda function: names.append(function.__qualname__)

    monkeypatch.setattr(numba_steps, "njit", named)
    monkeypatch.setattr(numba_steps, "cfunc", named)
    for dtype in (np.float32, np.float64):
        for kind in range(3):
            numba_steps.noise(dtype, kind)
        for kind, plain in itertools.product(range(2), (False, True)):
            numba_steps.forward(dtype, kind, plain)
            for pairs in (True, False):
                numba_steps.backward(dtype, kind, plain, pairs)
    assert len(set(names)) == len(names) == 2 * 2 * (3 + 2 * 2 * 3)


def test_errors_of_the_normal_distribution_are_as_stated() -> None:
    from snntorch_lr.kernels import numba_numbers

    @numba.njit(error_model="numpy")
    def apply(z: Any) -> Any:
        density, tail = np.empty_like(z), np.empty_like(z)
        for i in range(len(z)):
            density[i], tail[i] = numba_numbers.normal(z[i])
        return density, tail

    z = np.linspace(-13, 13, 200_001, dtype=np.float32)
    density, tail = apply(z)
    x = torch.from_numpy(z).double().abs()
    exact = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    # The square of a number of single precision is as exact as it is.
    room = 2e-6 + 2**-23 * x.square().numpy()
    assert (np.abs(density / exact.numpy() - 1) < room).all()
    ratio = (math.sqrt(math.pi / 2) * torch.special.erfcx(x / math.sqrt(2))).numpy()
    assert (np.abs(tail / (exact.numpy() * ratio) - 1) < 2 * room).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.int64])
def test_memory_is_no_view_and_given_out_again_only_when_nobody_holds_it(dtype: torch.dtype) -> None:
    pool = memory.Pool()
    first = pool.empty((100, 1000), dtype)
    assert (first.shape, first.dtype) == ((100, 1000), dtype)
    assert first.is_contiguous()
    assert not first._is_view()
    assert first.data_ptr() % 64 == 0
    place, part = first.data_ptr(), first[50:52]
    del first
    assert pool.empty((100, 1000), dtype).data_ptr() != place
    saved = (part * torch.ones(2, 1000, requires_grad=True)).grad_fn
    del part
    assert pool.empty((100, 1000), dtype).data_ptr() != place
    del saved
    assert place in {again.data_ptr() for again in [pool.empty((100, 1000), dtype) for _ in range(3)]}


def test_a_pool_lets_go_of_what_nobody_asks_for() -> None:
    pool = memory.Pool()
    pool.empty((1 << 15,), torch.float32)
    for _ in range(memory.Pool.patience):
        pool.count_presentation()
    assert pool._free
    for _ in range(memory.Pool.patience):
        pool.count_presentation()
    assert not pool._free
    assert pool.empty((1 << 15,), torch.float32).numel() == 1 << 15


def test_without_numba_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, Tensor]:
        net = Net().double()
        torch.manual_seed(3)
        slr.Counterfactual(net, control=0.5).backward(net.loss, *data(torch.float64))
        return gradients(net)

    fused = found()
    monkeypatch.setattr(kernels, "_load", lambda device: None)
    # Quantiles have the polynomials of single precision.
    assert_same(found(), fused, rtol=1e-5, atol=1e-7)
