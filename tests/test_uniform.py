"""Uniform numbers: their distribution, and the points that they never reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr
from snntorch_lr import noise_stream as uniform

COUNT = 300_000
DTYPES = [torch.float32, torch.float64]


def of_counter(seed: int, dtype: torch.dtype) -> Tensor:
    like = torch.empty(1, COUNT, dtype=dtype)
    return uniform.NoiseStream(seed, 1, 0, 1).draw(1, like, slr.EscapeNoise()).view(-1)


def of_generator(seed: int, dtype: torch.dtype) -> Tensor:
    return uniform.from_generator(torch.empty(COUNT, dtype=dtype), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", [of_counter, of_generator])
def test_numbers_are_uniform_between_the_end_points(draw: Any, dtype: torch.dtype) -> None:
    numbers = draw(0, dtype).double()
    assert numbers.min() > -1
    assert numbers.max() < 1
    expected = torch.full((100,), COUNT / 100, dtype=torch.float64)
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
    assert ((torch.histc(numbers, 100, -1, 1) - expected).square() / expected).sum() < 99 + 5 * 14
    correlation = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
    assert correlation.abs() < 5 / COUNT**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_end_points_are_never_reached_and_the_middle_is_no_value(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [0x80000000, 0xFFFFFFFF, 0, 0x7FFFFFFF]
    monkeypatch.setattr(uniform.kernels, "noise_on", lambda *_: None)
    monkeypatch.setattr(uniform, "philox", lambda *_: [torch.full((1, 1), word) for word in words])
    numbers = uniform.NoiseStream(0, 1, 0, 1).draw(1, torch.empty(1, 4, dtype=dtype), slr.EscapeNoise())[0]
    assert -1 < numbers[0] < numbers[1] < 0 < numbers[2] < numbers[3] < 1
    assert torch.equal(numbers, -numbers.flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_generator_never_gives_an_end_point(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "uniform_", lambda out, low, high, generator: out.fill_(low))
    numbers = uniform.from_generator(torch.empty(1, dtype=dtype), None)
    assert -1 < numbers.item() < -0.999
