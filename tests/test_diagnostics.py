from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import DEVICES, Net, assert_same, data, gradients

NAMES = [name for name, _ in Net().named_parameters()]


class Doubled(slr.Vanilla):
    """Twice the gradient: a relative bias of 1."""

    def backward(self, loss_fn: Any, inputs: Any, targets: Any) -> Tensor:
        before = gradients(self.net)
        loss = super().backward(loss_fn, inputs, targets)
        for name, gradient in gradients(self.net).items():
            parameter = self.net.get_parameter(name)
            parameter.grad = 2 * gradient - before.get(name, torch.zeros_like(gradient))
        return loss


class WithState(Net):
    """BatchNorm in front of the noise, dropout after it, and a buffer that is replaced by each call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(()))
        self.fc1 = nn.Sequential(self.fc1, self.norm)
        self.readout = nn.Sequential(self.dropout, self.readout)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


def report(net: Net, *args: Any, **options: Any) -> slr.GradientReport:
    return slr.gradient_report(net, net.loss, *data(), *args, **options)


@pytest.fixture(scope="module")
def precise() -> slr.GradientReport:
    """Many copies, so that everything is resolved."""
    net = Net()
    estimators = {"vanilla": "vanilla", "approximate": "approximate", "doubled": Doubled(net, 2000)}
    return report(net, estimators, copies=2000, repeats=6, reference=12)


def test_cosine_of_many_copies_is_close_to_one_and_to_what_can_be_reached(precise: slr.GradientReport) -> None:
    for name in NAMES:
        vanilla, best = precise.quality[name]["vanilla"], precise.reference_cosine[name]
        assert best is not None
        assert 0.9 < best <= 1
        assert vanilla.cosine is not None
        assert 0.85 < vanilla.cosine < 1.001


def test_one_call_is_not_part_of_its_own_reference() -> None:
    net = Net()
    reports = [report(net, ("vanilla",), copies=2, repeats=6, reference=2, seed=seed) for seed in range(10)]
    cosines = [r.quality["fc1.weight"]["vanilla"].cosine or 0.0 for r in reports]
    # Two gradients that are mostly noise agree by 1/√2 with their own mean.
    assert sum(cosines) / len(cosines) < 0.4


def test_bias_of_vanilla_is_within_its_floor(precise: slr.GradientReport) -> None:
    for name in NAMES:
        vanilla = precise.quality[name]["vanilla"]
        assert vanilla.bias is not None
        assert vanilla.bias_floor is not None
        assert 0 < vanilla.bias_floor < 0.4
        assert vanilla.bias < 3 * vanilla.bias_floor


def test_bias_of_twice_the_gradient_is_one_and_hides_in_no_other_figure(precise: slr.GradientReport) -> None:
    for name in NAMES:
        vanilla, doubled = precise.quality[name]["vanilla"], precise.quality[name]["doubled"]
        assert doubled.bias_floor is not None
        assert doubled.bias == pytest.approx(1, abs=3 * doubled.bias_floor)
        assert doubled.cosine == pytest.approx(vanilla.cosine, abs=0.1)


def test_bias_of_approximate_is_resolved(precise: slr.GradientReport) -> None:
    for name in NAMES:
        approximate = precise.quality[name]["approximate"]
        assert approximate.bias is not None
        assert approximate.bias_floor is not None
        if name == "fc2.weight":
            assert approximate.bias > 2 * approximate.bias_floor
        else:  # element-wise, or what is not approximated
            assert name == "fc1.weight" or approximate.bias < 3 * approximate.bias_floor


def test_surrogate_gradient_is_biased_but_for_a_noise_free_readout() -> None:
    measured = report(Net(), ("vanilla",), copies=50, repeats=2, reference=150)
    for name in ("fc2.bias", "readout.weight", "readout.bias"):
        surrogate = measured.quality[name]["surrogate, 1 draw"]
        assert surrogate.bias is not None
        assert surrogate.bias_floor is not None
        assert (surrogate.bias > 2 * surrogate.bias_floor) == (name == "fc2.bias")


def test_signal_to_noise_grows_with_copies() -> None:
    net = Net()
    estimators = {str(copies): slr.Vanilla(net, copies) for copies in (20, 80)}
    quality = report(net, estimators, repeats=100, reference=2).quality
    for name in ("fc2.bias", "lif2.noise.log_sigma", "fc2.weight"):
        few, many = quality[name]["20"].snr, quality[name]["80"].snr
        assert few is not None
        assert many is not None
        assert 2 < many / few < 8, name


def test_signal_to_noise_by_hand() -> None:
    net, x_y = Net(), data()
    kept: list[Tensor] = []

    class Keeping(slr.Vanilla):
        def backward(self, loss_fn: Any, inputs: Any, targets: Any) -> Tensor:
            loss = super().backward(loss_fn, inputs, targets)
            kept.append(net.fc2.weight.grad.clone().flatten())  # type: ignore[union-attr]
            return loss

    measured = slr.gradient_report(net, net.loss, *x_y, [Keeping(net, 4)], copies=4, repeats=5, reference=2)
    g = torch.stack(kept[-5:]).double()
    products = g @ g.T
    signal = (products.sum() - products.trace()) / 20
    snr = signal / g.var(0).sum()
    assert measured.quality["fc2.weight"]["keeping"].snr == pytest.approx(float(snr), rel=1e-3)


def test_what_has_no_surrogate_gradient_is_measured_without() -> None:
    net = Net()

    def zero_one(x: Tensor, y: Tensor) -> Tensor:
        return (net(x).argmax(1) != y).float()

    with pytest.warns(UserWarning, match="no surrogate gradient"):
        measured = slr.gradient_report(net, zero_one, *data(), ("vanilla",), copies=4, repeats=2, reference=2)
    assert list(measured.quality["fc1.weight"]) == ["vanilla"]
    # No gradient at all: nothing to divide by.
    assert measured.quality["readout.weight"]["vanilla"].cosine is None
    assert measured.quality["readout.weight"]["vanilla"].snr is None
    assert list(measured.cost) == ["vanilla"]
    json.dumps(measured.to_json(), allow_nan=False)


@pytest.mark.filterwarnings("ignore:BatchNorm")
@pytest.mark.parametrize("fails", [False, True])
def test_network_is_left_as_it_was_found(fails: bool) -> None:
    net = WithState()
    net.dropout.eval()
    net.fc1[0].bias.grad = filled = torch.ones(4)
    net.fc2.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    calls = net.calls
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        net.train()
        losses = net.loss(x, y)
        return losses * math.nan if fails and calls is not net.calls and net.calls > 8 else losses

    if fails:
        with pytest.raises(ValueError, match="not finite"):
            slr.gradient_report(net, loss_fn, *data(), copies=2, repeats=2, reference=4)
    else:
        measured = slr.gradient_report(net, loss_fn, *data(), copies=2, repeats=2, reference=4)
        assert "fc2.weight" not in measured.quality
    assert_same(state, {name: value for name, value in net.state_dict().items() if name in state})
    assert net.calls is calls
    assert net.fc1[0].bias.grad is filled
    assert torch.equal(filled, torch.ones(4))
    assert all(p.grad is None for p in net.parameters() if p is not net.fc1[0].bias)
    assert modes == [module.training for module in net.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not net.lif1.mem.any()
    assert net.lif1.mem.grad_fn is None


def test_same_seed_gives_the_same_figures_whatever_came_before() -> None:
    net = Net()
    first = report(net, copies=4, repeats=2, reference=3)
    torch.rand(3)
    assert report(net, copies=4, repeats=2, reference=3).quality == first.quality
    assert report(net, copies=4, repeats=2, reference=3, seed=1).quality != first.quality


def test_table_and_json_hold_every_figure(precise: slr.GradientReport) -> None:
    table = precise.table()
    assert str(precise) == table
    lines = [line.split() for line in table.splitlines()]
    for name in NAMES:
        for estimator in ("vanilla", "approximate", "doubled"):
            assert any(line[:2] == [name, estimator] and len(line) == 7 for line in lines)
    figures = [line for line in table.splitlines() if line.startswith(("parameter", *NAMES))]
    assert len({len(line) for line in figures}) == 1
    again = json.loads(json.dumps(precise.to_json(), allow_nan=False))
    assert again["quality"]["fc1.weight"]["vanilla"]["snr"] == precise.quality["fc1.weight"]["vanilla"].snr
    assert (again["copies"], again["repeats"], again["reference"], again["seed"]) == (2000, 6, 12, 0)


def test_cost_is_measured(precise: slr.GradientReport) -> None:
    assert list(precise.cost) == ["vanilla", "approximate", "doubled", "surrogate, 1 draw"]
    assert all(0 < cost.milliseconds < 10_000 for cost in precise.cost.values())


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_is_measured(device: str) -> None:
    net = Net().to(device)
    measured = slr.gradient_report(net, net.loss, *data(device=device), copies=4, repeats=2, reference=2)
    assert measured.device.startswith(device)
    assert all((cost.megabytes is None) == (device == "cpu") for cost in measured.cost.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 1}, "repeats must be at least 2"),
        ({"reference": 1}, "reference must be at least 2"),
        ({"copies": 1}, "copies must be at least 2"),
        ({"repeats": 2.5}, "repeats must be a positive integer"),
        ({"estimators": ("exact",)}, "choose one of counterfactual, vanilla, approximate"),
        ({"estimators": ()}, "no estimator"),
        ({"estimators": ("vanilla", "vanilla")}, "two estimators are called 'vanilla'"),
        ({"estimators": [slr.Vanilla(Net())]}, "another network"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report(Net(), **options)


def test_a_network_whose_noise_is_off_is_refused() -> None:
    with pytest.raises(ValueError, match=r"net\.train\(\)"):
        report(Net().eval())


def test_a_network_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        report(Net().requires_grad_(False))


def test_prints_the_fitted_control_of_counterfactual_credit_and_leaves_that_of_the_network() -> None:
    net = Net(noise="escape")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    steps, control = net.lif1.control.steps, net.lif1.control
    estimators = {"fitted": "counterfactual", "fixed": slr.Counterfactual(net, control=0.25)}
    report = slr.gradient_report(net, net.loss, *data(), estimators, copies=2, repeats=2, reference=2)
    assert report.control["fixed"] == {"lif1": 0.25, "lif2": 0.25}
    assert report.control["fitted"].keys() == {"lif1", "lif2"}
    assert 0 <= report.control["fitted"]["lif1"] != net.lif1.control.start
    assert f"λ of fitted: lif1 {report.control['fitted']['lif1']:.2f}, lif2" in str(report)
    assert_same(before, dict(net.state_dict()))
    assert (net.lif1.control, control.steps, control.pending) == (control, steps, None)


def test_the_surrogate_gradient_is_one_whatever_was_chosen_for_the_network() -> None:
    net = Net()
    expected = report(net, ("vanilla",), copies=2, repeats=2, reference=3)
    slr.use_gradient(net, "counterfactual")
    assert report(net, ("vanilla",), copies=2, repeats=2, reference=3).quality == expected.quality
    assert net.lif1.sampler is not None


def test_names_the_cause_of_a_gradient_that_is_exactly_zero() -> None:
    net = Net()
    nn.init.constant_(net.fc2.bias, -100)
    net.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="never fired|same loss"):
        measured = report(net, ("vanilla",), copies=2, repeats=2, reference=2)
    assert measured.zero["fc1.weight"] == "lif2 (Leaky) never fired"
    assert measured.zero["unused.weight"] == "the loss does not depend on it"
    assert "readout.bias" not in measured.zero
    assert "unused.weight: the gradient is exactly zero, the loss does not depend on it" in str(measured)
