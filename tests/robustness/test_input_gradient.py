from __future__ import annotations

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr.robustness import Target, likelihood_ratio_input_gradient

from .networks import SmallNet, images, predictions


class OneSpike(nn.Module):
    """Logits (0, s) of the only spike of one neuron, whose current is w · x."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, -2.0]]))
        noise = slr.EscapeNoise(distribution="gaussian") if kind == "escape" else kind
        self.lif = slr.Leaky(beta=0.9, threshold=0.2, init_hidden=True, noise=noise)

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        spikes = self.lif(self.fc(x.flatten(1)))
        return torch.cat([torch.zeros_like(spikes), spikes], 1)


@pytest.mark.parametrize("kind", ["membrane", "escape"])
def test_likelihood_ratio_is_the_derivative_of_the_expected_loss(kind: str) -> None:
    """E[ℒ] = P ℒ(1) + (1 − P) ℒ(0) with P = Φ((w·x − 0.2) / σ), for which the derivative is known."""
    net = OneSpike(kind)
    x, y = torch.tensor([0.5, 0.1, 0.2, 0.3]).view(2, 1, 1, 2), torch.tensor([0, 1])
    gradient = likelihood_ratio_input_gradient(Target(net), x, y, copies=4000, chunk=1000)
    leaf = x.clone().requires_grad_()
    fires = Normal(0.0, 0.5).cdf(net.fc(leaf.flatten(1)) - 0.2).squeeze(1)
    losses = [F.cross_entropy(torch.tensor([[0.0, spike]] * 2), y, reduction="none") for spike in (0.0, 1.0)]
    expected = torch.autograd.grad((fires * losses[1] + (1 - fires) * losses[0]).sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("gradient", ["surrogate", "counterfactual"])
def test_the_network_is_left_alone(gradient: str) -> None:
    net, x = slr.add_noise(SmallNet(), sigma=0.5).train(), images()
    slr.use_gradient(net, gradient)
    sampler, before = net.lif.sampler, {name: value.clone() for name, value in net.state_dict().items()}
    net.fc.weight.requires_grad_(False)
    learned = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    likelihood_ratio_input_gradient(Target(net), x, predictions(net, x), copies=4)
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == learned
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training
    assert not net.lif.mem.any()
    assert net.lif.sampler is sampler
    # λ of a training included.
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert net.lif.control.steps == 0


def test_a_gradient_that_was_chosen_for_training_does_not_matter() -> None:
    net, x = slr.add_noise(SmallNet(), sigma=0.5), images()
    y = predictions(net, x)
    plain, other = (likelihood_ratio_input_gradient(Target(net), x, y, copies=8, seed=seed) for seed in (0, 1))
    assert not torch.equal(plain, other)
    slr.use_gradient(net, "counterfactual", discount=0.0, control=1.0)
    assert torch.equal(likelihood_ratio_input_gradient(Target(net), x, y, copies=8), plain)


@pytest.mark.parametrize("chunk", [2, 5])
def test_draws_in_chunks_are_averaged(chunk: int) -> None:
    """Of a loss that is linear in the image, which no spike has a part in, whatever the draws."""
    net, x = slr.add_noise(SmallNet(), sigma=0.5), images()

    def linear(net: SmallNet, x: Tensor) -> Tensor:
        return 0 * net(x)[:, :1] + x.flatten(1)[:, :3] * torch.tensor([1.0, 2.0, 4.0])

    y = torch.zeros(6, dtype=torch.long)
    gradient = likelihood_ratio_input_gradient(Target(net, forward=linear), x, y, 5, "margin", chunk=chunk)
    expected = torch.zeros_like(x).flatten(1)
    best = (x.flatten(1)[:, 1:3] * torch.tensor([2.0, 4.0])).argmax(1) + 1
    expected[torch.arange(6), best] = 2.0**best
    expected[:, 0] = -1
    torch.testing.assert_close(gradient.flatten(1), expected)


def test_reads_records_as_the_view_does() -> None:
    net, x = slr.add_noise(SmallNet(), sigma=0.5), images()

    def record(net: SmallNet, x: Tensor) -> Tensor:
        return torch.stack([net.out(net.lif(net.fc(2 * x.flatten(1)))) for _ in range(5)])

    y = predictions(net, x)
    plain = likelihood_ratio_input_gradient(Target(net), x, y, copies=8)
    recorded = likelihood_ratio_input_gradient(Target(net, forward=record, scale=5.0), x, y, copies=8)
    torch.testing.assert_close(recorded, plain)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = slr.SLSTM(36, 36, init_hidden=True, noise=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.flatten(1))


class Cut(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (snn.Leaky(beta=0.9), "needs noisy neurons"),
        (Cell(), r"cell \(SLSTM\): an LSTM cell mixes"),
        (slr.add_noise(SmallNet(inhibition=True), kind="membrane"), r"lif \(Leaky\): inhibition lets only one"),
        (nn.Sequential(nn.Flatten(), snn.Leaky(0.9, init_hidden=True), slr.Leaky(0.9, init_hidden=True, noise=True)),
         r"the spikes of 1 \(Leaky\) have no noise, but feed 2"),
        (slr.add_noise(Cut()), "no derivative by the images"),
    ],
    ids=["no noise", "LSTM", "inhibition", "no noise in front", "cut"],
)  # fmt: skip
def test_what_has_no_such_gradient_is_refused_by_name(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood_ratio_input_gradient(Target(net), images(), torch.zeros(6, dtype=torch.long), copies=2)


def test_pooled_spikes_are_differentiated_as_what_a_flip_does() -> None:
    """Two neurons, of which one firing is enough: P = 1 − (1 − P₁)(1 − P₂)."""
    lif = slr.Leaky(beta=0.9, threshold=0.2, init_hidden=True, noise="escape")

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        fires = F.max_pool1d(net(x.flatten(1)), 2)
        return torch.cat([torch.zeros_like(fires), fires], 1)

    x, y = torch.tensor([[[[0.3, 0.1]]]]), torch.tensor([0])
    gradient = likelihood_ratio_input_gradient(Target(lif, forward), x, y, 8000, "margin", chunk=2000)
    leaf = x.clone().requires_grad_()
    chances = torch.sigmoid((leaf - 0.2) / 0.5)
    (expected,) = torch.autograd.grad(1 - (1 - chances).prod(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.01)
