"""Tables of a study from results that are written by hand, and fronts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from snntorch_lr.experiments.page import Page, Point, Table, beside, difference, front
from snntorch_lr.experiments.study import Entry, read_plan
from snntorch_lr.robustness import wilson

PLAN = """
[recipes.surrogate]
method = "surrogate"
dataset = "mnist"
validation = 6000

[recipes.escape]
like = "surrogate"
method = "likelihood ratio"
noise = "escape"
distribution = "logistic"
sigma = 0.3

[usual]
evaluations = [{ attacks = "reduced", images = 100, epsilons = [0.02, 0.05] }]
networks = [
  { family = "surrogate", like = "surrogate" },
  { family = "likelihood ratio, escape, vanilla", like = "escape", estimator = "vanilla" },
]

[seed]
evaluations = [{ attacks = "reduced", images = 100, epsilons = [0.05] }]
networks = [
  { family = "likelihood ratio, escape, vanilla", label = "seed 1", like = "escape", estimator = "vanilla", seed = 1 },
  { family = "likelihood ratio, escape, vanilla", label = "seed 2", like = "escape", estimator = "vanilla", seed = 2 },
]

[front]
evaluations = [{ attacks = "reduced", images = 100, epsilons = [0.05] }]
networks = [
  { family = "likelihood ratio", label = "8 epochs", like = "escape", epochs = 8 },
  { family = "surrogate", label = "decay 5", like = "surrogate", decay = 5 },
  { family = "surrogate, PGD-trained", label = "0.05", like = "surrogate", adversary = 0.05 },
]

