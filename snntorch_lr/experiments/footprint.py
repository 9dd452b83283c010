"""Peak memory of one training step of a recipe, measured in a process that does nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from .measure import from_fresh_process, peak_of
from .models import SpikingClassifier
from .recipe import Recipe, make_network, make_optimizer
from .train import make_estimators, stepper


def step_megabytes(recipe: Recipe, shape: tuple[int, int, int]) -> float:
    """Peak memory of one training step above weights, gradients and the optimizer's state, in 10⁶ bytes.

    Args:
        recipe: what is trained; on random images.
        shape: of an image: channels, height, width.

    Raises:
        ChildProcessError: if the process dies, for want of memory for example.
    """
    return from_fresh_process(__spec__.name, [asdict(recipe), shape, torch.get_num_threads()])


def _measure(recipe: Recipe, shape: tuple[int, int, int]) -> float:
    net = make_network(recipe, shape)
    take_step = stepper(recipe, net, make_optimizer(recipe, net), make_estimators(recipe, net))
    x, y = torch.rand(recipe.batch_size, *shape), torch.randint(10, (recipe.batch_size,))
    if isinstance(net, SpikingClassifier):
        # A short step makes what stays: gradients, and the optimizer's state.
        net.num_steps = 1
        take_step(x, y)
        net.num_steps = recipe.num_steps
    return peak_of(lambda: take_step(x, y), torch.device("cpu"))


if __name__ == "__main__" and (_given := sys.stdin.read()):
    _recipe, _shape, _threads = json.loads(_given)
    torch.set_num_threads(_threads)
    print(_measure(Recipe(**_recipe), tuple(_shape)))
