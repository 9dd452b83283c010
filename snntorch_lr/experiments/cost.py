"""Time and peak memory of training steps."""

from __future__ import annotations

import contextlib
import ctypes
import math
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class TrainingStep:
    """A training step on a fixed batch; each call updates the weights.

    Attributes:
        net: the network; if it has time steps, their number ``num_steps`` may be changed between calls.
        call: the step.
    """

    net: nn.Module
    call: Callable[[], Any]

    def __call__(self) -> Any:
        """Updates the weights once, and returns the loss."""
        return self.call()


def median_milliseconds(
    steps: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, tell: Callable[[str], None]
) -> dict[str, float]:
    """Median time of a training step of each kind; they take turns, so that a busy machine slows all of them.

    Args:
        steps: by name.
        device: where they compute.
        repeats: timed rounds, after one that warms up.
        tell: told the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        tell(f"round {round_} of {repeats}")
        for name, step in steps.items():
            taken = _milliseconds(step, device)
            if round_:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
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


def peak_megabytes(make: Callable[[], TrainingStep], device: torch.device) -> float:
    """Peak memory of one training step above weights, gradients and the optimizer's state, in 10⁶ bytes.

    These are there before: a step with a single time step warms up. On a CPU it is the memory of a fresh process, so
    that nothing that was freed earlier hides a part of it. On a CUDA device it is what torch's allocator counts.

    Args:
        make: makes the step; ``pickle`` has to find it in a module.
        device: where the step computes.

    Raises:
        ChildProcessError: if the process dies, for want of memory for example.
    """
    given = pickle.dumps((make, str(device), torch.get_num_threads()))
    # In a session of its own: Ctrl-C is for this process, which ends the other one.
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name], input=given, stdout=subprocess.PIPE, start_new_session=True
    )
    if process.returncode:
        raise ChildProcessError(f"measuring the memory of {make} ended with status {process.returncode}")
    return float(process.stdout)


def _peak(step: TrainingStep, device: torch.device) -> float:
    """``peak_megabytes``, in the process that does nothing else."""
    import psutil

    net: Any = step.net
    if num_steps := getattr(net, "num_steps", 0):
        net.num_steps = 1
        step()
        net.num_steps = num_steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return float(torch.cuda.max_memory_allocated(device) - before) / 1e6
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = psutil.Process().memory_info().rss
    afresh = _forget_peak()
    step()
    return float(_peak_bytes(afresh) - before) / 1e6


def _forget_peak() -> bool:
    """Starts the kernel's record of the peak afresh; False where only that since the start of the process is known."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes(afresh: bool) -> int:
    if afresh:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of a power law through the costs: the slope of their logarithms."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


# Nothing is given by a process that Ctrl-C ends while it starts this one.
if __name__ == "__main__" and (_given := sys.stdin.buffer.read()):
    _make, _device, _threads = pickle.loads(_given)
    torch.set_num_threads(_threads)
    print(_peak(_make(), torch.device(_device)))
