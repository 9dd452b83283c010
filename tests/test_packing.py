from __future__ import annotations

import pytest
import torch
from torch import nn

from snntorch_lr.estimators.packing import PackedSpikes, pack, unpack


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("shape", [(1,), (8,), (3, 7), (5, 2, 3, 3), (0, 4)])
def test_unpacks_what_was_packed_in_an_eighth_of_a_byte_each(shape: tuple[int, ...], device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spikes = (torch.rand(shape, device=device) > 0.5).double()
    packed = pack(spikes)
    assert packed.numel() * packed.element_size() == -(-spikes.numel() // 8)
    assert torch.equal(unpack(packed, spikes.shape, spikes.dtype), spikes)


def test_a_graph_saves_announced_spikes_as_bits_and_has_the_same_gradient() -> None:
    linear = nn.Linear(64, 3)
    spikes, other = (torch.rand(2, 10, 64) > 0.5).float()
    hooks = PackedSpikes(0)
    hooks.announce(spikes)
    with hooks:
        out = linear(spikes).square().sum() + linear(other).sum() + linear(spikes[:, :].flatten(1)).sum()
    assert [packed.numel() for packed in hooks._packed.values()] == [80]
    out.backward()
    expected = linear.weight.grad.clone()
    linear.zero_grad()
    (linear(spikes).square().sum() + linear(other).sum() + linear(spikes).sum()).backward()
    torch.testing.assert_close(expected, linear.weight.grad)


def test_memory_that_is_used_again_is_not_taken_for_spikes() -> None:
    hooks, linear = PackedSpikes(), nn.Linear(4, 2)
    spikes = torch.ones(3, 4)
    hooks.announce(spikes)
    address = spikes.data_ptr()
    del spikes
    for _ in range(50):
        again = torch.full((3, 4), 0.5)
        if again.data_ptr() == address:
            break
    with hooks:
        out = linear(again).sum()
    out.backward()
    torch.testing.assert_close(linear.weight.grad, torch.full((2, 4), 1.5))


def test_spikes_that_were_changed_in_place_are_saved_as_they_are() -> None:
    hooks, linear = PackedSpikes(0), nn.Linear(4, 2)
    spikes = torch.ones(3, 4)
    hooks.announce(spikes)
    with hooks:
        before = linear(spikes).sum()
        # As dropout does with inplace=True.
        after = linear(spikes.mul_(0.5)).sum()
    (before + after).backward()
    torch.testing.assert_close(linear.weight.grad, torch.full((2, 4), 4.5))


def test_few_spikes_are_saved_as_they_are_as_long_as_a_graph_holds_them() -> None:
    hooks, linear = PackedSpikes(most_bytes=100), nn.Linear(4, 2)
    outputs = []
    with hooks:
        for _ in range(3):
            spikes = torch.ones(3, 4)
            hooks.announce(spikes)
            outputs.append((spikes, linear(spikes).sum()))
    # Of 48 bytes each, two fit.
    assert len(hooks._packed) == 1
    sum(output for _, output in outputs).backward()
    torch.testing.assert_close(linear.weight.grad, torch.full((2, 4), 9.0))
    outputs.clear()
    with hooks:
        again = linear(spikes).sum()
        spikes.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after it had been"):
        again.backward()
