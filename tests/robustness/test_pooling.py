"""Max-pooling of spikes is differentiated as what a flip of one spike does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snntorch_lr.robustness.surrogates import SpikePooling

POOLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "1d": ((2, 3, 9), lambda x: F.max_pool1d(x, 2)),
    "2d": ((2, 3, 6, 7), nn.MaxPool2d(2)),
    "unbatched": ((3, 6, 7), nn.MaxPool2d(2)),
    "overlapping": ((2, 2, 6, 7), lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1)),
    "beyond the border": ((2, 2, 6, 7), nn.MaxPool2d(3, stride=2, ceil_mode=True)),
    "overlapping inside": ((2, 2, 6, 7), nn.MaxPool2d(3, stride=2)),
    "all at once": ((1, 1, 9), nn.MaxPool1d(9)),
    "nothing": ((2, 2, 3, 3), nn.MaxPool2d(1)),
    "dilated": ((2, 2, 6, 7), nn.MaxPool2d((2, 3), dilation=(1, 2))),
    "torch's": ((2, 2, 6, 7), lambda x: torch.max_pool2d(x, 2)),
    "3d": ((1, 2, 4, 4, 4), nn.MaxPool3d(2)),
}


def spikes(shape: tuple[int, ...], height: float = 1.0) -> Tensor:
    chance = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((chance < 0.25).double() * height).requires_grad_()


@pytest.mark.parametrize("height", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", POOLS)
def test_derivative_is_what_a_flip_does(kind: str, height: float) -> None:
    shape, pool = POOLS[kind]
    x = spikes(shape, height)
    with SpikePooling():
        pooled = pool(x)
    assert torch.equal(pooled, pool(x))
    weights = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * pooled).sum(), x)
    expected = torch.zeros(x.numel(), dtype=torch.float64)
    for index in range(x.numel()):
        flipped = []
        for value in (height, 0.0):
            with torch.no_grad():
                changed = x.clone().view(-1)
                changed[index] = value
                flipped.append(float((weights * pool(changed.view(shape))).sum()))
        expected[index] = (flipped[0] - flipped[1]) / height
    torch.testing.assert_close(gradient.view(-1), expected, rtol=0, atol=1e-4)


def test_windows_that_do_not_fit_are_refused_as_ever() -> None:
    with SpikePooling(), pytest.raises(RuntimeError, match="too small"):
        F.max_pool2d(spikes((1, 2, 3, 3)), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivative_in_half_precision_is_finite_and_the_same(dtype: torch.dtype) -> None:
    gradients = []
    for precision in (torch.float32, dtype):
        x = spikes((2, 3, 6, 6)).detach().to(precision).requires_grad_()
        with SpikePooling():
            pooled = F.max_pool2d(x, 2)
        assert pooled.dtype == precision
        gradients += [gradient.float() for gradient in torch.autograd.grad(pooled.sum(), x)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-2)


@pytest.mark.parametrize("silent", [False, True])
def test_currents_are_pooled_as_ever(silent: bool) -> None:
    x = (torch.rand(2, 3, 6, 6) * (not silent)).requires_grad_()
    with SpikePooling():
        pooled = F.max_pool2d(x, 2)
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveMaxPool2d(2), lambda x: F.max_pool2d(x, 2, return_indices=True)[0]], ids=["adaptive", "indices"]
)
def test_pooling_whose_windows_are_not_known_is_warned_of_for_spikes_only(
    pool: Callable[[Tensor], Any], recwarn: pytest.WarningsRecorder
) -> None:
    with SpikePooling():
        pool(torch.rand(1, 1, 4, 4, requires_grad=True))
    assert not recwarn
    x = spikes((1, 1, 4, 4))
    with SpikePooling(), pytest.warns(UserWarning, match="hides the gradient from attacks"):
        gradients = torch.autograd.grad(pool(x).sum(), x)
    assert torch.equal(*gradients, *torch.autograd.grad(pool(x).sum(), x))
