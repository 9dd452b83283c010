from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import BATCH, COUNTERFACTUAL, FEATURES, MAKERS, STEPS, Net, data, nothing_changes

COPIES = 4
LossFn = Callable[[Tensor, Tensor], Any]
# Approximate looks at the network as Vanilla does.
watching = pytest.mark.parametrize("estimator", ["vanilla", *COUNTERFACTUAL])


def backward(net: nn.Module, loss_fn: LossFn | None = None, estimator: str = "vanilla") -> Tensor:
    return MAKERS[estimator](net, COPIES).backward(loss_fn or net.loss, *data())


def says_nothing(net: nn.Module, loss_fn: LossFn | None = None, estimator: str = "vanilla") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(net, loss_fn, estimator)


def test_network_without_noisy_neurons_is_refused() -> None:
    for net in (Net(noise=False), nn.Linear(3, 3)):
        with pytest.raises(ValueError, match=r"no noisy neuron.*noise=True.*snntorch_lr.add_noise\(net\)"):
            slr.Vanilla(net, COPIES)
        with pytest.raises(ValueError, match="no noisy neuron"):
            slr.attach(torch.optim.SGD(net.parameters(), lr=0.1), net)


def test_network_that_lost_its_noise_is_refused() -> None:
    net = Net()
    estimator = slr.Vanilla(net, COPIES)
    slr.remove_noise(net)
    with nothing_changes(net), pytest.raises(ValueError, match="no noisy neuron"):
        estimator.backward(net.loss, *data())


def test_network_whose_noise_is_off_is_refused() -> None:
    net = Net()
    estimator = slr.Vanilla(net, COPIES)
    message = (
        r"noise of lif1 \(Leaky\), lif2 \(Leaky\) is off: call net.train\(\), leave noise_off\(net\), or .*at_eval=True"
    )
    with nothing_changes(net), slr.noise_off(net), pytest.raises(ValueError, match=message):
        estimator.backward(net.loss, *data())
    net.eval()
    with nothing_changes(net), pytest.raises(ValueError, match=message):
        estimator.backward(net.loss, *data())


@pytest.mark.parametrize("value", [-200.0, 200.0, float("nan")], ids=["underflow", "overflow", "nan"])
@pytest.mark.parametrize("elements", [1, 4])
def test_noise_level_that_left_its_range_is_refused(value: float, elements: int) -> None:
    net = Net(noise=slr.MembraneNoise(torch.full((elements,), 0.5)))
    net.lif2.noise = slr.MembraneNoise(torch.full((elements,), 0.5))
    estimator = slr.Vanilla(net, COPIES)
    with torch.no_grad():
        net.lif2.noise.log_sigma[-1] = value
    start = net.fc1.weight.detach().clone()
    with pytest.raises(ValueError, match=r"lif2\.noise: sigma must be positive and finite.*learning rate"):
        estimator.backward(net.loss, *data())
    assert net.fc1.weight.grad is None
    assert torch.equal(net.fc1.weight, start)


WRONG_LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "mean": (lambda loss: loss.mean(), ValueError, r"one number.*reduction='none'"),
    "sum in a list": (lambda loss: loss.sum().view(1), ValueError, r"one number.*reduction='none'"),
    "no tensor": (lambda loss: loss.mean().item(), TypeError, "tensor of per-sample losses, not float"),
    "nothing": (lambda loss: None, TypeError, "not NoneType"),
    "too short": (lambda loss: loss[1:], ValueError, r"shape \({short},\).*{copies} copies of 5 samples need shape"),
    "batch only": (lambda loss: loss[:BATCH], ValueError, "does the loss use the targets passed to it"),
    "per output": (lambda loss: loss[:, None].expand(-1, 3), ValueError, r"losses.flatten\(1\).mean\(1\)"),
    "copies by batch": (lambda loss: loss.view(-1, BATCH), ValueError, r"need\s+shape \({rows},\)"),
    "nan": (lambda loss: loss.index_fill(0, torch.tensor([2]), torch.nan), ValueError, "1 of {rows} losses are not"),
    "inf": (lambda loss: loss / 0, ValueError, "{rows} of {rows} losses are not finite.*learning rate"),
}


def told(message: str, copies: int) -> str:
    return message.format(copies=copies, rows=copies * BATCH, short=copies * BATCH - 1)


@watching
@pytest.mark.parametrize("hooked", [False, True], ids=["estimator", "hook"])
@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_wrong_loss_is_refused(kind: str, hooked: bool, estimator: str) -> None:
    net = Net()
    change, error, message = WRONG_LOSSES[kind]
    # Rates looks at the network with two copies first.
    message = told(message, 2 if estimator == "rates" else COPIES)
    optimizer = torch.optim.Adam(net.parameters())
    made = MAKERS[estimator](net, COPIES)
    if hooked:
        slr.attach(optimizer, net, made)
        start = [parameter.detach().clone() for parameter in net.parameters()]
        with pytest.raises(error, match=message):
            optimizer.step(slr.closure(lambda x, y: change(net.loss(x, y)), *data()))
        assert all(torch.equal(*pair) for pair in zip(start, net.parameters(), strict=True))
        assert not optimizer.state
    else:
        with nothing_changes(net), pytest.raises(error, match=message):
            made.backward(lambda x, y: change(net.loss(x, y)), *data())
        # The network is fine, and so is the estimator.
        made.backward(net.loss, *data())


