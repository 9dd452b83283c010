"""Time and memory of a training step by every method, how they grow, and the time to an accuracy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._messages import markdown
from ..gradients import ESTIMATORS
from ..robustness.figures import colors_of, new_figure, with_legend
from . import data, files
from .options import Place, check, command_line, option, recorded
from .recipe import Recipe, make_network
from .train import accuracy, stepper
from .workloads import (
    KERNEL_COLUMNS,
    NOISES,
    RIVAL,
    Workload,
    kernel_nanoseconds,
    make_step,
    median_milliseconds,
    peak_megabytes,
    slope,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {
    "steps": "Training step",
    "kernels": "Noise of one call, on one thread of a CPU",
    "deep": "Training step of networks with two hidden layers",
    "memory": "Peak memory of the first training step, K = 1",
    "growth": "Growth of the time of a training step",
    "accuracy": "Training time to an accuracy",
}
"""Parts of the benchmark, and their headings."""
TARGETS = {"mnist": 0.95, "fashion-mnist": 0.84, "digits": 0.93}
# The network trains for so many steps between two looks at the test images, whose time is not counted.
_LOOK_EVERY = 25
# Peaks vary from process to process, with what the allocator of the C library makes of the same requests.
_PROCESSES = 3
_SHAPE = (1, 28, 28)
_SURROGATES = ("surrogate", "surrogate, hoisted", "surrogate, noise")
_NO_RIVAL = "SpikingJelly is not installed, and has no row; pip install spikingjelly adds it."
_DASHES = ("-", "--", ":", "-.")
# Part, what is drawn over what, and the names of the axes.
_FIGURES = (
    ("steps", "copies", "ratio", "noise copies K", "time of a step / surrogate's"),
    ("memory", "num_steps", "megabytes", "time steps T", "peak memory of a step (MB)"),
)
Rows = list[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]
Tell = Callable[[str], None]
"""Told what is measured next."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(Place):
    """Options of the command ``snntorch-lr benchmark``."""

    parts: tuple[str, ...] = option(tuple(PARTS), "what to measure", choices=PARTS, flag="--part")
    repeats: int = option(7, "timed rounds; the median counts", least=1)
    copies: tuple[int, ...] = option((1, 4, 16, 64), "noise copies K", least=1)
    num_steps: int = option(25, "time steps of the timed steps", least=1)
    width: int = option(1000, "hidden neurons", least=1)
    batch: int = option(128, "images in a step", least=1)
    memory_steps: tuple[int, ...] = option((25, 100, 400), "time steps at which memory is measured", least=1)
    dataset: str = option("mnist", "of the time to an accuracy", choices=TARGETS)
    limit: float = option(600.0, "seconds of training after which an accuracy is given up", above=0)
    threads: int = option(2, "threads of torch", least=1)
    out: Path | None = option(None, "folder for the results; runs/benchmark", recorded=False)

    @property
    def folder(self) -> Path:
        """Folder for the results."""
        return self.out or Path("runs/benchmark")


def benchmark(options: Benchmark, tell: Tell = lambda what: None) -> dict[str, Any]:
    """Runs the parts, and writes ``benchmark.json``, ``benchmark.md`` and figures.

    Args:
        options: what to measure, and where.
        tell: told what is measured next.

    Returns:
        What ``benchmark.json`` holds.

    Raises:
        ValueError: if an option is wrong, or another process works in the folder.
        DataError: if the data cannot be had.
    """
    check(options)
    device = options.torch_device()
    files.check_writable(options.folder)
    images = data.load(options.dataset, options.data_root).to(device) if "accuracy" in options.parts else None
    command = command_line("benchmark", options)
    with files.locked(options.folder, command):
        with _threads(options.threads):
            results = files.origin(command, device) | {"settings": recorded(options)}
            measures = {
                "steps": _steps, "kernels": _kernels, "deep": _deep, "memory": _memory, "growth": _growth
            }  # fmt: skip
            for part, measure in measures.items():
                if part in options.parts:
                    results[part] = measure(options, device, tell)
            if images is not None:
                results["accuracy"] = _accuracy(options, images, device, tell)
        files.write_json(options.folder / "benchmark.json", results)
        files.write_text(options.folder / "benchmark.md", to_markdown(results))
        for part, x, y, *labels in _FIGURES:
            if part in results:
                files.save_figure(options.folder / f"{part}.png", _figure(results[part], x, y, labels))
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


