"""Tables of a study from results that are written by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from snntorch_lr.experiments.plans import Entry, plan

from snntorch_lr.experiments import study_tables as tables
from snntorch_lr.robustness.statistics import wilson

MNIST = {entry.name: entry for entry in plan("mnist")}
ESCAPE = "usual: likelihood ratio, escape, vanilla"


def bits(right: int, of: int) -> str:
    return "1" * right + "0" * (of - right)


def row(right: int, of: int, noise: str = "off", epsilons: tuple[str, ...] = ("0.05",)) -> dict[str, Any]:
    share = asdict(wilson(right, of))
    each = dict.fromkeys(epsilons, bits(right, of))
    return {
        "noise": noise, "verdict": "all gates passed", "corruptions": {}, "gates": [],
        "worst_case": dict.fromkeys(epsilons, share),
        "attacks": {"PGD": dict.fromkeys(epsilons, share)},
        "right": {"clean": bits(of, of), "worst": each, "reduced": each},
    }  # fmt: skip


def result(entry: Entry, clean: float, *rows: dict[str, Any]) -> dict[str, Any]:
    share = {"accuracy": clean, "low": clean, "high": clean}
    return {
        "entry": asdict(entry), "seconds_per_epoch": 1.0, "validation": clean, "rows": list(rows),
        "history": [{"epoch": epoch, "seconds": 2.0} for epoch in (1, 2)],
        "clean": {each["noise"]: {"majority vote": share, "single draw": share} for each in rows},
        "sigma": {"before": {"neurons.0": [0.3]}, "after": {"neurons.0": [0.2]}},
    }  # fmt: skip


def cells(table: tables.Table, line: str) -> dict[str, str]:
    header, lines = table
    return dict(zip(header[1:], next(each[1:] for each in lines if each[0] == line), strict=True))


@pytest.fixture
def usual() -> list[dict[str, Any]]:
    surrogate = result(MNIST["usual: surrogate"], 0.97, row(40, 100, "none", ("0.02", "0.05")))
    ratio = result(MNIST[ESCAPE], 0.95, row(60, 100, "off", ("0.02", "0.05")), row(18, 20, "on"))
    return [ratio, surrogate]


def test_networks_are_compared_on_the_images_that_both_were_attacked_on(usual: list[dict[str, Any]]) -> None:
    found = tables.differences(usual)
    assert cells(found, "likelihood ratio, escape, vanilla (noise off)")["ε = 0.05"].startswith("+20.0 ")
    # Of the first twenty images the surrogate has all right.
    on = cells(found, "likelihood ratio, escape, vanilla (noise on)")
    assert on["ε = 0.05"].startswith("-10.0 ")
    assert on["ε = 0.02"] == "-"


def test_noise_off_and_on_stand_side_by_side_on_the_same_images(usual: list[dict[str, Any]]) -> None:
    found = tables.usual(usual, "0.05")
    assert cells(found, "likelihood ratio, escape, vanilla (noise off)")["worst, first 20 images"] == "100.0"
    assert cells(found, "likelihood ratio, escape, vanilla (noise on)")["worst, first 20 images"] == "90.0"
    assert [line[0] for line in tables.usual(usual, "0.02")[1]] == [
        "surrogate",
        "likelihood ratio, escape, vanilla (noise off)",
    ]


def test_no_difference_is_not_shown_as_no_measurement(usual: list[dict[str, Any]]) -> None:
    usual[0]["rows"][0]["right"]["worst"]["0.05"] = bits(40, 100)
    found = tables.differences(usual)
    assert cells(found, "likelihood ratio, escape, vanilla (noise off)")["ε = 0.05"] == "+0.0 [+0.0, +0.0], p = 1"


def test_without_the_surrogate_nothing_takes_its_place(usual: list[dict[str, Any]]) -> None:
    alone = [each for each in usual if each["entry"]["family"] != "surrogate"]
    ((_, *line),) = tables.short(alone)[1]
    assert line[2] == "-"


def test_the_front_leaves_the_pgd_trained_out(usual: list[dict[str, Any]]) -> None:
    front = [
        result(MNIST["front: surrogate, PGD-trained, 0.05"], 0.98, row(95, 100, "none")),
        result(MNIST["front: surrogate, decay 5"], 0.96, row(70, 100, "none")),
        result(MNIST["front: likelihood ratio, 8 epochs"], 0.99, row(40, 100)),
    ]
    header, lines = tables.fronts([*usual, *front])
    found = {", ".join(line[:2]): dict(zip(header, line, strict=True)) for line in lines}
    assert found["surrogate, decay 5"]["worst, ε = 0.05"] == "70.0 *"
    assert found["surrogate, PGD-trained, 0.05"]["worst, ε = 0.05"] == "95.0 *"
    assert found["likelihood ratio, escape, vanilla, "]["to the front"].startswith("-10.0 ")
    assert found["likelihood ratio, 8 epochs"]["to the front"] == "-"
    _, said = tables.extremes([*usual, *front])
    assert "of 1 likelihood-ratio networks lies -10.0 to -10.0 points" in said
    assert "1 more are more accurate than all of these" in said


def test_seeds_count_the_network_of_table_a_as_one(usual: list[dict[str, Any]]) -> None:
    seeds = [
        result(MNIST[f"seed: likelihood ratio, escape, vanilla, seed {seed}"], 0.95, row(right, 100))
        for seed, right in ((1, 62), (2, 64))
    ]
    found = cells(tables.seeds([*usual, *seeds]), "likelihood ratio, escape, vanilla")
    assert found["seeds"] == "3"
    # Student's t for two degrees of freedom: 4.303 · 2 / √3.
    assert found["worst, ε = 0.05"] == "62.0 ± 5.0"


def test_what_was_tried_is_compared_with_what_was_trained_alike() -> None:
    tried = [
        result(MNIST["tune: surrogate, decay 5"], 0.96, row(70, 100, "none")),
        result(MNIST["tune: surrogate, adversary 0.05"], 0.96, row(90, 100, "none")),
        result(MNIST["tune: likelihood ratio, decay 5"], 0.95, row(60, 100)),
        result(MNIST["tune: likelihood ratio, adversary 0.05"], 0.95, row(85, 100)),
    ]
    found = tables.tuning(tried)
    assert cells(found, "likelihood ratio, decay 5")["to the front"].startswith("-10.0 ")
    assert cells(found, "likelihood ratio, adversary 0.05")["to the front"].startswith("-5.0 ")
    assert cells(found, "surrogate, decay 5")["to the front"] == "-"
    assert cells(found, "surrogate, decay 5")["training, s"] == "4"


def test_settings_name_what_a_network_has_of_its_own() -> None:
    entry = MNIST["tune: likelihood ratio, 4, then 32 copies"]
    found = cells(tables.settings([result(entry, 0.95, row(60, 100))]), entry.name)
    assert found["estimator, copies"] == "counterfactual, 4, late 32"
    assert found["noise"] == "escape, logistic, σ = 0.3"
    assert found["images attacked"] == "500 held out"
