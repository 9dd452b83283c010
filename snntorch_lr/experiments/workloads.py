"""Training steps of the benchmark, the same network by each method, and their time and peak memory."""

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

from ..convert import add_noise
from ..gradients import ESTIMATORS
from ..network import reset
from ..noise import KINDS
from ..optim import attach, closure
from ..philox import draw

FEATURES, CLASSES = 784, 10
RIVAL = "surrogate, SpikingJelly multi-step"
_SIGMA, _BETA = 0.5, 0.95
NOISES = {
    "membrane": ("membrane", "gaussian"), "escape": ("escape", "logistic"), "escape, Gaussian": ("escape", "gaussian")
}  # fmt: skip


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
    """Peak memory of the first training step above what there is before it, in 10⁶ bytes.

    Gradients, the optimizer's state and all that an estimator looks at in its first call are in it. Another network
    takes a step with a single time step before, so that libraries are there. On a CPU it is the memory of a fresh
    process, so that nothing that was freed earlier hides a part of it. On a CUDA device it is what torch's allocator
    counts.

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


def _peak(make: Callable[[], TrainingStep], device: torch.device) -> float:
    """``peak_megabytes``, in the process that does nothing else."""
    import psutil

    step = make()
    net: Any = step.net
    if hasattr(net, "num_steps"):
        net.num_steps = 1
        step()
        del step, net
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


@dataclass(frozen=True)
class Workload:
    """One training step to measure.

    Attributes:
        method: ``"surrogate"`` (backpropagation through time as snnTorch's tutorials write it),
            ``"surrogate, hoisted"`` (the current of the constant input computed once), ``"surrogate, noise"`` (that
            with noise of one copy), ``RIVAL`` (see ``_rival_step``), ``"textbook"`` (see ``_textbook_step``), or one of
            ``ESTIMATORS``.
        noise: one of ``NOISES``.
        copies: K.
        num_steps: T.
        width: neurons of each hidden layer.
        depth: number of hidden layers.
        batch: images in a step.
        hoists: the current of the constant input is computed once, in front of the loop; ``"surrogate"`` never does.
        rate: the loss reads the output neurons' spike counts, and these neurons have noise too; otherwise it is summed
            over their membrane potentials at all time steps.
    """

    method: str
    noise: str = "membrane"
    copies: int = 1
    num_steps: int = 25
    width: int = 1000
    depth: int = 1
    batch: int = 128
    hoists: bool = True
    rate: bool = False

    @property
    def name(self) -> str:
        """Name for tables, without sizes."""
        return self.method if self.method.startswith(("surrogate", "textbook")) else f"{self.method}, {self.noise}"


class Classifier(nn.Module):
    """Fully connected layers of leaky neurons that get a constant input, written as snnTorch's tutorials do."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        sizes = [FEATURES, *[workload.width] * workload.depth, CLASSES]
        self.linears = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.neurons = nn.ModuleList(snn.Leaky(beta=_BETA) for _ in self.linears)
        if not workload.rate and not workload.method.startswith("surrogate"):
            # The pathwise gradient of a readout without noise is exact only if it never resets.
            self.neurons[-1] = snn.Leaky(beta=_BETA, reset_mechanism="none")
        self.num_steps = workload.num_steps
        self.rate = workload.rate
        self.hoists = workload.hoists and workload.method != "surrogate"

    @property
    def noisy(self) -> list[str]:
        """Names of the neurons that get noise."""
        return [f"neurons.{index}" for index in range(len(self.neurons) - (not self.rate))]

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """One cross-entropy for each row of the targets."""
        reset(self)
        states = [torch.zeros((), device=x.device)] * len(self.neurons)
        current = self.linears[0](x) if self.hoists else None
        counts = total = torch.zeros((), device=x.device)
        for _ in range(self.num_steps):
            value = x
            for index, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
                given = current if index == 0 and current is not None else linear(value)
                value, states[index] = neuron(given, states[index])
            if self.rate:
                counts = counts + value
            else:
                total = total + F.cross_entropy(states[-1], y, reduction="none")
        return F.cross_entropy(counts, y, reduction="none") if self.rate else total


def make_step(workload: Workload, device: torch.device) -> TrainingStep:
    """A training step with Adam on a fixed random batch.

    Args:
        workload: what to compute.
        device: where.

    Raises:
        ValueError: if the method is unknown.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(workload.batch, FEATURES, generator=generator).to(device)
    y = torch.randint(CLASSES, (workload.batch,), generator=generator).to(device)
    torch.manual_seed(0)
    net = Classifier(workload).to(device)
    kind, distribution = NOISES[workload.noise]
    if workload.method == "surrogate, noise":
        add_noise(net, sigma=_SIGMA, only=net.noisy, kind=kind, distribution=distribution)
    if workload.method == RIVAL:
        return TrainingStep(net, _rival_step(net, x, y))
    if workload.method.startswith("surrogate"):
        return TrainingStep(net, _loop_step(net, x, y, torch.optim.Adam(net.parameters(), lr=1e-3)))
    if workload.method == "textbook":
        return TrainingStep(net, _textbook_step(workload, net, x, y))
    if workload.method not in ESTIMATORS:
        raise ValueError(f"unknown method {workload.method!r}; choose one of {', '.join(ESTIMATORS)}")
    add_noise(net, sigma=_SIGMA, only=net.noisy, kind=kind, distribution=distribution)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    options = {}
    if workload.method != "counterfactual":
        options = {"baseline": "leave-one-out" if workload.copies > 1 else "batch-mean"}
    attach(optimizer, net, workload.method, copies=workload.copies, **options)
    if workload.method == "counterfactual" and workload.copies == 1:
        return TrainingStep(net, _loop_step(net, x, y, optimizer))
    given = closure(net.losses, x, y)
    return TrainingStep(net, lambda: optimizer.step(given))


def _loop_step(net: Classifier, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = net.losses(x, y).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def _rival_step(net: Classifier, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Backpropagation by SpikingJelly, where each layer computes all time steps before the next one begins.

    The current of the constant input is computed once. Its neurons leak after a reset and not before it, as snnTorch's
    do; nothing else differs.

    Source: Fang et al. (2023), "SpikingJelly: An open-source machine learning infrastructure platform for spike-based
    intelligence".
    """
    from spikingjelly.activation_based import functional, neuron

    leaky = partial(neuron.LIFNode, 1 / (1 - _BETA), False, v_reset=None, detach_reset=True, step_mode="m")
    hidden = [leaky() for _ in net.neurons[:-1]]
    # Not infinite, for its reset multiplies by the threshold.
    output = leaky(v_threshold=1e9, store_v_seq=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> Tensor:
        value = net.linears[0](x).expand(net.num_steps, -1, -1)
        for spiking, linear in zip(hidden, net.linears[1:], strict=True):
            value = linear(spiking(value))
        output(value)
        loss = F.cross_entropy(output.v_seq.flatten(0, 1), y.repeat(net.num_steps)) * net.num_steps
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for each in (*hidden, output):
            functional.reset_net(each)
        return loss.detach()

    return step


def _textbook_step(workload: Workload, net: Classifier, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """The likelihood ratio for membrane noise as it is usually written, for one hidden layer and a membrane readout.

    Copies are rows of the batch from the input on, as in the tutorials the current is computed in each time step, all
    noise and spikes are kept as float32, and each time step has an outer product of its own.
    """
    log_sigma = nn.Parameter(torch.tensor(_SIGMA, device=x.device).log())
    optimizer = torch.optim.Adam([*net.parameters(), log_sigma], lr=1e-3)
    first, second = net.linears
    hidden: Any = net.neurons[0]
    output = net.neurons[1]
    assert isinstance(first, nn.Linear)
    rows, targets = x.repeat(workload.copies, 1), y.repeat(workload.copies)

    def sample() -> tuple[list[Tensor], list[Tensor]]:
        noise, spikes = [], []
        mem = spike = torch.zeros(len(rows), first.out_features, device=x.device)
        for _ in range(net.num_steps):
            current = first(rows)
            epsilon = torch.randn_like(current)
            mem = hidden.beta * mem + current - spike * hidden.threshold + log_sigma.exp() * epsilon
            spike = (mem > hidden.threshold).float()
            noise.append(epsilon)
            spikes.append(spike)
        return noise, spikes

    def step() -> Tensor:
        with torch.no_grad():
            noise, spikes = sample()
        mem = torch.zeros((), device=x.device)
        losses = torch.zeros((), device=x.device)
        for spike in spikes:
            _, mem = output(second(spike), mem)
            losses = losses + F.cross_entropy(mem, targets, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        table = losses.detach().view(workload.copies, -1)
        # The loss minus the mean of the other copies of the sample; of one copy, minus that of the batch.
        others = workload.copies - 1
        baseline = (table.sum(0) - table) / others if others else table.mean()
        advantages = (table - baseline).reshape(-1, 1) / table.numel()
        with torch.no_grad():
            scores = [advantages * epsilon / log_sigma.exp() for epsilon in noise]
            first.weight.grad = sum((score.T @ rows for score in scores), torch.zeros_like(first.weight))
            first.bias.grad = sum((score.sum(0) for score in scores), torch.zeros_like(first.bias))
            scales = ((advantages * (epsilon.square() - 1)).sum() for epsilon in noise)
            log_sigma.grad = sum(scales, torch.zeros_like(log_sigma))
        optimizer.step()
        return losses.mean().detach()

    return step


KERNEL_COLUMNS = ("from a counter", "uniform, by torch")
"""What ``kernel_nanoseconds`` measures."""


def kernel_nanoseconds(batch: int, width: int, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Nanoseconds for each number of the noise of one call, beside uniform numbers by torch; on one thread of a CPU.

    Args:
        batch: number of samples.
        width: number of neurons.
        repeats: of each; the median counts.
        device: where to draw.

    Returns:
        Numbers by the name of the noise, and ``KERNEL_COLUMNS``.
    """
    out = torch.empty(batch, width, device=device)

    def nanoseconds(call: Callable[[], object]) -> float:
        taken = [_milliseconds(call, device) for _ in range(repeats + 1)][1:]
        return 1e6 * statistics.median(taken) / out.numel()

    def drawn(kind: str, distribution: str) -> Callable[[], object]:
        noise = KINDS[kind](distribution=distribution)
        return lambda: draw(noise, out.shape, out.dtype, device, 5)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        uniform = nanoseconds(out.uniform_)
        return {
            f"{kind}, {distribution}": dict(
                zip(KERNEL_COLUMNS, (nanoseconds(drawn(kind, distribution)), uniform), strict=True)
            )
            for kind, made in KINDS.items()
            for distribution in made.offered
        }
    finally:
        torch.set_num_threads(before)


# Nothing is given by a process that Ctrl-C ends while it starts this one.
if __name__ == "__main__" and (_given := sys.stdin.buffer.read()):
    _make, _device, _threads = pickle.loads(_given)
    torch.set_num_threads(_threads)
    print(_peak(_make, torch.device(_device)))
