"""What noise-free neurons do to the gradient of a network that has noisy ones."""

from __future__ import annotations

import warnings

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import CLASSES, COUNTERFACTUAL, FEATURES, MAKERS, STEPS, Net, build, data, inputs_for, nothing_changes
from .test_validate import COPIES, Normalised, backward, says_nothing, watching


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
@watching
def test_noise_free_layer_before_a_noisy_one_is_refused(estimator: str, name: str, ours: bool) -> None:
    net = Chain(build(slr if ours else snn, name, init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    with (
        nothing_changes(net),
        pytest.raises(
            ValueError, match=r"spikes of first \(\w+\) have no noise.*noise=True.*add_noise\(net\).*requires_grad_"
        ),
    ):
        backward(net, None, estimator)
    # Still so at the next attempt, and cured by the remedy.
    with pytest.raises(ValueError, match="spikes of first"):
        backward(net, None, estimator)
    slr.add_noise(net)
    says_nothing(net, None, estimator if name != "SLSTM" else "vanilla")


@watching
def test_noise_free_layer_between_noisy_ones_is_refused(estimator: str) -> None:
    first = nn.Sequential(build(slr, "Leaky", init_hidden=True, noise=True), nn.Linear(3, 3), snn.Leaky(0.9, 0.1))
    first[2].init_hidden = True
    net = Chain(first, build(slr, "Leaky", init_hidden=True, noise=True))
    with nothing_changes(net), pytest.raises(ValueError, match=r"spikes of first\.2 \(Leaky\) have no noise"):
        backward(net, None, estimator)


@watching
def test_layer_whose_noise_is_off_counts_as_noise_free(estimator: str) -> None:
    net = Chain(*(build(slr, "Leaky", init_hidden=True, noise=True) for _ in range(2)))
    net.first.eval()
    with nothing_changes(net), pytest.raises(ValueError, match=r"spikes of first \(Leaky\) have no noise"):
        backward(net, None, estimator)


@watching
def test_noise_free_encoder_of_frozen_weights_is_fine(estimator: str) -> None:
    net = Chain(build(snn, "Leaky", init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    net.fc1.requires_grad_(False)
    says_nothing(net, None, estimator)
    assert net.fc2.weight.grad.any()


@watching
def test_noise_free_encoder_without_weights_is_fine(estimator: str) -> None:
    net = Chain(build(snn, "Leaky", init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    net.fc1 = nn.Identity()
    says_nothing(net, None, estimator)


def test_noise_free_encoder_with_a_learned_leak_is_refused() -> None:
    net = Chain(build(snn, "Leaky", learn=True, init_hidden=True), build(slr, "Leaky", init_hidden=True, noise=True))
    net.fc1 = nn.Identity()
    with nothing_changes(net), pytest.raises(ValueError, match="spikes of first"):
        backward(net)


@watching
def test_noise_free_spikes_in_the_loss_are_warned_of(estimator: str) -> None:
    net = Chain(build(slr, "Leaky", init_hidden=True, noise=True), build(snn, "Leaky", init_hidden=True))
    with pytest.warns(
        UserWarning, match=r"spikes of second \(Leaky\), which has no noise.*reset_mechanism='none'"
    ) as caught:
        backward(net, None, estimator)
    assert len(caught) == 1


def test_noise_free_spikes_in_the_loss_are_not_warned_of_if_nothing_before_them_is_learned() -> None:
    net = Chain(build(slr, "Leaky", init_hidden=True, noise=True), build(snn, "Leaky", init_hidden=True))
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
@watching
def test_membrane_that_never_resets_is_a_fine_readout(estimator: str, read: str, name: str) -> None:
    says_nothing(MembraneReadout(read, "none", name), None, estimator)


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("read", READS)
@watching
def test_membrane_that_resets_is_warned_of_as_a_readout(estimator: str, read: str, reset: str) -> None:
    net = MembraneReadout(read, reset)
    with pytest.warns(UserWarning, match=r"membrane potential of out \(Leaky\), which has no noise and resets.*'none'"):
        backward(net, None, estimator)


@pytest.mark.parametrize("name", ["RLeaky", "RSynaptic"])
def test_recurrent_readout_is_warned_of(name: str) -> None:
    with pytest.warns(UserWarning, match=rf"spikes of out \({name}\), which has no noise"):
        backward(MembraneReadout("returned", "none", name))


@watching
def test_warnings_of_readouts_come_before_any_change(estimator: str) -> None:
    net = MembraneReadout("returned", "subtract")
    with nothing_changes(net), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="resets"):
            backward(net, None, estimator)


@watching
def test_readouts_are_warned_of_once(estimator: str) -> None:
    net = MembraneReadout("returned", "subtract")
    made = MAKERS[estimator](net, COPIES)
    with pytest.warns(UserWarning, match="resets") as caught:
        made.backward(net.loss, *data())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.backward(net.loss, *data())


@pytest.mark.parametrize(
    ("name", "estimator"),
    [(name, estimator) for name in CLASSES for estimator in MAKERS if "LSTM" not in name or estimator == "vanilla"],
)
def test_sound_networks_of_every_class_are_not_warned_of(name: str, estimator: str) -> None:
    neuron = build(slr, name, learn=True, init_hidden=True, noise=True)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(neuron)
        return sum(neuron(step).flatten(1).sum(1) for step in inputs_for(name))

    says_nothing(neuron, loss_fn, estimator)


@watching
def test_warnings_point_at_the_users_line(estimator: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = MembraneReadout("returned", "subtract")
        MAKERS[estimator](net, COPIES).backward(net.loss, *data())
        norm = Normalised(nn.BatchNorm1d(4))
        MAKERS[estimator](norm, COPIES).backward(norm.loss, *data())
    # Counterfactual credit takes BatchNorm.
    assert len(caught) == (1 if estimator in COUNTERFACTUAL else 2)
    assert {warning.filename for warning in caught} == {__file__}
