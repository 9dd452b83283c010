"""Time and memory of a training step by every method, how they grow, and the time to an accuracy."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from .._messages import markdown
from ..convert import add_noise
from ..gradients import ESTIMATORS
from ..network import reset
from ..noise import KINDS
from ..optim import attach, closure
from ..philox import draw
from ..rollout import rollout
from . import data, files
from .options import Outcome, WithDevice, option
from .train import Recipe, accuracy, make_network, stepper

K = TypeVar("K", bound=Hashable)
FEATURES, CLASSES = 784, 10
CPU = torch.device("cpu")
_SIGMA, _BETA = 0.5, 0.95
Step = Callable[[], Any]
"""A training step on a fixed batch: each call updates the weights, and returns the loss."""
Forward = Callable[[Tensor, int], Tensor]
"""Membrane potentials of the output neurons, ``[time, batch, classes]``, from inputs and the number of time steps."""


def _as_written(net: nn.Sequential) -> Forward:
    """The loop of snnTorch's tutorials."""

    def forward(x: Tensor, num_steps: int) -> Tensor:
        reset(net)
        return torch.stack([net(x)[1] for _ in range(num_steps)])

    return forward


def _hoisted(net: nn.Sequential) -> Forward:
    """The same loop; the current of the constant input is computed once, in front of it."""
    loop = _as_written(net[1:])
    return lambda x, num_steps: loop(net[0](x), num_steps)


def _rolled_out(net: nn.Sequential) -> Forward:
    return lambda x, num_steps: rollout(net, x, num_steps)[1]


def _spikingjelly(net: nn.Sequential) -> Forward:
    """SpikingJelly, where each layer computes all time steps before the next one begins.

    Its neurons leak after a reset and not before it, as snnTorch's do; nothing else differs.

    Source: Fang et al. (2023), "SpikingJelly: An open-source machine learning infrastructure platform for spike-based
    intelligence".
    """
    from spikingjelly.activation_based import functional, neuron

    leaky = partial(neuron.LIFNode, 1 / (1 - _BETA), False, v_reset=None, detach_reset=True, step_mode="m")
    # Not infinite, for its reset multiplies by the threshold.
    output = leaky(v_threshold=1e9, store_v_seq=True)
    layers = [layer if isinstance(layer, nn.Linear) else leaky() for layer in list(net)[1:-1]]

    def forward(x: Tensor, num_steps: int) -> Tensor:
        for layer in (*layers, output):
            functional.reset_net(layer)
        value = net[0](x).expand(num_steps, -1, -1)
        for layer in layers:
            value = layer(value)
        output(value)
        return output.v_seq  # type: ignore[no-any-return]

    return forward