@pytest.mark.parametrize("estimator", COUNTERFACTUAL)
@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_a_loss_that_turns_wrong_is_refused(kind: str, estimator: str) -> None:
    net = Net()
    change, error, message = WRONG_LOSSES[kind]
    made = MAKERS[estimator](net, COPIES)
    made.backward(net.loss, *data())
    with nothing_changes(net), pytest.raises(error, match=told(message, COPIES)):
        made.backward(lambda x, y: change(net.loss(x, y)), *data())


def test_scalar_loss_of_a_single_row_is_refused_too() -> None:
    net = Net()
    x, y = data()
    with nothing_changes(net), pytest.raises(ValueError, match=r"shape \(\)"):
        slr.Vanilla(net, 1, baseline="none").backward(lambda x, y: net.loss(x, y).mean(), x[:1], y[:1])


def test_first_parameter_that_is_not_finite_is_named() -> None:
    net = Net()
    with torch.no_grad():
        net.readout.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"parameter readout\.weight"):
        backward(net)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_membrane_that_is_not_finite_is_named() -> None:
    net = Net()
    x, y = data()
    with nothing_changes(net), pytest.raises(ValueError, match="membrane potential of lif1"):
        slr.Vanilla(net, COPIES).backward(
            lambda x, y: net.loss(x, y) + net.lif1.mem.sum(1), x.index_fill(0, torch.tensor([0]), torch.inf), y
        )


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


def test_batch_norm_in_training_mode_is_warned_of() -> None:
    net = Normalised(nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"BatchNorm inner.0 is in training mode.*counterfactual.*GroupNorm"):
        backward(net)


@pytest.mark.parametrize("estimator", ["vanilla", "approximate"])
def test_warning_of_batch_norm_comes_before_any_change(estimator: str) -> None:
    net = Normalised(nn.BatchNorm1d(4))
    running = net.inner[0].running_mean.clone()
    with nothing_changes(net), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="BatchNorm"):
            backward(net, None, estimator)
    assert torch.equal(net.inner[0].running_mean, running)


@pytest.mark.filterwarnings("ignore:BatchNorm")
@pytest.mark.parametrize("estimator", MAKERS)
def test_statistics_of_batch_norm_see_each_time_step_once(estimator: str) -> None:
    nets = []
    for each in ("vanilla", estimator):
        net = Normalised(nn.BatchNorm1d(4))
        made = MAKERS[each](net, COPIES, seed=0)
        for calls in (1, 2):
            made.backward(net.loss, *data())
            assert net.inner[0].num_batches_tracked == calls * STEPS
        nets.append(net)
    assert torch.equal(nets[0].inner[0].running_mean, nets[1].inner[0].running_mean)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4).eval(), nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=str)
def test_other_normalisation_is_not_warned_of(norm: nn.Module) -> None:
    says_nothing(Normalised(norm))


def test_batch_norm_that_returns_to_training_mode_is_warned_of() -> None:
    net = Normalised(nn.BatchNorm1d(4).eval())
    estimator = slr.Vanilla(net, COPIES)
    estimator.backward(net.loss, *data())
    net.train()
    with pytest.warns(UserWarning, match=r"BatchNorm inner.0"):
        estimator.backward(net.loss, *data())


def test_batch_norm_is_warned_of_once() -> None:
    net = Normalised(nn.BatchNorm1d(4))
    estimator = slr.Vanilla(net, COPIES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            estimator.backward(net.loss, *data())
    assert len([warning for warning in caught if "BatchNorm" in str(warning.message)]) == 1


@pytest.mark.parametrize("hooked", [False, True])
def test_single_copy_with_leave_one_out_is_refused(hooked: bool) -> None:
    net = Net()
    message = "1 copy leaves nothing to compare with.*copies >= 2.*'batch-mean' or 'none'"
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    make = partial(slr.attach, optimizer, net, "vanilla") if hooked else partial(slr.Vanilla, net)
    with nothing_changes(net), pytest.raises(ValueError, match=message):
        make(copies=1)


@pytest.mark.parametrize("estimator", MAKERS.values(), ids=MAKERS)
def test_refuses_a_learned_threshold_that_one_sample_meets_twice(estimator: Any) -> None:
    options = {"learn_threshold": True, "reset_delay": False}
    net = slr.Leaky(beta=0.9, noise=True, init_hidden=True, **options)
    with pytest.raises(ValueError, match="reset_delay=True"):
        estimator(net).backward(lambda x, y: net(x).sum(1), torch.rand(3, 2), torch.zeros(3))
    assert net.threshold.grad is None
    net.noise = slr.EscapeNoise()
    estimator(net).backward(lambda x, y: net(x).sum(1), torch.rand(3, 2), torch.zeros(3))
    assert net.threshold.grad is not None
