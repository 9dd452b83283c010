from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

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
from snntorch_lr.robustness.figures import COLORS, colors_of
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
        protocol=Protocol(draws=2, votes=4, gate_images=8),
    )  # fmt: skip


def test_no_worst_case_stands_without_its_gates(report: RobustnessReport) -> None:
    blind = report.rows[2]
    assert verdict(blind.findings.gates).startswith("MASKING SUSPECTED (G1")
    assert verdict(report.gates) == "masking not ruled out (G6 not run)"
    assert isinstance(report.worst_case[0.3], Headline)
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
    row = Row(subject, clean, share_of(clean), attacks, found)
    assert row.under([], 0.1).tolist() == clean.tolist()
    assert row.under(["atan"], 0.1).tolist() == [True, True, False, False]
    assert row.worst(0.1).tolist() == [False] * 4
    assert {name: each[0.1].tolist() for name, each in row.by_surrogate().items()} == {
        "atan": [True, True, False, False], "ste": [False, True, True, False],
    }  # fmt: skip
    assert row.marked == "net, noise on ?"


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
    assert "snntorch-lr" in text
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith("| PGD |") and "±" in line}
    assert columns == {len(report.rows)}


def test_a_data_frame_holds_every_accuracy(report: RobustnessReport) -> None:
    frame = report.to_dataframe()
    attacks = sum(len(row.right) + 1 for row in report.rows) * len(report.epsilons)
    assert len(frame) == attacks + len(report.rows) * 2
    worst = frame.query("network == 'network' and noise == 'on' and attack == 'worst case' and epsilon == 0.3")
    assert worst.accuracy.item() == share_of(report.rows[1].worst(0.3)).accuracy
    assert worst.gates.item() == verdict(report.rows[1].findings.gates)
    clean = frame.query("attack == 'clean' and network == 'blind'")
    assert clean.accuracy.item() == share_of(report.rows[2].clean).accuracy


def test_the_html_page_has_everything_and_needs_nothing(report: RobustnessReport, tmp_path: Path) -> None:
    named = replace(report, rows=tuple(
        replace(row, subject=replace(row.subject, network=f"<b>{row.subject.network}")) for row in report.rows
    ))  # fmt: skip
    named.html(tmp_path / "report.html", "Tom & Jerry", note="Command: `run <me>`")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"<script|<link|@import|(?:src|href)=[\"'](?!data:|#)|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text
    assert "<title>Tom &amp; Jerry</title>" in text
    assert "run &lt;me&gt;" in text
    assert "<b>" not in text
    assert text.count("<svg") == 3
    for row in report.rows:
        for gate in row.findings.gates:
            assert gate.detail in unescape(text).replace("\xa0", " ")
    shown = sum(len(row.examples) for row in report.rows)
    assert text.count('class="broken"') == shown > 0
    assert text.count("data:image/png;base64,") == 4 * shown
    assert "spikes of hidden" in text
    assert len(re.findall("<table>", text)) == len(re.findall('<div class="scroll"><table>', text))


def test_a_network_has_one_color_in_all_figures(report: RobustnessReport) -> None:
    colors = colors_of(row.subject.network for row in report.rows)
    assert len(set(colors.values())) == 2
    for figure in report.figures().values():
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            for handle, row in zip(handles, report.rows, strict=True):
                assert row.marked in labels[handles.index(handle)]
                assert handle.lines[0].get_color() == colors[row.subject.network]
                assert handle.lines[0].get_marker() == "o"
                assert (handle.lines[0].get_markerfacecolor() == "white") == (row.subject.noise == "on")
                assert handle.has_xerr or handle.has_yerr


def test_colors_are_of_the_name_and_those_of_others_are_left() -> None:
    fixed = {"surrogate": "#0072B2", "likelihood-ratio": "#D55E00", "surrogate, noise": "#56B4E9"}
    assert colors_of(fixed) == fixed
    assert colors_of(reversed([*fixed])) == fixed
    found = colors_of(["mine", "yours", *fixed])
    assert found.items() >= fixed.items()
    assert len(set(found.values())) == 5
    assert len(colors_of(map(str, range(40)))) == 40
    assert colors_of(["lr-noisy-input"])["lr-noisy-input"] == COLORS["likelihood ratio noisy input"]


def test_no_worst_case_is_drawn_above_a_curve_of_its_gates(report: RobustnessReport) -> None:
    weak = replace(report, rows=tuple(
        replace(row, findings=replace(row.findings, ladder={0.3: 0.2, 0.5: 0.9, 1.0: 0.0})) for row in report.rows
    ))  # fmt: skip
    for each in report, weak:
        (axes,) = each.plot_epsilon().axes
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert len(dotted) == len(each.rows)
        for row, line in zip(each.rows, dotted, strict=True):
            worst = 100 * share_of(row.worst(0.3)).accuracy
            assert line.get_xdata()[0] == 0.3
            assert line.get_ydata()[0] == pytest.approx(worst)
            assert max(line.get_ydata()) <= worst + 1e-9


def test_figures_show_every_row(report: RobustnessReport) -> None:
    for figure, panels in (report.plot_epsilon(), 1), (report.plot_steps(), 1), (report.plot_surrogates(), 2):
        assert len(figure.axes) == panels
        (legend,) = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert [label.split(",")[0].rstrip(" !?") for label in labels] == ["network", "network", "blind"]
        assert labels[2].startswith("blind !")
    budgets = report.plot_epsilon().axes[0].lines[0].get_xdata()
    assert list(budgets) == [0, 0.1, 0.3]
    assert report.plot_epsilon().legends[0].get_title().get_text().startswith("! a gate failed")


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        ("pandas", "to_dataframe", "pip install pandas"),
        ("matplotlib.figure", "plot_steps", r"snntorch-lr\[experiments\]"),
    ],
)
def test_without_an_optional_package_it_says_what_to_install(
    report: RobustnessReport, missing: str, call: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=message):
        getattr(report, call)()
