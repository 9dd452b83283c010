from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from snntorch_lr import objectives

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.5, 0.2], [1.0, 1.0, 30.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 2, 0])


def test_true_class_is_the_expected_error_of_a_drawn_prediction() -> None:
    expected = torch.stack([1 - row.softmax(0)[target] for row, target in zip(LOGITS, TARGETS, strict=True)])
    torch.testing.assert_close(objectives.true_class(LOGITS, TARGETS), expected)


def test_zero_one_counts_errors() -> None:
    assert objectives.zero_one(LOGITS, TARGETS).tolist() == [0, 1, 1]


def test_clipped_margin_by_hand() -> None:
    # Leads of the true class: 2, -0.3, -29.
    torch.testing.assert_close(
        objectives.clipped_margin(LOGITS, TARGETS, margin=2.0), torch.tensor([0.0, 2.3 / 4, 1.0], dtype=torch.float64)
    )


def test_a_margin_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        objectives.clipped_margin(LOGITS, TARGETS, margin=0)


def test_a_vote_counts_the_majority_of_the_draws_of_an_image() -> None:
    predicted = torch.tensor([1, 1, 0, 2, 0, 0])
    targets = torch.tensor([1, 1, 1, 2, 2, 2])
    assert objectives.vote(F.one_hot(predicted).double(), targets, draws=3).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_vote_of_one_is_the_zero_one_loss() -> None:
    assert torch.equal(objectives.vote(LOGITS, TARGETS, draws=1), objectives.zero_one(LOGITS, TARGETS))


def test_rows_that_are_no_whole_votes_are_refused() -> None:
    with pytest.raises(ValueError, match="repeat_interleave"):
        objectives.vote(LOGITS, TARGETS, draws=2)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_each_gives_one_loss_per_sample(name: str) -> None:
    assert objectives.OBJECTIVES[name](LOGITS, TARGETS).shape == (3,)


def test_cross_entropy_is_torchs() -> None:
    torch.testing.assert_close(
        objectives.cross_entropy(LOGITS, TARGETS), F.cross_entropy(LOGITS, TARGETS, reduction="none")
    )
