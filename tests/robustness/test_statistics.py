from __future__ import annotations

import pytest
import torch

from snntorch_lr.robustness.scoring import Share, clopper_pearson, mcnemar, share_of, wilson


# Newcombe (1998), table I, methods 3 (score) and 5 (Clopper-Pearson).
@pytest.mark.parametrize(
    ("right", "total", "score", "exact"),
    [
        (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
        (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
        (0, 20, (0.0000, 0.1611), (0.0000, 0.1684)),
        (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
    ],
)
def test_intervals_are_those_of_newcombe(
    right: int, total: int, score: tuple[float, float], exact: tuple[float, float]
) -> None:
    for interval, published in (wilson(right, total), score), (clopper_pearson(right, total), exact):
        assert (interval.low, interval.high) == pytest.approx(published, abs=5.1e-5)
        assert interval.accuracy == right / total


def test_a_share_prints_percent_with_half_its_interval() -> None:
    assert str(Share(0.5, 0.4, 0.6, 96)) == "50.0 ± 10.0"


def pairs(only_first: int, only_second: int, both: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.tensor([True] * only_first + [False] * only_second + [True] * both)
    second = torch.tensor([False] * only_first + [True] * only_second + [True] * both)
    return first, second


def test_mcnemar_is_exact_binomial_of_discordant_pairs() -> None:
    # Fagerland, Lydersen & Laake (2013), "The McNemar test for binary matched-pairs data", table 1: airway
    # hyper-responsiveness in 21 children, 1 and 7 discordant pairs, exact conditional p = 0.070.
    test = mcnemar(*pairs(1, 7, 13))
    assert (test.only_first, test.only_second) == (1, 7)
    assert test.p_value == pytest.approx(0.0703, abs=5e-5)
    # 6 and 16 discordant pairs, the example of Wikipedia's "McNemar's test": exact binomial p = 0.052.
    assert mcnemar(*pairs(6, 16, 0)).p_value == pytest.approx(0.0525, abs=5e-5)


def test_networks_that_never_differ_are_not_told_apart() -> None:
    assert mcnemar(*pairs(0, 0, 5)).p_value == 1


def test_share_of_fractions_holds_its_mean() -> None:
    share = share_of(torch.tensor([1.0, 0.75, 0.5, 1.0]))
    assert share.accuracy == pytest.approx(0.8125)
    assert share.low < share.accuracy < share.high
    assert share_of(torch.tensor([True, False, True, True])) == wilson(3, 4)


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="5 of 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="there must be images"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="same images"):
        mcnemar(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
