from __future__ import annotations

import torch

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
