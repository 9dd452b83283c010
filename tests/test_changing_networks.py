"""What is learned, what has noise and what feeds what may change while an estimator is in use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr

from .helpers import COUNTERFACTUAL, MAKERS, Net, assert_same, data, gradients
from .test_every_estimator import COPIES, estimate, with_credit

BEFORE = "all before the second noise"
FROZEN = {
    "first layer": ["fc1.weight", "fc1.bias"],
    "bias": ["fc2.bias"],
    "sigma": ["lif1.noise.log_sigma", "lif2.noise.log_sigma"],
    BEFORE: ["fc1.weight", "fc1.bias", "lif1.noise.log_sigma"],
    "all but sigma": [f"{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")],
}


def freeze(net: Net, names: list[str]) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)


# Rates sums the currents of a neuron before which nothing is learned in another way.
@pytest.mark.parametrize(
    ("estimator", "kind"),
    [(estimator, kind) for estimator in COUNTERFACTUAL for kind in FROZEN if (estimator, kind) != ("rates", BEFORE)],
)
def test_frozen_parameters_get_no_gradient_and_do_not_change_the_others(estimator: str, kind: str) -> None:
    net = Net()
    freeze(net, FROZEN[kind])
    free = estimate(estimator, Net())
    expected = {name: gradient for name, gradient in free.items() if name not in FROZEN[kind]}
    # What is frozen ends the graph, which may change the order of sums.
    assert_same(estimate(estimator, net), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("noise_of_first", [True, False], ids=["noise on", "noise of the first layer off"])
@pytest.mark.parametrize("kind", FROZEN)
@with_credit
def test_what_is_set_free_or_switched_on_later_gets_the_gradient_of_a_new_estimator(
    estimator: str, kind: str, noise_of_first: bool
) -> None:
    net = Net()
    made = MAKERS[estimator](net, COPIES, control=0.5)
    # What lies before a layer without noise has to be frozen.
    freeze(net, FROZEN[kind] if noise_of_first else [*FROZEN[kind], *FROZEN["first layer"]])
    net.lif1.train(noise_of_first)
    made.backward(net.loss, *data())
    net.train()
    freeze(net, [])
    found = []
    for each in (made, MAKERS[estimator](net, COPIES, control=0.5)):
        net.zero_grad()
        torch.manual_seed(0)
        each.backward(net.loss, *data())
        found.append(gradients(net))
    assert found[0].keys() == dict(net.named_parameters()).keys()
    assert_same(*found)


class Growing(Net):
    """Leaves its second layer out until it is told to use it."""

    whole = False

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for t in range(x.shape[1]):
            spikes = self.lif1(self.fc1(x[:, t]))
            out = out + self.readout(self.lif2(self.fc2(spikes)) if self.whole else spikes)
        return out


@pytest.mark.parametrize("copies", [1, 2])
def test_spikes_that_feed_another_neuron_only_later_are_refused_by_rates_and_not_by_exact(copies: int) -> None:
    for estimator in COUNTERFACTUAL:
        net = Growing()
        made = MAKERS[estimator](net, copies)
        made.backward(net.loss, *data())
        net.whole = True
        net.zero_grad()
        if estimator == "exact":
            made.backward(net.loss, *data())
            assert gradients(net)["fc1.weight"].any()
            continue
        with pytest.raises(ValueError, match=r"feed lif2 \(Leaky\) now.*over_time=\"exact\""):
            made.backward(net.loss, *data())
        assert not gradients(net)