LOOPS: dict[str, Callable[[nn.Sequential], Forward]] = {
    "as written": _as_written, "hoisted": _hoisted, "rollout": _rolled_out, "SpikingJelly": _spikingjelly
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A way to compute a training step: by ``"surrogate"`` or one of ``ESTIMATORS``, in one of ``LOOPS``, K copies."""

    gradient: str = "surrogate"
    loop: str = "hoisted"
    copies: int = 1
    noisy: bool = True
    fused: bool = True


REFERENCE, RIVAL = "snnTorch, as written", "SpikingJelly, multi-step"
METHODS = {
    REFERENCE: Method(loop="as written", noisy=False),
    "snnTorch, hoisted": Method(noisy=False),
    "snnTorch, hoisted, same noise": Method(),
    RIVAL: Method(loop="SpikingJelly", noisy=False),
    "counterfactual, as written": Method("counterfactual", "as written"),
    "counterfactual, hoisted": Method("counterfactual"),
    "counterfactual, hoisted, not fused": Method("counterfactual", fused=False),
    "counterfactual, slr.rollout": Method("counterfactual", "rollout"),
    "approximate, slr.rollout": Method("approximate", "rollout"),
    "counterfactual, K = 2": Method("counterfactual", copies=2),
    "vanilla, K = 16": Method("vanilla", copies=16),
    "approximate, K = 16": Method("approximate", copies=16),
}
"""Rows of the benchmark, by name; K = 1 where none is named."""


def make_step(
    method: Method, noise: str = "escape", num_steps: int = 25, width: int = 1000, depth: int = 1, batch: int = 128,
    device: torch.device = CPU,
) -> Step:  # fmt: skip
    """A training step with Adam on a fixed random batch; the loss is summed over all time steps.

    The network has ``depth`` hidden layers of ``width`` neurons, with noise of a kind where the method has it.
    """
    torch.manual_seed(0)
    x = torch.rand(batch, FEATURES).to(device)
    y = torch.randint(CLASSES, (batch,)).to(device)
    sizes = [FEATURES, *[width] * depth, CLASSES]
    pairs = [(nn.Linear(*pair), snn.Leaky(beta=_BETA, init_hidden=True)) for pair in pairwise(sizes)]
    net = nn.Sequential(*(module for pair in pairs for module in pair))
    net[-1] = snn.Leaky(beta=_BETA, init_hidden=True, output=True, reset_mechanism="none")
    net.to(device)
    if method.noisy:
        add_noise(net, sigma=_SIGMA, only=[str(2 * layer + 1) for layer in range(depth)], kind=noise)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    forward = LOOPS[method.loop](net)
    if method.gradient != "surrogate":
        attach(optimizer, net, method.gradient, copies=method.copies if method.copies > 1 else None)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        mem = forward(x, num_steps)
        return F.cross_entropy(mem.flatten(0, 1), y.repeat(num_steps), reduction="none").view(num_steps, -1).sum(0)

    def loop() -> Tensor:
        with contextlib.nullcontext() if method.fused else kernels.off():
            loss = losses(x, y).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return loss.detach()

    return loop if method.copies == 1 else lambda: optimizer.step(closure(losses, x, y))


def median_milliseconds(steps: Mapping[K, Step], device: torch.device, repeats: int) -> dict[K, float]:
    """Median time of each step; they take turns, so that a busy machine slows all of them."""
    times: dict[K, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - started))
    # The first one compiles.
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def peak_megabytes(make: Callable[..., Step], device: torch.device) -> float:
    """Peak memory of the first training step above what there is before it, in 10⁶ bytes.

    Gradients, the optimizer's state and all that an estimator looks at in its first call are in it. Another network
    takes a step with a single time step before, so that libraries are there. On a CPU it is the memory of a fresh
    process, so that nothing that was freed earlier hides a part of it. On a CUDA device it is what torch's allocator
    counts. ``make`` makes the step, with ``num_steps=1`` one of a single time step; ``pickle`` has to find it.
    """
    job = pickle.dumps((make, str(device), torch.get_num_threads()))
    # In a session of its own: Ctrl-C is for this process, which ends the other one.
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name], input=job, stdout=subprocess.PIPE, start_new_session=True
    )
    if process.returncode:
        raise ChildProcessError(f"measuring the memory of {make} ended with status {process.returncode}")
    return float(process.stdout)


def _peak(make: Callable[..., Step], device: torch.device) -> float:
    """``peak_megabytes``, in the process that does nothing else."""
    make(num_steps=1)()
    # An optimizer with a hook is part of a cycle: what goes away later would be taken off the peak.
    gc.collect()
    step = make()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        step()
        return float(torch.cuda.max_memory_allocated(device) - allocated) / 1e6
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        # Linux starts its record of the peak afresh; other systems have that since the process began.
        Path("/proc/self/clear_refs").write_text("5")
    before = _highest()
    step()
    return (_highest() - before) / 1e6


def _highest() -> float:
    """The most memory that this process had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:5] == "VmHWM")
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


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


def _say(what: str) -> None:
    print(what, flush=True)


