from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snntorch_lr.baselines import BASELINES, batch_mean, leave_one_out

COPIES, BATCH = 6, 3


def losses() -> Tensor:
    return torch.rand(COPIES, BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_none_leaves_the_losses() -> None:
    assert torch.equal(BASELINES["none"](losses()), losses())


def test_leave_one_out_compares_with_the_other_copies_of_the_sample() -> None:
    table = losses()
    advantages = leave_one_out(table)
    for k in range(COPIES):
        others = [j for j in range(COPIES) if j != k]
        torch.testing.assert_close(advantages[k], table[k] - table[others].mean(0))
    torch.testing.assert_close(advantages.sum(0), torch.zeros(BATCH, dtype=torch.float64))


def test_batch_mean_compares_with_all_others() -> None:
    flat = losses().flatten()
    for index, advantage in enumerate(batch_mean(losses()).flatten()):
        others = torch.cat((flat[:index], flat[index + 1 :]))
        torch.testing.assert_close(advantage, flat[index] - others.mean())


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_does_not_depend_on_the_loss_of_its_own_noise(name: str) -> None:
    subtracted = torch.autograd.functional.jacobian(lambda x: x - BASELINES[name](x), losses())
    own = subtracted.view(COPIES * BATCH, COPIES * BATCH).diagonal()
    assert own.abs().max() < 1e-12


def test_batch_mean_of_single_copies_is_enough() -> None:
    assert batch_mean(torch.tensor([[1.0, 3.0]])).tolist() == [[-2.0, 2.0]]


def test_equal_losses_leave_no_dust_of_rounding() -> None:
    table = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).repeat(16, 1)
    table[0, 0] += 1
    advantages = leave_one_out(table)
    assert advantages[0, 0] != 0
    assert not advantages[:, 1:].any()
