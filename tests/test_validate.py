from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import BATCH, CLASSES, FEATURES, STEPS, Net, build, data, inputs_for, nothing_changes

COPIES = 4
ROWS = COPIES * BATCH


def backward(net: nn.Module, loss_fn: Callable[[Tensor, Tensor], Any] | None = None) -> Tensor:
    return slr.Vanilla(net, COPIES).backward(loss_fn or net.loss, *data())


def says_nothing(net: nn.Module, loss_fn: Callable[[Tensor, Tensor], Any] | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(net, loss_fn)


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
    message = r"noise of lif1, lif2 is off: call net.train\(\), leave noise_off\(net\), or .*at_eval=True"
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
    "too short": (lambda loss: loss[1:], ValueError, rf"shape \({ROWS - 1},\).*4 copies of 5 samples need shape"),
    "batch only": (lambda loss: loss[:BATCH], ValueError, "does the loss use the targets passed to it"),
    "per output": (lambda loss: loss[:, None].expand(-1, 3), ValueError, r"losses.flatten\(1\).mean\(1\)"),
    "copies by batch": (lambda loss: loss.view(COPIES, BATCH), ValueError, rf"need\s+shape \({ROWS},\)"),
    "nan": (lambda loss: loss.index_fill(0, torch.tensor([2]), torch.nan), ValueError, f"1 of {ROWS} losses are not"),
    "inf": (lambda loss: loss / 0, ValueError, f"{ROWS} of {ROWS} losses are not finite.*learning rate"),
}


@pytest.mark.parametrize("hooked", [False, True], ids=["estimator", "hook"])
@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_wrong_loss_is_refused(kind: str, hooked: bool) -> None:
    net = Net()
    change, error, message = WRONG_LOSSES[kind]
    optimizer = torch.optim.Adam(net.parameters())
    estimator = slr.Vanilla(net, COPIES)
    if hooked:
        slr.attach(optimizer, net, estimator)
        start = [parameter.detach().clone() for parameter in net.parameters()]
        with pytest.raises(error, match=message):
            optimizer.step(slr.closure(lambda x, y: change(net.loss(x, y)), *data()))
        assert all(torch.equal(*pair) for pair in zip(start, net.parameters(), strict=True))
        assert not optimizer.state
    else:
        with nothing_changes(net), pytest.raises(error, match=message):
            estimator.backward(lambda x, y: change(net.loss(x, y)), *data())
        # The network is fine, and so is the estimator.
        estimator.backward(net.loss, *data())


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


def test_warning_of_batch_norm_comes_before_any_change() -> None:
    net = Normalised(nn.BatchNorm1d(4))
    running = net.inner[0].running_mean.clone()
    with nothing_changes(net), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="BatchNorm"):
            backward(net)
    assert torch.equal(net.inner[0].running_mean, running)


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
    make = partial(slr.attach, optimizer, net) if hooked else partial(slr.Vanilla, net)
    with nothing_changes(net), pytest.raises(ValueError, match=message):
        make(copies=1)


