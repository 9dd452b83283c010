from __future__ import annotations

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr.robustness import Target, likelihood_ratio_input_gradient, surrogate_input_gradient

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


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), 0).item()


@pytest.mark.parametrize("kind", ["membrane", "escape"])
def test_likelihood_ratio_is_the_derivative_of_the_expected_loss(kind: str) -> None:
    """E[ℒ] = P ℒ(1) + (1 − P) ℒ(0) with P = Φ((w·x − 0.2) / σ), for which the derivative is known."""
    net = OneSpike(kind)
    x, y = torch.tensor([0.5, 0.1, 0.2, 0.3]).view(2, 1, 1, 2), torch.tensor([0, 1])
    found = likelihood_ratio_input_gradient(Target(net), x, y, copies=4000, chunk=1000)
    leaf = x.clone().requires_grad_()
    fires = Normal(0.0, 0.5).cdf(net.fc(leaf.flatten(1)) - 0.2).squeeze(1)
    losses = [F.cross_entropy(torch.tensor([[0.0, spike]] * 2), y, reduction="none") for spike in (0.0, 1.0)]
    expected = torch.autograd.grad((fires * losses[1] + (1 - fires) * losses[0]).sum(), leaf)[0]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.01)


def test_two_seeds_agree_with_each_other_and_with_the_matched_surrogate() -> None:
    net, x = slr.add_noise(SmallNet(), sigma=0.5), images()
    target, y = Target(net), predictions(net, x)
    first, second = (likelihood_ratio_input_gradient(target, x, y, copies=1024, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    through = surrogate_input_gradient(target, x, y, "gaussian", draws=512)
    assert cosine(first, second) > 0.7
    assert cosine(first + second, through) > 0.8


def test_weights_and_modes_are_left_alone() -> None:
    net, x = slr.add_noise(SmallNet(), sigma=0.5).train(), images()
    net.fc.weight.requires_grad_(False)
    learned = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    likelihood_ratio_input_gradient(Target(net), x, predictions(net, x), copies=4)
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == learned
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training
    assert not net.lif.mem.any()


def test_reads_records_as_the_view_does() -> None:
    net, x = slr.add_noise(SmallNet(), sigma=0.5), images()

    def record(net: SmallNet, x: Tensor) -> Tensor:
        return torch.stack([net.out(net.lif(net.fc(2 * x.flatten(1)))) for _ in range(5)])

    y = predictions(net, x)
    plain = likelihood_ratio_input_gradient(Target(net), x, y, copies=8)
    recorded = likelihood_ratio_input_gradient(Target(net, forward=record, scale=5.0), x, y, copies=8)
    torch.testing.assert_close(recorded, plain)


def test_surrogate_gradient_is_that_of_single_draws() -> None:
    """Without noise, that of the network; the chunks do not matter."""
    net, x = SmallNet(), images()
    y = predictions(net, x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)[0]
    torch.testing.assert_close(surrogate_input_gradient(Target(net), x, y, draws=5, chunk=2), expected)


def test_a_network_without_noise_has_no_likelihood_ratio() -> None:
    with pytest.raises(ValueError, match="needs noisy neurons"):
        likelihood_ratio_input_gradient(Target(snn.Leaky(beta=0.9)), images(), torch.zeros(6, dtype=torch.long))
