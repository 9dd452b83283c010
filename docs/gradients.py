"""Trains networks by loops as users write them, by surrogate gradients and by the likelihood ratio, and compares them.

``python docs/gradients.py --data-root data`` writes ``docs/results/gradients.json`` after each run, and
``gradients.md``. Runs that are in the file already are left out. ``--data-root`` is a torchvision root with MNIST and
Fashion-MNIST, and with ``fsdd/fsdd.zip`` (Free Spoken Digit Dataset: ``recordings/<digit>_<speaker>_<index>.wav``) and
``nmnist-small/nmnist-small.zip`` (recordings of N-MNIST: ``Train/<digit>/<index>.bin``, ``Test/...``).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import snntorch as snn
import torch
from scipy import signal
from scipy.io import wavfile
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr._messages import listed, markdown, versions
from snntorch_lr.experiments import data
from snntorch_lr.experiments.files import write_json, write_text

DISCOUNTS = 1.0, 0.9, 0.7, 0.5, 0.3, 0.0
SURROGATE, SAME_NOISE, RATIO = "surrogate", "surrogate, same noise", "likelihood ratio"


# ---- data: inputs and labels for training, then for testing


@dataclass(frozen=True)
class Split:
    """A data set in memory.

    Attributes:
        train: inputs, ``[n, ...]``.
        train_labels: ``[n]``.
        test: inputs, ``[m, ...]``.
        test_labels: ``[m]``.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@cache
def images(name: str, root: Path, tested: int = 10_000) -> Split:
    """MNIST, Fashion-MNIST, or scikit-learn's digits, ``[n, 1, height, width]``; of the test images the first ones."""
    loaded = data.load(name, root)
    return Split(loaded.train, loaded.train_labels, loaded.test[:tested], loaded.test_labels[:tested])


@cache
def digits(root: Path) -> Split:
    """scikit-learn's digits, ``[n, 1, 8, 8]``; the last 500 are for testing."""
    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    pixels = pixels.float().view(-1, 1, 8, 8) / 16
    return Split(pixels[:-500], labels[:-500], pixels[-500:], labels[-500:])


@cache
def speech(root: Path, steps: int, hop: int) -> Split:
    """Spoken digits as 40 log-mel bands, ``[n, steps, 40]``: windows of 32 ms, so many samples apart, at 8 kHz."""
    archive = zipfile.ZipFile(root / "fsdd" / "fsdd.zip")
    names = sorted(name for name in archive.namelist() if name.endswith(".wav"))
    frames = torch.stack([_log_mel(archive.read(name), steps, hop) for name in names])
    labels = torch.tensor([int(Path(name).name.split("_")[0]) for name in names])
    tested = torch.tensor([int(Path(name).stem.split("_")[2]) < 5 for name in names])
    level, spread = frames[~tested].mean((0, 1)), frames[~tested].std((0, 1))
    frames = (frames - level) / spread
    return Split(frames[~tested], labels[~tested], frames[tested], labels[tested])


def _log_mel(recording: bytes, steps: int, hop: int, window: int = 256, bands: int = 40) -> Tensor:
    rate, samples = wavfile.read(io.BytesIO(recording))
    length = (steps - 1) * hop + window
    samples = samples[:length].astype(np.float64) / np.abs(samples).max()
    samples = np.pad(samples, (0, length - len(samples)))
    frequencies, _, spectrum = signal.stft(
        samples, rate, "hann", window, window - hop, boundary=None, padded=False, scaling="psd"
    )
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    energies = np.minimum(rising, falling).clip(0) @ np.abs(spectrum) ** 2
    return torch.as_tensor(np.log(energies + 1e-9).T, dtype=torch.float32)


@cache
def events(root: Path, steps: int) -> Split:
    """N-MNIST as counts of events up to 1, ``[n, steps, 2, 34, 34]``; 800 recordings for training, 300 for testing."""
    archive = zipfile.ZipFile(root / "nmnist-small" / "nmnist-small.zip")
    names = sorted((name for name in archive.namelist() if name.endswith(".bin")), key=lambda name: Path(name).name)
    train, test = ([name for name in names if name.startswith(part)] for part in ("Train", "Test"))
    names = train + test
    frames = torch.stack([_frames(archive.read(name), steps) for name in names])
    labels = torch.tensor([int(Path(name).parent.name) for name in names])
    return Split(frames[:800], labels[:800], frames[800:], labels[800:])


