from __future__ import annotations

from functools import partial

import pytest
import torch

from snntorch_lr.experiments.recipe import Recipe
from snntorch_lr.experiments.study.run import training_step
from snntorch_lr.experiments.workloads import Workload, make_step, peak_megabytes, slope

CPU = torch.device("cpu")


def test_memory_of_a_recipe_is_that_of_a_whole_step() -> None:
    # The spikes of four copies at all time steps, as bits, and some tensors of the last one as float32.
    recipe = Recipe(method="likelihood ratio", estimator="vanilla", copies=4)
    neurons = recipe.copies * recipe.batch_size * 256
    peak = 1e6 * peak_megabytes(partial(training_step, recipe, (1, 8, 8)), CPU)
    assert neurons * recipe.num_steps / 8 < peak < 20 * 4 * neurons * recipe.num_steps


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match=r"no such method.* ended with status"):
        peak_megabytes(partial(make_step, Workload("no such method"), CPU), CPU)


def test_slope_is_the_exponent() -> None:
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
