from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn

import snntorch_lr as slr
from snntorch_lr.robustness import RobustnessReport, evaluate

from . import canaries

SMALL = {"draws": 4, "votes": 8, "gate_images": 24}


def run(net: nn.Module, **options: object) -> RobustnessReport:
    return evaluate(net, [canaries.digits()], [0.2], attacks=["PGD-20"], **(SMALL | options))  # type: ignore[arg-type]


def failed(report: RobustnessReport) -> set[str]:
    return {gate.name[:2] for gate in report.gates if gate.passed is False}


@pytest.mark.parametrize("noisy", [False, True])
def test_an_honest_network_passes(noisy: bool) -> None:
    net = canaries.trained()
    report = run(slr.add_noise(net, 0.3) if noisy else net)
    for row in report.rows:
        assert all(gate.passed is not False for gate in row.findings.gates), report.table()
    assert [gate.name[:2] for gate in report.gates] == [f"G{index}" for index in range(10)]
    assert run(net).gates == report.gates


@pytest.mark.parametrize(
    ("canary", "expected"),
    [
        (canaries.with_zero_gradient, {"G1", "G2", "G3"}),
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
    assert "MASKING SUSPECTED" in str(report.worst_case[0.2])
    assert "MASKING SUSPECTED" in report.table()
    assert "MASKING SUSPECTED" in report.to_markdown()
