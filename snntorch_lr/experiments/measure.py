"""Trained networks, attacked, certified, or their gradients measured: ``evaluate``, ``certify`` and ``diagnose``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._messages import markdown
from ..convert import add_noise
from ..diagnostics import gradient_report
from ..gradients import Counterfactual, Estimator, Vanilla
from ..network import noisy_neurons
from ..noise import KINDS
from ..robustness import SUITES, Certificate, Protocol, certify, evaluate, suite
from ..robustness.figures import colors_of, new_figure, with_legend
from . import NETWORKS, data, files
from .options import Outcome, WithDevice, option
from .train import MODELS, Recipe, SpikingClassifier, load_trained, make_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .cli import Watch

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
"""l2 radii of the table of certified accuracies."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints(WithDevice):
    """A command on trained networks, and images that they take."""

    checkpoints: tuple[Path, ...] = option(
        help="checkpoints of reproduce, or names such as mnist/lr; the network, then its baselines", positional=True
    )
    dataset: str | None = option(None, "data set of the test images, by default of the checkpoints", choices=data.NAMES)
    images: int = option(1000, "test images, from the first", least=1)

    def about(self) -> dict[str, Any]:
        """Also what the recipe of the first checkpoint says."""
        recipe, _ = load_trained(_file(self.checkpoints[0]))
        return vars(self) | {"dataset": self.dataset or recipe.dataset, "model": recipe.model}

    def load(self) -> tuple[dict[str, nn.Module], list[tuple[Tensor, Tensor]]]:
        """Networks by the names of their files, with the folders where those are not enough; images and labels."""
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
        nets = {name: net for name, (_, net) in loaded.items()}
        return nets, [(images.test[: self.images], images.test_labels[: self.images])]


def _file(checkpoint: Path) -> Path:
    """The file of a checkpoint, which may be the name of a network that comes with the package."""
    return checkpoint if checkpoint.exists() else NETWORKS.get(checkpoint.as_posix(), checkpoint)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Checkpoints):
    """Attack trained networks: worst case over a suite, transfers between them, and the gates that it has to pass.

    Example: snntorch-lr evaluate runs/digits-mlp-seed0/likelihood-ratio.pt runs/digits-mlp-seed0/surrogate.pt

    The checkpoints are those of: snntorch-lr reproduce --dataset digits
    """

    place = "runs/robustness/{dataset}-{model}-seed{seed}"
    kept = "finished attacks are kept: the same command goes on from there"
    suite: str = option("standard", "attacks", choices=SUITES)
    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget", flag="--epsilon")
    norm: str = option("linf", "linf or l2")
    draws: int = option(8, "noise draws that attacks average over")
    votes: int = option(32, "noise draws for each prediction")
    seed: int = option(0, "of attacks and noise")

    def run(self, watch: Watch) -> Outcome:
        """Writes ``robustness.md``, ``robustness.json``, figures, and ``report.html``."""
        suite(self.suite)  # an attack library that is missing is told now
        nets, loader = self.load()
        protocol = Protocol(norm=self.norm, draws=self.draws, votes=self.votes)
        (name, net), *baselines = nets.items()
        report = evaluate(
            net, loader, self.epsilons, self.suite, baselines=dict(baselines), seed=self.seed, name=name,
            protocol=protocol, cache=self.folder / "attacks", progress=watch.pieces("attacks"),
        )  # fmt: skip
        note = files.origin_note(files.origin(self.command_line(), self.torch_device()))
        files.write_evaluation(report, self.folder, note)
        written = f"Written: {self.folder}/report.html, robustness.md, robustness.json and figures"
        return Outcome(report.to_json(), f"{report.summary()}\n{written}", report.tables())


