"""Noise levels by the membrane potentials on a batch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import functional as SF
from torch import Tensor, nn

import snntorch_lr as slr


def over_time(net: nn.Module) -> Any:
    return lambda x: slr.rollout(net, x, num_steps=10)


def deep(**options: Any) -> nn.Sequential:
    """A network whose second layer never fires as torch makes it, and a spiking readout."""
    torch.manual_seed(0)
    neurons = [snn.Leaky(beta=0.8, init_hidden=True, **options) for _ in range(3)]
    net = nn.Sequential(nn.Linear(20, 30), neurons[0], nn.Linear(30, 30), neurons[1], nn.Linear(30, 4), neurons[2])
    with torch.no_grad():
        for block in (net[0], net[2], net[4]):
            block.weight.mul_(0.4)
    return net


def data() -> Tensor:
    return torch.rand(64, 20, generator=torch.Generator().manual_seed(1))


def levels(net: nn.Sequential) -> list[float]:
    return [float(net[index].noise.sigma) for index in (1, 3, 5)]


def test_levels_are_relative_to_the_spread_of_membranes() -> None:
    net = deep(threshold=2.0)
    with pytest.warns(UserWarning, match=r"^3 \(Leaky\), 5 \(Leaky\) never fired on the sample.*larger weights"):
        calibration = slr.calibrate(slr.add_noise(net, kind="escape"), data(), over_time(net), sigma=0.3, min_rate=0)
    assert [layer.name for layer in calibration.layers] == ["1", "3", "5"]
    assert [layer.readout for layer in calibration.layers] == [False, False, True]
    assert {layer.read for layer in calibration.layers} == {"spikes"}
    assert levels(net) == pytest.approx([0.3 * layer.spread for layer in calibration.layers])


def test_a_silent_readout_gets_its_threshold_but_no_more_than_ten_spreads() -> None:
    net = deep(threshold=2.0)
    readout = slr.calibrate(slr.add_noise(net, kind="escape"), data(), over_time(net)).layers[-1]
    assert readout.rate_off < 0.05
    assert readout.spread > 0.2
    assert readout.sigma == pytest.approx(2)
    net[5].threshold.fill_(20000)
    with pytest.warns(UserWarning, match="5 .Leaky. never fired on the sample"):
        far = slr.calibrate(net, data(), over_time(net)).layers[-1]
    assert far.sigma == pytest.approx(10 * far.spread)
    assert "fires at 0 even with noise: little can be learned before it" in far.note


def test_a_readout_that_fires_is_left_in_peace() -> None:
    net = deep(threshold=0.3)
    with torch.no_grad():
        net[4].bias.fill_(0.3)
    readout = slr.calibrate(slr.add_noise(net), data(), over_time(net)).layers[-1]
    assert readout.rate_off > 0.05
    assert readout.sigma == pytest.approx(0.25 * readout.spread)
    assert readout.sigma < 0.29


class Readout(nn.Module):
    """States by hand; returns spikes and membrane potentials over time, ``[time, batch, 4]``."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1 = nn.Linear(20, 30), snn.Leaky(beta=0.8, threshold=0.3)
        self.fc2, self.lif2 = nn.Linear(30, 4), snn.Leaky(beta=0.8, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2, record = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for _ in range(8):
            spk, mem1 = self.lif1(self.fc1(x), mem1)
            out, mem2 = self.lif2(self.fc2(spk), mem2)
            record.append((out, mem2))
        spikes, potentials = zip(*record, strict=True)
        return torch.stack(spikes), torch.stack(potentials)


READS: dict[str, Any] = {
    "spikes": lambda net, x: net(x)[0].mean(),
    "membrane": lambda net, x: net(x)[1].square().mean(),
    "both": lambda net, x: net(x)[0].mean() + net(x)[1].square().mean(),
    "first spike": lambda net, x: SF.ce_temporal_loss()(net(x)[0], torch.arange(len(x)) % 4),
    "unknown": lambda net, x: (net(x)[0].sum(0).argmax(1) == 0).float().mean(),
}


@pytest.mark.parametrize("read", READS)
def test_what_a_loss_reads_is_found(read: str) -> None:
    net = slr.add_noise(Readout(threshold=0.2), kind="escape")
    hidden, readout = slr.calibrate(net, data(), loss_fn=lambda x: READS[read](net, x)).layers
    assert (hidden.read, readout.read) == ("unknown" if read == "unknown" else "spikes", read)
    assert readout.sigma > 0
    assert readout.note.startswith("the loss reads only its membrane potential") == (read == "membrane")


def test_a_loss_of_first_spikes_gets_less_noise_than_its_threshold() -> None:
    sigma = {}
    for read in ("spikes", "first spike"):
        net = slr.add_noise(Readout(threshold=2.0), kind="escape")
        sigma[read] = slr.calibrate(net, (data(),), loss_fn=lambda x, r=read, n=net: READS[r](n, x)).layers[1].sigma
    assert 0.1 < sigma["first spike"] < 1.4
    assert sigma["spikes"] == pytest.approx(2)


@pytest.mark.parametrize("options", [{"reset_mechanism": "none"}, {"threshold": 20000.0}])
@pytest.mark.parametrize("kind", ["membrane", "escape"])
def test_a_readout_of_membrane_potentials_that_nothing_resets_gets_no_noise(kind: str, options: Any) -> None:
    class Membranes(Readout):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[1]

    net = Membranes(**options)
    with pytest.warns(UserWarning, match=r"lif2 \(Leaky\) got no noise: only the membrane potential is read"):
        slr.add_noise(net, kind=kind, sample=data())
    assert net.lif2.noise is None
    assert net.lif1.noise is not None
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slr.attach(optimizer, net)
    with warnings.catch_warnings():
        # It resets in principle, but never does.
        warnings.simplefilter("error")
        net(data()).square().mean().backward()
        optimizer.step()
    assert not torch.equal(net.fc1.weight, before["fc1.weight"])


def test_forward_and_a_loss_are_not_given_both() -> None:
    net = slr.add_noise(Readout())
    with pytest.raises(ValueError, match="give forward, which returns the output, or loss_fn"):
        slr.calibrate(net, data(), net, loss_fn=lambda x: net(x)[0].mean())


@pytest.mark.parametrize("kind", ["membrane", "escape"])
def test_a_layer_that_hardly_fires_gets_as_much_noise_as_it_takes(kind: str) -> None:
    net = deep(threshold=2.0)
    calibration = slr.calibrate(slr.add_noise(net, kind=kind), data(), over_time(net), sigma=0.3)
    for layer in calibration.layers[:2]:
        assert 0.3 * layer.spread < layer.sigma < 2
        # Measured once more, with other noise.
        assert 0.018 < layer.rate_on < 0.06
    more = slr.calibrate(net, data(), over_time(net), sigma=0.3, min_rate=0.1)
    assert all(layer.rate_on > 0.09 for layer in more.layers)
    with pytest.raises(ValueError, match=r"min_rate is in spikes per neuron and time step, in \[0, 0.5\), got 20"):
        slr.calibrate(net, data(), over_time(net), min_rate=20)


def test_spread_is_the_standard_deviation_of_the_membrane_potential() -> None:
    net = slr.add_noise(nn.Sequential(nn.Linear(20, 5), snn.Leaky(beta=0.9, init_hidden=True)))
    (layer,) = slr.calibrate(net, data(), over_time(net)).layers
    seen = []
    net[1].register_forward_hook(lambda neuron, *_: seen.append(neuron.mem.detach()))
    with slr.noise_off(net):
        spikes = slr.rollout(net, data(), num_steps=10)
    assert layer.spread == pytest.approx(float(torch.stack(seen).std(correction=0)), rel=1e-5)
    assert layer.rate_off == pytest.approx(float(spikes.mean()))


class Awkward(nn.Module):
    """Layers registered in another order than data flows, states by hand, BatchNorm, a linear readout at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.late, self.early = nn.Linear(6, 2), snn.RLeaky(beta=0.9, linear_features=6), snn.Leaky(beta=0.9)
        self.second, self.norm, self.first = nn.Linear(8, 6), nn.BatchNorm1d(8), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        mem, (spk, state) = self.early.reset_mem(), self.late.reset_mem()
        total = torch.zeros(())
        for _ in range(6):
            out, mem = self.early(self.norm(self.first(x)), mem)
            spk, state = self.late(self.second(out), spk, state)
            total = total + self.head(spk)
        return total


def test_layers_are_found_in_the_order_of_the_data_and_nothing_else_of_the_network_changes() -> None:
    torch.manual_seed(0)
    net = slr.add_noise(Awkward())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calibration = slr.calibrate(net, data())
    assert [layer.name for layer in calibration.layers] == ["early", "late"]
    assert not any(layer.readout for layer in calibration.layers)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"early.noise.log_sigma", "late.noise.log_sigma"}
    assert all(neuron.noise.forced is None for neuron in (net.early, net.late))
    assert net.training


def test_add_noise_with_a_sample_calibrates_and_without_does_not() -> None:
    one, two = deep(threshold=0.2), deep(threshold=0.2)
    assert slr.add_noise(one, 0.3, kind="escape", sample=data(), forward=over_time(one)) is one
    slr.calibrate(slr.add_noise(two, kind="escape"), data(), over_time(two), 0.3)
    assert all(first.shape == second.shape for first, second in zip(one.parameters(), two.parameters(), strict=True))
    assert levels(one) == pytest.approx(levels(two), rel=0.1)
    assert levels(slr.add_noise(deep())) == pytest.approx([0.5] * 3)


def test_the_default_level_is_a_quarter_of_the_spread_with_a_sample() -> None:
    net = deep(threshold=0.2)
    slr.add_noise(net, sample=data(), forward=over_time(net))
    assert levels(net)[0] == pytest.approx(0.25 * slr.calibrate(net, data(), over_time(net)).layers[0].spread)


def test_each_neuron_keeps_its_own_level_relative_to_the_spread() -> None:
    net = slr.add_noise(deep(threshold=0.2), torch.full((30,), 0.3), only=["1", "3"])
    net[5] = nn.Identity()
    calibration = slr.calibrate(net, data(), over_time(net), torch.linspace(0.1, 1, 30))
    assert torch.allclose(net[1].noise.sigma, torch.linspace(0.1, 1, 30) * calibration.layers[0].spread)


def test_a_forward_pass_that_leaves_a_neuron_out_is_refused() -> None:
    net = slr.add_noise(deep())
    with pytest.raises(ValueError, match=r"did not run 3 \(Leaky\), 5 \(Leaky\),.*forward="):
        slr.calibrate(net, data(), lambda x: net[1](net[0](x)))
    assert net[1].noise.forced is None


def test_the_table_says_what_was_done() -> None:
    net = slr.add_noise(deep(threshold=0.2))
    calibration: slr.Calibration = slr.calibrate(net, data(), over_time(net))
    lines = str(calibration).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert lines[-1].startswith("5 (readout)  ")
    assert lines[-1].endswith(f"{calibration.layers[-1].sigma:.3g}")


@pytest.mark.parametrize("estimator", ["counterfactual", "approximate"])
def test_a_network_that_is_attached_already_trains_as_if_it_had_not_been_calibrated(estimator: str) -> None:
    net = slr.add_noise(deep(threshold=0.2), kind="escape")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hook = slr.attach(optimizer, net, estimator)
    slr.calibrate(net, data(), lambda x: torch.stack([net(x) for _ in range(5)]))
    assert all(neuron.control.steps == 0 and neuron.control.pending is None for neuron in (net[1], net[3], net[5]))
    assert hook._first is not None
    assert not hook._first._some
    assert net[1].sampler is net[5].sampler is not None
    over_time(net)(data()).mean().backward()
    optimizer.step()


def test_a_sample_with_nan_changes_no_level() -> None:
    net = slr.add_noise(deep(), kind="escape")
    sample = data()
    sample[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"potentials of 1 \(Leaky\) are not finite on the sample; no noise level"):
        slr.calibrate(net, sample, over_time(net))
    assert levels(net) == pytest.approx([0.5] * 3)
