"""What the first forward pass shows: spikes without noise, layers that never fire, nothing to learn."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import functional as SF
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

from .helpers import CLASSES, FEATURES, MAKERS, STEPS, Net, build, data, every_estimator, nothing_changes

COPIES = 4


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
        return F.cross_entropy(total, y, reduction="none")


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
        return F.cross_entropy(mem, y, reduction="none")


Train = Callable[..., None]


def by(estimator: str) -> Train:
    """``train(net, loss_fn, calls)`` by an estimator, or in a plain loop."""

    def plain(net: Any, loss_fn: Any = None, calls: int = 1) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        hook = slr.attach(optimizer, net)
        try:
            for _ in range(calls):
                (loss_fn or net.loss)(*data()).mean().backward()
                optimizer.step()
        finally:
            # Gradients stay, which the test is about.
            hook._handle.remove()

    def estimate(net: Any, loss_fn: Any = None, calls: int = 1) -> None:
        made = MAKERS[estimator](net, COPIES)
        for _ in range(calls):
            made.backward(loss_fn or net.loss, *data())

    return plain if estimator == "plain loop" else estimate


def noisy(**options: Any) -> Any:
    return build(slr, "Leaky", init_hidden=True, noise=True, **options)


WAYS = ["plain loop", *MAKERS]
every_way = pytest.mark.parametrize("train", [by(way) for way in WAYS], ids=WAYS)
by_estimators = pytest.mark.parametrize("train", [by(name) for name in MAKERS], ids=MAKERS)


class TestNoiseFreeNeurons:
    """Spikes without noise in a network that has noisy neurons."""

    @pytest.mark.parametrize(
        ("package", "name"), [(slr, "Leaky"), *((snn, name) for name in CLASSES if name != "SConv2dLSTM")]
    )
    @every_way
    def test_before_a_noisy_layer_they_are_refused(self, train: Train, package: Any, name: str) -> None:
        net = Chain(build(package, name, init_hidden=True), noisy())
        said = (
            r"spikes of first \(\w+\) have no noise.*feed second \(Leaky\).*add_noise\(net\).*requires_grad_\(False\)"
        )
        for _ in range(2):
            with nothing_changes(net), pytest.raises(ValueError, match=said):
                train(net)
            slr.use_gradient(net, "surrogate")

    @pytest.mark.filterwarnings("error")
    @every_way
    def test_the_remedies_help(self, train: Train) -> None:
        net = Chain(build(snn, "Leaky", init_hidden=True), noisy())
        train(slr.add_noise(net))
        for free in (lambda net: net.fc1.requires_grad_(False), lambda net: setattr(net, "fc1", nn.Identity())):
            net = Chain(build(snn, "Leaky", init_hidden=True), noisy())
            free(net)
            train(net)
            assert net.fc2.weight.grad.any()

    @every_way
    def test_a_learned_leak_alone_is_refused(self, train: Train) -> None:
        net = Chain(build(snn, "Leaky", learn=True, init_hidden=True), noisy())
        net.fc1 = nn.Identity()
        with nothing_changes(net), pytest.raises(ValueError, match="spikes of first"):
            train(net)

    @every_way
    def test_between_noisy_layers_and_with_their_noise_off_they_are_refused(self, train: Train) -> None:
        middle = nn.Sequential(noisy(), nn.Linear(3, 3), snn.Leaky(beta=0.9, threshold=0.1, init_hidden=True))
        net = Chain(middle, noisy())
        with nothing_changes(net), pytest.raises(ValueError, match=r"spikes of first\.2 \(Leaky\) have no noise"):
            train(net)
        net = Chain(noisy(), noisy())
        net.first.eval()
        with nothing_changes(net), pytest.raises(ValueError, match=r"spikes of first \(Leaky\) have no noise"):
            train(net)

    @every_way
    def test_in_the_loss_they_are_warned_of_once(self, train: Train) -> None:
        net = Chain(noisy(), build(snn, "Leaky", init_hidden=True))
        with pytest.warns(
            UserWarning, match=r"spikes of second \(Leaky\) have no noise.*reset_mechanism='none'"
        ) as said:
            train(net, calls=3)
        assert len(said) == 1

    @by_estimators
    def test_in_the_loss_of_frozen_weights_or_beside_it_they_are_fine(self, train: Train) -> None:
        net = Chain(noisy(), build(snn, "Leaky", init_hidden=True))
        net.fc2.requires_grad_(False)
        net.first.requires_grad_(False)
        beside = Net()
        beside.monitor = snn.Leaky(beta=0.9, init_hidden=True)

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            beside.monitor(beside.fc1(x[:, 0]))
            return beside.loss(x, y)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(beside, loss_fn)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("name", ["Leaky", "Lapicque", "Synaptic", "Alpha", "SLSTM"])
    @pytest.mark.parametrize("read", ["returned", "output", "attribute"])
    @every_way
    def test_a_membrane_that_never_resets_is_a_fine_readout(self, train: Train, read: str, name: str) -> None:
        train(MembraneReadout(read, "none", name))

    @pytest.mark.parametrize("reset", ["subtract", "zero"])
    @pytest.mark.parametrize("read", ["returned", "output", "attribute"])
    @by_estimators
    def test_a_membrane_that_resets_is_warned_of_before_any_change(self, train: Train, read: str, reset: str) -> None:
        net = MembraneReadout(read, reset)
        with pytest.warns(
            UserWarning, match=r"membrane potential of out \(Leaky\), which has no noise and resets.*'none'"
        ):
            train(net)
        with nothing_changes(net), warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="resets"):
                train(net)

    @pytest.mark.parametrize("name", ["RLeaky", "RSynaptic"])
    @every_way
    def test_a_recurrent_readout_is_warned_of(self, train: Train, name: str) -> None:
        with pytest.warns(UserWarning, match=rf"spikes of out \({name}\) have no noise"):
            train(MembraneReadout("returned", "none", name))


@pytest.mark.parametrize(
    ("threshold", "said"), [(1e3, r"lif1 \(Leaky\) never fired"), (-1e3, r"all of lif1 \(Leaky\) fired in every step")]
)
@every_way
def test_layers_that_never_or_always_fire_are_named_once(train: Train, threshold: float, said: str) -> None:
    net = Net(reset_mechanism="zero")
    net.lif1.threshold.fill_(threshold)
    with pytest.warns(UserWarning, match=said) as caught:
        train(net, calls=3)
    assert sum("fired" in str(warning.message) for warning in caught) == 1


@every_way
def test_warnings_point_at_the_users_line(train: Train) -> None:
    net = MembraneReadout("returned", "subtract")
    net.lif.threshold.fill_(1e3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net)
    assert caught
    assert {warning.filename for warning in caught} == {__file__}


@by_estimators
def test_a_frozen_network_is_refused_unless_something_else_learns(train: Train) -> None:
    net, encoder = Net().requires_grad_(False), nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"nothing to learn|no derivative"):
        train(net)
    train(net, lambda x, y: net.loss(encoder(x), y))
    assert encoder.weight.grad is not None


@by_estimators
def test_a_loss_that_runs_another_network_is_refused(train: Train) -> None:
    net, other = Net(), Net()
    said = r"ran none of lif1 \(Leaky\), lif2 \(Leaky\), the noisy neurons of Net"
    with nothing_changes(net), pytest.raises(ValueError, match=said):
        train(net, lambda x, y: other.loss(x.repeat(len(y) // len(x), 1, 1), y))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_a_network_that_is_watched_is_not_watched(copier: Callable[[Net], Net]) -> None:
    net = Net()
    slr.use_gradient(net)
    copied = copier(net)
    copied.lif1.threshold.fill_(1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            copied.loss(*data()).mean().backward()
    assert copied.fc1.weight.grad is not None


def test_nothing_is_left_on_the_network_after_the_first_backward_pass() -> None:
    net = Net()
    slr.use_gradient(net)
    for _ in range(2):
        net.loss(*data()).mean().backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@every_estimator
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_network_after_a_call(estimator: str, fails: bool) -> None:
    net = Net()
    net.monitor = snn.Leaky(beta=0.9, init_hidden=True)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        net.monitor(net.fc1(x[:, 0]))
        return net.loss(x, y) / (0 if fails else 1)

    if fails:
        with pytest.raises(ValueError, match="not finite"):
            MAKERS[estimator](net, COPIES).backward(loss_fn, *data())
    else:
        MAKERS[estimator](net, COPIES).backward(loss_fn, *data())
    assert all(neuron.sampler is None for neuron in (net.lif1, net.lif2))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    # An ordinary network again.
    net.zero_grad()
    net.loss(*data()).mean().backward()
    assert net.fc1.weight.grad.any()


class FirstSpikes(nn.Module):
    """Two noisy layers; returns the spikes of the second, ``[time, batch, 3]``."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(5, 20), slr.Leaky(beta=0.9, init_hidden=True, noise=slr.EscapeNoise(0.3)),
            nn.Linear(20, 3), slr.Leaky(beta=0.9, init_hidden=True, noise=slr.EscapeNoise(sigma)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        return torch.stack([self.net(x) for _ in range(8)])


@pytest.mark.parametrize(
    ("loss_of", "sigma", "is_warned"),
    [("first", 1.0, True), ("first", 0.3, False), ("counts", 1.0, False), ("last step", 1.0, False)],
)
@pytest.mark.parametrize("in_rollout", [False, True])
def test_much_noise_is_warned_of_where_only_first_spikes_count(
    loss_of: str, sigma: float, is_warned: bool, in_rollout: bool
) -> None:
    net = FirstSpikes(sigma)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.attach(optimizer, net)
    x, y = torch.rand(6, 5), torch.arange(6) % 3
    spikes = slr.rollout(net.net, x, num_steps=8) if in_rollout else net(x)
    if loss_of == "first":
        SF.ce_temporal_loss()(spikes, y).backward()
    else:
        F.cross_entropy(spikes.sum(0) if loss_of == "counts" else spikes[-1], y).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    said = [str(warning.message) for warning in caught]
    assert any("the loss reads one spike of each neuron in net.3 (Leaky)" in message for message in said) == is_warned


def test_a_batch_of_one_sample_is_warned_of() -> None:
    net = FirstSpikes(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.attach(optimizer, net)
    net(torch.rand(1, 5)).mean().backward()
    with pytest.warns(UserWarning, match="the batch is one sample, with one draw of noise"):
        optimizer.step()


@pytest.mark.parametrize("closure", [False, True])
def test_a_layer_that_falls_silent_during_training_is_warned_of_once(closure: bool) -> None:
    net = FirstSpikes(0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    slr.attach(optimizer, net)
    x = torch.rand(6, 5)

    def update() -> None:
        if closure:
            optimizer.step(slr.closure(lambda inputs, _: net(inputs).mean((0, 2)), x, x))
        else:
            optimizer.zero_grad()
            net(x).mean().backward()
            optimizer.step()

    for _ in range(100):
        update()
    with torch.no_grad():
        net.net[2].bias.fill_(-100)
    with pytest.warns(UserWarning, match=r"net.3 \(Leaky\) never fired in update 101: spikes that never change"):
        update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(210):
            update()


@pytest.mark.parametrize("fires", [False, True])
def test_spikes_without_noise_are_warned_of_though_their_threshold_is_out_of_reach(fires: bool) -> None:
    net = FirstSpikes(0.3)
    net.net[3] = snn.Leaky(beta=0.9, threshold=0.01 if fires else 1e4, init_hidden=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.attach(optimizer, net)
    net(torch.rand(6, 5)).mean().backward()
    with pytest.warns(UserWarning, match=r"the spikes of net.3 \(Leaky\) have no noise"):
        optimizer.step()


def test_a_readout_that_begins_to_reset_during_training_is_warned_of_once() -> None:
    net = FirstSpikes(0.3)
    net.net[3] = snn.Leaky(beta=0.9, threshold=1e4, init_hidden=True, output=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    slr.attach(optimizer, net)

    def update() -> None:
        slr.reset(net)
        optimizer.zero_grad()
        torch.stack([net.net(x)[1] for _ in range(5)]).square().mean().backward()
        optimizer.step()

    x = torch.rand(6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            update()
    net.net[3].threshold.fill_(0.1)
    with pytest.warns(
        UserWarning, match=r"the loss reads the membrane potential of net.3 \(Leaky\), which has no noise"
    ):
        update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(210):
            update()
