"""Training steps of the benchmark, the same network by every method, and their time and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..convert import add_noise
from ..network import reset
from ..optim import attach, closure
from ..rollout import rollout

FEATURES, CLASSES = 784, 10
CPU = torch.device("cpu")
_SIGMA, _BETA = 0.5, 0.95
Step = Callable[[], Any]
"""A training step on a fixed batch: each call updates the weights, and returns the loss."""
Forward = Callable[[Tensor, int], Tensor]
"""Membrane potentials of the output neurons, ``[time, batch, classes]``, from inputs and the number of time steps."""


def _as_written(net: nn.Sequential) -> Forward:
    """The loop of snnTorch's tutorials."""

    def forward(x: Tensor, num_steps: int) -> Tensor:
        reset(net)
        return torch.stack([net(x)[1] for _ in range(num_steps)])

    return forward


def _hoisted(net: nn.Sequential) -> Forward:
    """The same loop; the current of the constant input is computed once, in front of it."""
    rest = net[1:]

    def forward(x: Tensor, num_steps: int) -> Tensor:
        reset(net)
        current = net[0](x)
        return torch.stack([rest(current)[1] for _ in range(num_steps)])

    return forward


def _rolled_out(net: nn.Sequential) -> Forward:
    return lambda x, num_steps: rollout(net, x, num_steps)[1]


def _spikingjelly(net: nn.Sequential) -> Forward:
    """SpikingJelly, where each layer computes all time steps before the next one begins.

    Its neurons leak after a reset and not before it, as snnTorch's do; nothing else differs.

    Source: Fang et al. (2023), "SpikingJelly: An open-source machine learning infrastructure platform for spike-based
    intelligence".
    """
    from spikingjelly.activation_based import functional, neuron

    leaky = partial(neuron.LIFNode, 1 / (1 - _BETA), False, v_reset=None, detach_reset=True, step_mode="m")
    # Not infinite, for its reset multiplies by the threshold.
    output = leaky(v_threshold=1e9, store_v_seq=True)
    layers = [layer if isinstance(layer, nn.Linear) else leaky() for layer in list(net)[1:-1]]

    def forward(x: Tensor, num_steps: int) -> Tensor:
        for layer in (*layers, output):
            functional.reset_net(layer)
        value = net[0](x).expand(num_steps, -1, -1)
        for layer in layers:
            value = layer(value)
        output(value)
        return output.v_seq  # type: ignore[no-any-return]

    return forward


