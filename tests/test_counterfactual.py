"""Counterfactual credit as the backward pass of a neuron, in any loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr.gradients import CounterfactualCredit

from .helpers import (
    Net,
    assert_same,
    backward,
    credited,
    data,
    every_path,
)

X, Y = data()


def of_loss(net: Net, seed: int = 0, x: Tensor = X) -> dict[str, Tensor]:
    """Gradients of the mean loss alone."""
    return backward(net, lambda: net.loss(x, Y[: len(x)]).mean(), seed=seed)


def fitting(noise: str = "escape") -> Net:
    return credited(noise, control=None)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "logistic"])
@pytest.mark.parametrize("noise", [slr.MembraneNoise, slr.EscapeNoise])
def test_of_one_spike_the_gradient_is_that_of_its_probability_where_lambda_is_one(
    noise: Any, distribution: str
) -> None:
    if distribution not in noise.offered:
        pytest.skip("no such noise")
    neuron = slr.Leaky(
        beta=0.9, threshold=0.4, learn_threshold=True, noise=noise(torch.tensor([0.3, 0.8]), distribution=distribution)
    )
    slr.use_gradient(neuron, control=1.0)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    learned = [x, neuron.threshold, neuron.noise.log_sigma]
    spikes, _ = neuron(x, torch.zeros(6, 2))
    found = torch.autograd.grad((spikes * torch.arange(12.0).view(6, 2)).sum(), learned)
    leaf, threshold, log_sigma = (value.detach().requires_grad_() for value in learned)
    standard = {
        "gaussian": torch.special.ndtr,
        "laplace": lambda z: torch.where(z > 0, 1 - (-z.abs()).exp() / 2, (-z.abs()).exp() / 2),
        "logistic": torch.sigmoid,
    }
    p = standard[distribution]((leaf - threshold) / log_sigma.exp())
    expected = torch.autograd.grad((p * torch.arange(12.0).view(6, 2)).sum(), [leaf, threshold, log_sigma])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_discount_is_about_later_time_steps_alone() -> None:
    def found(discount: float, steps: int) -> Tensor:
        return of_loss(credited(discount=discount), x=X[:, :steps])["fc1.weight"]

    assert torch.equal(found(0.0, 1), found(1.0, 1))
    assert not torch.allclose(found(0.0, 2), found(1.0, 2))


class TestControl:
    """The control variate λ."""

    @every_path
    def test_the_first_presentation_has_half_and_later_ones_what_earlier_ones_fit(self, noise: str) -> None:
        net = fitting(noise)
        assert_same(of_loss(net), of_loss(credited(noise, control=0.5)))
        fitted = fit(net)
        assert all(0 < value < 1 and value != 0.5 for value in fitted.values())
        fixed = credited(noise)
        for name, value in fitted.items():
            fixed.get_submodule(name).sampler = CounterfactualCredit(control=value)
        # Whatever noise the next one has.
        for seed in (1, 2):
            again = fitting(noise)
            of_loss(again)
            assert_same(of_loss(again, seed), of_loss(fixed, seed))
            assert fit(again) != fitted

    def test_the_fit_is_where_the_variance_is_least(self) -> None:
        x, y = 2 * torch.rand(20, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3

        def variance(control: float | None) -> float:
            torch.manual_seed(0)
            lif = slr.Leaky(beta=0.9, noise="escape", init_hidden=True)
            net = nn.Sequential(nn.Linear(8, 40), lif, nn.Linear(40, 3))
            slr.use_gradient(net, control=control)
            calls = []
            for _ in range(60):
                net.zero_grad()
                F.cross_entropy(slr.rollout(net, x, num_steps=6).mean(0), y).backward()
                calls.append(net[0].weight.grad.clone())
            return float(torch.stack(calls[10:]).var(0).sum())

        swept = [variance(control) for control in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert variance(None) < 1.3 * min(swept) < max(swept) / 1.5

    def test_is_saved_with_the_network_and_copied_with_it(self) -> None:
        net = fitting()
        of_loss(net)
        loaded = fitting()
        loaded.load_state_dict(net.state_dict())
        copied = copy.deepcopy(net)
        expected = of_loss(net, 1)
        assert_same(expected, of_loss(loaded, 1))
        assert_same(expected, of_loss(copied, 1))
        assert not torch.equal(expected["fc1.weight"], of_loss(fitting(), 1)["fc1.weight"])

    def test_a_gradient_that_overflows_leaves_it_as_it_was(self) -> None:
        net = fitting()
        of_loss(net)
        before = fit(net)
        (net.loss(X, Y).mean() * torch.inf).backward()
        assert fit(net) == before


def fit(net: Net) -> dict[str, float]:
    """λ of the next presentation."""
    sums = {name.removesuffix(".noise.control"): v for name, v in net.state_dict().items() if name.endswith("control")}
    return {name: float(-product / square) for name, (product, square) in sums.items()}


def test_double_backward_is_refused_by_name() -> None:
    net = credited()
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no derivative of its own.*create_graph=True.*\"surrogate\""):
        torch.autograd.grad(net.loss(x, Y).sum(), x, create_graph=True)


def test_inputs_get_a_gradient_each_row_its_own() -> None:
    net = credited()
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    (whole,) = torch.autograd.grad(net.loss(x, Y).sum(), x)
    assert whole.any()
    torch.manual_seed(0)
    (first,) = torch.autograd.grad(net.loss(x, Y)[0], x)
    torch.testing.assert_close(first[0], whole[0])
    assert not first[1:].any()
