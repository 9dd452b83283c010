"""Kernels for CUDA: in Triton's interpreter against those of a CPU and torch, and on a device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.gradients import CounterfactualCredit
from snntorch_lr.kernels import kinds
from snntorch_lr.philox import draw

pytest.importorskip("triton")
pytest.importorskip("numba")
# Triton looks at it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=CUDA)]
NOISES = {
    "escape": (kinds.LOGISTIC_ESCAPE, lambda: slr.EscapeNoise(0.4)),
    "gaussian": (kinds.GAUSSIAN, lambda: slr.MembraneNoise(0.4)),
}
MECHANISMS = {"subtract": kinds.SUBTRACT, "zero": kinds.ZERO, "erase": kinds.ERASE, "none": kinds.NONE}


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


def close(first: Tensor, second: Tensor, allowed: float, name: str) -> None:
    first, second = first.cpu(), second.cpu()
    assert first.isfinite().all(), name
    assert (first - second).abs().max() <= allowed * second.abs().max(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numbers", [3, 1203])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_that_of_a_cpu(noise: str, numbers: int, device: str) -> None:
    def drawn(where: str) -> Tensor:
        return draw(NOISES[noise][1](), torch.Size((3, numbers)), torch.float32, torch.device(where), 2**63 - 5).cpu()

    with on_triton(device):
        own = drawn(device)
    if noise.startswith("escape"):
        assert torch.equal(own, drawn("cpu"))
    else:
        torch.testing.assert_close(own, drawn("cpu"), rtol=1e-5, atol=1e-6)


def time_steps(module: Any, device: str, case: dict[str, Any], given: dict[str, Any]) -> Any:
    constants = (None if given[name] is None else given[name].to(device) for name in CONSTANTS)
    return module.TimeSteps(case["kind"], case["mechanism"], *constants)


def forward(module: Any, device: str, case: dict[str, Any], given: dict[str, Any]) -> dict[str, Tensor]:
    """What the forward kernel fills."""
    rows, neurons, steps, sets = case["rows"], case["neurons"], case["steps"], case["sets"]

    def new(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*lead, rows, neurons, dtype=dtype, device=device)

    seen = steps if case["all_seen"] else 1
    filled = {
        "new_shadow": new() if sets == 2 else None,
        "spikes": new(steps),
        "seen_mem": new(seen),
        "seen_syn": new(seen) if given["alpha"] is not None else None,
        "code": new(steps, sets, dtype=torch.int16),
        "noise_code": new(steps, sets, dtype=torch.int16) if case["kind"] >= kinds.GAUSSIAN else None,
    }
    shared = {name: None if given[name] is None else given[name].to(device) for name in FORWARD}
    time_steps(module, device, case, given).forward(
        rows, sets, steps, len(given["current"]), seen, given["keys"], *shared.values(), *filled.values()
    )
    return {name: value.cpu() for name, value in filled.items() if value is not None}


def backward(module: Any, device: str, case: dict[str, Any], given: dict[str, Any]) -> dict[str, Tensor]:
    """What the backward kernel fills."""
    read = [None if given[name] is None else given[name].to(device) for name in BACKWARD]
    filled = {name: None if given[name] is None else given[name].clone().to(device) for name in IN_AND_OUT}
    if case["sets"] == 1:
        filled |= {"togo": filled["togo"][:, 0].contiguous(), "parted": None}
    kernel = time_steps(module, device, case, given)
    sums = kernel.sums_of(case["rows"])
    kernel.backward(
        case["rows"], case["sets"], case["steps"], len(given["current"]), *read, filled["togo"], filled["parted"],
        1 if case["sets"] == 2 else 0, filled["trace"],
        0 if given["trace"] is None else len(given["trace"]), filled["syn_trace"], filled["to_current"],
        case["all_seen"], sums,
    )  # fmt: skip
    filled |= {"to_sigma": sums[0].sum(0), "sums": sums[1].sum(0)}
    return {name: value.cpu() for name, value in filled.items() if value is not None}


CONSTANTS = ("leak", "share", "alpha", "threshold", "sigma")
FORWARD = ("current", "mem", "shadow", "syn", "fired", "before")
BACKWARD = ("a", "b", "b_syn", "code", "noise_code", "fired", "before", "settings")
IN_AND_OUT = ("togo", "parted", "trace", "syn_trace", "to_current")


def inputs(case: dict[str, Any]) -> dict[str, Any]:
    """Tensors for both kernels, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    rows, neurons, steps, sets = case["rows"], case["neurons"], case["steps"], case["sets"]

    def some(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) + 0.1

    size = (rows, neurons)
    escapes, clears = case["kind"] < kinds.GAUSSIAN, case["mechanism"] in (kinds.ZERO, kinds.ERASE)
    traces = (2 if clears and sets == 2 else 1) if escapes else 0
    fired = (some(sets, *size) > 0.6).float()
    reads, synaptic, fresh = case["reads"], case["synaptic"], case["begins"] == "fresh"
    return {
        "keys": torch.randint(2**63 - 1, (steps,), generator=generator),
        "current": some(steps if case["changes"] else 1, *size),
        "mem": None if fresh else some(*size),
        "shadow": None if fresh or sets == 1 else some(*size),
        "syn": some(*size) if synaptic and not fresh else None,
        "fired": fired if case["begins"] == "fired" else None,
        "before": fired.to(torch.int16) | 0x3F80 if case["begins"] == "code" else None,
        "leak": some(neurons) * 0.8, "share": some(neurons), "alpha": some(neurons) * 0.8 if synaptic else None,
        "threshold": some(neurons), "sigma": some(neurons),
        "a": some(steps, *size) - 0.6 if reads != "states" else None,
        "b": some(steps, *size) - 0.6 if reads != "spikes" else None,
        "b_syn": some(steps, *size) - 0.6 if reads != "spikes" and synaptic else None,
        "settings": torch.tensor([0.4, 0.7]),
        "togo": some(*size) - 0.6, "parted": some(*size) - 0.6,
        "trace": some(traces, *size) - 0.6 if traces else None, "syn_trace": some(*size) - 0.6 if synaptic else None,
        "to_current": None if case["reads"] == "states" else some(steps if case["changes"] else 1, *size),
    }  # fmt: skip