class Chain(nn.Module):
    """Linear, neuron, Linear, neuron, Linear."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(FEATURES, FEATURES)
        self.first = first
        self.fc2 = nn.Linear(FEATURES, FEATURES)
        self.second = second
        self.fc3 = nn.Linear(FEATURES, 2)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        total = sum(self.fc3(self.second(self.fc2(self.first(self.fc1(x[:, t]))))) for t in range(STEPS))
        return nn.functional.cross_entropy(total, y, reduction="none")


LINEAR_CLASSES = [name for name in CLASSES if name != "SConv2dLSTM"]


@pytest.mark.parametrize("name", LINEAR_CLASSES)
@pytest.mark.parametrize("ours", [False, True], ids=["snntorch", "snntorch_lr"])
def test_noise_free_layer_before_a_noisy_one_is_refused(name: str, ours: bool) -> None:
    net = Chain(build(slr if ours else snn, name, init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    with (
        nothing_changes(net),
        pytest.raises(ValueError, match=r"spikes of first have no noise.*noise=True.*add_noise\(net\).*requires_grad_"),
    ):
        backward(net)
    # Still so at the next attempt, and cured by the remedy.
    with pytest.raises(ValueError, match="spikes of first"):
        backward(net)
    says_nothing(slr.add_noise(net))


def test_noise_free_layer_between_noisy_ones_is_refused() -> None:
    first = nn.Sequential(build(slr, "Leaky", init_hidden=True, noise=True), nn.Linear(3, 3), snn.Leaky(0.9, 0.1))
    first[2].init_hidden = True
    net = Chain(first, build(slr, "Leaky", init_hidden=True, noise=True))
    with nothing_changes(net), pytest.raises(ValueError, match=r"spikes of first\.2 have no noise"):
        backward(net)


def test_layer_whose_noise_is_off_counts_as_noise_free() -> None:
    net = Chain(*(build(slr, "Leaky", init_hidden=True, noise=True) for _ in range(2)))
    net.first.eval()
    with nothing_changes(net), pytest.raises(ValueError, match="spikes of first have no noise"):
        backward(net)


def test_noise_free_encoder_of_frozen_weights_is_fine() -> None:
    net = Chain(build(snn, "Leaky", init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    net.fc1.requires_grad_(False)
    says_nothing(net)
    assert net.fc2.weight.grad.any()


def test_noise_free_encoder_without_weights_is_fine() -> None:
    net = Chain(build(snn, "Leaky", init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    net.fc1 = nn.Identity()
    says_nothing(net)


def test_noise_free_encoder_with_a_learned_leak_is_refused() -> None:
    net = Chain(build(snn, "Leaky", learn=True, init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    net.fc1 = nn.Identity()
    with nothing_changes(net), pytest.raises(ValueError, match="spikes of first"):
        backward(net)


def test_noise_free_spikes_in_the_loss_are_warned_of_unless_nothing_before_them_is_learned() -> None:
    net = Chain(build(slr, "Leaky", init_hidden=True, noise=True), build(snn, "Leaky", init_hidden=True))
    with pytest.warns(UserWarning, match=r"spikes of second, which has no noise.*reset_mechanism='none'") as caught:
        backward(net)
    assert len(caught) == 1
    net.fc2.requires_grad_(False)
    says_nothing(net)


def test_noise_free_spikes_beside_the_loss_are_fine() -> None:
    net = Net()
    monitor = snn.Leaky(beta=0.9, init_hidden=True)
    net.monitor = monitor

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        monitor(net.fc1(x[:, 0]))
        return net.loss(x, y)

    says_nothing(net, loss_fn)


class MembraneReadout(nn.Module):
    """Noisy layer, then a noise-free neuron whose membrane potential is the output."""

    def __init__(self, read: str, reset: str, name: str = "Leaky") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(FEATURES, FEATURES)
        self.lif = slr.Leaky(beta=0.9, threshold=0.3, init_hidden=True, noise=True)
        self.fc2 = nn.Linear(FEATURES, FEATURES)
        hidden = read != "returned"
        self.out = build(snn, name, reset_mechanism=reset, init_hidden=hidden, output=read == "output")
        self.read = read

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        states = self.out.reset_mem()
        states = states if isinstance(states, tuple) else (states,)
        for t in range(STEPS):
            current = self.fc2(self.lif(self.fc1(x[:, t])))
            output = self.out(current) if self.out.init_hidden else self.out(current, *states)
            states = output[-len(states) :] if isinstance(output, tuple) else ()
            mem = self.out.mem if self.read == "attribute" else states[-1]
        return nn.functional.cross_entropy(mem, y, reduction="none")


READS = ["returned", "output", "attribute"]


@pytest.mark.parametrize("name", ["Leaky", "Lapicque", "Synaptic", "Alpha", "SLSTM"])
@pytest.mark.parametrize("read", READS)
def test_membrane_that_never_resets_is_a_fine_readout(read: str, name: str) -> None:
    says_nothing(MembraneReadout(read, "none", name))


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("read", READS)
def test_membrane_that_resets_is_warned_of_as_a_readout(read: str, reset: str) -> None:
    net = MembraneReadout(read, reset)
    with pytest.warns(UserWarning, match=r"membrane potential of out, which has no noise and resets.*'none'"):
        backward(net)


@pytest.mark.parametrize("name", ["RLeaky", "RSynaptic"])
def test_recurrent_readout_is_warned_of(name: str) -> None:
    with pytest.warns(UserWarning, match="spikes of out, which has no noise"):
        backward(MembraneReadout("returned", "none", name))


def test_warnings_of_readouts_come_before_any_change() -> None:
    net = MembraneReadout("returned", "subtract")
    with nothing_changes(net), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="resets"):
            backward(net)


def test_readouts_are_warned_of_once() -> None:
    net = MembraneReadout("returned", "subtract")
    estimator = slr.Vanilla(net, COPIES)
    with pytest.warns(UserWarning, match="resets"):
        estimator.backward(net.loss, *data())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.backward(net.loss, *data())


@pytest.mark.parametrize("name", CLASSES)
def test_sound_networks_of_every_class_are_not_warned_of(name: str) -> None:
    neuron = build(slr, name, learn=True, init_hidden=True, noise=True)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(neuron)
        return sum(neuron(step).flatten(1).sum(1) for step in inputs_for(name))

    says_nothing(neuron, loss_fn)


def test_warnings_point_at_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = MembraneReadout("returned", "subtract")
        slr.Vanilla(net, COPIES).backward(net.loss, *data())
        norm = Normalised(nn.BatchNorm1d(4))
        slr.Vanilla(norm, COPIES).backward(norm.loss, *data())
    assert len(caught) == 2
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("estimator", [slr.Vanilla, slr.Approximate])
def test_refuses_a_learned_threshold_that_one_sample_meets_twice(estimator: Any) -> None:
    options = {"learn_threshold": True, "reset_delay": False}
    net = slr.Leaky(beta=0.9, noise=True, init_hidden=True, **options)
    with pytest.raises(ValueError, match="reset_delay=True"):
        estimator(net).backward(lambda x, y: net(x).sum(1), torch.rand(3, 2), torch.zeros(3))
    assert net.threshold.grad is None
    net.noise = slr.EscapeNoise()
    estimator(net).backward(lambda x, y: net(x).sum(1), torch.rand(3, 2), torch.zeros(3))
    assert net.threshold.grad is not None
