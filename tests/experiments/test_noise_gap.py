"""One message where a network is another one without its noise: no more often than chance allows, and exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snntorch_lr.anneal import noise_gap
from snntorch_lr.robustness import mcnemar


def samples(both: int, only_off: int, only_on: int, neither: int) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([both, only_off, only_on, neither])
    off, on = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    return off.repeat_interleave(counts), on.repeat_interleave(counts)


def test_both_accuracies_and_the_remedies_are_said() -> None:
    message = noise_gap(*samples(60, 10, 29, 1))
    assert message is not None
    for part in ("70.0 % without", "89.0 % with", "snntorch_lr.anneal", "noise_on", "update_batch_norm"):
        assert part in message


@pytest.mark.parametrize("only_off", [0, 1, 5, 40, 3000])
def test_the_limit_is_that_of_an_exact_mcnemar_test(only_off: int) -> None:
    said = []
    for only_on in range(only_off, only_off + 12 + 4 * int(only_off**0.5)):
        off, on = samples(50, only_off, only_on, 50)
        said.append(noise_gap(off, on) is not None)
        assert said[-1] == (mcnemar(off, on).p_value < 0.01)
        assert (noise_gap(on, off) is not None) == said[-1]
    assert not said[0]
    assert said[-1]


def test_few_samples_tell_nothing() -> None:
    assert noise_gap(*samples(0, 0, 7, 0)) is None
    assert noise_gap(*samples(0, 0, 8, 0)) is not None
    assert noise_gap(torch.zeros(0).bool(), torch.zeros(0).bool()) is None


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same samples .* got \(2,\), \(3,\)"):
        noise_gap(torch.ones(2).bool(), torch.ones(3).bool())
