from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from snntorch_lr.experiments import benchmark
from snntorch_lr.experiments.benchmark import Benchmark
from snntorch_lr.experiments.workloads import NOISES, RIVAL, Workload, kernel_nanoseconds, make_step
from snntorch_lr.gradients import ESTIMATORS

from .commands import is_one_line, run

CPU = torch.device("cpu")
DEEP = ["counterfactual, escape, K = 1", "counterfactual, escape, K = 2"]
TINY: dict[str, Any] = {"num_steps": 4, "width": 20, "batch": 8}


@pytest.mark.parametrize("rate", [False, True])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("method", ["surrogate", "surrogate, hoisted", RIVAL, "textbook", *ESTIMATORS])
def test_every_workload_learns(method: str, noise: str, rate: bool) -> None:
    if method in (RIVAL, "textbook") and (rate or noise == "escape"):
        pytest.skip("written for one case")
    if method == RIVAL:
        pytest.importorskip("spikingjelly")
    step = make_step(Workload(method, noise, copies=16, rate=rate, num_steps=4, width=50, batch=4), CPU)
    losses = [float(step()) for _ in range(40)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_textbook_has_the_gradient_of_vanilla() -> None:
    means = []
    for method in ("textbook", "vanilla"):
        step = make_step(Workload(method, copies=20_000, num_steps=3, width=4, batch=2), CPU)
        step()
        gradient = step.net.linears[0].weight.grad
        means.append(gradient.clone())
    assert torch.nn.functional.cosine_similarity(means[0].flatten(), means[1].flatten(), dim=0) > 0.95
    assert float(means[0].norm()) == pytest.approx(float(means[1].norm()), rel=0.1)


def test_the_rival_has_the_loss_and_the_gradient_of_the_readout_of_snntorch_where_nothing_resets() -> None:
    pytest.importorskip("spikingjelly")
    found = []
    for method in ("surrogate, hoisted", RIVAL):
        # Before the second time step no neuron has reset.
        step = make_step(Workload(method, num_steps=1, width=30, batch=4), CPU)
        loss = float(step())
        found.append((loss, step.net.linears[1].weight.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("copies", [1, 4])
def test_one_copy_of_counterfactual_credit_is_a_plain_loop(copies: int) -> None:
    step = make_step(Workload("counterfactual", copies=copies, **TINY), CPU)
    rows: list[int] = []
    step.net.linears[1].register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    step()
    assert set(rows) == {8 * copies}
    assert all(parameter.grad.any() for parameter in step.net.parameters())


def test_noise_of_every_kind_is_timed() -> None:
    threads = torch.get_num_threads()
    found = kernel_nanoseconds(4, 8, 2, CPU)
    assert {*found} == {
        "membrane, gaussian", "membrane, laplace", "membrane, logistic", "escape, logistic", "escape, gaussian"
    }  # fmt: skip
    assert all(value > 0 for row in found.values() for value in row.values())
    assert torch.get_num_threads() == threads


def test_hoisting_computes_the_first_current_once() -> None:
    calls: list[int] = []
    for method in ("surrogate", "surrogate, hoisted"):
        step = make_step(Workload(method, **TINY), CPU)
        step.net.linears[0].register_forward_hook(lambda *_: calls.append(1))
        step()
    assert len(calls) == TINY["num_steps"] + 1


@pytest.fixture(scope="module", autouse=True)
def two_methods() -> Iterator[list[str]]:
    """All of them are tried above."""
    few = ["vanilla", "counterfactual"]
    with mock.patch.object(benchmark, "ESTIMATORS", few):
        yield few


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, two_methods: list[str]) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    options = Benchmark(
        repeats=1, copies=(1, 2), memory_steps=(2, 3), dataset="digits", limit=0.1, threads=2, out=out, **TINY
    )
    with pytest.MonkeyPatch.context() as patch:
        # A process for each figure takes minutes; one is measured above.
        patch.setattr(benchmark, "peak_megabytes", lambda make, device: float(make.args[0].num_steps))
        patch.setattr(benchmark, "find_spec", lambda name: None)
        benchmark.benchmark(options)
    return out


def test_threads_are_as_before(written: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        benchmark.benchmark(
            Benchmark(parts=("steps",), repeats=1, copies=(1,), threads=1, out=written / "again", **TINY)
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_writes_every_part(written: Path) -> None:
    results = json.loads((written / "benchmark.json").read_text())
    assert {part for part in benchmark.PARTS if results[part]} == set(benchmark.PARTS)
    assert results["steps"][0]["ratio"] == 1
    # Two numbers of copies.
    assert len(results["steps"]) == 3 + 2 * (2 * len(NOISES) + 1)
    page = (written / "benchmark.md").read_text()
    assert results["command"] in page
    assert "SpikingJelly is not installed, and has no row" in page
    assert [row["method"] for row in results["deep"]] == ["surrogate", *DEEP] * 2
    assert {path.name for path in written.glob("*.png")} == {"steps.png", "memory.png"}


def test_the_command_runs_chosen_parts(tmp_path: Path) -> None:
    arguments = ["--part", "steps", "--repeats", "1", "--copies", "2", "--num-steps", "2", "--width", "5"]
    result = run("benchmark", *arguments, "--batch", "2", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "textbook" in result.output
    assert "memory" not in json.loads((tmp_path / "benchmark.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "speed"], "steps, kernels, deep, memory, growth, accuracy"),
        (["--dataset", "cifar"], "mnist, fashion-mnist, digits"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--copies", "0"], "--copies must be at least 1"),
        (["--device", "gpu"], "unknown device"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("benchmark", *arguments, "--out", str(tmp_path))
    is_one_line(result, 2, message)
    assert list(tmp_path.iterdir()) == []


def test_no_two_lines_of_a_figure_look_alike() -> None:
    methods = ["surrogate", "surrogate, hoisted", "surrogate, noise", RIVAL, "textbook"]
    methods += [f"{method}, {noise}" for method in ESTIMATORS for noise in NOISES]
    rows = [{"method": method, "copies": copies, "ratio": copies} for method in methods for copies in (1, 2)]
    (axes,) = benchmark._figure(rows, "copies", "ratio", ["K", "ratio"]).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == len(methods)
