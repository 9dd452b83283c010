"""Trained networks of the experiments, attacked or certified: the commands ``evaluate`` and ``certify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .._messages import markdown
from ..robustness import SUITES, Certificate, Protocol, RobustnessReport, certify, evaluate
from ..robustness.figures import colors_of
from . import NETWORKS, data, files
from .options import Place, check, command_line, option
from .recipe import Recipe, load_trained
from .reproduce import check_suite, write_evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..robustness.evaluate import Progress


RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
"""l2 radii of the table of certified accuracies."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Place):
    """Options of the command ``snntorch-lr evaluate``."""

    checkpoints: tuple[Path, ...] = option(
        help="the network, then its baselines: checkpoints of reproduce, or names such as mnist/lr", positional=True
    )
    suite: str = option("standard", "attacks", choices=SUITES)
    dataset: str | None = option(None, "data set of the test images, by default of the checkpoints", choices=data.NAMES)
    images: int = option(1000, "test images to attack, from the first", least=1)
    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget", flag="--epsilon")
    norm: str = option("linf", "linf or l2")
    draws: int = option(8, "noise draws that attacks average over")
    votes: int = option(32, "noise draws for each prediction")
    seed: int = option(0, "of attacks and noise")
    out: Path | None = option(None, "folder for the results; runs/robustness/DATASET-MODEL-seedSEED", recorded=False)

    @property
    def folder(self) -> Path:
        """Folder for the results; without ``out`` the first checkpoint is read for it."""
        if self.out:
            return self.out
        recipe, _ = load_trained(_file(self.checkpoints[0]))
        return Path("runs/robustness") / files.run_name(self.dataset or recipe.dataset, recipe.model, self.seed)


def evaluate_checkpoints(options: Evaluate, progress: Progress = lambda what, done, total: None) -> RobustnessReport:
    """Evaluates checkpoints, and writes ``robustness.md``, ``robustness.json`` and figures.

    Finished attacks are kept in the folder ``attacks``: the same call goes on from there.
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
            protocol=Protocol(norm=options.norm, draws=options.draws, votes=options.votes),
            cache=out / "attacks",
            progress=progress,
        )
        write_evaluation(evaluation, out, files.origin_note(files.origin(command, device)))
    return evaluation


@dataclass(frozen=True, kw_only=True)
class Certify(Place):
    """Options of the command ``snntorch-lr certify``."""

    checkpoints: tuple[Path, ...] = option(help="checkpoints of reproduce, or names such as mnist/lr", positional=True)
    sigmas: tuple[float, ...] = option((0.25, 0.5), "level of the noise on the input", flag="--sigma", above=0)
    dataset: str | None = option(None, "data set of the test images, by default of the checkpoints", choices=data.NAMES)
    images: int = option(500, "test images to certify, from the first", least=1)
    draws: int = option(1000, "noise draws that bound each radius", least=1)
    seed: int = option(0, "of the noise")
    out: Path = option(Path("runs/certificates"), "folder for the results", recorded=False)


def certify_checkpoints(
    options: Certify, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> tuple[list[str], list[list[str]]]:
    """Certifies checkpoints, and writes ``certificates.json``, ``certificates.md`` and ``certificates.png``."""
    check(options)
    device, command = options.torch_device(), command_line("certify", options)
    recipes, nets = _load(options.checkpoints, device)
    files.check_writable(options.out)
    images = data.load(_dataset(options.dataset, recipes), options.data_root)
    _check_sizes(nets, recipes, images)
    loader = [(images.test[: options.images], images.test_labels[: options.images])]
    total = len(nets) * len(options.sigmas) * len(loader[0][0])
    found: dict[str, Certificate] = {}
    with files.locked(options.out, command):
        for name, net in nets.items():
            for sigma in options.sigmas:
                label, before = f"{name}, σ = {sigma:g}", len(found) * len(loader[0][0])

                def tell(done: int, _: int, label: str = label, before: int = before) -> None:
                    progress(label, before + done, total)

                found[label] = certify(net, loader, sigma, options.draws, seed=options.seed, progress=tell)
        header = ["", *(f"r = {radius:g}" for radius in RADII)]
        lines = [[label, *(str(each.accuracy(radius)) for radius in RADII)] for label, each in found.items()]
        origin = files.origin(command, device)
        text = f"# Certified accuracy in percent, by l2 radius\n\n{markdown(header, lines)}\n\n"
        text += (
            f"{options.draws} draws for each of {len(loader[0][0])} images, α = 0.001, neurons without noise; with the "
            f"half-width of the 95 % Wilson interval.\n\n{files.origin_note(origin)}\n"
        )
        files.write_text(options.out / "certificates.md", text)
        results = {label: each.to_json() for label, each in found.items()}
        files.write_json(options.out / "certificates.json", origin | {"certificates": results})
        files.save_figure(options.out / "certificates.png", _certified_figure(found))
    return header, lines


def _certified_figure(found: Mapping[str, Certificate]) -> Figure:
    """Certified accuracy against the l2 radius, with its interval; one line for each network and σ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = colors_of(label.rpartition(", ")[0] for label in found)
    dashes = dict(zip(dict.fromkeys(label.rpartition(", ")[2] for label in found), cycle(("-", "--", ":", "-."))))
    for label, each in found.items():
        name, _, sigma = label.rpartition(", ")
        radii = sorted({0.0, *each.radii.tolist()})
        shares = [each.accuracy(radius) for radius in radii]
        middle = [100 * share.accuracy for share in shares]
        axes.step(radii, middle, where="pre", label=label, color=colors[name], linestyle=dashes[sigma])
        ends = [100 * share.low for share in shares], [100 * share.high for share in shares]
        axes.fill_between(radii, *ends, step="pre", color=colors[name], alpha=0.15, lw=0)
    axes.set(xlabel="l2 radius", ylabel="certified accuracy (%)", ylim=(0, 103), xlim=(0, None))
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def _file(checkpoint: Path) -> Path:
    """The file of a checkpoint, which may be the name of a network that comes with the package."""
    return checkpoint if checkpoint.exists() else NETWORKS.get(checkpoint.as_posix(), checkpoint)


def _load(checkpoints: Sequence[Path], device: torch.device) -> tuple[list[Recipe], dict[str, nn.Module]]:
    """Recipes, and networks by the names of their files, with the folders where those are not enough."""
    short = [path.stem for path in checkpoints]
    names = short if len(set(short)) == len(short) else [str(path.with_suffix("")) for path in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError("a checkpoint is given more than once")
    loaded = [load_trained(_file(path)) for path in checkpoints]
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