@dataclass(frozen=True, kw_only=True)
class Certify(Checkpoints):
    """Certify trained networks by randomized smoothing: l2 radii within which no attack changes a prediction.

    Example: snntorch-lr certify runs/digits-mlp-seed0/likelihood-ratio.pt --sigma 0.25

    The checkpoint is one of: snntorch-lr reproduce --dataset digits
    """

    place = "runs/certificates"
    images: int = option(500, "test images to certify, from the first", least=1)
    sigmas: tuple[float, ...] = option((0.25, 0.5), "level of the noise on the input", flag="--sigma", above=0)
    draws: int = option(1000, "noise draws that bound each radius", least=1)
    seed: int = option(0, "of the noise")

    def run(self, watch: Watch) -> Outcome:
        """Writes ``certificates.json``, ``certificates.md`` and ``certificates.png``."""
        progress, (nets, loader) = watch.pieces("images", apart=10), self.load()
        count = len(loader[0][0])
        pairs = [(name, net, sigma) for name, net in nets.items() for sigma in self.sigmas]
        certificates: dict[tuple[str, str], Certificate] = {}
        for index, (name, net, sigma) in enumerate(pairs):

            def tell(done: int, _: int, label: str = f"{name}, σ = {sigma:g}", before: int = index * count) -> None:
                progress(label, before + done, len(pairs) * count)

            key = name, f"σ = {sigma:g}"
            certificates[key] = certify(net, loader, sigma, self.draws, seed=self.seed, progress=tell)
        labelled = {", ".join(key): certificate for key, certificate in certificates.items()}
        header = ["", *(f"r = {radius:g}" for radius in RADII)]
        lines = [[label, *(str(made.accuracy(radius)) for radius in RADII)] for label, made in labelled.items()]
        origin = files.origin(self.command_line(), self.torch_device())
        files.write_text(
            self.folder / "certificates.md",
            f"# Certified accuracy in percent, by l2 radius\n\n{markdown(header, lines)}\n\n"
            f"{self.draws} draws for each of {count} images, α = 0.001, neurons without noise; with the half-width of "
            f"the 95 % Wilson interval.\n\n{files.origin_note(origin)}\n",
        )
        results = {label: certificate.to_json() for label, certificate in labelled.items()}
        files.write_json(self.folder / "certificates.json", origin | {"certificates": results})
        files.save_figure(self.folder / "certificates.png", _certified_figure(certificates))
        written = f"Written: {self.folder}/certificates.md, certificates.json, certificates.png"
        title = "certified accuracy (%) by l2 radius"
        return Outcome([dict(zip(header, line, strict=True)) for line in lines], written, [(title, header, lines)])


def _certified_figure(certificates: dict[tuple[str, str], Certificate]) -> Figure:
    """Certified accuracy against the l2 radius, with its interval; one line for each network and σ."""
    figure, (axes,) = new_figure(7, 4.5)
    names, sigmas = (dict.fromkeys(parts) for parts in zip(*certificates, strict=True))
    colors, dashes = colors_of(names), dict(zip(sigmas, cycle(("-", "--", ":", "-.")), strict=False))
    for (name, sigma), certificate in certificates.items():
        radii = sorted({0.0, *certificate.radii.tolist()})
        shares = [certificate.accuracy(radius) for radius in radii]
        look = {"label": f"{name}, {sigma}", "color": colors[name], "linestyle": dashes[sigma]}
        axes.step(radii, [100 * share.accuracy for share in shares], where="pre", **look)
        ends = [100 * share.low for share in shares], [100 * share.high for share in shares]
        axes.fill_between(radii, *ends, step="pre", color=colors[name], alpha=0.15, lw=0)
    axes.set(xlabel="l2 radius", ylabel="certified accuracy (%)", ylim=(0, 103), xlim=(0, None))
    return with_legend(figure, axes)


