from __future__ import annotations

import sys

import pytest

import snntorch_lr as slr
from snntorch_lr.robustness import Descent, Headline, RobustnessReport, evaluate, gradient_attack, share_of, verdict
from snntorch_lr.robustness.gates import Gate

from . import canaries

PGD = gradient_attack("PGD", Descent(steps=3, length=0.5))


@pytest.fixture(scope="module")
def report() -> RobustnessReport:
    return evaluate(
        slr.add_noise(canaries.trained(), 0.3), [canaries.digits(20)], [0.1, 0.3], [PGD],
        baselines={"blind": canaries.with_zero_gradient()}, draws=2, votes=4, gate_images=8, corruptions=["contrast"],
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


def test_a_headline_prints_what_the_gates_say() -> None:
    assert str(Headline(0.5, 0.4, 0.6, 96, "all gates passed")) == "50.0 ± 10.0 % (all gates passed)"


def test_verdict_names_what_failed_before_what_is_missing() -> None:
    passed, missing, failed = (Gate(f"G{i} x", state, "") for i, state in enumerate((True, None, False)))
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
