"""Time and peak memory of training steps."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .workloads import Workload, make_step

Progress = Callable[[str], None]
"""Called with what is measured next."""


def median_milliseconds(
    workloads: Mapping[str, Workload], device: torch.device, repeats: int, progress: Progress
) -> dict[str, float]:
    """Median time of a training step of each workload; they take turns, so that a busy machine slows all of them.

    Args:
        workloads: what to measure, by name.
        device: where.
        repeats: timed rounds, after one that warms up.
        progress: told the rounds.
    """
    steps = {name: make_step(workload, device) for name, workload in workloads.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 1):
        progress(f"round {round_} of {repeats}")
        for name, step in steps.items():
            taken = _milliseconds(step, device)
            if round_:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _milliseconds(step: Callable[[], Tensor], device: torch.device) -> float:
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


def peak_megabytes(workload: Workload, device: torch.device) -> float:
    """Peak memory of one training step above what is there before it, in 10⁶ bytes.

    Weights, gradients and the optimizer's state are there before: a step with the same sizes and a single time step
    warms up. On a CPU it is the memory of a fresh process, so that nothing that was freed earlier hides a part of it.
    On a CUDA device it is what torch's allocator counts.

    Raises:
        ChildProcessError: if the process dies, for want of memory for example.
    """
    return from_fresh_process(__spec__.name, [asdict(workload), str(device), torch.get_num_threads()])


def from_fresh_process(module: str, given: object) -> float:
    """What a module prints that is run as a program, and given JSON.

    Raises:
        ChildProcessError: if the process dies, for want of memory for example.
    """
    # In a session of its own: Ctrl-C is for this process, which ends the other one.
    process = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(given), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    if process.returncode:
        raise ChildProcessError(f"measuring the memory of {given} ended with status {process.returncode}")
    return float(process.stdout)


def _measure(workload: Workload, device: torch.device) -> float:
    """What ``peak_megabytes`` returns, in the process that does nothing else."""
    step = make_step(workload, device)
    step.net.num_steps = 1
    step()
    step.net.num_steps = workload.num_steps
    return peak_of(step, device)


def peak_of(step: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a call above what is there before it, in 10⁶ bytes; on a CPU, of the whole process."""
    import psutil

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
if __name__ == "__main__" and (_given := sys.stdin.read()):
    _workload, _name, _threads = json.loads(_given)
    torch.set_num_threads(_threads)
    print(_measure(Workload(**_workload), torch.device(_name)))
