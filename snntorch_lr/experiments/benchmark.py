"""Time and memory of a training step by every method, how they grow, and the time to an accuracy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._messages import versions
from . import data, files
from .benchmark_report import to_markdown, write_figures
from .measure import Progress, median_milliseconds, peak_megabytes, slope
from .recipe import Recipe
from .recipe import make_network as make_classifier
from .reproduce import arguments, machine
from .train import accuracy, make_estimators, stepper
from .workloads import ESTIMATORS, NOISES, Workload

PARTS = ("steps", "memory", "growth", "accuracy")
TARGETS = {"mnist": 0.95, "fashion-mnist": 0.84, "digits": 0.93}
# The network trains for so many steps between two looks at the test images, whose time is not counted.
_LOOK_EVERY = 25
# Peaks vary from process to process, with what the allocator of the C library makes of the same requests.
_PROCESSES = 3


@dataclass(frozen=True)
class Settings:
    """Arguments of the command ``snntorch-lr benchmark``.

    Attributes:
        parts: some of ``PARTS``.
        repeats: timed rounds.
        copies: values of K.
        num_steps: T of the timed steps.
        width: hidden neurons of the timed steps.
        batch: images in a step.
        memory_steps: values of T at which memory is measured.
        dataset: of the time to an accuracy.
        limit: seconds of training after which an accuracy is given up.
        threads: of torch.
    """

    parts: tuple[str, ...] = PARTS
    repeats: int = 7
    copies: tuple[int, ...] = (1, 4, 16, 64)
    num_steps: int = 25
    width: int = 1000
    batch: int = 128
    memory_steps: tuple[int, ...] = (25, 100, 400)
    dataset: str = "mnist"
    limit: float = 600.0
    threads: int = 2


def benchmark(
    settings: Settings,
    out: Path,
    data_root: Path | None = None,
    device: torch.device | None = None,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Runs the parts, and writes ``benchmark.json``, ``benchmark.md`` and figures.

    Args:
        settings: what to measure.
        out: directory for the files.
        data_root: torchvision root, for the time to an accuracy.
        device: where to compute; the CPU by default.
        progress: told what is measured next.

    Returns:
        What ``benchmark.json`` holds.

    Raises:
        ValueError: if a setting is wrong, or another process works in ``out``.
        DataError: if the data cannot be had.
    """
    _check(settings)
    files.check_writable(out)
    device = torch.device("cpu") if device is None else device
    images = data.load(settings.dataset, data_root) if "accuracy" in settings.parts else None
    with files.locked(out, f"snntorch-lr benchmark {_arguments(settings)}"):
        with _threads(settings.threads):
            results = _measured(settings, images, device, progress)
        files.write_json(out / "benchmark.json", results)
        files.write_text(out / "benchmark.md", to_markdown(results))
        write_figures(results, out)
    return results


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads of torch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(
    settings: Settings, images: data.Images | None, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """What each of the parts found, and with what."""
    results: dict[str, Any] = {
        "command": f"snntorch-lr benchmark {_arguments(settings)}",
        "versions": versions("snntorch-lr", "snntorch", "torch", "numpy"),
        "machine": machine(device),
        "settings": asdict(settings),
    }
    if "steps" in settings.parts:
        results["steps"] = _steps(settings, device, progress)
    if "memory" in settings.parts:
        results["memory"] = _memory(settings, device, progress)
    if "growth" in settings.parts:
        results["growth"] = _growth(settings, device, progress)
    if images is not None:
        results["accuracy"] = _accuracy(settings, images.to(device), device, progress)
    return results


def _check(settings: Settings) -> None:
    unknown = [part for part in settings.parts if part not in PARTS]
    if unknown or not settings.parts:
        raise ValueError(f"unknown part {', '.join(unknown)!r}; choose some of {', '.join(PARTS)}")
    if settings.dataset not in TARGETS:
        raise ValueError(f"unknown data set {settings.dataset!r}; choose one of {', '.join(TARGETS)}")
    for name in ("repeats", "num_steps", "width", "batch", "threads", "limit"):
        if getattr(settings, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(settings, name)}")
    for name in ("copies", "memory_steps"):
        values = getattr(settings, name)
        if not values or min(values) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive integers, got {list(values)}")


def _base(settings: Settings, method: str, noise: str = "membrane", copies: int = 1) -> Workload:
    return Workload(
        method, noise, copies, num_steps=settings.num_steps, width=settings.width, batch=settings.batch
    )  # fmt: skip


def _steps(settings: Settings, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    """Median milliseconds of all methods in turn, and their ratio to the surrogate's."""
    workloads = [_base(settings, "surrogate"), _base(settings, "surrogate, hoisted")]
    for copies in settings.copies:
        workloads += [_base(settings, method, noise, copies) for method in ESTIMATORS for noise in NOISES]
        workloads.append(_base(settings, "textbook", copies=copies))
    named = {f"{workload.name}, K = {workload.copies}": workload for workload in workloads}
    times = median_milliseconds(named, device, settings.repeats, lambda what: progress(f"steps: {what}"))
    reference = next(iter(times.values()))
    return [
        {
            "method": workload.name, "copies": workload.copies, "milliseconds": times[name],
            "ratio": times[name] / reference,
        }
        for name, workload in named.items()
    ]  # fmt: skip


def _memory(settings: Settings, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    """Peak memory of one copy; the output neurons have noise too, and their spike counts are the logits."""
    rows = []
    pairs = [("surrogate", "membrane"), *((method, noise) for method in ESTIMATORS for noise in NOISES)]
    for method, noise in pairs:
        for num_steps in settings.memory_steps:
            workload = replace(_base(settings, method, noise), num_steps=num_steps, rate=True)
            progress(f"memory: {workload.name}, T = {num_steps}")
            peaks = [peak_megabytes(workload, device) for _ in range(_PROCESSES)]
            rows.append({"method": workload.name, "num_steps": num_steps, "megabytes": statistics.median(peaks)})
    return rows


def _growth(settings: Settings, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    """Exponents of time over T, K, width and depth; a width enters the cost as the product of two layers' widths."""
    rows = []
    scales: dict[str, Callable[[Workload, int], Workload]] = {
        "num_steps": lambda workload, factor: replace(workload, num_steps=workload.num_steps * factor),
        "copies": lambda workload, factor: replace(workload, copies=workload.copies * factor),
        "width": lambda workload, factor: replace(workload, width=workload.width * factor // 2),
        "depth": lambda workload, factor: replace(workload, depth=workload.depth * factor),
    }
    for method in ESTIMATORS:
        for axis, scale in scales.items():
            start = replace(_base(settings, method), copies=4, depth=2 if axis == "width" else 1)
            named = {str(factor): scale(start, factor) for factor in (1, 2, 4)}
            repeats = max(3, settings.repeats // 2)
            progress(f"growth: {method}, {axis}")
            times = median_milliseconds(named, device, repeats, lambda _: None)
            factors = [float(factor) for factor in named]
            rows.append(
                {
                    "method": method, "axis": axis, "milliseconds": list(times.values()),
                    "exponent": slope(factors, list(times.values())),
                }
            )  # fmt: skip
    return rows


def _accuracy(
    settings: Settings, images: data.Images, device: torch.device, progress: Progress
) -> list[dict[str, Any]]:
    """Seconds of training until the test accuracy, noise off, reaches the target for the first time."""
    surrogate = Recipe("surrogate", settings.dataset, "mlp", 1, 16, 0)
    membrane = replace(surrogate, method="likelihood ratio", estimator="vanilla")
    escape = replace(membrane, noise="escape", distribution="logistic", sigma=0.3)
    recipes = {
        "surrogate": surrogate,
        "surrogate, learning rate 0.003": replace(surrogate, learning_rate=3e-3),
        "vanilla, membrane, K = 16": membrane,
        "approximate, membrane, K = 16": replace(membrane, estimator="approximate"),
        "vanilla, escape, K = 16": escape,
        **{
            f"counterfactual, {noise}, K = 2, learning rate {rate:g}": replace(
                recipe, estimator="counterfactual", copies=2, learning_rate=rate
            )
            for noise, recipe in (("membrane", membrane), ("escape", escape))
            for rate in (1e-3, 3e-3)
        },
    }
    target = TARGETS[settings.dataset]
    rows = []
    for name, recipe in recipes.items():
        progress(f"accuracy: {name}")
        seconds, steps, best = _train_to(target, recipe, images, device, settings.limit)
        rows.append({"method": name, "target": target, "seconds": seconds, "steps": steps, "best": best})
    return rows


def _train_to(
    target: float, recipe: Recipe, images: data.Images, device: torch.device, limit: float
) -> tuple[float | None, int, float]:
    """Seconds, None if the limit came first; steps; and the best accuracy seen."""
    torch.manual_seed(recipe.seed)
    net = make_classifier(recipe, images.shape).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    take_step = stepper(recipe, net, optimizer, make_estimators(recipe, net))
    spent, steps, best = 0.0, 0, 0.0
    while spent < limit:
        order = torch.randperm(len(images.train)).to(device)
        for rows in torch.split(order, recipe.batch_size):
            started = time.perf_counter()
            take_step(images.train[rows], images.train_labels[rows])
            spent += time.perf_counter() - started
            steps += 1
            if steps % _LOOK_EVERY == 0:
                best = max(best, accuracy(net, images.test, images.test_labels))
                if best >= target:
                    return spent, steps, best
            if spent >= limit:
                break
    return None, steps, best


def _arguments(settings: Settings) -> str:
    lists = {"parts": "part", "copies": "copies", "memory_steps": "memory-steps"}
    values = asdict(settings)
    repeated = [f"--{option} {value}" for name, option in lists.items() for value in values.pop(name)]
    return " ".join([arguments(values), *repeated])
