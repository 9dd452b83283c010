"""The main job: surrogate-gradient baselines beside the likelihood-ratio network, clean and under attack."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import KINDS
from ..optim import ESTIMATORS
from ..robustness import AttackableView
from . import data, files, models, report
from .ranks import ALONE, Ranks
from .train import METHODS, Progress, Recipe, Trained, train

ATTACKS = ("FGSM", "PGD")
PGD_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """Arguments of the command ``snntorch-lr reproduce``.

    Attributes:
        dataset: ``"digits"``, ``"mnist"`` or ``"fashion-mnist"``.
        model: ``"mlp"`` or ``"conv"``.
        epochs: passes over the training images.
        copies: noise copies of each sample, for the likelihood ratio.
        seed: of everything random.
        estimator: of the likelihood ratio, ``"vanilla"`` or ``"approximate"``.
        noise: kind of noise, ``"membrane"`` or ``"escape"``.
        distribution: of the noise.
        sigma: initial noise level.
        epsilons: budgets of the attacks, l∞, for pixels in [0, 1].
        attack_images: number of test images to attack, from the first.
        draws: noise draws that predictions and attacks average over where the noise is on.
    """

    dataset: str = "digits"
    model: str = "mlp"
    epochs: int = 30
    copies: int = 16
    seed: int = 0
    estimator: str = "vanilla"
    noise: str = "membrane"
    distribution: str = "gaussian"
    sigma: float = 0.5
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    attack_images: int = 1000
    draws: int = 8


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
        ("copies", settings.copies, 2),
        ("attack-images", settings.attack_images, 1),
        ("draws", settings.draws, 1),
    ):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not settings.epsilons or any(not 0 < epsilon <= 1 for epsilon in settings.epsilons):
        raise ValueError(f"--epsilon must be in (0, 1], got {', '.join(map(str, settings.epsilons))}")
    try:
        import torchattacks  # noqa: F401
    except ImportError as error:
        raise ValueError("torchattacks is missing: pip install 'snntorch-lr[attacks]'") from error


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
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Trains three networks, attacks them, and writes ``results.json``, ``table.md`` and figures.

    Args:
        settings: what to run.
        out: directory for results and checkpoints.
        data_root: torchvision root.
        device: where to compute; the CPU by default.
        resume: go on from the checkpoints in ``out``.
        announce: progress of each training.
        ranks: the processes that call this together. The first does everything; the others take part in the
            likelihood-ratio training, and need neither ``data_root`` nor ``out``.

    Returns:
        What ``results.json`` holds; None on other ranks than the first.

    Raises:
        ValueError: if a setting is wrong, or ``out`` has checkpoints and ``resume`` is False.
        DataError: if the data cannot be had.
        RankError: if another rank failed.
    """
    device = torch.device("cpu") if device is None else device
    recipes = {
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
            batch_size=32 if settings.dataset == "digits" else 128,
        )
        for method in METHODS
    }
    checkpoints = {method: out / f"{method.replace(', ', '-').replace(' ', '-')}.pt" for method in METHODS}

    def prepare() -> data.Images:
        check_settings(settings)
        if settings.copies < ranks.size:
            raise ValueError(f"{ranks.size} ranks cannot divide {settings.copies} copies: give more --copies")
        there = [path.name for path in checkpoints.values() if path.exists()]
        if there and not resume:
            raise ValueError(f"{out} holds {', '.join(there)} already: add --resume to go on, or choose another --out")
        return data.load(settings.dataset, data_root)

    images = ranks.from_first(prepare)

    def run(method: str, ranks: Ranks) -> Trained:
        recipe = recipes[method]
        progress = announce(method, recipe.epochs * -(-len(images.train) // recipe.batch_size))
        return train(recipe, images, checkpoints[method], device, resume, progress, ranks)

    # What the ranks do together comes first, so that none of them waits while the first goes on alone.
    *alone, together = METHODS
    shared = run(together, ranks)
    ranks.leave()
    if ranks.rank > 0:
        return None
    trained = {method: run(method, ALONE) for method in alone} | {together: shared}
    results = {
        "command": f"snntorch-lr reproduce {_arguments(settings)}",
        "versions": versions(
            "snntorch-lr", "snntorch", "torch", "torchvision", "torchattacks", "numpy", "scikit-learn"
        ),
        "machine": machine(device),
        "ranks": ranks.size,
        "settings": asdict(settings) | {"epsilons": list(settings.epsilons)},
        "recipes": {method: asdict(recipe) for method, recipe in recipes.items()},
        "training": {
            method: {"seconds_per_epoch": run.seconds_per_epoch, "history": run.history}
            for method, run in trained.items()
        },
        "rows": _evaluate(settings, {method: run.net for method, run in trained.items()}, images.to(device)),
    }
    files.write_json(out / "results.json", results)
    report.write(results, out)
    return results


def _evaluate(
    settings: Settings, nets: Mapping[str, models.SpikingClassifier], images: data.Images
) -> list[dict[str, Any]]:
    """One row for each network and each use of its noise: clean accuracy, and accuracy under each attack."""
    rows = []
    x, y = images.test[: settings.attack_images], images.test_labels[: settings.attack_images]
    for method, net in nets.items():
        for noise in (False,) if method == "surrogate" else (False, True):
            view = AttackableView(net, draws=settings.draws, noise=noise, seed=settings.seed)
            right = _right(view, images.test, images.test_labels)
            row: dict[str, Any] = {
                "network": method,
                "noise": "on" if noise else "off" if method != "surrogate" else "none",
                "clean": _share(right),
                "attacks": {},
            }
            for epsilon in settings.epsilons:
                survived = right[: len(x)]
                for name in ATTACKS:
                    adversarial = _attack(name, view, epsilon, x, y, settings.seed)
                    still = _right(view, adversarial, y)
                    row["attacks"][f"{name} {epsilon:g}"] = _share(still)
                    survived = survived & still
                row["attacks"][f"worst {epsilon:g}"] = _share(survived)
            rows.append(row)
    return rows


def _attack(name: str, view: AttackableView, epsilon: float, x: Tensor, y: Tensor, seed: int) -> Tensor:
    import torchattacks

    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        if name == "FGSM":
            attack = torchattacks.FGSM(view, eps=epsilon)
        else:
            attack = torchattacks.PGD(view, eps=epsilon, alpha=epsilon / 4, steps=PGD_STEPS, random_start=True)
        parts = [attack(*part).detach() for part in _batches(x, y)]
    adversarial = torch.cat(parts)
    if not bool(adversarial.isfinite().all()) or float((adversarial - x).abs().max()) > epsilon + 1e-5:
        raise RuntimeError(f"{name} left its budget of {epsilon}, or made images that are not finite")
    return adversarial


def _right(view: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([view(part).argmax(1) == labels for part, labels in _batches(x, y)])


def _batches(x: Tensor, y: Tensor, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


def _share(right: Tensor) -> dict[str, float]:
    """Accuracy with its 95 % Wilson interval."""
    from scipy.stats import binomtest

    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, "wilson")
    return {
        "accuracy": float(right.float().mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "images": len(right),
    }


def _arguments(settings: Settings) -> str:
    values = {key: value for key, value in asdict(settings).items() if key != "epsilons"}
    return " ".join([arguments(values), *(f"--epsilon {epsilon:g}" for epsilon in settings.epsilons)])


def arguments(values: Mapping[str, object]) -> str:
    """Options of the command line from the settings that are not None."""
    given = {key: value for key, value in values.items() if value is not None}
    return " ".join(f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in given.items())


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def machine(device: torch.device) -> str:
    """What the results were computed on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"
