from __future__ import annotations

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from snntorch_lr.experiments import benchmark
from snntorch_lr.experiments.benchmark import (
    FEATURES,
    METHODS,
    REFERENCE,
    RIVAL,
    Benchmark,
    Method,
    make_step,
    peak_megabytes,
)
from snntorch_lr.noise import KINDS

from .commands import run

TINY: dict[str, Any] = {"num_steps": 4, "width": 20, "batch": 8}


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str, noise: str) -> None:
    if name == RIVAL:
        pytest.importorskip("spikingjelly")
    step = make_step(METHODS[name], noise, num_steps=4, width=50, batch=4, depth=2 if noise == "escape" else 1)
    losses = [float(step()) for _ in range(40)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def first_step(name: str, **sizes: Any) -> tuple[float, list[torch.Tensor], list[int]]:
    """Loss and gradients of the first step, and the rows that went through the first block in its calls."""
    gradients: list[torch.Tensor] = []
    rows: list[int] = []

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            gradients.extend(p.grad for p in group["params"] if p.grad is not None)

    def after_call(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.in_features == FEATURES:
            rows.append(len(args[0]))

    hooks = register_optimizer_step_post_hook(after_step), register_module_forward_hook(after_call)
    try:
        return float(make_step(METHODS[name], **sizes)()), gradients, rows
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["snnTorch, hoisted", RIVAL])
def test_without_noise_the_loss_and_the_gradient_are_those_of_snntorch(name: str) -> None:
    if name == RIVAL:
        pytest.importorskip("spikingjelly")
    # SpikingJelly's neurons reset otherwise: before the second time step none has.
    sizes = TINY | {"num_steps": 1 if name == RIVAL else 4}
    (loss, gradients, _), (other, others, _) = first_step(REFERENCE, **sizes), first_step(name, **sizes)
    assert loss == pytest.approx(other)
    torch.testing.assert_close(gradients[-2:], others[-2:])


def test_the_first_current_is_computed_as_often_as_the_loop_says() -> None:
    calls = {name: len(first_step(name, **TINY)[2]) for name in METHODS if name != RIVAL and METHODS[name].copies < 16}
    assert {name for name, number in calls.items() if number > 1} == {REFERENCE, "counterfactual, as written"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    options = Benchmark(repeats=1, memory_steps=(2, 3), dataset="digits", limit=0.05, threads=1, out=out, **TINY)
    with pytest.MonkeyPatch.context() as patch:
        # A process for each figure takes minutes; one is measured below.
        patch.setattr(benchmark, "peak_megabytes", lambda make, device: float(make.keywords["num_steps"]))
        patch.setattr(benchmark, "find_spec", lambda name: None)
        options.run()
    return out


def test_writes_every_part(written: Path) -> None:
    results = json.loads((written / "benchmark.json").read_text())
    assert {part for part in benchmark.PARTS if results[part]} == set(benchmark.PARTS)
    assert [row["method"] for row in results["steps"]] == [name for name in METHODS if name != RIVAL]
    assert results["steps"][0]["ratio, escape"] == 1
    assert results["growth"][0]["exponent"] == pytest.approx(
        statistics.linear_regression([0, 1, 2], [math.log2(results["growth"][0][f"{n} ×"]) for n in (1, 2, 4)]).slope
    )
    assert results["memory"][0] == {"method": REFERENCE, "T = 2": 2.0, "T = 3": 3.0}
    assert all(row[key] > 0 for row in results["kernels"] for key in ("by counter", "torch, uniform"))
    assert {row["noise"] for row in results["kernels"]} == {
        "membrane, gaussian", "membrane, laplace", "membrane, logistic", "escape, logistic", "escape, gaussian"
    }  # fmt: skip
    page = (written / "benchmark.md").read_text()
    assert results["command"] in page
    assert "SpikingJelly is not installed, and has no row" in page
    assert "not reached" in page


def test_the_command_runs_chosen_parts(tmp_path: Path) -> None:
    arguments = ["--part", "steps", "--repeats", "1", "--num-steps", "2", "--width", "5", "--batch", "2"]
    result = run("benchmark", *arguments, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "slr.rollout" in result.output
    assert "memory" not in json.loads((tmp_path / "benchmark.json").read_text())


def test_memory_is_that_of_a_whole_step() -> None:
    # Some tensors of all neurons, copies and time steps, as float32.
    peak = 1e6 * peak_megabytes(
        partial(make_step, METHODS["vanilla, K = 16"], num_steps=8, width=256), torch.device("cpu")
    )
    numbers = 16 * 128 * 256 * 8
    assert numbers / 8 < peak < 20 * 4 * numbers


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match=r"no such method.* ended with status"):
        peak_megabytes(partial(make_step, Method(loop="no such method")), torch.device("cpu"))
