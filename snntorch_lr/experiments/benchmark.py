"""Time and memory of a training step by every method, how they grow, and the time to an accuracy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from .._messages import markdown
from ..gradients import ESTIMATORS
from ..noise import KINDS
from ..philox import draw
from . import data, files
from .options import Outcome, WithDevice, option
from .train import Recipe, accuracy, make_network, stepper
from .workloads import METHODS, REFERENCE, RIVAL, Method, Step, make_step, median_milliseconds, peak_megabytes, slope

if TYPE_CHECKING:
    from .cli import Watch

PARTS = {
    "steps": "Training step, ms",
    "kernels": "Noise of one call on one thread of a CPU, ns for a number",
    "deep": "Training step of networks with two hidden layers, ms",
    "memory": "Peak memory of the first training step, MB above the start",
    "growth": "Growth of the time of a training step, ms at 1, 2 and 4 times the size",
    "accuracy": "Training time to an accuracy on test images",
}
"""Parts of the benchmark, and their headings."""
TARGETS = {"mnist": 0.95, "fashion-mnist": 0.84, "digits": 0.93}
# The network trains for so many steps between two looks at the test images, whose time is not counted.
_LOOK_EVERY = 25
# Peaks vary from process to process, with what the allocator of the C library makes of the same requests.
_PROCESSES = 3
_SHAPE = (1, 28, 28)
_NO_RIVAL = "SpikingJelly is not installed, and has no row; pip install spikingjelly adds it."
Rows = list[dict[str, Any]]
"""Lines of a table: cells by the names of their columns."""
ESCAPE = {"method": "likelihood ratio", "noise": "escape", "distribution": "logistic", "sigma": 0.3}
DEEP: dict[str, dict[str, Any]] = {
    "surrogate": {"method": "surrogate"}, "counterfactual": ESCAPE, "counterfactual, K = 2": ESCAPE | {"copies": 2}
}  # fmt: skip
"""Recipes of networks with two hidden layers, by name."""
ACCURACY: dict[str, dict[str, Any]] = {
    "surrogate": {"method": "surrogate"},
    "counterfactual, membrane": {"method": "likelihood ratio"},
    "counterfactual, escape": ESCAPE,
}
"""Recipes that are trained to an accuracy, by name."""
GROWTH: dict[str, Callable[[int, Benchmark], dict[str, int]]] = {
    "num_steps": lambda factor, options: {"num_steps": options.num_steps * factor},
    "copies": lambda factor, options: {},
    # A width enters the cost as the product of two layers' widths.
    "width": lambda factor, options: {"width": options.width * factor // 2, "depth": 2},
    "depth": lambda factor, options: {"depth": factor},
}
"""Sizes of the network that grows by a factor, by what grows."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(WithDevice):
    """Measure time and memory of a training step by every method, their growth, and the time to an accuracy.

    Example: snntorch-lr benchmark --part steps --part memory --out runs/benchmark
    """

    place = "runs/benchmark"
    parts: tuple[str, ...] = option(tuple(PARTS), "what to measure", choices=PARTS, flag="--part")
    repeats: int = option(7, "timed rounds; the median counts", least=1)
    num_steps: int = option(25, "time steps of the timed steps", least=1)
    width: int = option(1000, "hidden neurons", least=1)
    batch: int = option(128, "images in a step", least=1)
    memory_steps: tuple[int, ...] = option((25, 100, 400), "time steps at which memory is measured", least=1)
    dataset: str = option("mnist", "of the time to an accuracy", choices=TARGETS)
    seeds: int = option(3, "of the time to an accuracy; the median counts", least=1)
    limit: float = option(600.0, "seconds of training after which an accuracy is given up", above=0)
    threads: int = option(2, "threads of torch", least=1)

    def run(self, watch: Watch) -> Outcome:
        """Runs the parts, and writes ``benchmark.json`` and ``benchmark.md``."""
        device = self.torch_device()
        images = data.load(self.dataset, self.data_root).to(device) if "accuracy" in self.parts else None
        with _threads(self.threads):
            results = files.origin(self.command_line(), device) | {"settings": self.recorded()}
            measures: dict[str, Callable[[Benchmark, Watch], Rows]] = {
                "steps": _steps, "kernels": _kernels, "deep": _deep, "memory": _memory, "growth": _growth,
                "accuracy": partial(_accuracy, images),
            }  # fmt: skip
            results |= {part: measures[part](self, watch) for part in PARTS if part in self.parts}
        files.write_json(self.folder / "benchmark.json", results)
        files.write_text(self.folder / "benchmark.md", to_markdown(results))
        return Outcome(results, f"Written: {self.folder}/benchmark.json, benchmark.md", tables(results))

    def maker(self, method: Method, **sizes: Any) -> Callable[..., Step]:
        """Makes the training step of a method, of the sizes that are chosen here or given; can be pickled."""
        chosen: dict[str, Any] = {"num_steps": self.num_steps, "width": self.width, "batch": self.batch}
        return partial(make_step, method, device=self.torch_device(), **chosen | sizes)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads of torch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _methods() -> dict[str, Method]:
    return {name: method for name, method in METHODS.items() if name != RIVAL or find_spec("spikingjelly")}