[tune]
evaluations = [{ attacks = "reduced", images = 500, epsilons = [0.05], held_out = true }]
networks = [
  { family = "surrogate", label = "decay 5", like = "surrogate", decay = 5 },
  { family = "surrogate", label = "adversary 0.05", like = "surrogate", adversary = 0.05 },
  { family = "likelihood ratio", label = "decay 5", like = "escape", decay = 5 },
  { family = "likelihood ratio", label = "adversary 0.05", like = "escape", adversary = 0.05 },
  { family = "likelihood ratio", label = "4, then 32 copies", like = "escape", copies = 4, late_copies = 32 },
]
"""


def entries(text: str) -> dict[str, Entry]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        path.write_text(text, encoding="utf-8")
        return {entry.name: entry for entry in read_plan(str(path))}


MNIST = entries(PLAN)
ESCAPE = "usual: likelihood ratio, escape, vanilla"


def bits(right: int, of: int) -> str:
    return "1" * right + "0" * (of - right)


def row(right: int, of: int, noise: str = "off", epsilons: tuple[str, ...] = ("0.05",)) -> dict[str, Any]:
    share = asdict(wilson(right, of))
    single = dict.fromkeys(epsilons, bits(right, of))
    return {
        "noise": noise, "verdict": "all gates passed", "gates": [],
        "worst_case": dict.fromkeys(epsilons, share),
        "attacks": {"PGD": dict.fromkeys(epsilons, share)},
        "right": {"clean": bits(of, of), "worst": single, "reduced": single},
    }  # fmt: skip


def result(entry: Entry, clean: float, *rows: dict[str, Any]) -> dict[str, Any]:
    share = {"accuracy": clean, "low": clean, "high": clean, "images": 1000}
    return {
        "entry": asdict(entry), "seconds_per_epoch": 1.0, "validation": clean, "rows": list(rows),
        "history": [{"epoch": epoch, "seconds": 2.0} for epoch in (1, 2)],
        "clean": {single["noise"]: {"majority vote": share, "single draw": share} for single in rows},
        "sigma": {"before": {"neurons.0": [0.3]}, "after": {"neurons.0": [0.2]}},
    }  # fmt: skip


def cells(table: Table, line: str) -> dict[str, str]:
    header, lines = table
    return dict(zip(header[1:], next(single[1:] for single in lines if single[0] == line), strict=True))


@pytest.fixture
def usual() -> list[dict[str, Any]]:
    surrogate = result(MNIST["usual: surrogate"], 0.97, row(40, 100, "none", ("0.02", "0.05")))
    ratio = result(MNIST[ESCAPE], 0.95, row(60, 100, "off", ("0.02", "0.05")), row(18, 20, "on"))
    return [ratio, surrogate]


def test_networks_are_compared_on_the_images_that_both_were_attacked_on(usual: list[dict[str, Any]]) -> None:
    told = Page(usual).differences()
    assert cells(told, "likelihood ratio, escape, vanilla (noise off)")["ε = 0.05"].startswith("+20.0 ")
    # Of the first twenty images the surrogate has all right.
    on = cells(told, "likelihood ratio, escape, vanilla (noise on)")
    assert on["ε = 0.05"].startswith("-10.0 ")
    assert on["ε = 0.02"] == "-"


def test_noise_off_and_on_stand_side_by_side_on_the_same_images(usual: list[dict[str, Any]]) -> None:
    told = Page(usual).table_a("0.05")
    assert cells(told, "likelihood ratio, escape, vanilla (noise off)")["worst, first 20 images"] == "100.0"
    assert cells(told, "likelihood ratio, escape, vanilla (noise on)")["worst, first 20 images"] == "90.0"
    assert [line[0] for line in Page(usual).table_a("0.02")[1]] == [
        "surrogate",
        "likelihood ratio, escape, vanilla (noise off)",
    ]


def test_no_difference_is_not_shown_as_no_measurement(usual: list[dict[str, Any]]) -> None:
    usual[0]["rows"][0]["right"]["worst"]["0.05"] = bits(40, 100)
    told = Page(usual).differences()
    assert cells(told, "likelihood ratio, escape, vanilla (noise off)")["ε = 0.05"] == "+0.0 [-2.1, +2.1], p = 1"


def test_without_the_surrogate_nothing_takes_its_place(usual: list[dict[str, Any]]) -> None:
    alone = [single for single in usual if single["entry"]["family"] != "surrogate"]
    ((_, *line),) = Page(alone).short()[1]
    assert line[2] == "-"


def test_the_front_leaves_the_pgd_trained_out(usual: list[dict[str, Any]]) -> None:
    swept = [
        result(MNIST["front: surrogate, PGD-trained, 0.05"], 0.98, row(95, 100, "none")),
        result(MNIST["front: surrogate, decay 5"], 0.96, row(70, 100, "none")),
        result(MNIST["front: likelihood ratio, 8 epochs"], 0.99, row(40, 100)),
    ]
    header, lines = Page([*usual, *swept]).fronts()
    told = {", ".join(line[:2]): dict(zip(header, line, strict=True)) for line in lines}
    assert told["surrogate, decay 5"]["worst, ε = 0.05"] == "70.0 *"
    assert told["surrogate, PGD-trained, 0.05"]["worst, ε = 0.05"] == "95.0 *"
    assert told["likelihood ratio, escape, vanilla, "]["to the front"].startswith("-10.0 ")
    assert told["likelihood ratio, 8 epochs"]["to the front"] == "-"
    _, said = Page([*usual, *swept]).extremes()
    assert "of 1 likelihood-ratio networks lies -10.0 to -10.0 points" in said
    assert "1 more are more accurate than all of these" in said


def test_the_front_is_of_the_images_that_all_were_attacked_on(usual: list[dict[str, Any]]) -> None:
    header, lines = Page([*usual, result(MNIST["front: surrogate, decay 5"], 0.96, row(30, 50, "none"))]).fronts()
    told = {", ".join(line[:2]): dict(zip(header, line, strict=True)) for line in lines}
    # Of the first 50 images: 40 of the surrogate, 30 with decay, all of the likelihood ratio.
    assert told["surrogate, "]["worst, ε = 0.05"] == "80.0 *"
    assert told["surrogate, decay 5"]["worst, ε = 0.05"] == "60.0"
    assert told["likelihood ratio, escape, vanilla, "]["to the front"].startswith("+20.0 ")


def test_seeds_count_the_network_of_table_a_as_one(usual: list[dict[str, Any]]) -> None:
    seeds = [
        result(MNIST[f"seed: likelihood ratio, escape, vanilla, seed {seed}"], 0.95, row(right, 100))
        for seed, right in ((1, 62), (2, 64))
    ]
    told = cells(Page([*usual, *seeds]).seeds(), "likelihood ratio, escape, vanilla")
    assert told["seeds"] == "3"
    # Student's t for two degrees of freedom: 4.303 · 2 / √3.
    assert told["worst, ε = 0.05"] == "62.0 ± 5.0"


def test_what_was_tried_is_compared_with_what_was_trained_alike() -> None:
    tried = [
        result(MNIST["tune: surrogate, decay 5"], 0.96, row(70, 100, "none")),
        result(MNIST["tune: surrogate, adversary 0.05"], 0.96, row(90, 100, "none")),
        result(MNIST["tune: likelihood ratio, decay 5"], 0.95, row(60, 100)),
        result(MNIST["tune: likelihood ratio, adversary 0.05"], 0.95, row(85, 100)),
    ]
    told = Page(tried).tuning()
    assert cells(told, "likelihood ratio, decay 5")["to the front"].startswith("-10.0 ")
    assert cells(told, "likelihood ratio, adversary 0.05")["to the front"].startswith("-5.0 ")
    assert cells(told, "surrogate, decay 5")["to the front"] == "-"
    assert cells(told, "surrogate, decay 5")["training, s"] == "4"


def test_settings_name_what_a_network_has_of_its_own() -> None:
    entry = MNIST["tune: likelihood ratio, 4, then 32 copies"]
    told = cells(Page([result(entry, 0.95, row(60, 100))]).settings(), entry.name)
    assert told["estimator, copies"] == "counterfactual, 4, late 32"
    assert told["noise"] == "escape, logistic, σ = 0.3"
    assert told["images attacked"] == "500 held out"


def point(name: str, clean: float, right: int) -> Point:
    return Point(name, "", True, False, clean, 10, np.array([1.0] * right + [0.0] * (10 - right)))


def test_the_front_leaves_out_what_another_beats() -> None:
    points = [point("a", 0.9, 3), point("b", 0.8, 6), point("c", 0.85, 2), point("d", 0.8, 5), point("e", 0.9, 3)]
    assert [p.name for p in front(points)] == ["b", "a"]


@pytest.mark.parametrize(
    ("clean", "mean"), [(0.85, 0.7 - 0.45), (0.5, 0.7 - 0.6), (0.95, None)], ids=["between", "below", "above"]
)
def test_beside_the_front_robustness_is_interpolated_and_never_extrapolated(clean: float, mean: float | None) -> None:
    apart = beside(point("x", clean, 7), [point("a", 0.9, 3), point("b", 0.8, 6)])
    if mean is None:
        assert apart is None
    else:
        assert apart is not None
        assert apart.mean == pytest.approx(mean)
        assert apart.low < apart.mean < apart.high


def test_the_interval_is_students() -> None:
    first, second = np.array([1.0, 1, 0, 1]), np.array([0.0, 1, 0, 1])
    told = difference(first, second)
    # Mean 1/4, standard error 1/4, quantile 3.182 for three degrees of freedom.
    assert (told.low, told.high) == pytest.approx((0.25 - 3.182446 / 4, 0.25 + 3.182446 / 4))
    same = difference(first, first)
    assert same.mean == 0
    assert same.low == -same.high < 0
