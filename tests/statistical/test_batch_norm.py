"""BatchNorm in training mode behind noisy neurons: the gradient of a loss whose samples share batch statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

from .objective import along, estimates, finite_difference

pytestmark = pytest.mark.statistical
LIMIT = 4.0  # standard errors
STEPS, BATCH, COPIES, WIDTH = 5, 8, 2, 8
ROWS = BATCH * COPIES


class PerDraw(nn.BatchNorm1d):
    """BatchNorm over the rows of one call of the estimator, of many calls that finite differences run at once."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        draws = x.view(-1, ROWS, x.shape[1]).transpose(0, 1)
        weight, bias = (value.repeat(draws.shape[1]) for value in (self.weight, self.bias))
        found = F.batch_norm(draws.flatten(1), None, None, weight, bias, training=True)
        return found.view(draws.shape).transpose(0, 1).flatten(0, 1)


class Normalised(nn.Module):
    """Two noisy layers with BatchNorm in between, and an input that changes over time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc1, self.lif1 = nn.Linear(4, WIDTH), self.neuron()
        self.fc2, self.norm, self.lif2 = nn.Linear(WIDTH, WIDTH), PerDraw(WIDTH), self.neuron()
        self.readout = nn.Linear(WIDTH, 3)
        self.double()
        with torch.no_grad():
            self.norm.weight.fill_(0.7)
            self.norm.bias.fill_(0.5)

    @staticmethod
    def neuron() -> slr.Leaky:
        return slr.Leaky(beta=0.7, init_hidden=True, noise=slr.EscapeNoise(0.5, distribution="logistic"))

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        total = torch.zeros(())
        for step in x.unbind(1):
            total = total + self.readout(self.lif2(self.norm(self.fc2(self.lif1(self.fc1(step))))))
        return F.cross_entropy(total, y, reduction="none")


GROUPS = {"before": ["fc1.weight", "fc1.bias"], "between": ["fc2.weight"], "norm": ["norm.weight", "norm.bias"]}


def test_counterfactual_credit_holds_what_a_spike_does_to_the_losses_of_others() -> None:
    net = Normalised()
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.rand(BATCH, STEPS, 4, generator=generator, dtype=torch.float64)
    y = F.one_hot(torch.randint(3, (BATCH,), generator=generator), 3).double()
    # Each pair of copies has statistics of its own, as in a call of two copies.
    pairs = x.repeat(COPIES, 1, 1), y.repeat(COPIES, 1)
    calls = estimates(slr.Counterfactual(net, copies=200 * COPIES, discount=1.0), net.losses, x, y, 32)
    for group, names in GROUPS.items():
        # Along the gradient, where there is much to see; by other calls than those that are compared.
        mean = {name: sum(call[name] for call in calls[:16]) for name in names}
        norm = torch.cat([value.flatten() for value in mean.values()]).norm()
        direction = {name: value / norm for name, value in mean.items()}
        expected = finite_difference(net, net.losses, *pairs, direction, draws=6000)
        assert expected.error < 0.05 * expected.mean
        found = along(calls[16:], direction)
        print(f"{group}: {found} and {expected}")
        assert found.distance(expected) < LIMIT