def _steps(options: Benchmark, watch: Watch) -> Rows:
    """Median milliseconds of all methods in turn, and their ratio to snnTorch's."""
    watch.say("steps: all methods in turn")
    steps = {
        f"{name}; {noise}": options.maker(method, noise=noise)()
        for name, method in _methods().items()
        for noise in (KINDS if method.noisy else ("escape",))
    }
    times = median_milliseconds(steps, options.torch_device(), options.repeats)
    rows = []
    for name, method in _methods().items():
        row: dict[str, Any] = {"method": name}
        for noise in KINDS:
            taken = times[f"{name}; {noise if method.noisy else 'escape'}"]
            row |= {f"{noise} noise": taken, f"ratio, {noise}": taken / times[f"{REFERENCE}; escape"]}
        rows.append(row)
    return rows


def _kernels(options: Benchmark, watch: Watch) -> Rows:
    """Nanoseconds for each random number, beside uniform numbers by torch."""
    device, rows = options.torch_device(), []
    out = torch.empty(options.batch, options.width, device=device)

    def nanoseconds(call: Callable[[], object]) -> float:
        return 1e6 * median_milliseconds({"": call}, device, 10 * options.repeats)[""] / out.numel()

    with _threads(1):
        for kind, made in KINDS.items():
            for distribution in made.offered:
                watch.say(f"kernels: {kind}, {distribution}")
                noise = made(distribution=distribution)
                counter = nanoseconds(partial(draw, noise, out.shape, out.dtype, device, 5))
                uniform = nanoseconds(out.uniform_)
                rows.append({"noise": f"{kind}, {distribution}", "by counter": counter, "torch, uniform": uniform})
    return rows


def _deep(options: Benchmark, watch: Watch) -> Rows:
    """Median milliseconds of dense and convolutional layers; ratios are to the surrogate's of the same network."""
    device, rows = options.torch_device(), []
    x = torch.rand(options.batch, *_SHAPE, device=device)
    y = torch.randint(10, (options.batch,), device=device)
    for model in ("deep-mlp", "conv"):
        watch.say(f"deep: {model}")
        steps = {}
        for name, change in DEEP.items():
            recipe = Recipe(model=model, num_steps=options.num_steps, **change)
            steps[name] = partial(_network_and_step(recipe, _SHAPE, device)[1], x, y)
        times = median_milliseconds(steps, device, options.repeats)
        for name, taken in times.items():
            rows.append({"model": model, "method": name, "ms": taken, "ratio": taken / times["surrogate"]})
    return rows


def _memory(options: Benchmark, watch: Watch) -> Rows:
    """Median peak of a few processes, at several numbers of time steps."""
    rows = []
    for name, method in _methods().items():
        row: dict[str, Any] = {"method": name}
        for num_steps in options.memory_steps:
            watch.say(f"memory: {name}, T = {num_steps}")
            make = options.maker(method, num_steps=num_steps)
            peaks = [peak_megabytes(make, options.torch_device()) for _ in range(_PROCESSES)]
            row[f"T = {num_steps}"] = statistics.median(peaks)
        rows.append(row)
    return rows


