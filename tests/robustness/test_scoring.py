from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.robustness import Target, clopper_pearson, mcnemar, score, share_of, wilson

from . import canaries
from .networks import counted


class Coin(nn.Module):
    """Says class 1 where a pixel is above uniform noise of torch's global generator, else class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        level = images[:, 0, 0, 0]
        ahead = (level > torch.rand_like(level)).float()
        return torch.stack([1 - ahead, ahead], 1) * self.scale


def test_majority_is_sure_where_a_single_draw_is_not() -> None:
    images = torch.full((200, 1, 1, 1), 0.7)
    scores = score(Target(Coin()), images, torch.ones(200, dtype=torch.long), votes=101, rows=4000)
    assert scores.right.all()
    assert scores.single.mean() == pytest.approx(0.7, abs=0.02)


def test_ties_go_to_the_larger_mean_probability() -> None:
    def forward(net: nn.Module, images: Tensor) -> Tensor:
        # Of every two draws one is for class 0, barely, and one for class 1, clearly.
        turn = torch.arange(len(images)) % 2
        logits = torch.where(turn == 0, torch.tensor([[0.1], [0.0]]), torch.tensor([[0.0], [5.0]])).T
        return logits + 1e-6 * torch.rand(1)

    images = torch.zeros(1, 1, 1, 1)
    scores = score(Target(nn.Linear(1, 1), forward), images, torch.tensor([1]), votes=8)
    assert (scores.right.tolist(), scores.single.tolist()) == ([True], [0.5])


def test_a_network_without_noise_is_run_once_for_each_image() -> None:
    rows: list[int] = []
    images, labels = canaries.digits(20)
    score(Target(canaries.trained(), counted(rows)), images, labels, votes=32)
    assert rows[-1] == 20
    assert score(Target(canaries.trained()), images[:0], labels[:0]).right.shape == (0,)


def test_draws_are_a_function_of_the_seed_and_leave_the_global_state() -> None:
    images, labels = canaries.digits(20)
    target = Target(slr.add_noise(canaries.trained(), 0.8))
    before = torch.get_rng_state()
    first, again, other = (score(target, images, labels, 8, seed).single for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


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


def pairs(only_first: int, only_second: int, both: int) -> tuple[Tensor, Tensor]:
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
    assert mcnemar(*pairs(0, 0, 5)).p_value == 1


def test_the_interval_of_a_paired_difference_is_newcombes_and_never_empty() -> None:
    # The same children: 1 with it both times, 12 never. Fagerland, Lydersen & Laake (2014), "Recommended tests and
    # confidence intervals for paired binomial proportions": -0.507 to -0.026.
    first, second = pairs(1, 7, 1)
    never = torch.zeros(12, dtype=torch.bool)
    test = mcnemar(torch.cat([first, never]), torch.cat([second, never]))
    assert test.difference == pytest.approx(-6 / 21)
    assert (test.low, test.high) == pytest.approx((-0.507, -0.026), abs=5e-4)
    for right in (torch.ones(8), torch.zeros(8), torch.arange(8) % 2):
        same = mcnemar(right.bool(), right.bool())
        assert same.low == pytest.approx(-same.high)
        assert same.low < -0.1
    assert str(same) == "+0.0 [-20.1, +20.1]"


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
