from __future__ import annotations

import pytest
import snntorch as snn
import torch
import torchattacks
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import network
from snntorch_lr.robustness import AttackableView
from snntorch_lr.robustness.surrogates import SpikePooling


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 12)
        self.lif = snn.Leaky(beta=0.9, init_hidden=True)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(12, 3)

    def record(self, images: Tensor) -> Tensor:
        return torch.stack([self.lif(self.fc(3 * images.flatten(1))) for _ in range(5)])

    def forward(self, images: Tensor) -> Tensor:
        # No reset here: the view's job.
        return self.out(self.dropout(self.record(images).mean(0)))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_state_is_reset_before_and_after(images: Tensor) -> None:
    net = Net()
    view = AttackableView(net)
    first = view(images)
    torch.testing.assert_close(view(images), first, rtol=0, atol=0)
    assert not net.lif.mem.any()


def test_draws_are_fresh_independent_and_reproducible(images: Tensor) -> None:
    net = slr.add_noise(Net())
    first, second = AttackableView(net, draws=4, seed=1), AttackableView(net, draws=4, seed=1)
    a = first(images)
    torch.manual_seed(0)  # what attack libraries do to the global generator is no matter
    torch.testing.assert_close(second(images), a)
    assert not torch.equal(first(images), a)


def test_averages_over_the_draws(images: Tensor) -> None:
    net = slr.add_noise(Net())
    spread = [torch.stack([view(images).detach() for _ in range(200)]).std(0).mean() for view in (
        AttackableView(net, draws=1), AttackableView(net, draws=16))]  # fmt: skip
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.25)


def test_without_noise_it_is_deterministic_even_in_training_mode(images: Tensor) -> None:
    view = AttackableView(slr.add_noise(Net()).train(), noise=False, draws=8)
    torch.testing.assert_close(view(images), view(images), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [True, False])
def test_network_keeps_its_mode(images: Tensor, mode: bool) -> None:
    net = slr.add_noise(Net()).train(mode)
    net.dropout.train(not mode)
    view = AttackableView(net)
    adversarial = torchattacks.PGD(view, eps=0.1, steps=2)(images, LABELS)
    assert 0 < (adversarial - images).abs().max() <= 0.1 + 1e-6
    with pytest.raises(ValueError, match="shape"):
        AttackableView(net, forward=lambda net, x: x)(images)
    assert net.training is mode
    assert net.dropout.training is not mode
    assert net.lif.noise.forced is None


@pytest.mark.parametrize("surrogate", ["training", "gaussian"])
def test_a_network_that_trains_by_the_likelihood_ratio_is_attacked_through_surrogates(
    images: Tensor, surrogate: str
) -> None:
    gradients = []
    for gradient in ("surrogate", "counterfactual"):
        net = slr.add_noise(Net())
        slr.use_gradient(net, gradient)
        sampler, x = net.lif.sampler, images.clone().requires_grad_()
        AttackableView(net, draws=3, surrogate=surrogate)(x).square().sum().backward()
        gradients.append(x.grad)
        assert net.lif.sampler is sampler
        assert (sampler is None) == (gradient == "surrogate")
        assert net.lif.control.steps == 0
    assert torch.equal(*gradients)
    assert (gradients[0].flatten(1).norm(dim=1) > 0).all()


