from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snntorch_lr.noise_stream import NoiseStream

COPIES = 6


def as_it_is(uniform: Tensor) -> Tensor:
    return uniform


def draw(first: int, last: int, features: int, antithetic: bool = False, seed: int = 0, index: int = 1) -> Tensor:
    like = torch.empty((last - first) * 2, features)
    return (
        NoiseStream(seed, COPIES, first, last, antithetic).draw(index, like, as_it_is).view(last - first, 2, features)
    )


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("features", [3, 9_000, 40_000], ids=["one block", "blocks of copies", "block each"])
def test_any_range_of_copies_is_the_same_noise(features: int, antithetic: bool) -> None:
    whole = draw(0, COPIES, features, antithetic)
    for first in range(COPIES):
        for last in range(first + 1, COPIES + 1):
            assert torch.equal(draw(first, last, features, antithetic), whole[first:last])


@pytest.mark.parametrize("features", [3, 9_000, 40_000])
def test_antithetic_copies_are_negated(features: int) -> None:
    whole = draw(0, COPIES, features, antithetic=True)
    assert torch.equal(whole[COPIES // 2 :], -whole[: COPIES // 2])
    assert whole[: COPIES // 2].unique().numel() > 0.9 * whole[: COPIES // 2].numel()


@pytest.mark.parametrize("features", [3, 9_000])
def test_seeds_draws_and_copies_are_independent(features: int) -> None:
    one = draw(0, COPIES, features)
    others = [draw(0, COPIES, features, seed=1), draw(0, COPIES, features, index=2), one.roll(1, 0), one.roll(1, 1)]
    for other in others:
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert correlation.abs() < 5 / one.numel() ** 0.5


def test_many_draws_have_no_common_seed() -> None:
    first = torch.stack([draw(0, COPIES, 1, seed=s, index=i)[0, 0] for s in range(40) for i in range(40)])
    assert first.unique().numel() == 1600
