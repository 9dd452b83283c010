"""What decides a training run, and the network and optimizer that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..convert import add_noise
from ..network import noisy_neurons
from ..objectives import OBJECTIVES
from . import files, models

FLAT = ("zero-one", "vote")
"""Objectives without a gradient."""
METHODS = ("surrogate", "surrogate, noise", "likelihood ratio")


INCOMPLETE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""What is raised by a checkpoint that lacks something, or has something else in its place."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes.

    Attributes:
        method: one of ``METHODS``: surrogate-gradient backpropagation without noise, the same with the noise of the
            likelihood-ratio network, and the likelihood ratio.
        dataset: name of the data set.
        model: name of the network.
        epochs: passes over the training images.
        copies: noise copies of each sample, for the likelihood ratio.
        seed: of weights, order of the images, and noise.
        num_steps: time steps.
        estimator: of the likelihood ratio, ``"counterfactual"``, ``"vanilla"`` or ``"approximate"``.
        noise: kind of the noise of the hidden neurons, ``"membrane"`` or ``"escape"``.
        distribution: of the noise.
        sigma: initial noise level of the hidden neurons.
        batch_size: images per step.
        learning_rate: of Adam, falling to zero along a cosine.
        validation: training images held out to choose by, drawn by the seed.
        stop_at: validation accuracy (noise off) at which training stops; None to train to the end.
        objective: loss per sample, one of ``OBJECTIVES``, or ``"vote"``: the 0-1 loss of a majority of noise draws.
            With ``"zero-one"`` and ``"vote"`` the output neurons have noise too.
        decay: decoupled weight decay of the first block's weights, as a multiple of the learning rate.
        input_noise: standard deviation of Gaussian noise on the training images.
        adversary: l∞ budget of the adversarial examples (PGD with seven steps, through the surrogate gradient) that
            take the place of the training images; 0 for none.
        learn_sigma: whether noise levels are learned.
        per_neuron: whether each neuron, or channel, has a noise level of its own.
        late_copies: noise copies once the learning rate has fallen by half; 0 for as many as before.
        votes: noise draws of which ``"vote"`` counts the majority.
    """

    method: str
    dataset: str
    model: str
    epochs: int
    copies: int
    seed: int
    estimator: str = "counterfactual"
    noise: str = "membrane"
    distribution: str = "gaussian"
    num_steps: int = 8
    sigma: float = 0.5
    batch_size: int = 128
    learning_rate: float = 1e-3
    validation: int = 0
    stop_at: float | None = None
    objective: str = "cross-entropy"
    decay: float = 0.0
    input_noise: float = 0.0
    adversary: float = 0.0
    learn_sigma: bool = True
    per_neuron: bool = False
    late_copies: int = 0
    votes: int = 1


def check_recipe(recipe: Recipe) -> None:
    """Refuses a recipe that cannot be trained.

    Raises:
        ValueError: if a name is unknown, a number is out of range, or there is nothing to stop by.
    """
    if recipe.method not in METHODS:
        raise ValueError(f"unknown method {recipe.method!r}; choose one of {', '.join(METHODS)}")
    if recipe.objective not in (*OBJECTIVES, "vote"):
        raise ValueError(f"unknown objective {recipe.objective!r}; choose one of {', '.join(OBJECTIVES)}, vote")
    if recipe.objective in FLAT and recipe.method != "likelihood ratio":
        raise ValueError(
            f"the objective {recipe.objective} has no gradient to backpropagate: use the method likelihood ratio"
        )
    if recipe.votes < 1 or (recipe.votes > 1 and recipe.objective != "vote"):
        raise ValueError(f"votes must be positive, and 1 unless the objective is vote, got {recipe.votes}")
    if recipe.late_copies and recipe.method != "likelihood ratio":
        raise ValueError(f"late_copies needs the method likelihood ratio, got {recipe.method}")
    if recipe.objective in FLAT and recipe.estimator == "counterfactual":
        raise ValueError(f"the objective {recipe.objective} has no derivative by a spike: use the estimator vanilla")
    for name in ("decay", "input_noise", "adversary", "late_copies"):
        if not getattr(recipe, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(recipe, name)}")
    if recipe.input_noise and recipe.adversary:
        raise ValueError("input_noise and adversary cannot be combined: attacks refuse images outside [0, 1]")
    if recipe.model == "ann" and recipe.method != "surrogate":
        raise ValueError("the model ann has no spiking neurons to add noise to: use the method surrogate")
    if recipe.stop_at is not None and not recipe.validation:
        raise ValueError("stop_at needs validation images, so that the test images decide nothing")


def make_network(recipe: Recipe, shape: tuple[int, int, int]) -> nn.Module:
    """The untrained network of a recipe; networks of the same seed start from the same weights."""
    torch.manual_seed(recipe.seed)
    net = models.build(recipe.model, shape, num_steps=recipe.num_steps)
    if recipe.method == "surrogate" or not isinstance(net, models.SpikingClassifier):
        return net
    for name in net.hidden:
        add_noise(net, _level(recipe, net, name), recipe.learn_sigma, [name], recipe.noise, recipe.distribution)
    if recipe.objective in FLAT:
        # What is learned without a gradient of the loss has to be sampled, and the loss reads membrane potentials.
        add_noise(net, recipe.sigma, recipe.learn_sigma, ["output"])
    return net


def _level(recipe: Recipe, net: models.SpikingClassifier, name: str) -> float | Tensor:
    """Initial σ of a neuron: one number, or one for each feature or channel of the block in front of it."""
    if not recipe.per_neuron:
        return recipe.sigma
    block = net.blocks[int(name.rpartition(".")[2])]
    weight = [module for module in block.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1].weight
    return torch.full((weight.shape[0], *[1] * (weight.dim() - 2)), recipe.sigma)


def make_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    """Adam, with decoupled decay of the first block's weights if the recipe has any."""
    first = [p for name, p in net.named_parameters() if name.startswith("blocks.0.") and p.dim() > 1]
    rest = [p for p in net.parameters() if all(p is not other for other in first)]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": first, "weight_decay": recipe.decay}]
    return torch.optim.AdamW([group for group in groups if group["params"]], recipe.learning_rate, weight_decay=0.0)


def noise_levels(net: nn.Module) -> dict[str, list[float]]:
    """Noise levels σ by neuron, as plain numbers."""
    found = noisy_neurons(net).items()
    return {
        name: cast("list[float]", neuron.noise.sigma.detach().flatten().tolist())
        for name, neuron in found
        if neuron.noise is not None
    }


def load_trained(checkpoint: Path) -> tuple[Recipe, nn.Module]:
    """Recipe and network of a checkpoint.

    Raises:
        ValueError: if the file is not a checkpoint of ``train``.
    """
    state = files.load_checkpoint(checkpoint)
    try:
        recipe = Recipe(**state["recipe"])
        net = make_network(recipe, tuple(state["shape"]))
        net.load_state_dict(state["net"])
    except INCOMPLETE as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of reproduce ({type(error).__name__})") from error
    return recipe, net
