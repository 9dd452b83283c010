"""Trained networks of the experiments under attack: the command ``snntorch-lr evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..robustness import CORRUPTIONS, SUITES, Protocol, RobustnessReport, evaluate
from . import data, files
from .options import Place, check, command_line, option
from .recipe import Recipe, load_trained
from .reproduce import check_suite, write_evaluation

if TYPE_CHECKING:
    from ..robustness.evaluate import Progress


@dataclass(frozen=True, kw_only=True)
class Evaluate(Place):
    """Options of the command ``snntorch-lr evaluate``."""

    checkpoints: tuple[Path, ...] = option(
        help="checkpoints of reproduce: the network, then its baselines", positional=True
    )
    suite: str = option("standard", "attacks", choices=SUITES)
    dataset: str | None = option(None, "data set of the test images, by default of the checkpoints", choices=data.NAMES)
    images: int = option(1000, "test images to attack, from the first", least=1)
    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget", flag="--epsilon")
    norm: str = option("linf", "linf or l2")
    draws: int = option(8, "noise draws that attacks average over")
    votes: int = option(32, "noise draws for each prediction")
    corruptions: bool = option(False, "score natural corruptions too")
    seed: int = option(0, "of attacks and noise")
    out: Path | None = option(None, "folder for the results; runs/robustness/DATASET-MODEL-seedSEED", recorded=False)

    @property
    def folder(self) -> Path:
        """Folder for the results; without ``out`` the first checkpoint is read for it."""
        if self.out:
            return self.out
        recipe, _ = load_trained(self.checkpoints[0])
        return Path("runs/robustness") / files.run_name(self.dataset or recipe.dataset, recipe.model, self.seed)


def evaluate_checkpoints(options: Evaluate, progress: Progress = lambda what, done, total: None) -> RobustnessReport:
    """Evaluates checkpoints, and writes ``robustness.md``, ``robustness.json`` and figures.

    Finished attacks are kept in the folder ``attacks``: the same call goes on from there.

    Args:
        options: what to evaluate, how, and where.
        progress: told before each piece.

    Raises:
        ValueError: if an option is wrong, a file is not a checkpoint, a package is missing, or another process works in
            the folder.
        DataError: if the data cannot be had.
    """
    check(options)
    check_suite(options.suite)
    device, out, command = options.torch_device(), options.folder, command_line("evaluate", options)
    recipes, nets = _load(options.checkpoints, device)
    files.check_writable(out)
    images = data.load(_dataset(options.dataset, recipes), options.data_root)
    _check_sizes(nets, recipes, images)
    (name, net), *baselines = nets.items()
    with files.locked(out, command):
        evaluation = evaluate(
            net,
            [(images.test[: options.images], images.test_labels[: options.images])],
            options.epsilons,
            options.suite,
            baselines=dict(baselines),
            seed=options.seed,
            name=name,
            protocol=Protocol(
                norm=options.norm,
                draws=options.draws,
                votes=options.votes,
                corruptions=tuple(CORRUPTIONS) if options.corruptions else (),
            ),
            cache=out / "attacks",
            progress=progress,
        )
        write_evaluation(evaluation, out, files.origin_note(files.origin(command, device)))
    return evaluation


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