LOOPS: dict[str, Callable[[nn.Sequential], Forward]] = {
    "as written": _as_written, "hoisted": _hoisted, "rollout": _rolled_out, "SpikingJelly": _spikingjelly
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A way to compute a training step: by ``"surrogate"`` or one of ``ESTIMATORS``, in one of ``LOOPS``, K copies."""

    gradient: str = "surrogate"
    loop: str = "hoisted"
    copies: int = 1
    noisy: bool = True
    fused: bool = True


REFERENCE, RIVAL = "snnTorch, as written", "SpikingJelly, multi-step"
METHODS = {
    REFERENCE: Method(loop="as written", noisy=False),
    "snnTorch, hoisted": Method(noisy=False),
    "snnTorch, hoisted, same noise": Method(),
    RIVAL: Method(loop="SpikingJelly", noisy=False),
    "counterfactual, as written": Method("counterfactual", "as written"),
    "counterfactual, hoisted": Method("counterfactual"),
    "counterfactual, hoisted, not fused": Method("counterfactual", fused=False),
    "counterfactual, slr.rollout": Method("counterfactual", "rollout"),
    "approximate, slr.rollout": Method("approximate", "rollout"),
    "counterfactual, K = 2": Method("counterfactual", copies=2),
    "vanilla, K = 16": Method("vanilla", copies=16),
    "approximate, K = 16": Method("approximate", copies=16),
}
"""Rows of the benchmark, by name; K = 1 where none is named."""


def make_step(
    method: Method, noise: str = "escape", num_steps: int = 25, width: int = 1000, depth: int = 1, batch: int = 128,
    device: torch.device = CPU,
) -> Step:  # fmt: skip
    """A training step with Adam on a fixed random batch; the loss is summed over all time steps.

    The network has ``depth`` hidden layers of ``width`` neurons, with noise of a kind where the method has it.
    """
    torch.manual_seed(0)
    x = torch.rand(batch, FEATURES).to(device)
    y = torch.randint(CLASSES, (batch,)).to(device)
    sizes = [FEATURES, *[width] * depth, CLASSES]
    pairs = [(nn.Linear(*pair), snn.Leaky(beta=_BETA, init_hidden=True)) for pair in pairwise(sizes)]
    net = nn.Sequential(*(module for pair in pairs for module in pair))
    net[-1] = snn.Leaky(beta=_BETA, init_hidden=True, output=True, reset_mechanism="none")
    net.to(device)
    if method.noisy:
        add_noise(net, sigma=_SIGMA, only=[str(2 * layer + 1) for layer in range(depth)], kind=noise)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    forward = LOOPS[method.loop](net)
    if method.gradient != "surrogate":
        attach(optimizer, net, method.gradient, copies=method.copies if method.copies > 1 else None)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        mem = forward(x, num_steps)
        return F.cross_entropy(mem.flatten(0, 1), y.repeat(num_steps), reduction="none").view(num_steps, -1).sum(0)

    def loop() -> Tensor:
        with contextlib.nullcontext() if method.fused else kernels.off():
            loss = losses(x, y).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return loss.detach()

    return loop if method.copies == 1 else lambda: optimizer.step(closure(losses, x, y))


def median_milliseconds(steps: Mapping[str, Step], device: torch.device, repeats: int) -> dict[str, float]:
    """Median time of each step; they take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            times[name].append(_milliseconds(step, device))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def _milliseconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    started = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - started)


def peak_megabytes(make: Callable[..., Step], device: torch.device) -> float:
    """Peak memory of the first training step above what there is before it, in 10⁶ bytes.

    Gradients, the optimizer's state and all that an estimator looks at in its first call are in it. Another network
    takes a step with a single time step before, so that libraries are there. On a CPU it is the memory of a fresh
    process, so that nothing that was freed earlier hides a part of it. On a CUDA device it is what torch's allocator
    counts. ``make`` makes the step, with ``num_steps=1`` one of a single time step; ``pickle`` has to find it.
    """
    job = pickle.dumps((make, str(device), torch.get_num_threads()))
    # In a session of its own: Ctrl-C is for this process, which ends the other one.
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name], input=job, stdout=subprocess.PIPE, start_new_session=True
    )
    if process.returncode:
        raise ChildProcessError(f"measuring the memory of {make} ended with status {process.returncode}")
    return float(process.stdout)


def _peak(make: Callable[..., Step], device: torch.device) -> float:
    """``peak_megabytes``, in the process that does nothing else."""
    import psutil

    make(num_steps=1)()
    # An optimizer with a hook is part of a cycle: what goes away later would be taken off the peak.
    gc.collect()
    step = make()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return float(torch.cuda.max_memory_allocated(device) - before) / 1e6
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = psutil.Process().memory_info().rss
    status = Path("/proc/self/status")
    if status.exists():
        # The kernel starts its record of the peak afresh.
        Path("/proc/self/clear_refs").write_text("5")
        step()
        peak = 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:5] == "VmHWM")
    else:
        import resource

        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak - before) / 1e6


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of a power law through the costs: the slope of their logarithms."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


# Nothing is given by a process that Ctrl-C ends while it starts this one.
if __name__ == "__main__" and (_given := sys.stdin.buffer.read()):
    _make, _device, _threads = pickle.loads(_given)
    torch.set_num_threads(_threads)
    print(_peak(_make, torch.device(_device)))
