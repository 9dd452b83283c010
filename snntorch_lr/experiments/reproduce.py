"""The main job: surrogate-gradient baselines beside the likelihood-ratio network, clean and under attack."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..noise import KINDS
from ..optim import ESTIMATORS
from ..robustness import Protocol, RobustnessReport, Row, evaluate, score, share_of, suite, verdict
from ..robustness.evaluate import Progress as EvaluationProgress
from ..versions import versions
from . import data, files, models, report
from .ranks import ALONE, Ranks
from .recipe import METHODS, Recipe
from .train import Progress, Trained, split, train, validation_accuracy

LIKELIHOOD_RATIO = "likelihood ratio"
STOPPED = "surrogate, stopped"


@dataclass(frozen=True)
class Settings:
    """Arguments of the command ``snntorch-lr reproduce``.

    Attributes:
        dataset: ``"digits"``, ``"mnist"`` or ``"fashion-mnist"``.
        model: ``"mlp"`` or ``"conv"``.
        epochs: passes over the training images.
        copies: noise copies of each sample, for the likelihood ratio.
        seed: of everything random.
        estimator: of the likelihood ratio, ``"counterfactual"``, ``"vanilla"`` or ``"approximate"``.
        noise: kind of noise, ``"membrane"`` or ``"escape"``.
        distribution: of the noise.
        sigma: initial noise level.
        learning_rate: of Adam, for all networks.
        epsilons: budgets of the attacks, l∞, for pixels in [0, 1].
        attack_images: number of test images to attack, from the first.
        draws: noise draws that attacks average over where the noise is on.
        suite: attacks: ``"quick"``, ``"paper"`` or ``"standard"``.
    """

    dataset: str = "digits"
    model: str = "mlp"
    epochs: int = 30
    copies: int = 2
    seed: int = 0
    estimator: str = "counterfactual"
    noise: str = "membrane"
    distribution: str = "gaussian"
    sigma: float = 0.5
    learning_rate: float = 1e-3
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    attack_images: int = 1000
    draws: int = 8
    suite: str = "quick"


Announce = Callable[[str, int], Progress]
"""Called before a network is trained, with its name and number of steps; returns what to call after each step."""


def check_settings(settings: Settings) -> None:
    """Refuses settings that would only fail after hours of training.

    Raises:
        ValueError: if a number is out of range, or torchattacks is not installed.
    """
    check_names(settings.dataset, settings.model)
    if settings.estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {settings.estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    if settings.noise not in KINDS:
        raise ValueError(f"unknown noise {settings.noise!r}; choose one of {', '.join(KINDS)}")
    KINDS[settings.noise](settings.sigma, distribution=settings.distribution)
    for name, value, least in (
        ("epochs", settings.epochs, 1),
        ("copies", settings.copies, 1),
        ("attack-images", settings.attack_images, 1),
        ("draws", settings.draws, 1),
    ):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not settings.learning_rate > 0:
        raise ValueError(f"--learning-rate must be positive, got {settings.learning_rate}")
    if not settings.epsilons or any(not 0 < epsilon <= 1 for epsilon in settings.epsilons):
        raise ValueError(f"--epsilon must be in (0, 1], got {', '.join(map(str, settings.epsilons))}")
    try:
        suite(settings.suite)
    except ImportError as error:
        raise ValueError(str(error)) from error


def check_names(dataset: str, model: str) -> None:
    """Refuses a data set or model that is unknown.

    Raises:
        ValueError: if one is.
    """
    if model not in models.NAMES:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(models.NAMES)}")
    if dataset not in data.NAMES:
        raise ValueError(f"unknown data set {dataset!r}; choose one of {', '.join(data.NAMES)}")


def reproduce(
    settings: Settings,
    out: Path,
    data_root: Path | None = None,
    device: torch.device | None = None,
    resume: bool = False,
    announce: Announce = lambda name, steps: lambda done, loss: None,
    watch: EvaluationProgress = lambda what, done, total: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Trains the networks, attacks them, and writes ``results.json``, ``table.md``, ``robustness.md`` and figures.

    A tenth of the training images is held out. The likelihood-ratio network stands beside surrogate-gradient networks
    without noise, with the same noise, and without noise but stopped at its own accuracy on the held-out images:
    robustness falls while accuracy rises, and is to be compared where accuracy is equal.

    Args:
        settings: what to run.
        out: directory for results and checkpoints.
        data_root: torchvision root.
        device: where to compute; the CPU by default.
        resume: go on from the checkpoints in ``out``.
        announce: progress of each training.
        watch: progress of the evaluation.
        ranks: the processes that call this together. The first does everything; the others take part in the
            likelihood-ratio training, and need neither ``data_root`` nor ``out``.

    Returns:
        What ``results.json`` holds; None on other ranks than the first.

    Raises:
        ValueError: if a setting is wrong, another process works in ``out``, or it has checkpoints and ``resume`` is
            False.
        DataError: if the data cannot be had.
        RankError: if another rank failed.
    """
    device = torch.device("cpu") if device is None else device
    command = f"snntorch-lr reproduce {_arguments(settings)}"
    checkpoints = {name: out / f"{name.replace(', ', '-').replace(' ', '-')}.pt" for name in (*METHODS, STOPPED)}

    def prepare() -> data.Images:
        check_settings(settings)
        if settings.copies < ranks.size:
            raise ValueError(f"{ranks.size} ranks cannot divide {settings.copies} copies: give more --copies")
        files.check_writable(out)
        held.enter_context(files.locked(out, command))
        there = [path.name for path in checkpoints.values() if path.exists()]
        if there and not resume:
            raise ValueError(f"{out} holds {', '.join(there)} already: add --resume to go on, or choose another --out")
        return data.load(settings.dataset, data_root)

    with ExitStack() as held:
        images = ranks.from_first(prepare).to(device)
        recipes = _recipes(settings, images)
        steps = -(-len(split(recipes[LIKELIHOOD_RATIO], images)[0]) // recipes[LIKELIHOOD_RATIO].batch_size)

        def run(name: str, ranks: Ranks = ALONE) -> Trained:
            progress = announce(name, settings.epochs * steps)
            return train(recipes[name], images, checkpoints[name], device, resume, progress, ranks)

        # What the ranks do together comes first, so that none of them waits while the first goes on alone.
        together = run(LIKELIHOOD_RATIO, ranks)
        ranks.leave()
        if ranks.rank > 0:
            return None
        reached = validation_accuracy(together.net, recipes[LIKELIHOOD_RATIO], images)
        recipes[STOPPED] = replace(recipes["surrogate"], stop_at=reached)
        trained = {name: together if name == LIKELIHOOD_RATIO else run(name) for name in checkpoints}
        nets = {name: run.net for name, run in trained.items()}
        evaluation = _evaluate(settings, nets, images, out / "attacks", watch)
        results = {
            "command": command,
            "versions": versions(
                "snntorch-lr", "snntorch", "torch", "torchvision", "torchattacks", "numpy", "scikit-learn"
            ),
            "machine": machine(device),
            "ranks": ranks.size,
            "settings": asdict(settings) | {"epsilons": list(settings.epsilons)},
            "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
            "training": {
                name: {"seconds_per_epoch": run.seconds_per_epoch, "history": run.history}
                for name, run in trained.items()
            },
            "rows": [
                _row(row, settings, images)
                for name in checkpoints
                for row in evaluation.rows
                if row.subject.network == name
            ],
            "evaluation": evaluation.to_json(),
        }
        files.write_json(out / "results.json", results)
        report.write(results, evaluation, out)
    return results


def _recipes(settings: Settings, images: data.Images) -> dict[str, Recipe]:
    """What to train, by name; the stopping point of the last is known after the likelihood ratio has been trained."""
    return {
        method: Recipe(
            method=method,
            dataset=settings.dataset,
            model=settings.model,
            epochs=settings.epochs,
            copies=settings.copies,
            seed=settings.seed,
            estimator=settings.estimator,
            noise=settings.noise,
            distribution=settings.distribution,
            sigma=settings.sigma,
            learning_rate=settings.learning_rate,
            batch_size=32 if settings.dataset == "digits" else 128,
            validation=len(images.train) // 10,
        )
        for method in METHODS
    }


def _evaluate(
    settings: Settings,
    nets: Mapping[str, nn.Module],
    images: data.Images,
    cache: Path,
    progress: EvaluationProgress,
) -> RobustnessReport:
    baselines = {name: net for name, net in nets.items() if name != LIKELIHOOD_RATIO}
    attacked = images.test[: settings.attack_images], images.test_labels[: settings.attack_images]
    return evaluate(
        nets[LIKELIHOOD_RATIO],
        [attacked],
        settings.epsilons,
        settings.suite,
        baselines=baselines,
        seed=settings.seed,
        protocol=Protocol(draws=settings.draws),
        name=LIKELIHOOD_RATIO,
        cache=cache,
        progress=progress,
    )


def _row(row: Row, settings: Settings, images: data.Images) -> dict[str, Any]:
    """Figures of one network with its noise off or on; the clean ones are of all test images."""
    scores = score(row.subject.target, images.test, images.test_labels, seed=settings.seed)
    names = [attack.name for attack in suite(settings.suite) if attack.name in row.right]
    shares = {f"{name} {e:g}": share_of(row.right[name][e]) for e in sorted(settings.epsilons) for name in names}
    shares |= {f"worst {e:g}": share_of(row.worst(e)) for e in sorted(settings.epsilons)}
    return {
        "network": row.subject.network,
        "noise": row.subject.noise,
        "clean": asdict(share_of(scores.right)),
        "single draw": asdict(share_of(scores.single)),
        "attacks": {name: asdict(share) for name, share in shares.items()},
        "verdict": verdict(row.findings.gates),
    }


def _arguments(settings: Settings) -> str:
    values = {key: value for key, value in asdict(settings).items() if key != "epsilons"}
    return " ".join([arguments(values), *(f"--epsilon {epsilon:g}" for epsilon in settings.epsilons)])


def arguments(values: Mapping[str, object]) -> str:
    """Options of the command line from the settings that are not None."""
    given = {key: value for key, value in values.items() if value is not None}
    return " ".join(f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in given.items())


def run_name(dataset: str, model: str, seed: int) -> str:
    """Name of the folder of a run whose user gives none; another run has another."""
    return f"{dataset}-{model}-seed{seed}"


def machine(device: torch.device) -> str:
    """What the results were computed on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"
