"""BatchNorm in training mode, which couples rows."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import FEATURES, MAKERS, STEPS, assert_filled, data, every_estimator, nothing_changes

COPIES = 4
SCORES = pytest.mark.parametrize("estimator", ["vanilla", "approximate"])


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(FEATURES, 4)
        self.inner = nn.Sequential(norm)
        self.lif = slr.Leaky(beta=0.9, init_hidden=True, noise=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        return sum(self.lif(self.inner(self.fc(x[:, t]))) for t in range(STEPS)).sum(1)


@SCORES
def test_the_likelihood_ratio_of_rows_warns_of_it_once_before_any_change_also_in_a_later_call(estimator: str) -> None:
    net = Normalised(nn.BatchNorm1d(4).eval())
    made = MAKERS[estimator](net, COPIES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.backward(net.loss, *data())
    running = net.train().inner[0].running_mean.clone()
    with nothing_changes(net), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"BatchNorm inner.0 is in training mode.*counterfactual.*GroupNorm"):
            made.backward(net.loss, *data())
    assert torch.equal(net.inner[0].running_mean, running)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            made.backward(net.loss, *data())
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4).eval(), nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=str)
@every_estimator
def test_other_normalisation_is_not_warned_of(estimator: str, norm: nn.Module) -> None:
    net = Normalised(norm)
    MAKERS[estimator](net, COPIES).backward(net.loss, *data())


@pytest.mark.filterwarnings("error")
def test_counterfactual_credit_takes_it() -> None:
    net = Normalised(nn.BatchNorm1d(4))
    slr.use_gradient(net)
    net.loss(*data()).mean().backward()
    assert_filled(net)


@pytest.mark.filterwarnings("ignore:BatchNorm")
@every_estimator
def test_running_statistics_see_each_time_step_once(estimator: str) -> None:
    nets = []
    for name in ("counterfactual", estimator):
        net = Normalised(nn.BatchNorm1d(4))
        made = MAKERS[name](net, COPIES, seed=0)
        for calls in (1, 2):
            made.backward(net.loss, *data())
            assert net.inner[0].num_batches_tracked == calls * STEPS
        nets.append(net)
    assert torch.equal(nets[0].inner[0].running_mean, nets[1].inner[0].running_mean)