def _base(options: Benchmark, method: str, noise: str = "membrane", copies: int = 1) -> Workload:
    return Workload(method, noise, copies, options.num_steps, options.width, batch=options.batch)


def _steps(options: Benchmark, device: torch.device, tell: Tell) -> Rows:
    """Median milliseconds of all methods in turn, and their ratio to the surrogate's."""
    workloads = [_base(options, method) for method in _SURROGATES]
    if find_spec("spikingjelly"):
        workloads.append(_base(options, RIVAL))
    else:
        tell(f"steps: {_NO_RIVAL}")
    for copies in options.copies:
        workloads += [_base(options, method, noise, copies) for method in ESTIMATORS for noise in NOISES]
        workloads.append(_base(options, "textbook", copies=copies))
    named = {f"{workload.name}, K = {workload.copies}": workload for workload in workloads}
    steps = {name: make_step(workload, device) for name, workload in named.items()}
    times = median_milliseconds(steps, device, options.repeats, lambda what: tell(f"steps: {what}"))
    reference = next(iter(times.values()))
    return [
        {
            "method": workload.name, "copies": workload.copies, "milliseconds": times[name],
            "ratio": times[name] / reference,
        }
        for name, workload in named.items()
    ]  # fmt: skip


def _kernels(options: Benchmark, device: torch.device, tell: Tell) -> Rows:
    """Nanoseconds for each random number."""
    tell("kernels")
    found = kernel_nanoseconds(options.batch, options.width, 10 * options.repeats, device)
    return [{"noise": name, **times} for name, times in found.items()]


def _deep(options: Benchmark, device: torch.device, tell: Tell) -> Rows:
    """Median milliseconds of dense and convolutional layers; ratios are to the surrogate's of the same network."""
    images = torch.rand(options.batch, *_SHAPE, device=device)
    labels = torch.randint(10, (options.batch,), device=device)
    rows = []
    for model in ("deep-mlp", "conv"):
        surrogate = Recipe(method="surrogate", model=model, num_steps=options.num_steps)
        escape = replace(surrogate, method="likelihood ratio", noise="escape", distribution="logistic", sigma=0.3)
        recipes = {"surrogate": surrogate} | {
            f"counterfactual, escape, K = {copies}": replace(escape, copies=copies) for copies in (1, 2)
        }
        steps = {
            name: partial(_take_step(recipe, _SHAPE, device)[1], images, labels) for name, recipe in recipes.items()
        }
        tell(f"deep: {model}")
        times = median_milliseconds(steps, device, options.repeats, lambda _: None)
        rows += [
            {"model": model, "method": name, "milliseconds": taken, "ratio": taken / times["surrogate"]}
            for name, taken in times.items()
        ]
    return rows


def _memory(options: Benchmark, device: torch.device, tell: Tell) -> Rows:
    """Peak memory of one copy, with the loop of snnTorch's tutorials; the output neurons have noise too."""
    rows = []
    pairs = [("surrogate", "membrane"), *((method, noise) for method in ESTIMATORS for noise in ("membrane", "escape"))]
    for method, noise in pairs:
        for num_steps in options.memory_steps:
            workload = replace(_base(options, method, noise), num_steps=num_steps, hoists=False, rate=True)
            tell(f"memory: {workload.name}, T = {num_steps}")
            peaks = [peak_megabytes(partial(make_step, workload, device), device) for _ in range(_PROCESSES)]
            rows.append({"method": workload.name, "num_steps": num_steps, "megabytes": statistics.median(peaks)})
    return rows


