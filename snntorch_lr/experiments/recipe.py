"""A recipe decides what a training run computes; the network, its noise and the optimizer follow from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import snntorch as snn
import torch
from torch import Tensor, nn

from ..convert import add_noise
from ..gradients import ESTIMATORS
from ..network import noises, reset
from ..noise import KINDS, NoisyInput
from ..objectives import OBJECTIVES
from . import data, files
from .options import check, option

METHODS = ("surrogate", "surrogate, noise", "likelihood ratio")
INCOMPLETE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""Errors of a checkpoint that lacks something, or has something else in its place."""
MODELS = ("mlp", "wide-mlp", "deep-mlp", "spiking-mlp", "conv")
"""Spiking networks. There is also ``"ann"``, with rectified linear units, to transfer adversarial images from."""


class SpikingClassifier(nn.Module):
    """Blocks with leaky neurons between them, and a readout by the mean membrane potential or by spike counts.

    The image is the constant input current of every time step (direct coding), so the first block runs once, unless
    the module ``input`` in front of it draws noise in each time step. Without ``counts`` of spikes as logits, the
    output neurons integrate and never reset.
    """

    def __init__(
        self, blocks: list[nn.Module], readout: nn.Module, num_steps: int = 8, beta: float = 0.9, counts: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.neurons = nn.ModuleList(snn.Leaky(beta=beta, init_hidden=True) for _ in blocks)
        self.input: nn.Module = nn.Identity()
        self.readout = readout
        mechanism = "subtract" if counts else "none"
        self.output = snn.Leaky(beta=beta, init_hidden=True, output=True, reset_mechanism=mechanism)
        self.num_steps = num_steps
        self.counts = counts

    @property
    def spiking(self) -> list[str]:
        """Names of the neurons whose spikes count: those that get noise."""
        hidden = [f"neurons.{index}" for index in range(len(self.neurons))]
        return [*hidden, "output"] if self.counts else hidden

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` from images ``[batch, channels, height, width]``."""
        reset(self)
        noise = self.input
        changes = isinstance(noise, NoisyInput) and noise.active and not noise.frozen
        current = self.blocks[0](noise(images))
        total = torch.zeros((), device=images.device)
        for step in range(self.num_steps):
            if step and changes:
                current = self.blocks[0](noise(images))
            spikes = self.neurons[0](current)
            for block, neuron in zip(list(self.blocks)[1:], list(self.neurons)[1:], strict=True):
                spikes = neuron(block(spikes))
            spikes, mem = self.output(self.readout(spikes))
            total = total + (spikes if self.counts else mem)
        return total if self.counts else total / self.num_steps


def build(model: str, shape: tuple[int, int, int], classes: int = 10, num_steps: int = 8) -> nn.Module:
    """A network for images of a shape: channels, height, width.

    The models are ``"mlp"`` (256 hidden neurons), ``"wide-mlp"`` (1000), ``"deep-mlp"`` (256 and 128),
    ``"spiking-mlp"`` (256, and a readout by spike counts), ``"conv"`` (8 and 16 channels, 5 × 5 kernels, each with max
    pooling by 2), and ``"ann"`` (256 rectified linear units).
    """
    channels, height, width = shape
    pixels = channels * height * width
    if model == "ann":
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, classes))
    if model in ("mlp", "wide-mlp", "deep-mlp", "spiking-mlp"):
        hidden = 1000 if model == "wide-mlp" else 256
        first = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden))
        if model != "deep-mlp":
            return SpikingClassifier([first], nn.Linear(hidden, classes), num_steps, counts=model == "spiking-mlp")
        return SpikingClassifier([first, nn.Linear(256, 128)], nn.Linear(128, classes), num_steps)
    if model == "conv":
        blocks: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(channels, 8, 5, padding=2), nn.MaxPool2d(2)),
            nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 5, padding=2)),
        ]
        features = 16 * (height // 2 // 2) * (width // 2 // 2)
        return SpikingClassifier(blocks, nn.Sequential(nn.Flatten(), nn.Linear(features, classes)), num_steps)
    raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}")


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Noise of the hidden neurons."""

    noise: str = option("membrane", "kind of the noise of the hidden neurons", choices=KINDS)
    distribution: str = option("gaussian", "gaussian, logistic; membrane noise also laplace")
    sigma: float = option(0.5, "initial noise level of the hidden neurons")

    def check_noise(self) -> None:
        """Refuses noise that cannot be made."""
        KINDS[self.noise](self.sigma, distribution=self.distribution)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(NoiseOptions):
    """Options of a training run that the command line offers too."""

    dataset: str = option("digits", "data set, digits without a download", choices=data.NAMES)
    model: str = option("mlp", "network", choices=MODELS)
    epochs: int = option(None, "passes over the data; 20 for digits, 4 otherwise", least=1)
    copies: int = option(None, "noise copies of each sample; 1 for counterfactual, else 16", least=1)
    seed: int = option(0, "of everything random")
    estimator: str = option("counterfactual", "estimator of the likelihood ratio", choices=ESTIMATORS)
    learning_rate: float = option(1e-3, "of Adam, for all networks; falls to 0 along a cosine", above=0)
    anneal: float | None = option(
        None, "fraction of the noise levels that is left at the end; by default they do not fall", above=0, most=1
    )

    def __post_init__(self) -> None:
        epochs, copies = 20 if self.dataset == "digits" else 4, 1 if self.estimator == "counterfactual" else 16
        for name, value in (("epochs", epochs), ("copies", copies)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingOptions):
    """Everything that decides what a training run computes: the options of ``TrainingOptions``, and these.

    Attributes:
        method: surrogate-gradient backpropagation without noise, the same with the noise of the likelihood-ratio
            network, or the likelihood ratio.
        model: as above, or ``"ann"``.
        num_steps: time steps.
        batch_size: images per step.
        validation: training images held out to choose by, drawn by the seed.
        stop_at: validation accuracy (noise off) at which training stops; None to train to the end.
        objective: loss per sample, one of ``OBJECTIVES``; with ``"zero-one"`` the output neurons have noise too.
        decay: decoupled weight decay of the first block's weights, as a multiple of the learning rate.
        input_noise: initial level of Gaussian noise on the input, for every method; 0 for none.
        input_noise_each_step: it is drawn in each time step, in place of once for each presentation.
        learn_input_noise: its level is learned, down to half of where it starts.
        adversary: l∞ budget of the adversarial examples that take the place of the training images; 0 for none.
        free: updates of each batch, whose gradient with respect to the images makes the next adversarial examples in
            place of an attack (Shafahi et al. 2019, "Adversarial Training for Free!"); 0 for an attack.
        learn_sigma: noise levels are learned.
        late_copies: noise copies once the learning rate has fallen by half; 0 for as many as before.
    """

    method: str = option(choices=METHODS)
    model: str = option("mlp", choices=(*MODELS, "ann"))
    num_steps: int = option(8, least=1)
    batch_size: int = option(128, least=1)
    validation: int = option(0, least=0)
    stop_at: float | None = None
    objective: str = option("cross-entropy", choices=OBJECTIVES)
    decay: float = option(0.0, least=0)
    input_noise: float = option(0.0, least=0)
    input_noise_each_step: bool = False
    learn_input_noise: bool = False
    adversary: float = option(0.0, least=0)
    free: int = option(0, least=0)
    learn_sigma: bool = True
    late_copies: int = option(0, least=0)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Recipe:
        """A recipe as it was saved, by this version or an earlier one, whose other options nobody used."""
        return cls(**{field.name: saved[field.name] for field in fields(cls) if field.name in saved})


def check_recipe(recipe: Recipe) -> None:
    """Refuses a recipe that cannot be trained."""
    check(recipe, flags=False)
    recipe.check_noise()
    flat = recipe.objective == "zero-one"
    if flat and recipe.method != "likelihood ratio":
        raise ValueError("the objective zero-one has no gradient to backpropagate: use the method likelihood ratio")
    if recipe.late_copies and recipe.method != "likelihood ratio":
        raise ValueError(f"late_copies needs the method likelihood ratio, got {recipe.method}")
    if flat and recipe.estimator == "counterfactual":
        raise ValueError("the objective zero-one has no derivative by a spike: use the estimator vanilla")
    if recipe.free and not recipe.adversary:
        raise ValueError("free needs the budget of an adversary")
    if recipe.model == "ann" and (recipe.method != "surrogate" or recipe.input_noise):
        raise ValueError("the model ann has no spiking neurons: use the method surrogate, without noise")
    if recipe.stop_at is not None and not recipe.validation:
        raise ValueError("stop_at needs validation images, so that the test images decide nothing")


def make_network(recipe: Recipe, shape: tuple[int, int, int]) -> nn.Module:
    """The untrained network of a recipe; networks of the same seed start from the same weights."""
    torch.manual_seed(recipe.seed)
    net = build(recipe.model, shape, num_steps=recipe.num_steps)
    if recipe.input_noise and isinstance(net, SpikingClassifier):
        frozen = not recipe.input_noise_each_step
        net.input = NoisyInput(recipe.input_noise, recipe.learn_input_noise, frozen=frozen)
    if recipe.method == "surrogate" or not isinstance(net, SpikingClassifier):
        return net
    add_noise(net, recipe.sigma, recipe.learn_sigma, net.spiking, recipe.noise, recipe.distribution)
    if recipe.objective == "zero-one" and not net.counts:
        # What is learned without a gradient of the loss has to be sampled, and the loss reads membrane potentials.
        add_noise(net, recipe.sigma, recipe.learn_sigma, ["output"])
    return net


def make_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    """Adam, with decoupled decay of the first block's weights if the recipe has any."""
    first = [p for name, p in net.named_parameters() if name.startswith("blocks.0.") and p.dim() > 1]
    rest = [p for p in net.parameters() if all(p is not other for other in first)]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": first, "weight_decay": recipe.decay}]
    return torch.optim.AdamW([group for group in groups if group["params"]], recipe.learning_rate, weight_decay=0.0)


def noise_levels(net: nn.Module) -> dict[str, list[float]]:
    """Noise levels σ by neuron and input, as plain numbers."""
    found = {name.removesuffix(".noise"): noise.sigma.detach().flatten() for name, noise in noises(net).items()}
    return {name: cast("list[float]", sigma.tolist()) for name, sigma in found.items()}


def load_trained(checkpoint: Path) -> tuple[Recipe, nn.Module]:
    """Recipe and network of a checkpoint."""
    state = files.load_checkpoint(checkpoint)
    try:
        recipe = Recipe.of(state["recipe"])
        net = make_network(recipe, tuple(state["shape"]))
        net.load_state_dict(state["net"])
    except INCOMPLETE as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of reproduce ({type(error).__name__})") from error
    return recipe, net