def _frames(recording: bytes, steps: int, last: int = 310_000) -> Tensor:
    parts = np.frombuffer(recording, np.uint8).reshape(-1, 5).astype(np.int64)
    x, y, polarity = parts[:, 0], parts[:, 1], parts[:, 2] >> 7
    microseconds = (parts[:, 2] & 127) << 16 | parts[:, 3] << 8 | parts[:, 4]
    frames = torch.zeros(steps, 2, 34, 34)
    frames[np.minimum(microseconds * steps // last, steps - 1), polarity, y, x] = 1
    return frames


# ---- networks


class Dense(nn.Module):
    """784-256-10 on a constant image, a linear readout of spikes."""

    def __init__(self, steps: int = 8) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.lif, self.fc2 = nn.Linear(784, 256), snn.Leaky(beta=0.9), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        mem, current, total = self.lif.reset_mem(), self.fc1(x.flatten(1)), torch.zeros(())
        for _ in range(self.steps):
            spikes, mem = self.lif(current, mem)
            total = total + self.fc2(spikes)
        return total * 10 / self.steps


class Sequence(nn.Module):
    """Two hidden layers on a sequence ``[batch, time, features]``, a linear readout of spikes."""

    def __init__(self, features: int, hidden: int, beta: float) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(features, hidden), snn.Leaky(beta=beta)
        self.fc2, self.lif2 = nn.Linear(hidden, hidden), snn.Leaky(beta=beta)
        self.fc3 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        mem1, mem2, total = self.lif1.reset_mem(), self.lif2.reset_mem(), torch.zeros(())
        for frame in x.unbind(1):
            spikes, mem1 = self.lif1(self.fc1(frame), mem1)
            spikes, mem2 = self.lif2(self.fc2(spikes), mem2)
            total = total + self.fc3(spikes)
        return total * 10 / x.shape[1]


class RateCoded(Sequence):
    """The same on an image, whose pixels fire at random in each of 25 time steps."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        x = x.flatten(1).unsqueeze(1).expand(-1, 25, -1)
        return super().forward((torch.rand_like(x) < x).to(x.dtype))


class Deep(nn.Module):
    """Five times convolution, BatchNorm, LIF; pooled currents; 4 time steps.

    Args:
        running: BatchNorm has running statistics, and uses them at test; otherwise it uses those of the batch.
        surrogate: of snnTorch; None for its default, the arctangent.
    """

    def __init__(self, running: bool = False, surrogate: Any = None) -> None:
        super().__init__()
        channels = (1, 8, 16, 16, 32, 32)
        pairs = list(itertools.pairwise(channels))
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1, bias=False) for pair in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=running) for width in channels[1:])
        self.lifs = nn.ModuleList(snn.Leaky(beta=0.5, spike_grad=surrogate) for _ in pairs)
        self.head = nn.Linear(288, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        mems = [lif.reset_mem() for lif in self.lifs]
        first, total = self.norms[0](self.convs[0](x)), torch.zeros(())
        for _ in range(4):
            value, mems[0] = self.lifs[0](first, mems[0])
            for index in range(1, 5):
                value = self.norms[index](self.convs[index](value))
                value = F.avg_pool2d(value, 2) if index in (1, 2, 4) else value
                value, mems[index] = self.lifs[index](value, mems[index])
            total = total + self.head(value.flatten(1))
        return total / 4


def louder(net: nn.Module, factor: float) -> None:
    """Multiplies the weights of convolutions at the start: with those of torch hardly a neuron fires."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= factor


class Convolutional(nn.Module):
    """Two convolutions on events ``[batch, time, 2, 34, 34]``; strides, or max-pooling of spikes.

    Args:
        pooled: spikes are pooled.
    """

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        stride = 1 if pooled else 2
        self.pool = nn.MaxPool2d(2) if pooled else nn.Identity()
        self.conv1, self.lif1 = nn.Conv2d(2, 12, 5, stride, padding=2), snn.Leaky(beta=0.5)
        self.conv2, self.lif2 = nn.Conv2d(12, 24, 5, stride, padding=2), snn.Leaky(beta=0.5)
        self.head = nn.Linear(1536 if pooled else 1944, 10)
        louder(self, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        mem1, mem2, total = self.lif1.reset_mem(), self.lif2.reset_mem(), torch.zeros(())
        for frame in x.unbind(1):
            spikes, mem1 = self.lif1(self.conv1(frame), mem1)
            spikes, mem2 = self.lif2(self.conv2(self.pool(spikes)), mem2)
            total = total + self.head(self.pool(spikes).flatten(1))
        return total * 10 / x.shape[1]


class PooledImages(nn.Module):
    """Two convolutions on a constant image, whose spikes are pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(1, 12, 5), snn.Leaky(beta=0.5)
        self.conv2, self.lif2 = nn.Conv2d(12, 32, 5), snn.Leaky(beta=0.5)
        self.head = nn.Linear(512, 10)
        louder(self, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        mem1, mem2, current, total = self.lif1.reset_mem(), self.lif2.reset_mem(), self.conv1(x), torch.zeros(())
        for _ in range(6):
            spikes, mem1 = self.lif1(current, mem1)
            spikes, mem2 = self.lif2(self.conv2(F.max_pool2d(spikes, 2)), mem2)
            total = total + self.head(F.max_pool2d(spikes, 2).flatten(1))
        return total * 10 / 6


# ---- runs


@dataclass(frozen=True)
class Task:
    """A network, its data and how it is trained.

    Attributes:
        load: the data, from ``--data-root``.
        network: makes the network.
        steps: optimizer steps.
        batch: samples of each.
        rate: learning rate of Adam.
        cosine: the learning rate falls to 0.
        sigma: noise level of logistic escape noise.
        to: what is left of it at the end, by ``slr.anneal``; 1 keeps it.
        says: what the network and its data are, for the page.
    """

    load: Callable[[Path], Split]
    network: Callable[[], nn.Module]
    steps: int
    batch: int
    rate: float
    says: str
    cosine: bool = True
    sigma: float = 0.3
    to: float = 1.0


def fast_sigmoid() -> Any:
    """The surrogate with slope 25 of snnTorch's tutorials."""
    return snn.surrogate.fast_sigmoid(slope=25)


MNIST = Task(lambda root: images("mnist", root), Dense, 4 * 468, 128, 1e-3, "784-256-10 on MNIST, T = 8, β .9")
SPEECH = Task(
    lambda root: speech(root, 39, 128), lambda: Sequence(40, 200, 0.95), 12 * 42, 64, 5e-3,
    "40-200-200-10 on spoken digits, T = 39, β .95", to=1 / 3,
)  # fmt: skip
LONG = replace(
    SPEECH, load=lambda root: speech(root, 97, 51), network=lambda: Sequence(40, 200, 0.98), steps=3 * 42,
    says="40-200-200-10 on spoken digits, T = 97, β .98",
)  # fmt: skip
RATES = Task(
    digits, lambda: RateCoded(64, 128, 0.95), 15 * 20, 64, 2e-3,
    "64-128-128-10 on scikit-learn's digits, rate-coded, T = 25, β .95", to=1 / 3,
)  # fmt: skip
EVENTS = Task(
    lambda root: events(root, 20), Convolutional, 5 * 25, 32, 2e-3,
    "two convolutions with strides on N-MNIST, T = 20, β .5", to=1 / 3,
)  # fmt: skip
DEEP = Task(
    lambda root: images("fashion-mnist", root, 2000), lambda: Deep(surrogate=fast_sigmoid()), 600, 64, 2e-3,
    "five convolutions with BatchNorm on Fashion-MNIST, T = 4, β .5", cosine=False,
)  # fmt: skip
TASKS = {
    "mnist": MNIST,
    "mnist, annealed": replace(MNIST, to=1 / 3),
    "speech": SPEECH,
    "deep": DEEP,
    "deep, annealed": replace(DEEP, to=1 / 3),
    "deep, arctangent": replace(DEEP, network=Deep),
    "deep, running statistics": replace(DEEP, network=lambda: Deep(running=True, surrogate=fast_sigmoid())),
    "MNIST": replace(MNIST, rate=3e-3, steps=468),
    "speech 39": replace(SPEECH, steps=4 * 42),
    "speech 97": LONG,
    "digits": RATES,
    "events": EVENTS,
    "pooled images": Task(
        lambda root: images("mnist", root, 2000), PooledImages, 200, 64, 2e-3,
        "two convolutions with pooled spikes on MNIST, T = 6, β .5", sigma=0.1,
    ),
    "pooled events": replace(
        EVENTS, network=lambda: Convolutional(pooled=True), steps=4 * 25, sigma=0.1, to=1.0,
        says="two convolutions with pooled spikes on N-MNIST, T = 20, β .5",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
        part: of the issue, the unit of the command line.
        task: a key of ``TASKS``.
        method: surrogate gradients without noise or with the same noise, or the likelihood ratio.
        seed: of weights, batches and noise.
        rate: learning rate; None for that of the task.
        discount: γ; None for the default.
        multilinear: max-pooling of spikes has the derivative of what one spike does, in place of torch's.
    """

    part: str
    task: str
    method: str
    seed: int
    rate: float | None = None
    discount: float | None = None
    multilinear: bool = False


def plan(part: str, seeds: int) -> Iterator[Run]:
    """The runs of a part, the first seed of all first."""
    for seed in range(seeds):
        if part == "mnist":
            for rate in (1e-3, 3e-3):
                yield from (Run(part, "mnist", method, seed, rate) for method in (SURROGATE, SAME_NOISE, RATIO))
                yield Run(part, "mnist, annealed", RATIO, seed, rate)
        elif part == "speech":
            yield from (Run(part, "speech", method, seed) for method in (SURROGATE, SAME_NOISE, RATIO))
        elif part == "deep":
            for task in ("deep", "deep, running statistics"):
                yield from (Run(part, task, method, seed) for method in (SURROGATE, RATIO))
            yield Run(part, "deep, annealed", RATIO, seed)
            yield Run(part, "deep, arctangent", SURROGATE, seed)
        elif part == "discount":
            for task in ("MNIST", "speech 39", "speech 97", "digits", "events"):
                yield Run(part, task, SURROGATE, seed)
                yield from (Run(part, task, RATIO, seed, discount=discount) for discount in DISCOUNTS)
        else:
            for task in ("pooled images", "pooled events"):
                yield Run(part, task, SURROGATE, seed)
                yield from (Run(part, task, RATIO, seed, multilinear=known) for known in (False, True))


SEEDS = {"mnist": 3, "speech": 2, "deep": 2, "discount": 2, "pooling": 2}


def train(run: Run, root: Path) -> dict[str, Any]:
    """Trains a network and tests it; the numbers of the page."""
    task = TASKS[run.task]
    split = task.load(root)
    torch.manual_seed(run.seed)
    net = task.network()
    if run.method != SURROGATE:
        slr.add_noise(net, sigma=task.sigma, kind="escape", learn=False)
    optimizer = torch.optim.Adam(net.parameters(), run.rate or task.rate)
    if run.method == RATIO:
        slr.attach(optimizer, net, **({} if run.discount is None else {"discount": run.discount}))
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps) if task.cosine else None
    quieter = slr.anneal(net, task.steps, task.to) if run.method != SURROGATE and task.to < 1 else None
    losses = []
    start = time.process_time()
    for rows in batches(len(split.train), task.batch, task.steps, run.seed):
        optimizer.zero_grad()
        with pooling(run.multilinear):
            loss = F.cross_entropy(net(split.train[rows]), split.train_labels[rows])
        loss.backward()
        optimizer.step()
        for scheduler in (slower, quieter):
            if scheduler is not None:
                scheduler.step()
        losses.append(float(loss.detach()))
    seconds = time.process_time() - start
    net.eval()
    tail = losses[-max(1, len(losses) // 5) :]
    results = {"loss": mean(tail), "off": accuracy(net, split), "seconds": seconds}
    if run.method != SURROGATE:
        with slr.noise_on(net):
            results["on"] = accuracy(net, split)
    if run.task == "deep, running statistics" and run.method == RATIO:
        slr.update_batch_norm(net, split.train[:6400].split(64))
        results["off, statistics again"] = accuracy(net, split)
    return results | {"load": os.getloadavg()[0]}


def batches(samples: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of so many batches, the same for all methods."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for rows in torch.randperm(samples, generator=generator).split(batch)[: samples // batch]:
            if done == steps:
                return
            done += 1
            yield rows


def pooling(multilinear: bool) -> AbstractContextManager[Any]:
    """Context of a forward pass."""
    if not multilinear:
        return nullcontext()
    from snntorch_lr.robustness.surrogates import SpikePooling

    return SpikePooling()


def accuracy(net: nn.Module, split: Split) -> float:
    """On test data, in the mode that the network is in."""
    with torch.no_grad():
        scores = torch.cat([net(part) for part in split.test.split(500)])
    return float((scores.argmax(1) == split.test_labels).double().mean())


# ---- the page


def settings(row: dict[str, Any]) -> tuple[Any, ...]:
    """What runs with other seeds have in common."""
    return tuple(row["run"][key] for key in ("part", "task", "method", "rate", "discount", "multilinear"))


def percent(values: list[float]) -> str:
    """Mean of accuracies."""
    return f"{100 * mean(values):.2f}"


def grouped(rows: list[dict[str, Any]], part: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The runs of a part, those that differ in their seeds together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["run"]["part"] == part:
            groups.setdefault(settings(row), []).append(row)
    return groups


def comparison(rows: list[dict[str, Any]], part: str, bar: float = 1.0) -> str:
    """A table of methods, and how far from surrogate gradients without noise they are, in points; within a bar?"""
    groups = grouped(rows, part)
    lines = []
    for (_, task, method, rate, _, multilinear), runs in groups.items():
        reference = groups.get((part, task.removesuffix(", annealed"), SURROGATE, rate, None, False), [])
        plain = {row["run"]["seed"]: row["off"] for row in reference}
        differences = [100 * (row["off"] - plain[row["run"]["seed"]]) for row in runs if row["run"]["seed"] in plain]
        again = [row["off, statistics again"] for row in runs if "off, statistics again" in row]
        lines.append([
            f"{task}" if rate is None else f"{task}, learning rate {rate:g}",
            method + (", multilinear pooling" if multilinear else ""),
            percent([row["off"] for row in runs]) + (f" ({percent(again)})" if again else ""),
            percent([row["on"] for row in runs]) if "on" in runs[0] else "-",
            *(["-", "-"] if method == SURROGATE or not differences else _within(differences, bar)),
            ", ".join(f"{100 * row['off']:.2f}" for row in runs),
            f"{mean(row['loss'] for row in runs):.4f}",
            f"{mean(row['seconds'] for row in runs):.0f}",
            f"{mean(row['load'] for row in runs):.1f}",
        ])  # fmt: skip
    header = ["network", "gradient", "off, %", "on, %", "off - surrogate", f"not below -{bar:g}", "off, seed by seed"]
    return markdown([*header, "training loss", "s", "load"], lines)


def _within(differences: list[float], bar: float) -> list[str]:
    return [f"{mean(differences):+.2f}", "yes" if mean(differences) >= -bar else "no"]


def by_discount(rows: list[dict[str, Any]], key: str, show: Callable[[float], str]) -> str:
    """A table of one number by task and γ."""
    groups = grouped(rows, "discount")
    lines = []
    for task in dict.fromkeys(name for _, name, *_ in groups):
        runs = [groups.get(("discount", task, RATIO, None, discount, False), []) for discount in DISCOUNTS]
        plain = groups.get(("discount", task, SURROGATE, None, None, False), [])
        cells = [show(mean(row[key] for row in some)) if some else "-" for some in runs]
        first = show(mean(row[key] for row in plain)) if plain and key in plain[0] else "-"
        lines.append([TASKS[task].says, *cells, first])
    return markdown(["task", *(f"γ = {discount:g}" for discount in DISCOUNTS), "surrogate, no noise"], lines)


def excess(rows: list[dict[str, Any]]) -> str:
    """A table of how far the training losses of γ are above the least one, for numbers and for the rule γ = β."""
    groups = grouped(rows, "discount")
    lines = {f"γ = {discount:g}": [] for discount in DISCOUNTS} | {"γ = β": []}
    tasks = list(dict.fromkeys(name for _, name, *_ in groups))
    complete = [task for task in tasks if all(("discount", task, RATIO, None, g, False) in groups for g in DISCOUNTS)]
    for task in complete:
        runs = [groups["discount", task, RATIO, None, discount, False] for discount in DISCOUNTS]
        losses = [mean(row["loss"] for row in some) for some in runs]
        beta = next(float(neuron.beta) for neuron in TASKS[task].network().modules() if isinstance(neuron, snn.Leaky))
        # Between two of the discounts the loss is taken to be a straight line.
        ruled = float(np.interp(beta, DISCOUNTS[::-1], losses[::-1]))
        for cells, loss in zip(lines.values(), [*losses, ruled], strict=True):
            cells.append(100 * (loss / min(losses) - 1))
    table = [
        [name, *(f"{value:.1f}" for value in values), f"{mean(values):.1f}", f"{max(values):.1f}"]
        for name, values in lines.items()
        if values
    ]
    return markdown(["rule", *complete, "mean", "most"], table)


def to_markdown(results: dict[str, Any]) -> str:
    """The page."""
    rows = results["rows"]
    tasks = "\n".join(
        f"- **{name}**: {task.says}; {task.steps} steps of {task.batch}, learning rate {task.rate:g}"
        f"{', cosine to 0' if task.cosine else ''}; σ {task.sigma:g}"
        f"{f', annealed to {task.sigma * task.to:.2g}' if task.to < 1 else ''}"
        for name, task in TASKS.items()
    )
    return f"""# The gradient in plain loops

Networks and loops as users write them, `loss.backward(); optimizer.step()`, by snnTorch's surrogate gradients and,
after `slr.add_noise(net, kind="escape", learn=False)` and `slr.attach(optimizer, net)`, by the likelihood ratio with
one draw of the noise (K = 1). Weights at the start, batches and learning rates are the same for all. Accuracies are on
test data with the noise off and on (one draw), in percent, and means over seeds; the training loss is that of the last
fifth of the steps. Seconds are processor time of training, on one thread, of a machine that did other things at the
same time, which makes them longer: *load* is its average load at the end of the runs, on {results["cpus"]} cores.

{tasks}

## MNIST

{comparison(rows, "mnist", 0.15)}

## Spoken digits

{comparison(rows, "speech")}

## Five convolutional layers

In parentheses: after `slr.update_batch_norm`, which computes running statistics again without noise.

{comparison(rows, "deep")}

## The discount γ

Training loss:

{by_discount(rows, "loss", lambda value: f"{value:.4f}")}

By how many percent it is above that of the best γ of the task:

{excess(rows)}

Accuracy with the noise off:

{by_discount(rows, "off", lambda value: f"{100 * value:.1f}")}

Accuracy with the noise on:

{by_discount(rows, "on", lambda value: f"{100 * value:.1f}")}

## Max-pooling of spikes

Torch's derivative goes to the first of several equal spikes; the multilinear one is what a flip of one spike does.

{comparison(rows, "pooling")}

Command: `{results["command"]}`

Versions: {listed(results["versions"])}. Machine: {results["machine"]}.
"""


def main() -> None:
    """Trains what is not in the file yet, and writes the page after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(SEEDS)}; all by default")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, help="how many; by default as many as the page has")
    options = parser.parse_args()
    unknown = set(options.parts) - set(SEEDS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(SEEDS)}")
    torch.set_num_threads(1)
    path = options.out / "gradients.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for part in options.parts or SEEDS:
        runs = list(plan(part, options.seeds or SEEDS[part]))
        for index, run in enumerate(runs, 1):
            if any(row["run"] == vars(run) for row in rows):
                continue
            numbers = train(run, options.data_root)
            rows.append({"run": vars(run), **numbers})
            shown = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
            print(f"{part} {index}/{len(runs)}: {run.task}, {run.method}, {run}: {shown}", flush=True)
            save(path, rows)
    save(path, rows)


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the results, in the order of the plan, and their page."""
    order = [vars(run) for part in SEEDS for run in plan(part, SEEDS[part])]
    results = {
        "command": "python docs/gradients.py --data-root data",
        "versions": versions("snntorch", "torch", "numpy", "scipy", "scikit-learn") | {"snntorch-lr": slr.__version__},
        "machine": f"{platform.machine()}, 1 thread, cpu",
        "cpus": os.cpu_count(),
        "rows": sorted(rows, key=lambda row: order.index(row["run"])),
    }
    write_json(path, results)
    write_text(path.with_suffix(".md"), to_markdown(results))


if __name__ == "__main__":
    main()
