"""Trained networks of the experiments under attack: the command ``snntorch-lr evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..robustness import CORRUPTIONS, Protocol, RobustnessReport, suite
from ..robustness import evaluate as evaluate_networks
from ..robustness.evaluate import Progress
from . import data, files, report
from .recipe import Recipe, load_trained
from .reproduce import arguments, machine, run_name


@dataclass(frozen=True)
class Settings:
    """Arguments of the command ``snntorch-lr evaluate``.

    Attributes:
        checkpoints: of ``reproduce``; the first is the network, the others are its baselines.
        suite: ``"quick"``, ``"paper"`` or ``"standard"``.
        dataset: whose test images; None for that of the checkpoints.
        images: number of test images, from the first.
        epsilons: budgets of the attacks, for pixels in [0, 1].
        norm: ``"linf"`` or ``"l2"``.
        draws: noise draws that attacks average over.
        votes: noise draws for each prediction.
        corruptions: whether natural corruptions are scored too.
        seed: of attacks and noise.
    """

    checkpoints: tuple[Path, ...]
    suite: str = "standard"
    dataset: str | None = None
    images: int = 1000
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    norm: str = "linf"
    draws: int = 8
    votes: int = 32
    corruptions: bool = False
    seed: int = 0


def evaluate(
    settings: Settings,
    out: Path,
    data_root: Path | None = None,
    device: torch.device | None = None,
    progress: Progress = lambda what, done, total: None,
) -> RobustnessReport:
    """Evaluates checkpoints, and writes ``robustness.md``, ``robustness.json`` and figures.

    Finished attacks are kept in ``out/attacks``: the same call goes on from there.

    Args:
        settings: what to evaluate, and how.
        out: directory for the files.
        data_root: torchvision root.
        device: where to compute; the CPU by default.
        progress: told before each piece.

    Raises:
        ValueError: if a setting is wrong, a file is not a checkpoint, a package is missing, or another process works in
            ``out``.
        DataError: if the data cannot be had.
    """
    if settings.images < 1:
        raise ValueError(f"--images must be at least 1, got {settings.images}")
    try:
        suite(settings.suite)
    except ImportError as error:
        raise ValueError(str(error)) from error
    device = torch.device("cpu") if device is None else device
    recipes, nets = _load(settings.checkpoints, device)
    files.check_writable(out)
    images = data.load(_dataset(settings.dataset, recipes), data_root)
    _check_sizes(nets, recipes, images)
    (name, net), *baselines = nets.items()
    command = f"snntorch-lr evaluate {_arguments(settings)}"
    with files.locked(out, command):
        evaluation = evaluate_networks(
            net,
            [(images.test[: settings.images], images.test_labels[: settings.images])],
            settings.epsilons,
            settings.suite,
            baselines=dict(baselines),
            seed=settings.seed,
            protocol=Protocol(
                norm=settings.norm,
                draws=settings.draws,
                votes=settings.votes,
                corruptions=tuple(CORRUPTIONS) if settings.corruptions else (),
            ),
            name=name,
            cache=out / "attacks",
            progress=progress,
        )
        report.write_evaluation(evaluation, out, f"Command: `{command}`. Machine: {machine(device)}.\n")
    return evaluation


def default_name(settings: Settings) -> str:
    """Name of the folder for the results if the user gives none.

    Raises:
        ValueError: if the first file is not a checkpoint.
    """
    recipe, _ = load_trained(settings.checkpoints[0])
    return run_name(settings.dataset or recipe.dataset, recipe.model, settings.seed)


def _load(checkpoints: Sequence[Path], device: torch.device) -> tuple[list[Recipe], dict[str, nn.Module]]:
    """Recipes, and networks by the names of their files, with the folders where those are not enough."""
    short = [path.stem for path in checkpoints]
    names = short if len(set(short)) == len(short) else [str(path.with_suffix("")) for path in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError("a checkpoint is given more than once")
    loaded = [load_trained(path) for path in checkpoints]
    return [recipe for recipe, _ in loaded], {
        name: net.to(device).eval() for name, (_, net) in zip(names, loaded, strict=True)
    }


def _check_sizes(nets: Mapping[str, nn.Module], recipes: Sequence[Recipe], images: data.Images) -> None:
    for (name, net), recipe in zip(nets.items(), recipes, strict=True):
        device = next(net.parameters()).device
        try:
            with torch.no_grad():
                net(images.test[:1].to(device))
        except RuntimeError as error:
            raise ValueError(
                f"{name} was trained on {recipe.dataset}, and cannot take the images of {images.name}"
            ) from error


def _dataset(given: str | None, recipes: Sequence[Recipe]) -> str:
    trained_on = sorted({recipe.dataset for recipe in recipes})
    if given is None and len(trained_on) > 1:
        raise ValueError(f"the checkpoints were trained on {', '.join(trained_on)}; choose one with --dataset")
    return given or trained_on[0]


def _arguments(settings: Settings) -> str:
    values = {
        key: value for key, value in asdict(settings).items() if key not in ("checkpoints", "epsilons", "corruptions")
    }
    flags = ["--corruptions"] if settings.corruptions else []
    budgets = [f"--epsilon {epsilon:g}" for epsilon in settings.epsilons]
    return " ".join([*map(str, settings.checkpoints), arguments(values), *budgets, *flags])