def _growth(options: Benchmark, device: torch.device, tell: Tell) -> Rows:
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
            start = replace(_base(options, method), copies=4, depth=2 if axis == "width" else 1)
            steps = {str(factor): make_step(scale(start, factor), device) for factor in (1, 2, 4)}
            tell(f"growth: {method}, {axis}")
            times = [*median_milliseconds(steps, device, max(3, options.repeats // 2), lambda _: None).values()]
            rows.append({"method": method, "axis": axis, "milliseconds": times, "exponent": slope((1, 2, 4), times)})
    return rows


def _accuracy(options: Benchmark, images: data.Images, device: torch.device, tell: Tell) -> Rows:
    """Seconds of training until the test accuracy, noise off, reaches the target for the first time."""
    surrogate = Recipe(method="surrogate", dataset=options.dataset, copies=16)
    membrane = replace(surrogate, method="likelihood ratio", estimator="vanilla")
    escape = replace(membrane, noise="escape", distribution="logistic", sigma=0.3)
    recipes = {
        "surrogate": surrogate,
        "surrogate, learning rate 0.003": replace(surrogate, learning_rate=3e-3),
        "vanilla, membrane, K = 16": membrane,
        "approximate, membrane, K = 16": replace(membrane, estimator="approximate"),
        "vanilla, escape, K = 16": escape,
        **{
            f"counterfactual, {noise}, K = {copies}, learning rate {rate:g}": replace(
                recipe, estimator="counterfactual", copies=copies, learning_rate=rate
            )
            for noise, recipe, copies in (("membrane", membrane, 1), ("escape", escape, 1), ("escape", escape, 2))
            for rate in (1e-3, 3e-3)
        },
    }
    target = TARGETS[options.dataset]
    rows = []
    for name, recipe in recipes.items():
        tell(f"accuracy: {name}")
        seconds, steps, best = _train_to(target, recipe, images, device, options.limit)
        rows.append({"method": name, "target": target, "seconds": seconds, "steps": steps, "best": best})
    return rows


def _train_to(
    target: float, recipe: Recipe, images: data.Images, device: torch.device, limit: float
) -> tuple[float | None, int, float]:
    """Seconds, None if the limit came first; steps; and the best accuracy seen."""
    torch.manual_seed(recipe.seed)
    net, take_step = _take_step(recipe, images.shape, device)
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


def _take_step(
    recipe: Recipe, shape: tuple[int, int, int], device: torch.device
) -> tuple[torch.nn.Module, Callable[[torch.Tensor, torch.Tensor], float]]:
    """An untrained network, and its training step."""
    net = make_network(recipe, shape).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    return net, stepper(recipe, net, optimizer)


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headers and lines of what was measured."""
    drawn: dict[str, Callable[[Rows, dict[str, Any]], Table]] = {
        "steps": _steps_table, "kernels": _kernels_table, "deep": _deep_table,
        "memory": _memory_table, "growth": _growth_table, "accuracy": _accuracy_table,
    }  # fmt: skip
    found = {part: draw(results[part], results["settings"]) for part, draw in drawn.items() if part in results}
    return [(PARTS[part], *table) for part, table in found.items()]


def to_markdown(results: dict[str, Any]) -> str:
    """All tables as Markdown, with what is needed to read and repeat them."""
    settings = results["settings"]
    sections = [f"## {title}\n\n{markdown(header, lines)}" for title, header, lines in tables(results)]
    if not any(row["method"] == RIVAL for row in results.get("steps", [{"method": RIVAL}])):
        sections[0] += f"\n\n{_NO_RIVAL}"
    # The other parts train networks of the recipes.
    sized = {"steps", "kernels", "memory", "growth"} & results.keys()
    size = f"784-{settings['width']}-10 and batch {settings['batch']} where no other is named.\n\n" if sized else ""
    return f"# Benchmark\n\n{size}" + "\n\n".join(sections) + f"\n\n{files.origin_note(results)}"


def _steps_table(rows: Rows, settings: dict[str, Any]) -> Table:
    def cell(row: dict[str, Any]) -> str:
        return f"{row['milliseconds']:.1f} ({row['ratio']:.2f} ×)"

    header = ["median of turns; ms (ratio)", *(f"K = {copies}" for copies in settings["copies"])]
    return header, _by_method(rows, "copies", settings["copies"], cell)


def _kernels_table(rows: Rows, settings: dict[str, Any]) -> Table:
    header = ["ns for a number", *KERNEL_COLUMNS]
    return header, [[row["noise"], *(f"{row[column]:.2f}" for column in KERNEL_COLUMNS)] for row in rows]


def _deep_table(rows: Rows, settings: dict[str, Any]) -> Table:
    header = ["model", "method", "ms", "ratio"]
    return header, [
        [row["model"], row["method"], f"{row['milliseconds']:.1f}", f"{row['ratio']:.2f} ×"] for row in rows
    ]


def _memory_table(rows: Rows, settings: dict[str, Any]) -> Table:
    header = ["MB above the start", *(f"T = {steps}" for steps in settings["memory_steps"])]
    return header, _by_method(rows, "num_steps", settings["memory_steps"], lambda row: f"{row['megabytes']:.1f}")


def _by_method(rows: Rows, key: str, columns: list[int], cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
    """One line for each method, one column for each value of a key."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row[key]: cell(row) for row in rows if row["method"] == method}
        lines.append([method, *(found.get(column, "") for column in columns)])
    return lines


def _growth_table(rows: Rows, settings: dict[str, Any]) -> Table:
    header = ["method", "over", "ms at 1 ×, 2 ×, 4 ×", "exponent"]
    return header, [
        [row["method"], row["axis"], ", ".join(f"{t:.1f}" for t in row["milliseconds"]), f"{row['exponent']:.2f}"]
        for row in rows
    ]


def _accuracy_table(rows: Rows, settings: dict[str, Any]) -> Table:
    header = [f"{settings['dataset']}, mlp, test accuracy", "target", "seconds", "steps", "best seen"]
    return header, [
        [
            row["method"], f"{row['target']:.0%}", "not reached" if row["seconds"] is None else f"{row['seconds']:.1f}",
            str(row["steps"]), f"{row['best']:.1%}",
        ]
        for row in rows
    ]  # fmt: skip


def _figure(rows: Rows, x: str, y: str, labels: list[str]) -> Figure:
    """One line for each method: colours tell estimators, and dashes noises; surrogates, without copies, are black."""
    figure, (axes,) = new_figure(8, 5)
    styles = {row["method"]: _style(row["method"]) for row in rows}
    colors = colors_of(dict.fromkeys(name for name, _ in styles.values() if name != "surrogate"))
    for method, (name, dashes) in styles.items():
        points = [(row[x], row[y]) for row in rows if row["method"] == method]
        color = colors.get(name, "black")
        if name == "surrogate" and x == "copies":
            axes.axhline(points[0][1], color=color, linestyle=dashes, label=method)
        else:
            axes.plot(*zip(*points, strict=True), marker="o", color=color, linestyle=dashes, label=method)
    values = sorted({row[x] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    return with_legend(figure, axes, 3)


def _style(method: str) -> tuple[str, str]:
    """The estimator of a row, which has a colour, and its dashes."""
    if method.startswith("surrogate"):
        return "surrogate", dict(zip((*_SURROGATES, RIVAL), _DASHES, strict=True))[method]
    for noise, dashes in zip(NOISES, _DASHES, strict=False):
        if method.endswith(f", {noise}"):
            return method.removesuffix(f", {noise}"), dashes
    return method, _DASHES[0]
