from __future__ import annotations

import pytest
import snntorch as snn
import torch

import snntorch_lr as slr
from snntorch_lr.robustness.rate_gradient import RateGradient, bptr, rga
from snntorch_lr.robustness.surrogates import make_surrogate


@pytest.mark.parametrize(("threshold", "slopes"), [(1.0, [0.0, 0.2, 0.96 / 1.8, 0.96 / 1.8, 0.0]),
                                                    (2.0, [0.0, 0.1, 0.1, 0.48 / 1.8, 0.48 / 1.8])])  # fmt: skip
def test_rga_by_hand(threshold: float, slopes: list[float]) -> None:
    """τ = 0.8, γ = 0.2: γ below 1 − τ = 0.2, (1 − .2 + .16) / 1.8 up to 2, in units of the threshold."""
    neuron = snn.Leaky(beta=0.8, threshold=threshold)
    current = torch.tensor([-0.1, 0.1, 0.3, 1.9, 2.1], dtype=torch.float64)
    torch.testing.assert_close(rga(neuron, current, current), torch.tensor(slopes, dtype=torch.float64))


def test_rga_integrates_to_one() -> None:
    current = torch.linspace(-1, 3, 400001, dtype=torch.float64)
    for beta in (0.5, 0.9, 1.0):
        slope = rga(snn.Leaky(beta=beta), current, current)
        assert torch.trapezoid(slope, current).item() == pytest.approx(1, abs=1e-4)


def test_bptr_by_hand() -> None:
    rate = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(bptr(snn.Leaky(beta=0.9), rate, rate), torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize(("name", "slope"), [("rga", [0.2, (1 - 0.2 + 0.18) / 1.9, 0.0]), ("bptr", [0.0, 1.0, 1.0])])
def test_gradient_of_spikes_goes_to_the_input_of_the_same_step(hidden: bool, name: str, slope: list[float]) -> None:
    neuron = snn.Leaky(beta=0.9, init_hidden=hidden)
    # Means .08 (never fires), 1, 3 over two steps.
    x = torch.tensor([[0.04, 0.0, 3.5], [0.12, 2.0, 2.5]], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mem, total = neuron.reset_mem(), torch.zeros(())
    with make_surrogate(name).applied_to(neuron):
        for current, weight in zip(x, weights, strict=True):
            if hidden:
                spikes = neuron(current)
            else:
                spikes, mem = neuron(current, mem)
            total = total + (weight * spikes).sum()
    (gradient,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(gradient, weights * torch.tensor(slope))


def test_a_membrane_that_is_read_keeps_its_gradient() -> None:
    neuron = snn.Leaky(beta=0.5, init_hidden=True, output=True, reset_mechanism="none")
    x = torch.ones(2, 1, requires_grad=True)
    with RateGradient(rga).applied_to(neuron):
        for current in x:
            _, mem = neuron(current)
    assert torch.autograd.grad(mem.sum(), x)[0].flatten().tolist() == [0.5, 1.0]
    slr.reset(neuron)
    assert not neuron._forward_hooks