def _methods() -> dict[str, Method]:
    return {name: method for name, method in METHODS.items() if name != RIVAL or find_spec("spikingjelly")}


def _steps(options: Benchmark) -> Rows:
    """Median milliseconds of all methods in turn, and their ratio to snnTorch's."""
    _say("steps: all methods in turn")
    steps = {
        (name, noise): options.maker(method, noise=noise)()
        for name, method in _methods().items()
        for noise in (KINDS if method.noisy else ("escape",))
    }
    times = median_milliseconds(steps, options.torch_device(), options.repeats)
    rows = []
    for name, method in _methods().items():
        row: dict[str, Any] = {"method": name}
        for noise in KINDS:
            taken = times[name, noise if method.noisy else "escape"]
            row |= {f"{noise} noise": taken, f"ratio, {noise}": taken / times[REFERENCE, "escape"]}
        rows.append(row)
    return rows


def _kernels(options: Benchmark) -> Rows:
    """Nanoseconds for each random number, beside uniform numbers by torch."""
    device, rows = options.torch_device(), []
    out = torch.empty(options.batch, options.width, device=device)
    torch.set_num_threads(1)
    for kind, made in KINDS.items():
        for distribution in made.offered:
            _say(f"kernels: {kind}, {distribution}")
            noise = made(distribution=distribution)
            calls: dict[str, Step] = {
                "by counter": partial(draw, noise, out.shape, out.dtype, device, 5),
                "torch, uniform": out.uniform_,
            }
            times = median_milliseconds(calls, device, 10 * options.repeats)
            nanoseconds = {name: 1e6 * taken / out.numel() for name, taken in times.items()}
            rows.append({"noise": f"{kind}, {distribution}"} | nanoseconds)
    torch.set_num_threads(options.threads)
    return rows


def _deep(options: Benchmark) -> Rows:
    """Median milliseconds of dense and convolutional layers; ratios are to the surrogate's of the same network."""
    device, rows = options.torch_device(), []
    x = torch.rand(options.batch, *_SHAPE, device=device)
    y = torch.randint(CLASSES, (options.batch,), device=device)
    for model in ("deep-mlp", "conv"):
        _say(f"deep: {model}")
        steps = {}
        for name, change in DEEP.items():
            recipe = Recipe(model=model, num_steps=options.num_steps, **change)
            steps[name] = partial(_network_and_step(recipe, _SHAPE, CLASSES, device)[1], x, y)
        times = median_milliseconds(steps, device, options.repeats)
        for name, taken in times.items():
            rows.append({"model": model, "method": name, "ms": taken, "ratio": taken / times["surrogate"]})
    return rows


def _memory(options: Benchmark) -> Rows:
    """Median peak of a few processes, at several numbers of time steps."""
    rows = []
    for name, method in _methods().items():
        row: dict[str, Any] = {"method": name}
        for num_steps in options.memory_steps:
            _say(f"memory: {name}, T = {num_steps}")
            make = options.maker(method, num_steps=num_steps)
            peaks = [peak_megabytes(make, options.torch_device()) for _ in range(_PROCESSES)]
            row[f"T = {num_steps}"] = statistics.median(peaks)
        rows.append(row)
    return rows


