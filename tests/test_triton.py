"""Fused time steps for CUDA: in Triton's interpreter against Numba and torch, and through its compiler."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from snntorch_lr import kernels
from snntorch_lr.estimators.packing import pack, unpack
from snntorch_lr.kernels import kinds
from snntorch_lr.noise_stream import NoiseStream

from .helpers import gradients
from .test_kernels import ESTIMATORS, NOISES, Net, data

pytest.importorskip("triton")
# Triton looks at it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.mark.skipif(INTERPRETED, reason="it is")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@contextmanager
def on_triton(device: str) -> Iterator[None]:
    """Tensors of a CPU are taken for those of a GPU, if there is none."""
    from snntorch_lr.kernels import triton_steps

    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(kernels, "_load", lambda device: triton_steps)
        yield


DEVICES = [pytest.param("cpu", marks=interpreted), CUDA]


@pytest.mark.parametrize("device", DEVICES)
def test_random_words_are_the_known_ones(device: str) -> None:
    # Of the authors' own file of known answers; a number is made of the upper 24 bits of each word.
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    expected = (((words ^ 0x80000000) - 0x80000000) >> 8).float().add(0.5) * 2.0**-23
    out = torch.empty(1, 4, device=device)
    with on_triton(device):
        kernels.noise_on(out.device, out.dtype).noise(out, 0, 1, 0, 1, 0, kinds.LOGISTIC_ESCAPE)
    assert torch.equal(out[0].cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_that_of_a_cpu(noise: str, antithetic: bool, device: str) -> None:
    stream = NoiseStream(2**64 - 5, 6, 1, 5, antithetic)

    def draw(where: str) -> Tensor:
        return stream.draw(3, torch.empty(8, 1203, device=where), NOISES[noise]()).cpu()

    with on_triton(device):
        drawn = draw(device)
    if noise.startswith("escape"):
        assert torch.equal(drawn, draw("cpu"))
    else:
        torch.testing.assert_close(drawn, draw("cpu"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 8, 1001])
def test_bits_are_those_of_a_cpu(count: int, device: str) -> None:
    spikes = (torch.rand(count) > 0.5).float()
    with on_triton(device):
        bits = pack(spikes.to(device))
        assert torch.equal(unpack(bits, spikes.shape, torch.float32).cpu(), spikes)
    assert torch.equal(bits.cpu(), pack(spikes))


# Each noise, each neuron with each reset, and each estimator, but not all combinations; the interpreter takes seconds
# for each, so that it computes a few of them, with two noises in one network.
RATES = [
    ("Leaky", noises, "subtract", "rates", False)
    for noises in ("escape, logistic; membrane, gaussian", "escape, gaussian; membrane, laplace", "membrane, logistic")
]
CASES = [
    *[("Leaky", noise, "zero", "approximate", True) for noise in NOISES],
    *[
        (neuron, noise, reset, estimator, changes)
        for neuron, estimator in (("Leaky", "replay"), ("Lapicque", "vanilla"), ("Synaptic", "chunks, antithetic"))
        for noise, reset, changes in (
            ("escape, logistic", "subtract", False),
            ("membrane, gaussian", "zero", True),
            ("escape, logistic", "none", True),
        )
    ],
    ("Synaptic", "membrane, gaussian", "subtract", "rates", False),
]
INTERPRETED_CASE = ("Synaptic", "escape, logistic", "zero", "chunks, antithetic", True)


@pytest.mark.parametrize(
    ("neuron", "noise", "reset", "estimator", "changes", "device"),
    [
        *[pytest.param(*case, "cpu", marks=interpreted) for case in [*RATES, INTERPRETED_CASE]],
        *[pytest.param(*case, "cuda", marks=CUDA.marks) for case in [*RATES, INTERPRETED_CASE, *CASES]],
    ],
)
def test_gradients_are_those_of_a_cpu(
    neuron: str, noise: str, reset: str, estimator: str, changes: bool, device: str
) -> None:
    def found(where: str) -> dict[str, Tensor]:
        kinds_of_layers = itertools.cycle(noise.split("; "))
        net = Net(lambda: NOISES[next(kinds_of_layers)](), reset, changes, neuron).to(where)
        net.num_steps = 3
        own = ESTIMATORS[estimator](net)
        # The second call knows which time steps it may compute at once.
        for _ in range(2):
            loss = own.backward(net.loss, *(part[:2].to(where) for part in data(torch.float32)))
        return {name: value.cpu() for name, value in (gradients(net) | {"loss": loss}).items()}

    from snntorch_lr.kernels import triton_steps

    calls: list[Any] = []
    with on_triton(device), pytest.MonkeyPatch.context() as patch:
        step = triton_steps.step
        patch.setattr(triton_steps, "step", lambda *args, **named: (calls.append(1), step(*args, **named)))
        fused = found(device)
        with kernels.off():
            plain = found(device)
    assert calls
    for other in (plain, found("cpu")):
        for name, value in other.items():
            assert (fused[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-7, name
