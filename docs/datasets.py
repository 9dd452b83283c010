"""Trains networks on event recordings, sound and colour images, by surrogate gradients and by the likelihood ratio.

``python docs/datasets.py --nmnist ROOT --spoken-digits FOLDER --cifar10 FOLDER`` writes ``docs/results/datasets.json``
after each run, and ``datasets.md``. Runs that are in the file already are left out, and so are data without a place:
``Train/<digit>/*.bin`` and ``Test/<digit>/*.bin`` of N-MNIST, the WAV files of ``docs/spoken_digits.py``, and CIFAR-10
as an image folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import spoken_digits
import torch
from torch import nn

from snntorch_lr._messages import markdown
from snntorch_lr.experiments import data
from snntorch_lr.experiments.files import origin, origin_note, write_json, write_text
from snntorch_lr.experiments.train import Recipe, train

OUT = Path(__file__).parent / "results"
CPU = torch.device("cpu")
RATIO = "likelihood ratio"
NOISE: dict[str, Any] = {
    "method": RATIO, "noise": "escape", "distribution": "logistic", "sigma": 0.3, "anneal": 1 / 3, "learn_sigma": False
}  # fmt: skip
ATAN: dict[str, Any] = {"method": "surrogate"}
GRADIENTS = {"surrogate, atan": ATAN, "surrogate, fast sigmoid": ATAN | {"surrogate": "fast-sigmoid"}, RATIO: NOISE}
"""What is changed in a recipe, by the name of the gradient."""


@dataclass(frozen=True)
class Task:
    """Data, a network and its training.

    Attributes:
        says: what it is, for the page.
        gradients: of ``GRADIENTS``.
        seeds: number of runs of each.
        recipe: settings; none for spoken digits, which are trained by a plain loop.
    """

    says: str
    gradients: tuple[str, ...]
    seeds: int
    recipe: dict[str, Any]


TASKS = {
    "nmnist": Task(
        "event-conv (12 and 32 channels, 5 × 5) on a part of N-MNIST: 1,000 recordings to train on, 100 to test on, 10 "
        "frames each; 12 epochs, batches of 32, learning rate 0.005",
        ("surrogate, atan", RATIO), 3,
        {"dataset": "nmnist", "epochs": 12, "batch_size": 32, "learning_rate": 5e-3},
    ),
    "spoken-digits": Task(
        "40-200-200-10 on spoken digits, 39 log-mel frames each, by `docs/spoken_digits.py`; 24 epochs, batches of 64, "
        "learning rate 0.005",
        ("surrogate, atan", RATIO), 3, {},
    ),
    "cifar10": Task(
        "vgg (six 3 × 3 convolutions, 16 to 64 channels, BatchNorm) on CIFAR-10 as JPEG files, T = 4; 1 epoch, "
        "batches of 64, learning rate 0.002",
        tuple(GRADIENTS), 1,
        {"dataset": "folder", "epochs": 1, "batch_size": 64, "learning_rate": 2e-3},
    ),
}  # fmt: skip


def tell(entry: dict[str, float], net: nn.Module) -> None:
    """A line for an epoch."""
    print(entry, flush=True)


def runs(name: str, place: Path, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Trains the networks of a task that are not done yet, the first seed of all first."""
    task = TASKS[name]
    plan = [(seed, gradient) for seed in range(task.seeds) for gradient in task.gradients]
    left = [run for run in plan if not any((row["task"], row["seed"], row["gradient"]) == (name, *run) for row in done)]
    if not left:
        return
    one: Callable[[int, str], dict[str, float]]
    if task.recipe:
        dataset = data.load(task.recipe["dataset"], place)

        def one(seed: int, gradient: str) -> dict[str, float]:
            recipe = Recipe(**task.recipe | GRADIENTS[gradient], seed=seed)
            checkpoint = Path("runs/datasets") / f"{name}-{gradient.replace(', ', '-').replace(' ', '-')}-{seed}.pt"
            history = train(recipe, dataset, checkpoint, CPU, resume=True, after_epoch=tell).history
            last = history[-1]
            on = {"on": last["noisy_test_accuracy"]} if "noisy_test_accuracy" in last else {}
            return {"off": last["test_accuracy"]} | on
    else:
        sound = spoken_digits.load(place)

        def one(seed: int, gradient: str) -> dict[str, float]:
            return spoken_digits.train(sound, gradient == RATIO, seed)

    for seed, gradient in left:
        started = time.process_time()
        result = {"task": name, "seed": seed, "gradient": gradient} | one(seed, gradient)
        result |= {"seconds": time.process_time() - started, "load": os.getloadavg()[0]}
        print(result, flush=True)
        yield result


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies of a task, seed by seed, and how far from the better surrogate they are."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        groups.setdefault(row["gradient"], []).append(row)
    best = max(mean(row["off"] for row in group) for name, group in groups.items() if name != RATIO)
    lines = []
    for name, group in groups.items():
        off = mean(row["off"] for row in group)
        on = f"{100 * mean(row['on'] for row in group):.1f}" if "on" in group[0] else "-"
        seeds = ", ".join(f"{100 * row['off']:.1f}" for row in group)
        cost = [f"{mean(row[key] for row in group):{form}}" for key, form in (("seconds", ".0f"), ("load", ".1f"))]
        lines.append([name, f"{100 * off:.1f}", on, f"{100 * (off - best):+.1f}", seeds, *cost])
    header = ["gradient", "off, %", "on, %", "off - better surrogate", "off, seed by seed", "s", "load"]
    return markdown(header, lines)


def to_markdown(results: dict[str, Any]) -> str:
    """The page."""
    sections = [
        f"## {name}\n\n{task.says[0].upper()}{task.says[1:]}.\n\n{table(rows)}\n"
        for name, task in TASKS.items()
        if (rows := [row for row in results["rows"] if row["task"] == name])
    ]
    pages = "\n".join(sections)
    return f"""# Events, sound and colour

The same network by snnTorch's surrogate gradients and by the likelihood ratio with one draw of logistic escape noise,
whose level falls from 0.3 to 0.1 during training. Weights at the start, batches and learning rates, which fall to 0
along a cosine, are the same. Accuracies are on test data after the last epoch, in percent, with the noise off and on
(one draw), means over seeds. Seconds are processor time on one thread, of training and of a test after each epoch, of a
machine that did other things at the same time, which makes them longer: *load* is its average load at the end of the
runs, on {results["cpus"]} cores. The learning rate of N-MNIST and the weights that event-conv starts from were chosen
on 200 of its training recordings, and BatchNorm over all time steps on training images of CIFAR-10.

{pages}
{origin_note(results)}"""


def saved() -> list[dict[str, Any]]:
    """The runs that are done."""
    path = OUT / "datasets.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def write(rows: list[dict[str, Any]]) -> None:
    """Writes results and page."""
    command = "python docs/datasets.py --nmnist nmnist --spoken-digits recordings --cifar10 cifar10"
    results = origin(command, CPU) | {"cpus": os.cpu_count(), "rows": rows}
    write_json(OUT / "datasets.json", results)
    write_text(OUT / "datasets.md", to_markdown(results))


def main() -> None:
    """Trains what is missing, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in TASKS:
        parser.add_argument(f"--{name}", type=Path)
    torch.set_num_threads(1)
    for name, place in zip(TASKS, vars(parser.parse_args()).values(), strict=True):
        for row in runs(name, place, saved()) if place else ():
            # Another process may have other data.
            write([*saved(), row])
    write(saved())


if __name__ == "__main__":
    main()