def _growth(options: Benchmark) -> Rows:
    """Exponents of time over T, K, width and depth: slopes of the logarithms."""
    rows, factors = [], (1, 2, 4)
    for gradient in ESTIMATORS:
        for axis in ("num_steps", "copies", "width", "depth"):
            _say(f"growth: {gradient}, {axis}")
            steps = {}
            for factor in factors:
                # A width enters the cost as the product of two layers' widths.
                width = {"width": options.width * factor // 2, "depth": 2}
                sizes = {"num_steps": {axis: options.num_steps * factor}, "width": width, "depth": {axis: factor}}
                method = Method(gradient, copies=4 * factor if axis == "copies" else 4)
                steps[f"{factor} ×"] = options.maker(method, **sizes.get(axis, {}))()
            times = median_milliseconds(steps, options.torch_device(), max(3, options.repeats // 2))
            logs = [[math.log(value) for value in values] for values in (factors, times.values())]
            rows.append(
                {"method": gradient, "over": axis, **times, "exponent": statistics.linear_regression(*logs).slope}
            )
    return rows


def _accuracy(options: Benchmark) -> Rows:
    """Seconds of training until the test accuracy, noise off, reaches the target for the first time."""
    images = data.load(options.dataset, options.data_root).to(options.torch_device())
    tries: dict[tuple[str, float], list[tuple[float | None, int, float]]] = {}
    # Seed by seed, so that a busy machine slows all of them.
    for seed in range(options.seeds):
        for name, change in ACCURACY.items():
            for rate in 1e-3, 3e-3:
                _say(f"accuracy: {name}, learning rate {rate:g}, seed {seed}")
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


def _train_to(recipe: Recipe, images: data.Dataset, options: Benchmark) -> tuple[float | None, int, float]:
    """Seconds, None if the limit came first; steps; and the best accuracy seen."""
    target, device = TARGETS[recipe.dataset], options.torch_device()
    net, take_step = _network_and_step(recipe, images.shape, images.classes, device)
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
    recipe: Recipe, shape: tuple[int, ...], classes: int, device: torch.device
) -> tuple[nn.Module, Callable[[Tensor, Tensor], float]]:
    """An untrained network, and its training step."""
    net = make_network(recipe, shape, classes).to(device)
    return net, stepper(recipe, net, torch.optim.Adam(net.parameters(), lr=recipe.learning_rate))


PARTS: dict[str, tuple[str, Callable[[Benchmark], Rows]]] = {
    "steps": ("Training step, ms", _steps),
    "kernels": ("Noise of one call on one thread of a CPU, ns for a number", _kernels),
    "deep": ("Training step of networks with two hidden layers, ms", _deep),
    "memory": ("Peak memory of the first training step, MB above the start", _memory),
    "growth": ("Growth of the time of a training step, ms at 1, 2 and 4 times the size", _growth),
    "accuracy": ("Training time to an accuracy on test images", _accuracy),
}
"""Parts of the benchmark: their headings, and what measures them."""


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

    def run(self) -> Outcome:
        """Runs the parts, and writes ``benchmark.json`` and ``benchmark.md``."""
        device = self.torch_device()
        if "accuracy" in self.parts:
            data.load(self.dataset, self.data_root)  # images that are missing are told now
        torch.set_num_threads(self.threads)
        results = files.origin(self.command_line(), device) | {"settings": self.recorded()}
        results |= {part: measure(self) for part, (_, measure) in PARTS.items() if part in self.parts}
        files.write_json(self.folder / "benchmark.json", results)
        files.write_text(self.folder / "benchmark.md", to_markdown(results))
        return Outcome(results, f"Written: {self.folder}/benchmark.json, benchmark.md", tables(results))

    def maker(self, method: Method, **sizes: Any) -> Callable[..., Step]:
        """Makes the training step of a method, of the sizes that are chosen here or given; can be pickled."""
        chosen: dict[str, Any] = {"num_steps": self.num_steps, "width": self.width, "batch": self.batch}
        return partial(make_step, method, device=self.torch_device(), **chosen | sizes)


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headers and lines of what was measured."""
    return [
        (title, [*results[part][0]], [[*map(_cell, row.values())] for row in results[part]])
        for part, (title, _) in PARTS.items()
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


# Nothing is given by a process that Ctrl-C ends while it starts this one.
if __name__ == "__main__" and (_given := sys.stdin.buffer.read()):
    _make, _device, _threads = pickle.loads(_given)
    torch.set_num_threads(_threads)
    print(_peak(_make, torch.device(_device)))
