from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import snntorch_lr as slr
from snntorch_lr.robustness import (
    Budget,
    Descent,
    Protocol,
    RobustnessReport,
    Row,
    Target,
    evaluate,
    gates,
    score,
    share_of,
)
from snntorch_lr.robustness.report import Subject

from . import canaries
from .networks import counted

SMALL = Protocol(draws=4, votes=8, gate_images=24)


def run(net: nn.Module, noise: str = "both") -> RobustnessReport:
    attacks = ["PGD-20", canaries.TRANSFER]
    return evaluate(net, [canaries.digits()], [0.2], attacks, protocol=replace(SMALL, noise=noise), progress=False)


def failed(report: RobustnessReport) -> set[str]:
    return {gate.name[:2] for gate in report.gates if gate.passed is False}


@pytest.mark.parametrize("noisy", [False, True])
def test_an_honest_network_passes(noisy: bool) -> None:
    net = canaries.trained()
    report = run(slr.add_noise(net, 0.3) if noisy else net)
    for row in report.rows:
        assert all(gate.passed is not False for gate in row.findings.gates), report.table()
    assert [gate.name.split()[0] for gate in report.gates] == [f"G{index}" for index in range(11)]
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
    passed = {gate.name[:2]: gate.passed for gate in run(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).gates}
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
    assert report.plot_epsilon().axes


@pytest.mark.parametrize(("broken", "passed"), [(4, True), (12, False)])
def test_black_box_attacks_may_break_no_more_than_the_interval(broken: int, passed: bool) -> None:
    white = torch.tensor([True] * 90 + [False] * 10)
    black = white & (torch.arange(100) >= broken)
    measured = gates.black_box({0.1: white}, {0.1: black})
    assert measured[0] is passed
    assert f" {broken}.0 %" in measured[1]
    assert gates.black_box({0.1: white}, {})[0] is gates.black_box({}, {0.1: black})[0] is None


def probe_of(net: nn.Module, random: bool = True, **options: Any) -> gates.Probe:
    images, labels = canaries.digits(24)
    target = Target(net, draws=2, **options)
    return gates.Probe(target, images, labels, votes=4, random=random).only(score(target, images, labels).right)


def test_more_steps_that_break_more_mean_that_the_suite_had_not_converged() -> None:
    probe = probe_of(canaries.trained())
    longer, worst = gates.longer(probe.target), share_of(torch.arange(100) < 50)
    passed, said = gates.convergence(probe.right_after(0.3, longer), worst, 0.3, longer)
    assert passed is False
    assert "more steps of 4 draws" in said
    # Half of the survivors are a quarter of all images, a tenth are a twentieth.
    survivors = torch.arange(10)
    assert [gates.convergence(survivors >= n, worst, 0.3, longer)[0] for n in (1, 5)] == [True, False]
    assert gates.convergence(survivors[:0] > 0, worst, 0.3, longer)[0] is True


def test_a_claim_needs_images_and_small_tolerances() -> None:
    def gate(count: int, right: float) -> tuple[bool | None, str]:
        clean = torch.arange(count) < right * count
        row = Row(Subject("net", "off", Target(nn.Flatten())), clean, share_of(clean), (), {})
        return gates.enough(row, [], [0.1])

    for count, right, enough in (
        (32, 0.9, None),
        (199, 0.99, None),
        (200, 0.99, True),
        (200, 0.5, None),
        (500, 0.5, True),
    ):
        assert gate(count, right)[0] is enough
    assert gate(500, 0.5)[1] == "500 images (at least 200), G4 and G5 allow up to 4.4 points (at most 5)"


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.5])
def test_ascent_that_stops_when_nothing_is_left_breaks_the_same_images(epsilon: float) -> None:
    passes: list[int] = []
    ran, right = [], []
    for random in (True, False):
        probe = probe_of(canaries.trained(), random, noise=False, forward=counted(passes))
        passes.clear()
        right.append(probe.right_after(epsilon, gates.ASCENT))
        ran.append(len(passes))
    assert torch.equal(*right)
    assert (ran[1] < 10) == (epsilon == 0.5)
    assert ran[0] == gates.ASCENT.steps + 1


def test_each_candidate_of_an_attack_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_of(canaries.trained())
    broken = Descent(steps=20)(probe.target, probe.images, probe.labels, Budget(0.5), seed=0)
    halves = [torch.where((torch.arange(len(broken)) % 2 == half)[:, None, None, None], broken, probe.images)
              for half in (0, 1)]  # fmt: skip
    monkeypatch.setattr(Descent, "candidates", lambda *_, **__: halves)
    assert not probe.right_after(0.5, gates.ASCENT).any()
    assert not probe.right_after_frozen(0.5, gates.ASCENT).any()


def test_the_canary_fails_where_a_gate_lets_it_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_of(canaries.trained())
    assert gates.canary(probe) == (True, "G1, G2, G3 call out a masked copy")
    monkeypatch.setattr(gates.Probe, "vanishing", lambda probe: {"margin": 0.0})
    assert gates.canary(probe) == (False, "a copy without gradient passes G1")


def test_gates_take_few_passes() -> None:
    """A gate more, or one that measures again what another has, shows here."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    net = slr.add_noise(canaries.trained(), 0.3)
    net.register_forward_pre_hook(count)
    evaluate(net, [canaries.digits(16)], 0.1, "quick")
    # Of these, G4's are 200 without noise and 40 with it.
    assert passes <= 380


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_network_on_a_gpu_is_judged_like_one_on_the_cpu() -> None:
    report = run(canaries.trained().cuda())
    assert all(gate.passed is not False for gate in report.gates), report.table()


def test_a_check_that_cannot_run_fails_with_its_reason() -> None:
    def broken() -> gates.Measured:
        raise RuntimeError("first line\nsecond line")

    assert gates.guarded(broken) == (False, "could not be checked: RuntimeError: first line")
