from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import snntorch_lr as slr
from snntorch_lr.robustness import (
    Descent,
    Gate,
    Headline,
    Protocol,
    RobustnessReport,
    Row,
    Target,
    evaluate,
    gates,
    gradient_attack,
    share_of,
    suite,
    verdict,
)
from snntorch_lr.robustness.report import Subject

from . import canaries

PGD = gradient_attack("PGD", Descent(steps=3, length=0.5))


@pytest.fixture(scope="module")
def report() -> Iterator[RobustnessReport]:
    with pytest.MonkeyPatch.context() as patch:
        # Short attacks of the gates, which have tests of their own.
        patch.setattr(gates, "ASCENT", replace(gates.ASCENT, steps=5, length=0.5))
        patch.setattr(gates, "CURVE_STEPS", (1, 5))
        patch.setattr(gates, "LONGER", 8)
        yield made()


def made() -> RobustnessReport:
    return evaluate(
        slr.add_noise(canaries.trained(), 0.3), [canaries.digits(20)], [0.1, 0.3], [PGD, canaries.TRANSFER],
        baselines={"blind": canaries.with_zero_gradient()},
        protocol=Protocol(draws=2, votes=4, gate_images=8, corruptions=["contrast"]),
    )  # fmt: skip


def test_no_worst_case_stands_without_its_gates(report: RobustnessReport) -> None:
    blind = report.rows[2]
    assert verdict(blind.findings.gates).startswith("MASKING SUSPECTED (G1")
    assert verdict(report.gates) == "masking not ruled out (G6 not run)"
    assert str(report.worst_case[0.3]).endswith("% (masking not ruled out (G6 not run))")
    for text in str(report), report.to_markdown():
        (worst,) = (
            line for line in text.splitlines() if "worst case" in line and str(share_of(blind.worst(0.3))) in line
        )
        assert worst.rstrip(" |").endswith(f"{share_of(blind.worst(0.3))} !")
        for row in report.rows:
            for gate in row.findings.gates:
                assert gate.detail in text
    assert report.to_json()["rows"][2]["verdict"] == verdict(blind.findings.gates)


def test_a_row_is_right_where_it_is_right_under_everything() -> None:
    clean, *right = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]]).bool()
    attacks = *(gradient_attack(name, Descent(name)) for name in ("atan", "ste")), suite(["random noise"])[0]
    found = {attack.name: {0.1: each} for attack, each in zip(attacks, right, strict=True)}
    subject = Subject("net", "on", Target(torch.nn.Flatten()))
    row = Row(subject, clean, share_of(clean), attacks, found, {})
    assert row.under([], 0.1).tolist() == clean.tolist()
    assert row.under(["atan"], 0.1).tolist() == [True, True, False, False]
    assert row.worst(0.1).tolist() == [False] * 4
    assert {name: each[0.1].tolist() for name, each in row.by_surrogate().items()} == {
        "atan": [True, True, False, False], "ste": [False, True, True, False],
    }  # fmt: skip
    assert row.marked == "net, noise on ?"


def test_a_headline_prints_what_the_gates_say() -> None:
    assert str(Headline(0.5, 0.4, 0.6, 96, "all gates passed")) == "50.0 ± 10.0 % (all gates passed)"


def test_verdict_names_what_failed_before_what_is_missing() -> None:
    passed, missing, failed = (Gate(f"G{i} x", state, "") for i, state in enumerate((True, None, False)))
    assert verdict([]) == "masking not ruled out (gates not run)"
    assert verdict([passed]) == "all gates passed"
    assert verdict([passed, missing]) == "masking not ruled out (G1 not run)"
    assert verdict([passed, missing, failed]) == "MASKING SUSPECTED (G2 failed)"


def test_markdown_has_settings_tests_and_versions(report: RobustnessReport) -> None:
    text = report.to_markdown(level=3)
    assert "### Accuracy, ε = 0.3" in text
    assert "| PGD | white-box | " in text
    assert "steps 3" in text
    assert "Paired McNemar" in text
    assert "contrast 5" in text
    assert "snntorch-lr" in text
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith("| PGD |") and "±" in line}
    assert columns == {len(report.rows)}


def test_figures_show_every_row(report: RobustnessReport) -> None:
    for figure, panels in (report.plot_epsilon(), 1), (report.plot_steps(), 1), (report.plot_surrogates(), 2):
        assert len(figure.axes) == panels
        (legend,) = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert [label.split(",")[0].rstrip(" !?") for label in labels] == ["network", "network", "blind"]
        assert labels[2].startswith("blind !")
    budgets = report.plot_epsilon().axes[0].lines[0].get_xdata()
    assert list(budgets) == [0, 0.1, 0.3]


def test_figures_without_matplotlib_say_what_to_install(
    report: RobustnessReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"snntorch-lr\[experiments\]"):
        report.plot_steps()
