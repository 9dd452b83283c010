from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

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
from snntorch_lr.robustness.report import Subject, mark

from . import canaries

PGD = gradient_attack("PGD", Descent(steps=3, length=0.5))


@pytest.fixture(scope="module")
def report() -> Iterator[RobustnessReport]:
    with pytest.MonkeyPatch.context() as patch:
        # Short attacks of the gates, which have tests of their own.
        patch.setattr(gates, "ASCENT", replace(gates.ASCENT, steps=5, length=0.5))
        patch.setattr(gates, "LONGER", {True: 8, False: 8})
        yield evaluate(
            slr.add_noise(canaries.trained(), 0.3), [canaries.digits(20)], [0.1, 0.3], [PGD, canaries.TRANSFER],
            baselines={"blind": canaries.with_zero_gradient()},
            protocol=Protocol(draws=2, votes=4, gate_images=8), progress=False,
        )  # fmt: skip


def test_no_worst_case_stands_without_its_gates(report: RobustnessReport) -> None:
    blind = report.rows[2]
    assert verdict(blind.findings.gates).startswith("MASKING SUSPECTED (G1")
    assert verdict(report.gates) == "masking not ruled out (G6, G10 not run)"
    assert isinstance(report.worst_case[0.3], Headline)
    assert str(report.worst_case[0.3]).endswith("% (masking not ruled out (G6, G10 not run))")
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
    attacks = *(gradient_attack(name, Descent(name)) for name in ("atan", "gaussian")), suite(["Square"])[0]
    under = {attack.name: {0.1: images} for attack, images in zip(attacks, right, strict=True)}
    row = Row(Subject("net", "on", Target(torch.nn.Flatten())), clean, share_of(clean), attacks, under)
    assert row.under([], 0.1).tolist() == clean.tolist()
    assert row.under(["atan"], 0.1).tolist() == [True, True, False, False]
    assert row.worst(0.1).tolist() == [False] * 4
    assert {name: images[0.1].tolist() for name, images in row.by_surrogate().items()} == {
        "atan": [True, True, False, False], "gaussian": [False, True, True, False],
    }  # fmt: skip


def test_verdict_names_what_failed_before_what_is_missing() -> None:
    passed, missing, failed = (Gate(f"G{i} x", state, "") for i, state in enumerate((True, None, False)))
    few = Gate("G10 images", None, "")
    for judged, words, sign in (
        ([], "masking not ruled out (gates not run)", " ?"),
        ([passed], "all gates passed", ""),
        ([passed, missing], "masking not ruled out (G1 not run)", " ?"),
        ([passed, missing, failed], "MASKING SUSPECTED (G2 failed)", " !"),
        ([passed, few], "too few images for a claim", " ?"),
        ([passed, missing, few], "masking not ruled out (G1, G10 not run)", " ?"),
    ):
        assert (verdict(judged), mark(judged)) == (words, sign)


def test_every_form_has_what_a_paper_needs(report: RobustnessReport) -> None:
    beside = report.settings()
    assert beside["images"] == "20"
    assert beside["suite"] == "PGD, transfer, seed 0"
    assert beside["budgets"] == "linf, ε = 0.1, 0.3"
    assert beside["noise"] == "off; on, majority of 4 draws, attacks average over up to 2; none"
    assert re.fullmatch(r"\d+ s", beside["time"])
    assert "snntorch-lr " in beside["versions"]
    for text in str(report), report.to_markdown(), report._repr_markdown_():
        assert all(f"{name}: {value}" in text for name, value in beside.items())
        assert report.sentence() in text
    figures = report.to_json()
    assert figures["sentence"] == report.sentence()
    assert (figures["images"], figures["suite"], figures["seconds"]) == (20, "PGD, transfer", report.seconds)
    assert figures["protocol"] == {"epsilons": [0.1, 0.3], "seed": 0} | asdict(report.protocol)
    sentence = report.sentence()
    for share in report.worst_case.values():
        assert f"{100 * share.accuracy:.1f} % (95 % Wilson interval {100 * share.low:.1f} to " in sentence
    for part in (
        "Of 20 images",
        "noise off",
        "linf",
        "(suite PGD, transfer)",
        verdict(report.gates),
        "seed 0",
        "torch ",
    ):
        assert part in sentence


def test_markdown_has_settings_and_tests(report: RobustnessReport) -> None:
    text = report.to_markdown(level=3)
    assert "### Accuracy, ε = 0.3" in text
    assert "| PGD | white-box | " in text
    assert "steps 3" in text
    (pair,) = [pair for pair in report.comparisons if pair.first == "network, noise on"]
    assert f"| {pair.worst[0.3]} |" in text
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith("| PGD |") and "±" in line}
    assert columns == {len(report.rows)}


def test_colors_are_of_the_name_and_those_of_others_are_left() -> None:
    fixed = {"surrogate": "#0072B2", "likelihood-ratio": "#D55E00", "surrogate, noise": "#56B4E9"}
    assert colors_of(fixed) == colors_of(reversed([*fixed])) == fixed
    mixed = colors_of(["mine", "yours", *fixed])
    assert mixed.items() >= fixed.items()
    assert len(set(mixed.values())) == 5
    assert len(colors_of(map(str, range(40)))) == 40
    assert colors_of(["lr-noisy-input"])["lr-noisy-input"] == COLORS["likelihood ratio noisy input"]


def test_the_figure_shows_every_row_with_the_sign_of_its_gates(report: RobustnessReport) -> None:
    figure = report.plot_epsilon()
    (axes,), (legend,) = figure.axes, figure.legends
    handles, labels = axes.get_legend_handles_labels()
    assert [text.get_text() for text in legend.get_texts()] == labels
    assert labels == ["network, noise off ?", "network, noise on ?", "blind !"]
    assert legend.get_title().get_text().startswith("! a gate failed")
    colors = colors_of(row.subject.network for row in report.rows)
    assert len(set(colors.values())) == 2
    for handle, row in zip(handles, report.rows, strict=True):
        line = handle.lines[0]
        assert list(line.get_xdata()) == [0, 0.1, 0.3]
        assert line.get_ydata()[2] == pytest.approx(100 * share_of(row.worst(0.3)).accuracy)
        assert line.get_color() == colors[row.subject.network]
        assert (line.get_markerfacecolor() == "white") == (row.subject.noise == "on")
        assert handle.has_yerr


def test_no_worst_case_is_drawn_above_a_curve_of_its_gates(report: RobustnessReport) -> None:
    weak = replace(report, rows=tuple(
        replace(row, findings=replace(row.findings, ladder={0.3: 0.2, 0.5: 0.9, 1.0: 0.0})) for row in report.rows
    ))  # fmt: skip
    for drawn in report, weak:
        (axes,) = drawn.plot_epsilon().axes
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        for row, line in zip(drawn.rows, dotted, strict=True):
            worst = 100 * share_of(row.worst(0.3)).accuracy
            assert line.get_xdata()[0] == 0.3
            assert line.get_ydata()[0] == pytest.approx(worst)
            assert max(line.get_ydata()) <= worst + 1e-9


def test_without_matplotlib_it_says_what_to_install(report: RobustnessReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"snntorch-lr\[experiments\]"):
        report.plot_epsilon()
