from __future__ import annotations

import warnings
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.estimators.recording import Copies, Recording
from snntorch_lr.estimators.storing import Storing
from snntorch_lr.noise_stream import NoiseStream

from .helpers import (
    BATCH,
    CLASSES,
    COUNTERFACTUAL,
    DEVICES,
    FEATURES,
    MAKERS,
    RESETS,
    STEPS,
    Net,
    assert_same,
    build,
    data,
    gradients,
    initial_states,
    inputs_for,
    run,
)

COPIES = 4


def rows_fed_to(module: nn.Module) -> list[int]:
    """Number of rows of each input that a module gets from now on."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("init_hidden", [False, True])
def test_only_what_follows_the_first_noisy_neuron_is_computed_for_every_copy(init_hidden: bool) -> None:
    net = Net(init_hidden)
    rows = [rows_fed_to(module) for module in (net.fc1, net.fc2, net.readout)]
    slr.Vanilla(net, copies=COPIES).backward(net.loss, *data())
    # The first call looks at other passes before.
    assert [each[-STEPS:] for each in rows] == [[BATCH] * STEPS, *[[COPIES * BATCH] * STEPS] * 2]


@pytest.mark.parametrize("options", [{}, {"shadows": 3}], ids=str)
@pytest.mark.parametrize("estimator", COUNTERFACTUAL)
def test_shadows_are_rows_inside_neurons_only(estimator: str, options: dict[str, Any]) -> None:
    net = Net()
    made = MAKERS[estimator](net, copies=COPIES, **options)
    # The first call looks at the network with other copies.
    made.backward(net.loss, *data())
    rows = [rows_fed_to(module) for module in (net.fc1, net.fc2, net.readout)]
    made.backward(net.loss, *data())
    passes = STEPS + (estimator == "rates")
    assert rows == [[BATCH] * passes, [COPIES * BATCH] * passes, [COPIES * BATCH] * STEPS]


def test_noise_free_neuron_before_the_first_noisy_one_is_not_copied() -> None:
    net = nn.Sequential(snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(3, 2), slr.Leaky(beta=0.9, noise=True))
    rows = [rows_fed_to(module) for module in net]
    x, y = data()
    slr.Vanilla(net, copies=COPIES).backward(lambda x, y: net(x[:, 0])[0].sum(1), x, y)
    assert {count for each in rows for count in each} == {BATCH}


def membranes(net: nn.Module, neuron: Any, x: Tensor, **options: Any) -> Tensor:
    """Membrane potential of a neuron in every copy after one step, ``[copies, batch, ...]``."""

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        return net(x).sum(1)

    slr.Vanilla(net, copies=COPIES, seed=0, **options).backward(loss_fn, x, torch.zeros(len(x)))
    return neuron.mem.detach().unflatten(0, (COPIES, -1))


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "logistic"])
def test_antithetic_copies_have_opposite_noise(distribution: str) -> None:
    neuron = slr.Leaky(beta=0.9, init_hidden=True, noise=slr.MembraneNoise(0.7, distribution=distribution))
    x = data(torch.float64)[0][:, 0]
    noise = membranes(neuron, neuron, x, antithetic=True) - x
    torch.testing.assert_close(noise[COPIES // 2 :], -noise[: COPIES // 2])
    assert noise[: COPIES // 2].unique().numel() == noise[: COPIES // 2].numel()


def test_copies_are_independent_and_copy_first() -> None:
    neuron = slr.Leaky(beta=0.9, init_hidden=True, noise=slr.MembraneNoise(1e-3))
    x = torch.arange(BATCH, dtype=torch.float64)[:, None].expand(-1, FEATURES)
    copies = membranes(neuron, neuron, x)
    torch.testing.assert_close(copies, x.expand(COPIES, -1, -1), rtol=0, atol=1e-2)
    assert copies.unique().numel() == copies.numel()


def test_files_what_was_sampled() -> None:
    neuron = slr.Leaky(beta=0.8, init_hidden=True, noise=slr.MembraneNoise(torch.tensor([0.1, 0.5, 2.0])))
    x = inputs_for("Leaky").requires_grad_()
    with Storing(Copies({"lif": neuron}, NoiseStream(0, COPIES, 0, COPIES))) as recording:
        for step in x:
            neuron(step)
    assert len(recording.tokens) == STEPS
    assert recording.batch == BATCH
    recording.weights.given = torch.ones(COPIES * BATCH)
    # The graph of one draw spans one step.
    (reached,) = torch.autograd.grad(recording.tokens[-1], x, recording.tokens[-1])
    assert reached[-1].all()
    assert not reached[:-1].any()


def test_samples_carry_no_graph() -> None:
    neuron = slr.Leaky(beta=0.8, noise=True)
    with Storing(Copies({"lif": neuron}, NoiseStream(0, COPIES, 0, COPIES))):
        spikes, mem = neuron(torch.ones(BATCH, FEATURES, requires_grad=True), torch.zeros(BATCH, FEATURES))
    assert not spikes.requires_grad
    assert not mem.requires_grad


def given_states(name: str) -> tuple[Tensor, ...]:
    """States that are not zero, in batch rows."""
    neuron = build(snn, name)
    run(neuron, inputs_for(name))
    generator = torch.Generator().manual_seed(5)
    return tuple(3 * torch.rand(state.shape, generator=generator) for state in initial_states(neuron))


def loss_and_gradient(
    name: str, reset: str, states: tuple[Tensor, ...], estimator: str = "vanilla"
) -> dict[str, Tensor]:
    neuron = build(slr, name, learn=True, noise=True, reset_mechanism=reset, threshold=0.5)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        now, total = states, torch.zeros(())
        for step in x:
            output = neuron(step, *now)
            now = output[-len(now) :]
            total = total + output[0].flatten(1).sum(1)
        return (total - y).square()

    made = MAKERS[estimator](neuron, COPIES, seed=0)
    loss = made.backward(loss_fn, inputs_for(name), torch.linspace(0, 9, BATCH))
    return {"loss": loss, **gradients(neuron)}


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    ("name", "estimator"),
    [*((name, "vanilla") for name in CLASSES), *((name, "exact") for name in CLASSES if "LSTM" not in name)],
)
def test_given_states_are_copied(name: str, estimator: str, reset: str) -> None:
    states = given_states(name)
    copied = loss_and_gradient(name, reset, states, estimator)
    expanded = tuple(state.repeat(COPIES, *[1] * (state.dim() - 1)) for state in states)
    assert_same(copied, loss_and_gradient(name, reset, expanded, estimator))
    zeros = loss_and_gradient(name, reset, tuple(torch.zeros_like(state) for state in states), estimator)
    # Losses are of spike counts, and may be equal by chance.
    assert any(not torch.equal(copied[key], zeros[key]) for key in copied)


def test_state_by_keyword_is_copied() -> None:
    neuron = slr.Leaky(beta=0.9, noise=slr.MembraneNoise(1e-3))
    mem = torch.arange(BATCH * 1.0)[:, None]
    with Recording(Copies({"": neuron}, NoiseStream(0, COPIES, 0, COPIES))):
        _, after = neuron(torch.zeros(BATCH, 1), mem=mem)
    torch.testing.assert_close(after, (0.9 * mem - (mem > 1).float()).repeat(COPIES, 1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("estimator", ["vanilla", *COUNTERFACTUAL])
def test_learned_initial_state_gets_a_gradient(estimator: str) -> None:
    neuron = slr.Leaky(beta=0.9, noise=True)
    readout = nn.Linear(FEATURES, 1)
    start = torch.zeros(FEATURES, requires_grad=True)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return readout(neuron(x[:, 0], start.expand(BATCH, FEATURES))[0]).squeeze(1)

    MAKERS[estimator](neuron, COPIES).backward(loss_fn, *data())
    assert start.grad is not None
    assert start.grad.all()


def test_initial_state_of_a_noise_free_readout_is_kept() -> None:
    neuron = slr.Leaky(beta=0.9, noise=True)
    readout = snn.Leaky(beta=1.0, reset_mechanism="none")
    net = nn.ModuleList([neuron, readout])

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        spikes, _ = neuron(x[:, 0], neuron.reset_mem())
        return readout(0 * spikes, torch.full((BATCH, FEATURES), 7.0))[1].mean(1)

    assert slr.Vanilla(net, COPIES).backward(loss_fn, *data()).item() == pytest.approx(7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("estimator", "options"),
    [("vanilla", {}), ("vanilla", {"antithetic": True}), *((name, {}) for name in COUNTERFACTUAL)],
)
def test_both_ways_to_hold_states_give_the_same_gradient(estimator: str, options: Any, device: str) -> None:
    results = []
    for init_hidden in (False, True):
        net = Net(init_hidden).to(device)
        made = MAKERS[estimator](net, COPIES, seed=3, **options)
        for _ in range(2):
            made.backward(net.loss, *data(device=device))
        results.append(gradients(net))
    assert_same(*results)


# What rates knows of the first batch has a part in its later gradients.
@pytest.mark.parametrize(("estimator", "options"), [("vanilla", {}), ("exact", {"control": 0.3})])
@pytest.mark.parametrize("init_hidden", [False, True])
def test_batches_of_other_sizes_follow_each_other(init_hidden: bool, estimator: str, options: Any) -> None:
    x, y = data()
    net, fresh = Net(init_hidden), Net(init_hidden)
    made = MAKERS[estimator](net, COPIES, **options)
    for size in (BATCH, 2, 1):
        net.zero_grad()
        torch.manual_seed(0)
        made.backward(net.loss, x[:size], y[:size])
        with torch.no_grad():
            net(x)
    torch.manual_seed(0)
    MAKERS[estimator](fresh, COPIES, **options).backward(fresh.loss, x[:1], y[:1])
    assert_same(gradients(net), gradients(fresh))


def test_time_first_targets_are_an_error() -> None:
    net = Net()
    x, _ = data()
    with pytest.raises(
        ValueError, match=r"lif1 \(Leaky\) got an input of shape .*but there are 4 targets.*batch first"
    ):
        slr.Vanilla(net, COPIES).backward(net.loss, x, torch.zeros(STEPS, BATCH, dtype=torch.long))


def test_time_first_input_is_an_error() -> None:
    neuron = slr.Leaky(beta=0.9, noise=True)
    with pytest.raises(ValueError, match="one time step with the batch first"):
        slr.Vanilla(neuron, COPIES).backward(lambda x, y: neuron(x)[0], torch.ones(STEPS, BATCH, 3), torch.ones(BATCH))


@pytest.mark.parametrize("rows", [1, BATCH + 1, 2 * BATCH])
def test_state_that_does_not_fit_is_an_error_unless_zero(rows: int) -> None:
    neuron = slr.Leaky(beta=0.9, noise=True)
    estimator = slr.Vanilla(neuron, COPIES)
    with pytest.raises(ValueError, match=r"Leaky got a state of shape .*reset_mem\(\) or reset\(net\)"):
        estimator.backward(lambda x, y: neuron(x[:, 0], torch.ones(rows, FEATURES))[0].sum(1), *data())
    estimator.backward(lambda x, y: neuron(x[:, 0], torch.zeros(rows, FEATURES))[0].sum(1), *data())


@pytest.mark.parametrize(
    ("name", "maker"),
    [*((name, "vanilla") for name in CLASSES), *((name, "exact") for name in CLASSES if "LSTM" not in name)],
)
def test_left_over_state_is_warned_of(name: str, maker: str) -> None:
    net = nn.ModuleDict({"lif": build(slr, name, noise=True, init_hidden=True)})
    x = inputs_for(name)[0]
    estimator = MAKERS[maker](net, COPIES)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return net["lif"](x).flatten(1).sum(1)

    estimator.backward(loss_fn, x, torch.zeros(BATCH))
    # The graph of the first pass, which the state still holds, is gone.
    said = pytest.warns(UserWarning, match=rf"lif \({name}\) starts from the membrane .*snntorch_lr.reset\(net\)")
    with said, suppress(RuntimeError):
        estimator.backward(loss_fn, x, torch.zeros(BATCH))


@pytest.mark.parametrize("maker", ["vanilla", *COUNTERFACTUAL])
@pytest.mark.parametrize("init_hidden", [False, True])
def test_fresh_states_are_not_warned_of(init_hidden: bool, maker: str) -> None:
    net = Net(init_hidden)
    estimator = MAKERS[maker](net, COPIES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            estimator.backward(net.loss, *data())


class Monitored(Net):
    """With a noise-free neuron beside the path to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.monitor = snn.Leaky(beta=0.9, init_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.monitor(out)
        return out


@pytest.mark.parametrize("estimator", ["vanilla", *COUNTERFACTUAL])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_network_afterwards(fails: bool, estimator: str) -> None:
    net = Monitored()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        if fails:
            raise KeyError
        return losses

    with pytest.raises(KeyError) if fails else nullcontext():
        MAKERS[estimator](net, COPIES).backward(loss_fn, *data())
    for module in net.modules():
        assert not {"sampler", "_step"} & vars(module).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    net.zero_grad()
    x, y = data()
    outputs = net(x)
    assert outputs.shape == (BATCH, 2)
    nn.functional.cross_entropy(outputs, y).backward()
    assert net.fc1.weight.grad.any()


@pytest.mark.parametrize("estimator", ["vanilla", *COUNTERFACTUAL])
def test_another_network_in_the_loss_is_left_alone(estimator: str) -> None:
    net, alone, teacher = Net(), Net(), Net()
    rows: list[int] = []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        rows.append(len(teacher(x)))
        return net.loss(x, y)

    MAKERS[estimator](net, COPIES, seed=0).backward(loss_fn, *data())
    MAKERS[estimator](alone, COPIES, seed=0).backward(alone.loss, *data())
    assert set(rows) == {BATCH}
    assert gradients(teacher) == {}
    assert_same(gradients(net), gradients(alone))


def test_neuron_whose_noise_is_off_is_not_sampled() -> None:
    net = Net()
    net.lif2.eval()
    net.fc2.requires_grad_(False)
    rows = rows_fed_to(net.readout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slr.Vanilla(net, COPIES).backward(net.loss, *data())
    assert rows[-STEPS:] == [COPIES * BATCH] * STEPS
    assert net.lif1.noise.log_sigma.grad is not None
    assert net.lif2.noise.log_sigma.grad is None