def recalled(code: Tensor) -> Tensor:
    return ((code.int() & 0xFFFE) << 16).view(torch.float32)


# Each noise with each reset, and whatever else two of them meet.
CASES: dict[str, dict[str, Any]] = {}
for index, (noise, (kind, _)) in enumerate(NOISES.items()):
    for place, (reset, mechanism) in enumerate(MECHANISMS.items()):
        number = index + place
        CASES[f"{noise}, {reset}"] = {
            "kind": kind, "mechanism": mechanism, "sets": 2, "synaptic": number % 2 == 0,
            "steps": (3, 1, 2)[number % 3],
            "changes": (index + place // 2) % 2 == 0, "reads": ("both", "spikes", "states")[(index + 2 * place) % 3],
            "all_seen": number % 4 < 2, "begins": ("code", "fired", "fresh")[(2 * index + place) % 3],
            "learns_sigma": number % 3 > 0, "rows": 2, "neurons": (10, 7, 9)[(index + 2 * place) % 3],
        }  # fmt: skip
CASES["several blocks"] = CASES["escape, erase"] | {"neurons": 531, "steps": 1, "rows": 1}
CASES["one neuron"] = CASES["gaussian, zero"] | {"neurons": 1, "steps": 4}
CASES["no shadow"] = CASES["gaussian, subtract"] | {"sets": 1}
CASES["no shadow, escape"] = CASES["escape, erase"] | {"sets": 1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_time_steps_are_those_of_a_cpu(name: str, device: str) -> None:
    from snntorch_lr.kernels import cpu, triton_steps

    case = CASES[name]
    given = inputs(case)
    expected = forward(cpu, "cpu", case, given)
    for part, value in forward(triton_steps, device, case, given).items():
        if value.dtype == torch.int16:
            assert torch.equal(value & 1, expected[part] & 1), part
            # Few numbers lie where rounding before decides about rounding here.
            assert (value == expected[part]).float().mean() > 0.9, part
            torch.testing.assert_close(recalled(value), recalled(expected[part]), rtol=2**-6, atol=1e-4)
        else:
            torch.testing.assert_close(value, expected[part], rtol=1e-5, atol=1e-5)
    assert expected["spikes"].any()
    assert not expected["spikes"].all()
    given |= {"code": expected["code"], "noise_code": expected.get("noise_code")}
    expected = backward(cpu, "cpu", case, given)
    own = backward(triton_steps, device, case, given)
    assert own.keys() == expected.keys()
    for part, value in own.items():
        torch.testing.assert_close(value, expected[part], rtol=1e-4, atol=1e-5)
    if device == "cuda":
        again = backward(triton_steps, device, case, given)
        assert all(torch.equal(value, again[part]) for part, value in own.items())


@pytest.mark.skipif(INTERPRETED, reason="Triton only compiles what it does not interpret")
@pytest.mark.parametrize("kind", [kinds.LOGISTIC_ESCAPE, kinds.GAUSSIAN])
@pytest.mark.parametrize("mechanism", [kinds.SUBTRACT, kinds.ERASE])
def test_kernels_compile_without_a_device_and_fit_into_its_registers(kind: int, mechanism: int) -> None:
    triton = pytest.importorskip("triton", "3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from snntorch_lr.kernels import triton_steps

    types = dict.fromkeys(("code", "noise_code", "before"), "*i16") | {"keys": "*i64"}
    types |= dict.fromkeys(("batch", "neurons", "steps", "seen", "fit_rows"), "i32")
    constants = {
        "SETS": 2,
        "PAIRS": True,
        "TRACES": 1,
        "CHANGES": True,
        "ADDS": False,
        "KIND": kind,
        "PER_COUNTER": kinds.numbers_of_counter(kind),
        "MECHANISM": mechanism,
        "BLOCK": 128,
    }
    nothing = dict.fromkeys(("syn", "fired", "b_syn") if mechanism == kinds.SUBTRACT else ())
    for kernel in (triton_steps._forward, triton_steps._backward):
        names = kernel.arg_names
        fixed = {name: value for name, value in (constants | nothing).items() if name in names}
        signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        # Through shared memory go the random numbers, to neighbouring neurons, and the sums at the end.
        assert compiled.metadata.shared <= (
            512 * kinds.numbers_of_counter(kind) if kernel is triton_steps._forward else 64
        )
        assert ".local" not in compiled.asm["ptx"]


NEURONS = {
    "Leaky": lambda **options: slr.Leaky(0.8, **options),
    "Lapicque": lambda **options: slr.Lapicque(0.8, **options),
    "Synaptic": lambda **options: slr.Synaptic(0.6, 0.8, **options),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("neuron", "reset", "noise"),
    [
        ("Leaky", "subtract", "escape"),
        ("Lapicque", "zero", "gaussian"),
        ("Synaptic", "zero", "escape"),
    ],
)
def test_gradients_are_those_of_a_cpu_and_of_torch(neuron: str, reset: str, noise: str, device: str) -> None:
    def found(where: str, sequence: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        options = {"threshold": 0.5, "reset_mechanism": reset, "noise": NOISES[noise][1](), "init_hidden": True}
        net = nn.Sequential(nn.Linear(5, 7), NEURONS[neuron](output=True, **options)).to(where)
        net[1].sampler = CounterfactualCredit(control=0.4)
        x, weights = torch.rand(3, 2, 5).to(where), torch.randn(3, 2, 7).to(where)
        torch.manual_seed(5)
        if sequence:
            outputs = slr.rollout(net, x)
        else:
            # Each step hands credit to the one before it.
            outputs = tuple(torch.stack(part) for part in zip(*(net(step) for step in x), strict=True))
        sum((each * weights.roll(place, 0)).sum() for place, each in enumerate(outputs)).backward()
        return {
            "spikes": outputs[0].detach(), "weight": net[0].weight.grad, "sigma": net[1].noise.log_sigma.grad,
            "fitted": net[1].control.pending,
        }  # fmt: skip

    on_cpu = found("cpu", False)
    with on_triton(device):
        for own in (found(device, False), found(device, True)):
            for name, value in own.items():
                close(value, on_cpu[name], 1e-3, name)
    with kernels.off():
        close(on_cpu["weight"], found("cpu", False)["weight"], 2e-2, "weight")
