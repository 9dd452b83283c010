"""Gradients of one of the networks of the experiments, fresh or trained, measured on one batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._messages import listed, versions
from ..convert import add_noise
from ..diagnostics import GradientReport, gradient_report
from ..estimators.base import Estimator
from ..estimators.counterfactual import Counterfactual
from ..estimators.vanilla import Storing, StoringStep, Vanilla
from ..network import noisy_neurons
from ..noise import KINDS, EscapeNoise, MembraneNoise
from . import data, files, models
from .recipe import Recipe, load_trained, make_network
from .reproduce import arguments, check_names, machine, run_name


class _PlainStep(StoringStep):
    """Escape noise by the score of the noise that was drawn, and not of the spike alone."""

    # The sums that replace a graph are made for the score of the spike.
    sums_scores = False

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Spikes of noise on the margin, whose score is filed as that of a membrane potential."""
        same = MembraneNoise(distribution=noise.distribution)
        same.log_sigma = noise.log_sigma
        return (self.sample(same, margin) > 0).to(margin.dtype)


class _PlainScores(Storing):
    step_type = _PlainStep


class PlainScore(Vanilla):
    """What the spike-probability score of escape noise is better than: the score of the same noise itself.

    Unbiased too, and of a higher variance. For comparison only.
    """

    recording_type = _PlainScores


@dataclass(frozen=True)
class Settings:
    """Arguments of the command ``snntorch-lr diagnose``.

    Attributes:
        dataset: ``"digits"``, ``"mnist"`` or ``"fashion-mnist"``; None for that of the checkpoint, or digits.
        model: ``"mlp"`` or ``"conv"``; None for that of the checkpoint, or mlp.
        checkpoint: a checkpoint of ``reproduce``; None for a fresh network.
        noise: ``"membrane"`` or ``"escape"``, at the noise levels of the checkpoint.
        distribution: of the noise.
        sigma: noise level where the checkpoint has none.
        copies: noise copies of each sample.
        batch: training images, drawn by the seed.
        repeats: calls of each estimator.
        reference: calls of the reference.
        seed: of a fresh network, the batch and the noise.
    """

    dataset: str | None = None
    model: str | None = None
    checkpoint: Path | None = None
    noise: str = "membrane"
    distribution: str = "gaussian"
    sigma: float = 0.5
    copies: int = 16
    batch: int = 64
    repeats: int = 16
    reference: int = 128
    seed: int = 0


def diagnose(
    settings: Settings, out: Path, data_root: Path | None = None, device: torch.device | None = None
) -> GradientReport:
    """Measures the gradients, and writes ``gradients.json``, ``gradients.md`` and ``gradients.png``.

    Args:
        settings: what to measure.
        out: directory for the files.
        data_root: torchvision root.
        device: where to compute; the CPU by default.

    Raises:
        ValueError: if a setting is wrong, the checkpoint is not one, or another process works in ``out``.
        DataError: if the data cannot be had.
    """
    if settings.noise not in KINDS:
        raise ValueError(f"unknown noise {settings.noise!r}; choose one of {', '.join(KINDS)}")
    KINDS[settings.noise](settings.sigma, distribution=settings.distribution)
    if settings.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {settings.batch}")
    files.check_writable(out)
    device = torch.device("cpu") if device is None else device
    recipe, trained = _trained(settings) if settings.checkpoint else (_fresh(settings), None)
    images = data.load(recipe.dataset, data_root)
    net = make_network(recipe, images.shape) if trained is None else trained
    if not isinstance(net, models.SpikingClassifier):
        raise ValueError(f"the model {recipe.model} has no spiking neurons")
    _set_noise(net, settings)
    net.to(device)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(settings.seed))
    rows = order[: settings.batch]

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    command = f"snntorch-lr diagnose {arguments(asdict(settings))}"
    with files.locked(out, command):
        report = gradient_report(
            net, loss_fn, images.train[rows].to(device), images.train_labels[rows].to(device),
            _estimators(net, settings), copies=settings.copies, repeats=settings.repeats,
            reference=settings.reference, seed=settings.seed,
        )  # fmt: skip
        results = {
            "command": command,
            "versions": versions("snntorch-lr", "snntorch", "torch"),
            "machine": machine(device),
            "settings": asdict(settings) | {"checkpoint": settings.checkpoint and str(settings.checkpoint)},
            "recipe": asdict(recipe),
            "report": report.to_json(),
        }
        files.write_json(out / "gradients.json", results)
        files.write_text(out / "gradients.md", _markdown(results, report))
        files.save_figure(out / "gradients.png", lambda path: report.plot().savefig(path, dpi=150))
    return report


def default_name(settings: Settings) -> str:
    """Name of the folder for the results if the user gives none.

    Raises:
        ValueError: if a setting is wrong, or the checkpoint is not one.
    """
    recipe = _trained(settings)[0] if settings.checkpoint else _fresh(settings)
    return run_name(recipe.dataset, recipe.model, settings.seed)


def _estimators(net: models.SpikingClassifier, settings: Settings) -> dict[str, str | Estimator]:
    """What is compared: the estimators, and what each of their ingredients is worth."""
    found: dict[str, str | Estimator] = {"vanilla": "vanilla", "approximate": "approximate"}
    for over_time in ("rates", "exact"):
        found[f"counterfactual, {over_time}"] = Counterfactual(net, 2, over_time=over_time)
    found["no baseline"] = Vanilla(net, settings.copies, baseline="none")
    if settings.noise == "escape":
        found["plain score"] = PlainScore(net, settings.copies)
    return found


def _fresh(settings: Settings) -> Recipe:
    recipe = Recipe(
        "likelihood ratio", settings.dataset or "digits", settings.model or "mlp", 0, settings.copies, settings.seed
    )
    check_names(recipe.dataset, recipe.model)
    return recipe


def _trained(settings: Settings) -> tuple[Recipe, nn.Module]:
    """Recipe and network of the checkpoint."""
    assert settings.checkpoint is not None
    recipe, net = load_trained(settings.checkpoint)
    for name, given, found in (
        ("dataset", settings.dataset, recipe.dataset),
        ("model", settings.model, recipe.model),
    ):
        if given not in (None, found):
            raise ValueError(f"{settings.checkpoint} has {name} {found}, not {given}; leave out --{name}")
    return recipe, net


def _set_noise(net: models.SpikingClassifier, settings: Settings) -> None:
    """Gives the hidden neurons noise of a kind, at the level of the noise that they have, or else ``sigma``."""
    add_noise(net, sigma=settings.sigma, only=net.hidden)
    for neuron in noisy_neurons(net).values():
        if neuron.noise is not None:
            level = neuron.noise.sigma if settings.checkpoint else settings.sigma
            neuron.noise = KINDS[settings.noise](level, distribution=settings.distribution)
    net.train()


def _markdown(results: dict[str, Any], report: GradientReport) -> str:
    recipe, settings = results["recipe"], results["settings"]
    trained = (
        f"after {recipe['epochs']} epochs by {recipe['method']}" if settings["checkpoint"] else "at initialisation"
    )
    return (
        f"# Gradients: {recipe['dataset']}, {recipe['model']}, {settings['distribution']} {settings['noise']} noise, "
        f"{trained}\n\n"
        f"{settings['batch']} training images.\n\n```text\n{report}\n```\n\n"
        f"Command: `{results['command']}`\n\nVersions: {listed(results['versions'])}. Machine: {results['machine']}.\n"
    )