def test_the_gradient_of_pooled_spikes_reaches_all_that_could_have_fired() -> None:
    lif = snn.Leaky(beta=0.9, threshold=0.8, init_hidden=True)
    net = nn.Sequential(nn.Flatten(), lif, nn.MaxPool1d(2))
    x = (0.9 * torch.tensor([[[[0.5, 0.5, 0.4, 0.5]]], [[[1.0, 1.0, 0.0, 0.0]]]])).requires_grad_()
    logits = AttackableView(net)(x)
    assert logits.tolist() == [[0, 0], [1, 0]]
    logits.sum().backward()
    silent, (both_fire, none_fires) = x.grad[0].flatten(), x.grad[1].view(2, 2)
    assert (silent > 0).all()
    assert (none_fires > 0).all()
    # One of two spikes may go without a difference.
    assert (both_fire < 1e-4).all()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Functions of torch that were looked at, in case that they pool spikes."""
    functions: list[object] = []
    watch = SpikePooling.__torch_function__

    def record(self: SpikePooling, func: object, *args: object) -> object:
        functions.append(func)
        return watch(self, func, *args)

    monkeypatch.setattr(SpikePooling, "__torch_function__", record)
    return functions


@pytest.mark.parametrize("pooled", ["spikes", "currents", "nothing"])
def test_a_view_looks_for_pooled_spikes_where_there_are_some(pooled: str, watched: list[object]) -> None:
    lif, pool = snn.Leaky(beta=0.9, threshold=0.8, init_hidden=True), nn.MaxPool1d(2)
    layers = {"spikes": [lif, pool], "currents": [pool, lif], "nothing": [lif]}[pooled]
    view = AttackableView(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), *layers))
    torch.nn.init.eye_(view.net[1].weight)
    torch.nn.init.zeros_(view.net[1].bias)
    counts, gradients = [], []
    # The neurons are silent in the first pass.
    with torch.no_grad():
        view(torch.full((1, 1, 1, 4), 0.9))
    assert not watched, "a pass without a gradient says nothing of later ones"
    for level in (0.1, 0.9):
        x = (level * torch.tensor([[[[0.7, 0.8, 0.9, 1.0]]]])).requires_grad_()
        watched.clear()
        gradients += torch.autograd.grad(view(x).sum(), x)
        counts.append(len(watched))
    assert counts[0] > 0
    assert (counts[1] > 0) == (pooled == "spikes")
    fresh = AttackableView(view.net)
    assert torch.equal(torch.autograd.grad(fresh(x).sum(), x)[0], gradients[1])


def test_neurons_are_searched_for_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[nn.Module] = []
    visit = network._visit

    def record(name: str, value: object, seen: set[int]) -> object:
        if not seen:
            searched.append(value)
        return visit(name, value, seen)

    monkeypatch.setattr(network, "_visit", record)
    net = slr.add_noise(Net())
    view = AttackableView(net)
    searched.clear()
    view(images)
    assert searched == [net]
    with network.searched_once(net):
        view(images)
        view(images)
    assert searched == [net] * 2
    net.late = snn.Leaky(beta=0.9)
    assert [name for name, _ in network.spiking_neurons(net)] == ["lif", "late"]


def test_a_gradient_that_is_cut_is_zero_and_no_error(images: Tensor) -> None:
    x = images.clone().requires_grad_()
    cut = AttackableView(Net(), forward=lambda net, x: net.out(net.record(x).detach().mean(0)))
    assert not torch.autograd.grad(cut(x).sum(), x)[0].any()


def test_rates_are_scaled_to_logits(images: Tensor) -> None:
    view = AttackableView(Net(), forward=lambda net, x: net.record(x), scale=7.0)
    slr.reset(view.net)
    torch.testing.assert_close(view(images), 7 * view.net.record(images).mean(0))


@pytest.mark.parametrize("precision", [torch.float64, torch.float16])
def test_images_may_have_another_precision_than_the_network(images: Tensor, precision: torch.dtype) -> None:
    view, given = AttackableView(Net()), images.to(precision)
    x = given.clone().requires_grad_()
    torch.testing.assert_close(view(x), view(given.float()), rtol=0, atol=0)
    assert view(x).dtype == torch.float32
    (gradient,) = torch.autograd.grad(view(x).sum(), x)
    assert gradient.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(images: Tensor, value: float) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).index_fill(0, torch.tensor([2]), value)

    with pytest.raises(ValueError, match="NaN or infinite logits for 1 of 6 images"):
        AttackableView(Net(), forward)(images)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_refuses_images_out_of_range(images: Tensor, bad: float) -> None:
    images[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        AttackableView(Net())(images)
