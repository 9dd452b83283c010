"""Networks trained and attacked side by side: the commands ``reproduce`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..robustness import SUITES, Protocol, RobustnessReport, evaluate, suite
from . import NETWORKS, data, files
from .models import MODELS
from .options import Outcome, Progress, WithDevice, option
from .train import METHODS, Recipe, Trained, load_trained, train, validation_accuracy

LIKELIHOOD_RATIO, STOPPED = "likelihood ratio", "surrogate, stopped"
# First the one that the others are compared with, and that has the most settings that may be wrong.
REPRODUCED = (LIKELIHOOD_RATIO, "surrogate", "surrogate, noise", STOPPED)


@dataclass(frozen=True, kw_only=True)
class Evaluate(WithDevice):
    """Attack trained networks: worst case over a suite, transfers between them, and the gates that it has to pass.

    Example: snntorch-lr evaluate runs/digits-mlp-seed0/likelihood-ratio.pt runs/digits-mlp-seed0/surrogate.pt

    The checkpoints are those of: snntorch-lr reproduce --dataset digits
    """

    place = "runs/robustness/{dataset}-{model}-seed{seed}"
    kept = "finished attacks are kept: the same command goes on from there"
    checkpoints: tuple[Path, ...] = option(
        help="checkpoints of reproduce, or names such as mnist/lr; the network, then its baselines", positional=True
    )
    dataset: str | None = option(None, "data set of the test images, by default of the checkpoints", choices=data.NAMES)
    images: int = option(1000, "test images, from the first", least=1)
    suite: str = option("standard", "attacks", choices=SUITES)
    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget", flag="--epsilon")
    norm: str = option("linf", "linf or l2")
    draws: int = option(8, "noise draws that attacks average over")
    votes: int = option(32, "noise draws for each prediction")
    seed: int = option(0, "of attacks and noise")

    def about(self) -> dict[str, Any]:
        """Also what the recipe of the first checkpoint says."""
        recipe, _ = load_trained(_file(self.checkpoints[0]))
        return vars(self) | {"dataset": self.dataset or recipe.dataset, "model": recipe.model}

    def run(self) -> Outcome:
        """Writes ``robustness.md``, ``robustness.json`` and ``epsilon.png``."""
        suite(self.suite)  # an attack library that is missing is told now
        nets, images = self.load()
        protocol = Protocol(norm=self.norm, draws=self.draws, votes=self.votes)
        report = attack(self, nets, images, self.images, protocol)
        files.write_json(self.folder / "robustness.json", report.to_json())
        written = f"Written: {self.folder}/robustness.md, robustness.json, epsilon.png"
        return Outcome(report.to_json(), f"{report.summary()}\n{written}", report.tables())

    def load(self) -> tuple[dict[str, nn.Module], data.Dataset]:
        """Networks by the names of their files, with the folders where those are not enough; images that they take."""
        short = [path.stem for path in self.checkpoints]
        long = [str(path.with_suffix("")) for path in self.checkpoints]
        names = short if len(set(short)) == len(short) else long
        if len(set(names)) < len(names):
            raise ValueError("a checkpoint is given more than once")
        loaded = dict(zip(names, (load_trained(_file(path)) for path in self.checkpoints), strict=True))
        trained_on = sorted({recipe.dataset for recipe, _ in loaded.values()})
        if self.dataset is None and len(trained_on) > 1:
            raise ValueError(f"the checkpoints were trained on {', '.join(trained_on)}; choose one with --dataset")
        images = data.load(self.dataset or trained_on[0], self.data_root)
        for name, (recipe, net) in loaded.items():
            net.to(self.torch_device()).eval()
            try:
                with torch.no_grad():
                    net(images.test[:1].to(self.torch_device()))
            except RuntimeError as error:
                said = f"{name} was trained on {recipe.dataset}, and cannot take the images of {images.name}"
                raise ValueError(said) from error
        return {name: net for name, (_, net) in loaded.items()}, images


def _file(checkpoint: Path) -> Path:
    """The file of a checkpoint, which may be the name of a network that comes with the package."""
    return checkpoint if checkpoint.exists() else NETWORKS.get(checkpoint.as_posix(), checkpoint)


def attack(
    options: Any, nets: Mapping[str, nn.Module], images: data.Dataset, count: int, protocol: Protocol
) -> RobustnessReport:
    """Attacks a network and its baselines on the first test images; writes ``robustness.md`` and ``epsilon.png``."""
    (name, net), *baselines = nets.items()
    report = evaluate(
        net, [(images.test[:count], images.test_labels[:count])], options.epsilons, options.suite,
        baselines=dict(baselines), seed=options.seed, name=name, protocol=protocol, cache=options.folder / "attacks",
        progress=Progress("attacks", in_percent=True),
    )  # fmt: skip
    note = files.origin_note(files.origin(options.command_line(), options.torch_device()))
    files.write_text(options.folder / "robustness.md", f"# Robustness\n\n{report.to_markdown()}\n{note}")
    files.save_figure(options.folder / "epsilon.png", report.plot_epsilon())
    return report


@dataclass(frozen=True, kw_only=True)
class Reproduce(WithDevice, Recipe):
    """Train surrogate baselines and the likelihood-ratio network, attack them, print and save tables.

    Example: snntorch-lr reproduce --dataset digits

    Data that are downloaded: --dataset mnist --data-root data. Your own images in train/<class>/ and test/<class>/:
    --dataset folder --data-root FOLDER. Your own tensors: --dataset file --data-root FILE.
    """

    place = "runs/{dataset}-{model}-seed{seed}"
    kept = "finished epochs are kept: the same command with --resume goes on from there"
    method: str = option(LIKELIHOOD_RATIO, choices=METHODS, offered=False)
    model: str = option(None, "network; by default one that fits the data set", choices=MODELS)
    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget, l∞", above=0, most=1, flag="--epsilon")
    attack_images: int = option(1000, "test images to attack", least=1)
    draws: int = option(8, "noise draws that attacks average over if noise is on", least=1)
    suite: str = option("quick", "attacks", choices=SUITES)
    resume: bool = option(False, "go on from the checkpoints in --out", recorded=False)

    def run(self) -> Outcome:
        """Trains the networks, attacks them, and writes ``results.json``, ``robustness.md`` and ``epsilon.png``.

        The likelihood-ratio network stands beside surrogate-gradient networks without noise, with the same noise, and
        without noise but stopped at its own accuracy on the held-out images: robustness falls while accuracy rises,
        and is to be compared where accuracy is equal.
        """
        out, device = self.folder, self.torch_device()
        suite(self.suite)  # an attack library that is missing is told now
        images = data.load(self.dataset, self.data_root).to(device)
        # A tenth of the training images is held out.
        sizes = {"batch_size": 32 if len(images.train) < 10_000 else 128, "validation": len(images.train) // 10}
        recipe = Recipe.of(vars(self) | sizes)
        checkpoints = {name: out / f"{name.replace(', ', '-').replace(' ', '-')}.pt" for name in REPRODUCED}
        there = [path.name for path in checkpoints.values() if path.exists()]
        if there and not self.resume:
            raise ValueError(f"{out} holds {', '.join(there)} already: add --resume to go on, or choose another --out")
        recipes: dict[str, Recipe] = {}
        runs: dict[str, Trained] = {}
        for name in REPRODUCED:
            recipes[name] = replace(recipe, method="surrogate" if name == STOPPED else name)
            if name == STOPPED:
                reached = validation_accuracy(runs[LIKELIHOOD_RATIO].net, recipe, images)
                recipes[name] = replace(recipes[name], stop_at=reached)
            print(f"training: {name}", flush=True)
            tell = partial(_tell_epoch, Progress(f"epochs of {name}"), self.epochs)
            runs[name] = train(recipes[name], images, checkpoints[name], device, self.resume, tell)
        results: dict[str, Any] = files.origin(self.command_line(), device) | {
            "settings": self.recorded(),
            "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
            "training": {
                name: {"seconds_per_epoch": run.seconds_per_epoch, "history": run.history} for name, run in runs.items()
            },
        }
        nets = {name: run.net for name, run in runs.items()}
        report = attack(self, nets, images, self.attack_images, Protocol(draws=self.draws))
        results["evaluation"] = report.to_json()
        files.write_json(out / "results.json", results)
        written = f"Written: {out}/results.json, robustness.md, epsilon.png"
        return Outcome(results, f"{report.summary()}\n{written}", report.tables())


def _tell_epoch(progress: Progress, epochs: int, entry: dict[str, float], net: nn.Module) -> None:
    """A line for an epoch."""
    said = f"loss {entry['train_loss']:.3f}, accuracy {entry['test_accuracy']:.1%}"
    said += f", with noise {entry['noisy_test_accuracy']:.1%}" if "noisy_test_accuracy" in entry else ""
    progress(said, entry["epoch"], epochs)