@dataclass(frozen=True, kw_only=True)
class Diagnose(WithDevice):
    """Measure the gradients of the estimators on one batch: cosine, signal-to-noise, bias, time, memory.

    Example: snntorch-lr diagnose --dataset digits --out runs/gradients

    With --checkpoint of a network that reproduce trained, in place of a fresh one.
    """

    place = "runs/gradients/{dataset}-{model}-seed{seed}"
    noise: str = option("membrane", "kind of the noise of the hidden neurons", choices=KINDS)
    distribution: str = option("gaussian", "gaussian, logistic; membrane noise also laplace")
    sigma: float = option(0.5, "noise level where the checkpoint has none")
    dataset: str | None = option(None, "data set, by default of the checkpoint, or digits", choices=data.NAMES)
    model: str | None = option(None, "network, by default of the checkpoint, or mlp", choices=MODELS)
    checkpoint: Path | None = option(None, "network to measure, from reproduce; a fresh one by default")
    copies: int = option(16, "noise copies of each sample", least=1)
    batch: int = option(64, "training images", least=1)
    repeats: int = option(16, "calls of each estimator")
    reference: int = option(128, "calls that the reference gradient is the mean of")
    seed: int = option(0, "of a fresh network, the batch and the noise")

    def about(self) -> dict[str, Any]:
        """Also what the recipe says."""
        recipe, _ = self.trained()
        return {"dataset": recipe.dataset, "model": recipe.model, "seed": self.seed}

    def trained(self) -> tuple[Recipe, nn.Module | None]:
        """Recipe and network of the checkpoint; without one the recipe of a fresh network."""
        if self.checkpoint:
            return load_trained(self.checkpoint)
        dataset, model = self.dataset or "digits", self.model or "mlp"
        return Recipe(method="likelihood ratio", dataset=dataset, model=model, copies=self.copies, seed=self.seed), None

    def run(self, watch: Watch) -> Outcome:
        """Writes ``gradients.json``, ``gradients.md`` and ``gradients.png``."""
        device, out = self.torch_device(), self.folder
        recipe, net = self.trained()
        for name in ("dataset", "model"):
            wanted, has = getattr(self, name), getattr(recipe, name)
            if wanted not in (None, has):
                raise ValueError(f"{self.checkpoint} has {name} {has}, not {wanted}; leave out --{name}")
        images = data.load(recipe.dataset, self.data_root)
        net = make_network(recipe, images.shape) if net is None else net
        if not isinstance(net, SpikingClassifier):
            raise ValueError(f"the model {recipe.model} has no spiking neurons")
        # Noise of the kind that is asked for, at the level of the noise that there is.
        add_noise(net, sigma=self.sigma, only=[name for name in net.spiking if name not in noisy_neurons(net)])
        for neuron in noisy_neurons(net).values():
            if neuron.noise is not None:
                level = neuron.noise.sigma if self.checkpoint else self.sigma
                neuron.noise = KINDS[self.noise](level, distribution=self.distribution)
        net.train().to(device)
        rows = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(self.seed))[: self.batch]
        # The estimators, and what an ingredient is worth.
        estimators: dict[str, str | Estimator] = {
            "vanilla": "vanilla",
            "no baseline": Vanilla(net, self.copies, baseline="none"),
            "approximate": "approximate",
            "counterfactual": Counterfactual(net),
            "counterfactual, γ = 1": Counterfactual(net, discount=1),
            "counterfactual, λ = 0": Counterfactual(net, control=0),
        }

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(net(x), y, reduction="none")

        watch.say("measuring gradients")
        report = gradient_report(
            net, loss_fn, images.train[rows].to(device), images.train_labels[rows].to(device), estimators,
            copies=self.copies, repeats=self.repeats, reference=self.reference, seed=self.seed,
        )  # fmt: skip
        results = files.origin(self.command_line(), device)
        about = asdict(recipe) | ({} if self.checkpoint else {"epochs": 0})
        results |= {"settings": self.recorded(), "recipe": about, "report": report.to_json()}
        files.write_json(out / "gradients.json", results)
        trained = f"after {recipe.epochs} epochs by {recipe.method}" if self.checkpoint else "at initialisation"
        files.write_text(
            out / "gradients.md",
            f"# Gradients: {recipe.dataset}, {recipe.model}, {self.distribution} {self.noise} noise, {trained}\n\n"
            f"{self.batch} training images.\n\n```text\n{report}\n```\n\n{files.origin_note(results)}",
        )
        files.save_figure(out / "gradients.png", report.plot())
        words = "\n".join([*report.notes(), f"Written: {out}/gradients.json, gradients.md, gradients.png"])
        return Outcome(report.to_json(), words, [("", *table) for table in report.tables()])
