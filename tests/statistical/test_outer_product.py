"""The estimator equals the likelihood ratio written out by hand: noise times presynaptic activity, summed over time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

import snntorch_lr as slr
from snntorch_lr.philox import draw, new_key

BETA, SIGMA, STEPS, COPIES, BATCH = 0.8, 0.5, 5, 6, 4


def by_hand(
    current: list[Tensor], presynaptic: list[Tensor], noise: list[Tensor], readout: nn.Linear, labels: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Score-weighted noise at each step, and the mean loss, of one layer of leaky neurons with a linear readout."""
    mem = torch.zeros_like(noise[0])
    spikes = torch.zeros_like(mem)
    out = torch.zeros(())
    for t in range(STEPS):
        mem = BETA * mem + current[t] - spikes + SIGMA * noise[t]
        spikes = (mem > 1).to(mem.dtype)
        out = out + readout(spikes.flatten(1))
    losses = nn.functional.cross_entropy(out, labels, reduction="none").view(COPIES, BATCH)
    advantages = torch.stack(
        [losses[k] - torch.cat((losses[:k], losses[k + 1 :])).mean(0) for k in range(COPIES)]
    ).flatten()
    shape = (-1, *[1] * (mem.dim() - 1))
    return [advantages.view(shape) * noise[t] / SIGMA / losses.numel() for t in range(STEPS)], losses.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("convolution", [False, True], ids=["Linear", "Conv2d"])
def test_equals_explicit_rule(convolution: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = nn.Conv2d(2, 3, 3, padding=1) if convolution else nn.Linear(8, 5)
    shape = (STEPS, BATCH, 2, 4, 4) if convolution else (STEPS, BATCH, 8)
    lif = slr.Leaky(beta=BETA, noise=slr.MembraneNoise(SIGMA))
    readout = nn.Linear(48 if convolution else 5, 3)
    net = nn.ModuleList([block, lif, readout]).to(dtype)
    x = torch.rand(shape, dtype=dtype) * 3
    labels = torch.randint(0, 3, (BATCH,))

    def loss_fn(inputs: Tensor, targets: Tensor) -> Tensor:
        mem = lif.reset_mem()
        out = torch.zeros(())
        for step in inputs:
            spikes, mem = lif(block(step), mem)
            out = out + readout(spikes.flatten(1))
        return nn.functional.cross_entropy(out, targets, reduction="none")

    loss = slr.Vanilla(net, copies=COPIES, seed=7).backward(loss_fn, x, labels)

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        presynaptic = [step.repeat(COPIES, *[1] * (step.dim() - 1)) for step in x]
        current = [block(p) for p in presynaptic]
        noise = [draw(slr.MembraneNoise(), c.shape, dtype, c.device, new_key(generator)) for c in current]
        signals, expected_loss = by_hand(current, presynaptic, noise, readout, labels.repeat(COPIES))
        if convolution:
            expected = sum(
                conv2d_weight(p, block.weight.shape, s, padding=1) for p, s in zip(presynaptic, signals, strict=True)
            )
        else:
            expected = sum(s.T @ p for p, s in zip(presynaptic, signals, strict=True))
    torch.testing.assert_close(loss, expected_loss)
    # In single precision what a step keeps is rounded to two bytes.
    error = float((block.weight.grad - expected).norm() / expected.norm())
    assert error < (1e-5 if dtype == torch.float64 else 1e-2)
