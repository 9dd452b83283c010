"""Gradients of one of the networks of the experiments, fresh or trained, measured on one batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..convert import add_noise
from ..diagnostics import GradientReport, gradient_report
from ..gradients import Counterfactual, Estimator, Vanilla
from ..network import noisy_neurons
from ..noise import KINDS
from . import data, files
from .options import Place, check, command_line, option, recorded
from .recipe import MODELS, NoiseOptions, Recipe, SpikingClassifier, load_trained, make_network


@dataclass(frozen=True, kw_only=True)
class Diagnose(Place, NoiseOptions):
    """Options of the command ``snntorch-lr diagnose``, which has those of the noise."""

    dataset: str | None = option(None, "data set, by default of the checkpoint, or digits", choices=data.NAMES)
    model: str | None = option(None, "network, by default of the checkpoint, or mlp", choices=MODELS)
    checkpoint: Path | None = option(None, "network to measure, from reproduce; a fresh one by default")
    sigma: float = option(0.5, "noise level where the checkpoint has none")
    copies: int = option(16, "noise copies of each sample", least=1)
    batch: int = option(64, "training images", least=1)
    repeats: int = option(16, "calls of each estimator")
    reference: int = option(128, "calls that the reference gradient is the mean of")
    seed: int = option(0, "of a fresh network, the batch and the noise")
    out: Path | None = option(None, "folder for the results; runs/gradients/DATASET-MODEL-seedSEED", recorded=False)

    @property
    def folder(self) -> Path:
        """Folder for the results; without ``out`` the checkpoint is read for it."""
        if self.out:
            return self.out
        recipe = load_trained(self.checkpoint)[0] if self.checkpoint else _fresh(self)
        return Path("runs/gradients") / files.run_name(recipe.dataset, recipe.model, self.seed)


def diagnose(options: Diagnose) -> GradientReport:
    """Measures the gradients, and writes ``gradients.json``, ``gradients.md`` and ``gradients.png``."""
    check(options)
    options.check_noise()
    device, out = options.torch_device(), options.folder
    files.check_writable(out)
    recipe, net = load_trained(options.checkpoint) if options.checkpoint else (_fresh(options), None)
    for name in ("dataset", "model"):
        given, found = getattr(options, name), getattr(recipe, name)
        if given not in (None, found):
            raise ValueError(f"{options.checkpoint} has {name} {found}, not {given}; leave out --{name}")
    images = data.load(recipe.dataset, options.data_root)
    net = make_network(recipe, images.shape) if net is None else net
    if not isinstance(net, SpikingClassifier):
        raise ValueError(f"the model {recipe.model} has no spiking neurons")
    _set_noise(net, options)
    net.to(device)
    generator = torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(images.train), generator=generator)[: options.batch]

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    command = command_line("diagnose", options)
    with files.locked(out, command):
        report = gradient_report(
            net, loss_fn, images.train[rows].to(device), images.train_labels[rows].to(device),
            _estimators(net, options), copies=options.copies, repeats=options.repeats,
            reference=options.reference, seed=options.seed,
        )  # fmt: skip
        made = {"settings": recorded(options), "recipe": asdict(recipe), "report": report.to_json()}
        results = files.origin(command, device) | made
        files.write_json(out / "gradients.json", results)
        files.write_text(out / "gradients.md", _markdown(results, report))
        files.save_figure(out / "gradients.png", report.plot())
    return report


def _estimators(net: SpikingClassifier, options: Diagnose) -> dict[str, str | Estimator]:
    """The estimators, and those that show what an ingredient is worth."""
    return {
        "vanilla": "vanilla",
        "no baseline": Vanilla(net, options.copies, baseline="none"),
        "approximate": "approximate",
        "counterfactual": Counterfactual(net),
        "counterfactual, γ = 1": Counterfactual(net, discount=1),
        "counterfactual, λ = 0": Counterfactual(net, control=0),
    }


def _fresh(options: Diagnose) -> Recipe:
    return Recipe(
        method="likelihood ratio", dataset=options.dataset or "digits", model=options.model or "mlp", epochs=0,
        copies=options.copies, seed=options.seed,
    )  # fmt: skip


def _set_noise(net: SpikingClassifier, options: Diagnose) -> None:
    """Gives the hidden neurons noise of a kind, at the level of the noise that they have, or else ``sigma``."""
    add_noise(net, sigma=options.sigma, only=[name for name in net.spiking if name not in noisy_neurons(net)])
    for neuron in noisy_neurons(net).values():
        if neuron.noise is not None:
            level = neuron.noise.sigma if options.checkpoint else options.sigma
            neuron.noise = KINDS[options.noise](level, distribution=options.distribution)
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
        f"{files.origin_note(results)}"
    )
