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

from .helpers import CLASSES, FEATURES, RESETS, Net, assert_same, build, data, gradients, inputs_for, run

NOISES = ["membrane", "escape"]
X, Y = data()


def credited(noise: Any = "escape", init_hidden: bool = True, **options: Any) -> Net:
    net = Net(init_hidden, noise=noise)
    slr.use_gradient(net, **options)
    return net


def backward(net: Net, seed: int = 0, x: Tensor = X) -> dict[str, Tensor]:
    """Gradients of the mean loss alone."""
    net.zero_grad()
    torch.manual_seed(seed)
    net.loss(x, Y[: len(x)]).mean().backward()
    return gradients(net)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", [name for name in CLASSES if "LSTM" not in name])
def test_every_parameter_of_a_neuron_and_its_input_get_a_gradient(name: str, noise: str, reset: str) -> None:
    neuron = build(slr, name, learn=True, noise=noise, reset_mechanism=reset)
    slr.use_gradient(neuron)
    x = inputs_for(name).requires_grad_()
    torch.manual_seed(0)
    sum(spikes.sum() for spikes, *_ in run(neuron, x)).backward()
    learned = dict(neuron.named_parameters()) | {"input": x}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learned.values())


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


@pytest.mark.parametrize("noise", NOISES)
def test_the_mean_of_two_spikes_is_right_with_the_reset_between_them(noise: str) -> None:
    """E[s1 − 2 s2] by enumeration of the two trains; membrane noise by a pathwise integral would be the same."""
    rows, sigma = 200_000, 0.5
    kind = {"escape": slr.EscapeNoise(sigma), "membrane": slr.MembraneNoise(sigma)}[noise]
    neuron = slr.Leaky(beta=0.0, threshold=1.0, noise=kind)
    slr.use_gradient(neuron, discount=1.0)
    x = torch.tensor(0.8, requires_grad=True)
    torch.manual_seed(0)
    first, mem = neuron(x.expand(rows, 1), torch.zeros(rows, 1))
    second, _ = neuron(x.expand(rows, 1), mem)
    (first - 2 * second).mean().backward()

    def fires(mean: Tensor) -> Tensor:
        z = (mean - 1) / sigma
        return torch.sigmoid(z) if noise == "escape" else torch.special.ndtr(z)

    current = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    p = fires(current)
    expected = p - 2 * (p * fires(current - 1) + (1 - p) * fires(current))
    expected.backward()
    assert abs(x.grad.item() - current.grad.item()) < 0.02


@pytest.mark.parametrize("noise", NOISES)
def test_states_may_be_held_by_the_neuron_or_by_the_user(noise: str) -> None:
    assert_same(backward(credited(noise)), backward(credited(noise, init_hidden=False)))


@pytest.mark.parametrize("noise", NOISES)
def test_a_backward_pass_may_be_repeated(noise: str) -> None:
    net = credited(noise, control=0.5)
    once = backward(net)
    net.zero_grad()
    torch.manual_seed(0)
    loss = net.loss(X, Y).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(gradients(net), {name: 2 * value for name, value in once.items()}, rtol=1e-5, atol=1e-7)


def test_the_discount_is_about_later_time_steps_alone() -> None:
    def found(discount: float, steps: int) -> Tensor:
        return backward(credited(discount=discount, control=0.5), x=X[:, :steps])["fc1.weight"]

    assert torch.equal(found(0.0, 1), found(1.0, 1))
    assert not torch.allclose(found(0.0, 2), found(1.0, 2))


class TestControl:
    """The control variate λ."""

    def test_the_first_presentation_has_half_and_later_ones_what_earlier_ones_fit(self) -> None:
        net = credited()
        assert_same(backward(net), backward(credited(control=0.5)))
        fitted = fit(net)
        assert all(0 < value < 1 and value != 0.5 for value in fitted.values())
        fixed = credited()
        for name, value in fitted.items():
            fixed.get_submodule(name).sampler = CounterfactualCredit(control=value)
        # Whatever noise the next one has.
        for seed in (1, 2):
            again = credited()
            backward(again)
            assert_same(backward(again, seed), backward(fixed, seed))
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
        net = credited()
        backward(net)
        loaded = credited()
        loaded.load_state_dict(net.state_dict())
        copied = copy.deepcopy(net)
        expected = backward(net, 1)
        assert_same(expected, backward(loaded, 1))
        assert_same(expected, backward(copied, 1))
        assert not torch.equal(expected["fc1.weight"], backward(credited(), 1)["fc1.weight"])

    def test_a_gradient_that_overflows_leaves_it_as_it_was(self) -> None:
        net = credited()
        backward(net)
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
    net = credited(control=0.5)
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    (whole,) = torch.autograd.grad(net.loss(x, Y).sum(), x)
    assert whole.any()
    torch.manual_seed(0)
    (first,) = torch.autograd.grad(net.loss(x, Y)[0], x)
    torch.testing.assert_close(first[0], whole[0])
    assert not first[1:].any()


def test_states_of_the_first_step_may_be_learned() -> None:
    neuron = slr.Synaptic(alpha=0.5, beta=0.9, threshold=0.5, noise=True)
    slr.use_gradient(neuron)
    starts = [torch.full((FEATURES,), 0.3, requires_grad=True) for _ in range(2)]
    syn, mem = (start.expand(5, FEATURES) for start in starts)
    for t in range(3):
        spikes, syn, mem = neuron(X[:, t], syn, mem)
    spikes.sum().backward()
    assert all(start.grad.all() for start in starts)


@pytest.mark.parametrize("noise", NOISES)
def test_membrane_potentials_may_be_read(noise: str) -> None:
    """E[mem] after a reset by subtraction: of the current, and of minus the threshold where the spike was."""
    rows, sigma = 200_000, 0.5
    neuron = slr.Leaky(beta=0.8, threshold=1.0, noise=slr.EscapeNoise(sigma) if noise == "escape" else True)
    slr.use_gradient(neuron, discount=1.0)
    x = torch.tensor(0.8, requires_grad=True)
    torch.manual_seed(0)
    _, mem = neuron(x.expand(rows, 1), torch.zeros(rows, 1))
    _, mem = neuron(x.expand(rows, 1), mem)
    mem.mean().backward()
    z = torch.tensor(-0.2 / sigma)
    density = torch.sigmoid(z) * torch.sigmoid(-z) if noise == "escape" else (-z * z / 2).exp() / (2 * torch.pi) ** 0.5
    # Reset subtracts the threshold of one, which noise does not change.
    assert abs(x.grad.item() - (1.8 - density.item() / sigma)) < 0.03


@pytest.mark.filterwarnings("error")
def test_layers_may_be_frozen_and_set_free() -> None:
    net = credited(control=0.5)
    net.fc1.requires_grad_(False)
    frozen = backward(net)
    assert "fc1.weight" not in frozen
    net.fc1.requires_grad_(True)
    free = backward(net)
    assert free.keys() == dict(net.named_parameters()).keys()
    assert_same(frozen, {name: free[name] for name in frozen}, rtol=1e-4, atol=1e-6)


def test_noise_that_layers_share_gets_the_sum() -> None:
    shared, apart = backward(credited(slr.EscapeNoise(0.5), control=0.5)), backward(credited(control=0.5))
    total = apart["lif1.noise.log_sigma"] + apart["lif2.noise.log_sigma"]
    torch.testing.assert_close(shared["lif1.noise.log_sigma"], total)