def _growth(options: Benchmark, watch: Watch) -> Rows:
    """Exponents of time over T, K, width and depth."""
    rows, factors = [], (1, 2, 4)
    for gradient in ESTIMATORS:
        for axis, sizes in GROWTH.items():
            watch.say(f"growth: {gradient}, {axis}")
            steps = {}
            for factor in factors:
                method = Method(gradient, copies=4 * factor if axis == "copies" else 4)
                steps[f"{factor} ×"] = options.maker(method, **sizes(factor, options))()
            times = median_milliseconds(steps, options.torch_device(), max(3, options.repeats // 2))
            exponent = slope(factors, [*times.values()])
            rows.append({"method": gradient, "over": axis, **times, "exponent": exponent})
    return rows


def _accuracy(images: data.Images | None, options: Benchmark, watch: Watch) -> Rows:
    """Seconds of training until the test accuracy, noise off, reaches the target for the first time."""
    assert images is not None
    tries: dict[tuple[str, float], list[tuple[float | None, int, float]]] = {}
    # Seed by seed, so that a busy machine slows all of them.
    for seed in range(options.seeds):
        for name, change in ACCURACY.items():
            for rate in 1e-3, 3e-3:
                watch.say(f"accuracy: {name}, learning rate {rate:g}, seed {seed}")
                recipe = Recipe(dataset=options.dataset, learning_rate=rate, seed=seed, **change)
                tries.setdefault((name, rate), []).append(_train_to(recipe, images, options))
    rows: Rows = []
    for (name, rate), runs in tries.items():
        middle = statistics.median(math.inf if seconds is None else seconds for seconds, *_ in runs)
        rows.append(
            {
                options.dataset: f"{name}, learning rate {rate:g}",
                "target": f"{TARGETS[options.dataset]:.0%}",
                "seconds, median": None if math.isinf(middle) else middle,
                "seconds": ", ".join(_cell(seconds) for seconds, *_ in runs),
                "steps": ", ".join(str(steps) for _, steps, _ in runs),
                "best seen": ", ".join(f"{best:.1%}" for *_, best in runs),
            }
        )
    return rows


def _train_to(recipe: Recipe, images: data.Images, options: Benchmark) -> tuple[float | None, int, float]:
    """Seconds, None if the limit came first; steps; and the best accuracy seen."""
    target, device = TARGETS[recipe.dataset], options.torch_device()
    net, take_step = _network_and_step(recipe, images.shape, device)
    spent, steps, best = 0.0, 0, 0.0
    while spent < options.limit and best < target:
        for rows in torch.split(torch.randperm(len(images.train)).to(device), recipe.batch_size):
            started = time.perf_counter()
            take_step(images.train[rows], images.train_labels[rows])
            spent += time.perf_counter() - started
            steps += 1
            if steps % _LOOK_EVERY == 0:
                best = max(best, accuracy(net, images.test, images.test_labels))
            if spent >= options.limit or best >= target:
                break
    return spent if best >= target else None, steps, best


def _network_and_step(
    recipe: Recipe, shape: tuple[int, int, int], device: torch.device
) -> tuple[torch.nn.Module, Callable[[torch.Tensor, torch.Tensor], float]]:
    """An untrained network, and its training step."""
    net = make_network(recipe, shape).to(device)
    return net, stepper(recipe, net, torch.optim.Adam(net.parameters(), lr=recipe.learning_rate))


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headers and lines of what was measured."""
    return [
        (title, [*results[part][0]], [[*map(_cell, row.values())] for row in results[part]])
        for part, title in PARTS.items()
        if part in results
    ]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return "not reached" if value is None else str(value)


def to_markdown(results: dict[str, Any]) -> str:
    """All tables as Markdown, with what is needed to read and repeat them."""
    settings = results["settings"]
    sections = [f"## {title}\n\n{markdown(header, lines)}" for title, header, lines in tables(results)]
    if "steps" in results and not any(row["method"] == RIVAL for row in results["steps"]):
        sections[0] += f"\n\n{_NO_RIVAL}"
    # The other parts train networks of the recipes.
    sized = {"steps", "kernels", "memory", "growth"} & results.keys()
    size = (
        f"784-{settings['width']}-10 and batch {settings['batch']} where no other is named; ratios are to snnTorch as "
        "written; memory and growth with escape noise.\n\n"
    )
    return f"# Benchmark\n\n{size if sized else ''}" + "\n\n".join(sections) + f"\n\n{files.origin_note(results)}"
