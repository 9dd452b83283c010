"""What counterfactual credit takes, refuses, keeps and hands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr.estimators.credit import Control
from snntorch_lr.estimators.recording import Copies
from snntorch_lr.estimators.shadows import Shadowed
from snntorch_lr.noise_stream import NoiseStream

from .helpers import Net, assert_same, data, gradients, nothing_changes

OVER_TIME = ["rates", "exact"]


def gradients_of(net: nn.Module, loss: Any = None, calls: int = 1, **options: Any) -> dict[str, Tensor]:
    estimator = slr.Counterfactual(net, **{"seed": 0, **options})
    for _ in range(calls):
        net.zero_grad()
        estimator.backward(loss or net.loss, *data())
    return gradients(net)


@pytest.mark.parametrize("noise", ["membrane", "escape"])
@pytest.mark.parametrize("over_time", OVER_TIME)
def test_states_may_be_held_by_the_neuron_or_by_the_user(over_time: str, noise: str) -> None:
    held, handed = (gradients_of(Net(init, noise=noise), over_time=over_time) for init in (True, False))
    assert_same(held, handed)


@pytest.mark.parametrize("over_time", OVER_TIME)
@pytest.mark.parametrize("copies", [1, 3])
def test_every_parameter_gets_a_gradient_with_any_number_of_copies(copies: int, over_time: str) -> None:
    net = Net(noise="escape")
    found = gradients_of(net, copies=copies, shadows=2, over_time=over_time)
    assert found.keys() == dict(net.named_parameters()).keys()
    assert all(bool(gradient.isfinite().all() and gradient.any()) for gradient in found.values())


@pytest.mark.parametrize("over_time", OVER_TIME)
def test_adds_to_the_gradient_that_is_there_and_returns_the_mean_loss(over_time: str) -> None:
    net = Net(noise="escape")
    once = gradients_of(net, over_time=over_time)
    losses: list[Tensor] = []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        losses.append(net.loss(x, y))
        return losses[-1]

    mean = slr.Counterfactual(net, over_time=over_time, seed=0).backward(loss, *data())
    # The first call of rates is the trial run.
    assert mean == losses[-1].mean()
    assert_same(gradients(net), {name: 2 * gradient for name, gradient in once.items()}, rtol=1e-6, atol=1e-8)


def test_lambda_is_fitted_from_earlier_steps_only() -> None:
    net = Net(noise="escape")
    estimator = slr.Counterfactual(net, copies=20, seed=0)
    estimator.backward(net.loss, *data())
    fitted = estimator.control
    assert fitted.keys() == {"lif1", "lif2"}
    assert all(0 <= value <= 1 and value != 0.5 for value in fitted.values())
    assert_same(gradients_of(net, copies=20), gradients_of(net, copies=20, control=0.5))
    # In the second call the fitted value is used, whatever noise that call has.
    second = gradients_of(net, copies=20, calls=2)
    with pytest.raises(AssertionError):
        assert_same(second, gradients_of(net, copies=20, calls=2, control=0.5))


def test_fitted_lambda_is_where_the_variance_is_least() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 40), slr.Leaky(beta=0.9, noise="escape", init_hidden=True), nn.Linear(40, 3))
    x, y = 2 * torch.rand(20, 8), torch.randint(3, (20,))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(slr.rollout(net, x, num_steps=6).mean(0), y, reduction="none")

    def variance(control: float | None) -> float:
        estimator = slr.Counterfactual(net, control=control, seed=1)
        calls = []
        for _ in range(60):
            net.zero_grad()
            estimator.backward(loss, x, y)
            calls.append(net[0].weight.grad.clone())
        return float(torch.stack(calls[10:]).var(0).sum())

    swept = [variance(control) for control in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert variance(None) < 1.1 * min(swept) < max(swept) / 1.5


@pytest.mark.parametrize("over_time", OVER_TIME)
def test_spikes_may_be_changed_in_place(over_time: str) -> None:
    def scaled(in_place: bool) -> dict[str, Tensor]:
        net = Net(noise="escape")

        def loss(x: Tensor, y: Tensor) -> Tensor:
            slr.reset(net)
            out = torch.zeros(())
            for t in range(x.shape[1]):
                spikes = net.lif1(net.fc1(x[:, t]))
                spikes = spikes.mul_(0.5) if in_place else spikes * 0.5
                out = out + net.readout(net.lif2(net.fc2(spikes)))
            return F.cross_entropy(out, y, reduction="none")

        return gradients_of(net, loss, over_time=over_time)

    assert_same(scaled(True), scaled(False))


def test_shadows_share_currents_and_not_noise() -> None:
    net = nn.Sequential(slr.Leaky(beta=0.9, noise="membrane", init_hidden=True))
    slr.reset(net)
    neurons = {"0": net[0]}
    estimator = slr.Counterfactual(net)
    estimator._controls = {"0": Control()}
    recording = Shadowed(Copies(neurons, NoiseStream(0, 2, 0, 2), 3), 1, {net[0]: estimator._controls["0"]})
    recording.keeps_steps = True
    x = torch.rand(3, 4)
    with recording:
        spikes = net(x)
    assert spikes.shape == (6, 4)
    currents = recording.entered[net[0]][0].view(2, 2, 3, 4)
    assert torch.equal(currents, x.expand(2, 2, 3, 4))
    membranes = recording._last[net[0]].full["mem"].view(2, 2, 3, 4)
    assert membranes.flatten().unique().numel() == membranes.numel()


class Reading(Net):
    """Reads membrane potentials of its second neuron if it is told to."""

    reads = False

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        out = torch.zeros(())
        for t in range(x.shape[1]):
            spikes, mem1 = self.lif1(self.fc1(x[:, t]), mem1)
            spikes, mem2 = self.lif2(self.fc2(spikes), mem2)
            out = out + self.readout(spikes) + (mem2[:, :2] if self.reads else 0)
        return F.cross_entropy(out, y, reduction="none")


def test_a_state_that_is_read_later_than_the_first_call_is_an_error_and_changes_nothing() -> None:
    net = Reading(init_hidden=False)
    estimator = slr.Counterfactual(net)
    estimator.backward(net.loss, *data())
    net.reads = True
    with pytest.raises(RuntimeError, match=r"depends on a state of lif2 \(Leaky\) now"):
        estimator.backward(net.loss, *data())
    slr.Counterfactual(net).backward(net.loss, *data())


@pytest.mark.parametrize(
    ("change", "timed"),
    [
        (lambda net: None, []),
        (lambda net: setattr(net, "reads", True), ["lif2"]),
        (lambda net: setattr(net, "readout", nn.Identity()), ["lif2"]),
    ],
    ids=["a readout without noise", "a membrane potential that is read", "a spiking readout"],
)
def test_rates_keep_the_time_steps_of_layers_that_need_them(change: Callable[[Any], None], timed: list[str]) -> None:
    net = Reading(init_hidden=False)
    change(net)
    estimator = slr.Counterfactual(net)
    estimator.backward(net.loss, *data())
    assert estimator.timed == timed


def test_rates_keep_the_time_steps_of_recurrent_layers_and_of_what_they_feed() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4),
        slr.Leaky(beta=0.8, noise=True, init_hidden=True),
        nn.Linear(4, 4),
        slr.RLeaky(beta=0.8, noise=True, init_hidden=True, linear_features=4),
        nn.Linear(4, 4),
        slr.Leaky(beta=0.8, noise=True, init_hidden=True),
        nn.Linear(4, 2),
    )

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(slr.rollout(net, x.transpose(0, 1)).sum(0), y, reduction="none")

    estimator = slr.Counterfactual(net)
    estimator.backward(loss, *data())
    assert estimator.timed == ["3", "5"]


def test_rates_keep_the_time_steps_of_feedback_that_is_written_by_hand() -> None:
    net = Net(noise="escape")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        spikes, out = slr.per_copy(torch.zeros(len(x), 4)), torch.zeros(())
        for t in range(x.shape[1]):
            spikes = net.lif1(slr.per_copy(net.fc1(x[:, t])) + net.fc2(spikes))
            out = out + net.readout(spikes)
        return F.cross_entropy(out, y, reduction="none")

    estimator = slr.Counterfactual(net, seed=0)
    estimator.backward(loss, *data())
    assert estimator.timed == ["lif1"]


def test_rates_refuse_a_network_that_is_presented_twice_and_exact_takes_it() -> None:
    net = Net(noise="escape")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(x, y) + net.loss(x, y)

    with nothing_changes(net), pytest.raises(ValueError, match=r'lif1 \(Leaky\) did not go on .* over_time="exact"'):
        slr.Counterfactual(net).backward(loss, *data())
    assert gradients_of(net, loss, over_time="exact")["fc1.weight"].any()


def test_a_state_that_the_user_changes_is_read_by_the_next_step() -> None:
    net = Net(init_hidden=False, noise="escape")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mem, out = net.lif1.reset_mem(), torch.zeros(())
        for t in range(x.shape[1]):
            spikes, mem = net.lif1(net.fc1(x[:, t]), mem)
            mem = mem * 0.9
            out = out + net.readout(spikes)
        return F.cross_entropy(out, y, reduction="none")

    estimator = slr.Counterfactual(net, seed=0)
    estimator.backward(loss, *data())
    assert estimator.timed == ["lif1"]
    assert_same(gradients(net), gradients_of(net, loss, over_time="exact"))


def test_a_detached_state_is_still_handed_on() -> None:
    net = Net(init_hidden=False, noise="escape")

    def loss(x: Tensor, y: Tensor, detach: bool = True) -> Tensor:
        mem, out = net.lif1.reset_mem(), torch.zeros(())
        for t in range(x.shape[1]):
            spikes, mem = net.lif1(net.fc1(x[:, t]), mem.detach() if detach else mem)
            out = out + net.readout(spikes)
        return F.cross_entropy(out, y, reduction="none")

    assert_same(gradients_of(net, loss), gradients_of(net, lambda x, y: loss(x, y, False)))


@pytest.mark.parametrize(
    ("neuron", "reason"),
    [
        (slr.SLSTM(3, 3, noise=True, init_hidden=True), "an LSTM cell mixes"),
        (slr.Leaky(beta=0.9, noise=True, init_hidden=True, inhibition=True), "inhibition lets only one"),
    ],
)
def test_neurons_whose_trains_are_not_independent_are_refused_by_name(neuron: Any, reason: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), neuron, nn.Linear(3, 2))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(slr.rollout(net, x[:, 0], num_steps=2).sum(0), y, reduction="none")

    with nothing_changes(net), pytest.raises(ValueError, match=rf"^1 \({type(neuron).__name__}\): {reason}.*vanilla"):
        slr.Counterfactual(net).backward(loss, *data())


@pytest.mark.parametrize("over_time", OVER_TIME)
def test_a_loss_without_a_derivative_is_refused(over_time: str) -> None:
    net = Net()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (net(x).argmax(1) != y).float()

    with nothing_changes(net), pytest.raises(ValueError, match="no derivative with respect to the spikes"):
        slr.Counterfactual(net, over_time=over_time).backward(loss, *data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 0}, "copies must be a positive integer"),
        ({"shadows": 0}, "shadows must be a positive integer"),
        ({"over_time": "sums"}, "over_time must be 'rates' or 'exact'"),
        ({"control": 1.5}, "control must be in"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slr.Counterfactual(Net(), **options)


def test_a_network_in_half_precision_gets_gradients_of_its_own_dtype() -> None:
    net = Net(noise="escape").bfloat16()
    net.lif1.noise, net.lif2.noise = (slr.EscapeNoise(0.5, distribution="logistic").bfloat16() for _ in range(2))
    x, y = data()
    for over_time in OVER_TIME:
        net.zero_grad()
        slr.Counterfactual(net, over_time=over_time).backward(net.loss, x.bfloat16(), y)
        assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in net.parameters())


def test_noise_free_neurons_in_front_of_noisy_ones_are_refused() -> None:
    net = nn.Sequential(
        nn.Linear(3, 3),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(3, 3),
        slr.Leaky(beta=0.9, noise=True, init_hidden=True),
        nn.Linear(3, 2),
    )

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(slr.rollout(net, x[:, 0], num_steps=2).sum(0), y, reduction="none")

    for over_time in OVER_TIME:
        with nothing_changes(net), pytest.raises(ValueError, match=r"the spikes of 1 \(Leaky\) have no noise"):
            slr.Counterfactual(net, over_time=over_time).backward(loss, *data())


class TestInputGradient:
    def test_is_the_derivative_of_the_expected_loss_of_each_sample(self) -> None:
        """Of one spike with probability sigmoid((w · x − ϑ) / σ) the derivative of any affine loss is known."""
        net = nn.Sequential(nn.Linear(2, 1, bias=False), slr.Leaky(beta=0.9, threshold=0.2, init_hidden=True))
        net[1].noise = slr.EscapeNoise(0.5, distribution="logistic")
        x, y = torch.tensor([[0.5, 0.1], [0.2, 0.3]]), torch.tensor([3.0, -1.0])

        def loss(x: Tensor, y: Tensor) -> Tensor:
            slr.reset(net)
            return net(x)[:, 0] * y

        found = slr.input_gradient(net, loss, x, y, copies=2000, chunk=500, seed=0)
        leaf = x.clone().requires_grad_()
        p = torch.sigmoid((net[0](leaf)[:, 0] - 0.2) / 0.5)
        (expected,) = torch.autograd.grad((p * y).sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)

    def test_leaves_weights_gradients_and_inputs_alone(self) -> None:
        net = Net()
        x, y = data()
        with nothing_changes(net):
            slr.input_gradient(net, net.loss, x, y, copies=4)
        assert x.grad is None
        assert not x.requires_grad
        assert all(p.requires_grad for p in net.parameters())

    def test_vanilla_agrees(self) -> None:
        net = Net(noise="escape")
        x, y = data()
        found, reference = (
            slr.input_gradient(net, net.loss, x, y, copies, chunk=1000, estimator=name, seed=0)
            for name, copies in (("counterfactual", 2000), ("vanilla", 20_000))
        )
        assert found.shape == x.shape
        assert F.cosine_similarity(found.flatten(), reference.flatten(), 0) > 0.9

    def test_a_loss_that_does_not_use_the_inputs_is_an_error(self) -> None:
        net = Net()
        x, y = data()
        with pytest.raises(ValueError, match=r"requires_grad_\(\) on .* the inputs"):
            slr.input_gradient(net, lambda _, y: net.loss(x, y), x, y, copies=2)
