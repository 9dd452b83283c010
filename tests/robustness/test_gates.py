from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import snntorch_lr as slr
from snntorch_lr.robustness import Gate, Protocol, RobustnessReport, Target, evaluate, gates, score

from . import canaries

SMALL = Protocol(draws=4, votes=8, gate_images=24)


def run(net: nn.Module, noise: str = "both") -> RobustnessReport:
    attacks = ["PGD-20", canaries.TRANSFER]
    return evaluate(net, [canaries.digits()], [0.2], attacks, protocol=replace(SMALL, noise=noise))


def failed(report: RobustnessReport) -> set[str]:
    return {gate.name[:2] for gate in report.gates if gate.passed is False}


@pytest.mark.parametrize("noisy", [False, True])
def test_an_honest_network_passes(noisy: bool) -> None:
    net = canaries.trained()
    report = run(slr.add_noise(net, 0.3) if noisy else net)
    for row in report.rows:
        assert all(gate.passed is not False for gate in row.findings.gates), report.table()
    assert [gate.name[:2] for gate in report.gates] == [f"G{index}" for index in range(10)]
    if noisy:
        (again,) = run(net, noise="on").rows
        assert again.findings == report.rows[1].findings, "the seed decides them"


@pytest.mark.parametrize(
    ("canary", "expected"),
    [
        (canaries.with_zero_gradient, {"G1", "G2", "G3", "G7"}),
        (canaries.with_steep_surrogate, {"G7"}),
        (partial(canaries.with_unreset_state, detached=True), {"G0"}),
        (partial(canaries.with_unreset_state, detached=False), {"G0"}),
        (canaries.with_saturated_rates, {"G1"}),
        (canaries.with_seed_of_its_own, {"G0"}),
    ],
)
def test_canaries_are_called_out(canary: Callable[[], nn.Module], expected: set[str]) -> None:
    report = run(canary())
    assert failed(report) >= expected, report.table()
    if canary is canaries.with_zero_gradient:
        # A surrogate without a module does not stop the likelihood ratio.
        assert "cosine 0.00" in report.gates[7].detail
    assert "MASKING SUSPECTED" in str(report.worst_case[0.2])
    assert "MASKING SUSPECTED" in report.table()
    assert "MASKING SUSPECTED" in report.to_markdown()


def test_a_network_without_spikes_has_nothing_to_differentiate_through() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    report = run(net)
    passed = {gate.name[:2]: gate.passed for gate in report.gates}
    assert passed["G6"] is passed["G7"] is True


def test_a_network_that_has_nothing_right_is_not_judged() -> None:
    images, labels = canaries.digits(8)
    net = canaries.trained()
    net.readout.bias.data.fill_(-1e3)[0] = 1e3
    chosen = labels != 0
    report = evaluate(net, [(images[chosen], labels[chosen])], [0.2], ["PGD-20"], protocol=SMALL)
    assert [gate.passed for gate in report.gates] == [None]
    assert report.worst_case[0.2].accuracy == 0
    assert "nothing to attack" in report.table()
    for plot in report.plot_epsilon, report.plot_steps, report.plot_surrogates:
        assert plot().axes


class TestBlackBox:
    names = torch.tensor([True] * 90 + [False] * 10)

    def test_passes_within_the_interval(self) -> None:
        black = self.names.clone()
        black[:4] = False
        assert gates.black_box({0.1: self.names}, {0.1: black}).passed

    def test_fails_beyond_it(self) -> None:
        black = self.names.clone()
        black[:12] = False
        gate = gates.black_box({0.1: self.names}, {0.1: black})
        assert gate.passed is False
        assert "12.0 %" in gate.detail

    def test_needs_both(self) -> None:
        assert gates.black_box({0.1: self.names}, {}).passed is None
        assert gates.black_box({}, {0.1: self.names}).passed is None


def test_more_steps_that_break_more_mean_that_the_suite_had_not_converged() -> None:
    images, labels = canaries.digits(24)
    target = Target(canaries.trained(), draws=2)
    probe = gates.Probe(target, images, labels, votes=4).only(score(target, images, labels).right)
    survived, longer = torch.ones(len(probe.images), dtype=torch.bool), gates.longer(2)
    assert gates.convergence(survived, probe.right_after(0.3, longer), 0.3, longer).passed is False
    assert gates.convergence(~survived, ~survived, 0.3, longer).passed is True


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_network_on_a_gpu_is_judged_like_one_on_the_cpu() -> None:
    report = run(canaries.trained().cuda())
    assert all(gate.passed is not False for gate in report.gates), report.table()


def test_guarded_checks_fail_with_their_reason() -> None:
    def broken() -> Gate:
        raise RuntimeError("first line\nsecond line")

    assert gates.guarded("G2 x", broken) == Gate("G2 x", False, "could not be checked: RuntimeError: first line")
