from __future__ import annotations

from functools import partial

import pytest
import torch

from snntorch_lr.experiments.workloads import METHODS, Method, make_step, peak_megabytes, slope

CPU = torch.device("cpu")


def test_memory_is_that_of_a_whole_step() -> None:
    # Some tensors of all neurons, copies and time steps, as float32.
    peak = 1e6 * peak_megabytes(partial(make_step, METHODS["vanilla, K = 16"], num_steps=8, width=256), CPU)
    numbers = 16 * 128 * 256 * 8
    assert numbers / 8 < peak < 20 * 4 * numbers


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match=r"no such method.* ended with status"):
        peak_megabytes(partial(make_step, Method(loop="no such method")), CPU)


def test_slope_is_the_exponent() -> None:
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
