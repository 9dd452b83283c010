from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snntorch_lr.baselines import BASELINES, batch_mean, leave_one_out

COPIES, BATCH = 6, 3


def losses() -> Tensor:
    return torch.rand(COPIES, BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def left_out(copy: int, antithetic: bool) -> set[int]:
    """A copy, and the one with the opposite noise."""
    return {copy, (copy + COPIES // 2) % COPIES} if antithetic else {copy}


@pytest.mark.parametrize("antithetic", [False, True])
def test_leave_one_out_compares_with_the_other_copies_of_the_sample(antithetic: bool) -> None:
    given = losses()
    advantages = leave_one_out(given, antithetic)
    for k in range(COPIES):
        others = [j for j in range(COPIES) if j not in left_out(k, antithetic)]
        torch.testing.assert_close(advantages[k], given[k] - given[others].mean(0))
    torch.testing.assert_close(advantages.sum(0), torch.zeros(BATCH, dtype=torch.float64))


@pytest.mark.parametrize("antithetic", [False, True])
def test_batch_mean_compares_with_all_others(antithetic: bool) -> None:
    given = losses()
    advantages = batch_mean(given, antithetic)
    for k in range(COPIES):
        for b in range(BATCH):
            others = [
                given[j, c]
                for j in range(COPIES)
                for c in range(BATCH)
                if not (c == b and j in left_out(k, antithetic))
            ]
            torch.testing.assert_close(advantages[k, b], given[k, b] - torch.stack(others).mean())


def test_none_leaves_the_losses() -> None:
    assert torch.equal(BASELINES["none"](losses(), False), losses())


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_does_not_depend_on_the_noise_that_it_is_multiplied_with(name: str, antithetic: bool) -> None:
    given = losses()
    subtracted = torch.autograd.functional.jacobian(lambda x: x - BASELINES[name](x, antithetic), given)
    for k in range(COPIES):
        for j in left_out(k, antithetic):
            for b in range(BATCH):
                assert abs(subtracted[k, b, j, b].item()) < 1e-12


@pytest.mark.parametrize("name", ["leave-one-out", "batch-mean"])
def test_a_constant_in_all_losses_does_not_matter(name: str) -> None:
    torch.testing.assert_close(BASELINES[name](losses() + 100, False), BASELINES[name](losses(), False))


def test_leave_one_out_does_not_mix_samples() -> None:
    shifted = losses() + torch.tensor([0.0, 10.0, -10.0])
    torch.testing.assert_close(leave_one_out(shifted), leave_one_out(losses()))


@pytest.mark.parametrize(
    ("baseline", "shape", "antithetic", "remedy"),
    [
        (leave_one_out, (1, 5), False, "use more copies of each sample"),
        (leave_one_out, (2, 5), True, "antithetic partner: use more copies"),
        (batch_mean, (1, 1), False, "use more samples"),
        (batch_mean, (2, 1), True, "use more samples"),
    ],
)
def test_nothing_to_compare_with_is_an_error(
    baseline: Callable[[Tensor, bool], Tensor], shape: tuple[int, int], antithetic: bool, remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        baseline(torch.rand(shape), antithetic)


def test_batch_mean_of_single_copies_is_enough() -> None:
    assert batch_mean(torch.tensor([[1.0, 3.0]])).tolist() == [[-2.0, 2.0]]


@pytest.mark.parametrize("antithetic", [False, True])
def test_equal_losses_leave_no_dust_of_rounding(antithetic: bool) -> None:
    losses = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).repeat(16, 1)
    losses[0, 0] += 1
    advantages = leave_one_out(losses, antithetic)
    assert advantages[0, 0] != 0
    assert not advantages[:, 1:].any()
