from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.robustness import Target, score

from . import canaries


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
    found = score(Target(Coin()), images, torch.ones(200, dtype=torch.long), votes=101, rows=4000)
    assert found.right.all()
    assert found.single.mean() == pytest.approx(0.7, abs=0.02)


def test_ties_go_to_the_larger_mean_probability() -> None:
    def forward(net: nn.Module, images: Tensor) -> Tensor:
        # Of every two draws one is for class 0, barely, and one for class 1, clearly.
        turn = torch.arange(len(images)) % 2
        logits = torch.where(turn == 0, torch.tensor([[0.1], [0.0]]), torch.tensor([[0.0], [5.0]])).T
        return logits + 1e-6 * torch.rand(1)

    images = torch.zeros(1, 1, 1, 1)
    found = score(Target(nn.Linear(1, 1), forward), images, torch.tensor([1]), votes=8)
    assert found.right.tolist() == [True]
    assert found.single.tolist() == [0.5]


def test_a_network_without_noise_is_run_once_for_each_image() -> None:
    rows: list[int] = []

    def forward(net: nn.Module, images: Tensor) -> Tensor:
        rows.append(len(images))
        return net(images)

    images, labels = canaries.digits(20)
    score(Target(canaries.trained(), forward), images, labels, votes=32)
    assert rows[-1] == 20


def test_draws_are_a_function_of_the_seed_and_leave_the_global_state() -> None:
    images, labels = canaries.digits(20)
    target = Target(slr.add_noise(canaries.trained(), 0.8))
    before = torch.get_rng_state()
    first, again, other = (score(target, images, labels, 8, seed).single for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_are_no_class_are_refused(label: int) -> None:
    images, labels = canaries.digits(4)
    labels[2] = label
    with pytest.raises(ValueError, match=f"from 0 to 9, for the 10 logits of an image, got {label}; "):
        score(Target(canaries.trained()), images, labels)


def test_no_images_have_no_scores() -> None:
    images, labels = canaries.digits(4)
    assert score(Target(canaries.trained()), images[:0], labels[:0]).right.shape == (0,)
