from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from snntorch_lr import noise_stream as uniform

COUNT = 300_000
DTYPES = [torch.float32, torch.float64]


def of_seed(seed: int, dtype: torch.dtype = torch.float32, count: int = COUNT) -> Tensor:
    out = torch.empty(count, dtype=dtype)
    uniform.from_seeds([(out, (seed,))])
    return out


def of_generator(seed: int, dtype: torch.dtype) -> Tensor:
    return uniform.from_generator(torch.empty(COUNT, dtype=dtype), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", [of_seed, of_generator])
def test_numbers_are_uniform_between_the_end_points(draw: Any, dtype: torch.dtype) -> None:
    numbers = draw(0, dtype).double()
    assert numbers.min() > -1
    assert numbers.max() < 1
    expected = torch.full((100,), COUNT / 100, dtype=torch.float64)
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
    assert ((torch.histc(numbers, 100, -1, 1) - expected).square() / expected).sum() < 99 + 5 * 14
    correlation = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
    assert correlation.abs() < 5 / COUNT**0.5


@pytest.mark.parametrize(("floats", "signed"), [(np.float32, np.int32), (np.float64, np.int64)])
def test_end_points_are_never_reached_and_the_middle_is_no_value(floats: Any, signed: Any) -> None:
    limits = np.iinfo(signed)
    bits = np.array([limits.min, -1, 0, limits.max], signed).view(np.uint64)
    numbers = np.empty(4, floats)
    uniform.to_unit_interval(bits, numbers)
    assert -1 < numbers[0] < numbers[1] < 0 < numbers[2] < numbers[3] < 1
    assert (numbers == -numbers[::-1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_generator_never_gives_an_end_point(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "uniform_", lambda out, low, high, generator: out.fill_(low))
    numbers = uniform.from_generator(torch.empty(1, dtype=dtype), None)
    assert -1 < numbers.item() < -0.999


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_numbers(count: int) -> None:
    assert torch.equal(of_seed(3, count=count), of_seed(3)[:count])


def test_threads_give_the_same_numbers() -> None:
    parts = [torch.empty(COUNT) for _ in range(4)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        uniform.from_seeds([(part, (seed,)) for seed, part in enumerate(parts)])
    finally:
        torch.set_num_threads(before)
    for seed, part in enumerate(parts):
        assert torch.equal(part, of_seed(seed))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own() -> None:
    first = uniform._threads(2)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"new" if uniform._threads(2) is not first else b"old")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 3) == b"new"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_drawn_with_more_digits(dtype: torch.dtype) -> None:
    assert uniform.resolved(dtype) == torch.float32
