"""Quality and cost of a gradient on a network: cosine, signal-to-noise, bias, time, memory; as table and picture."""

from __future__ import annotations

import ctypes
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._messages import aligned, install, positive_integer, warn
from .gradients import ESTIMATORS, Counterfactual, Estimator, LossFn, Vanilla
from .gradients.base import surrogate
from .network import left_as_found
from .validate import FirstCall, noisy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SURROGATE = "surrogate, 1 draw"
_HEADER = ("parameter", "estimator", "cosine", "at most", "SNR", "bias", "floor")
_NOTE = """\
cosine     of one call's gradient to the mean of the reference calls, averaged over the calls
at most    what a gradient without noise would reach; where it is "-" the reference is noise: take more calls
SNR        |E g|^2 / tr Cov(g) of one call; around or below zero where it is not resolved
bias       |E g - E g_reference| / |E g_reference|, noise subtracted; less than the floor is not resolved
-          not resolved by that many calls, or not available
The inputs are the same in all calls: noise of the batch is not part of these figures."""


@dataclass(frozen=True)
class GradientQuality:
    """Gradient of one parameter tensor by one estimator; None where a figure is not resolved or not available.

    What each figure is stands below the table of a report. ``snr`` has an unbiased numerator, and may be below zero.
    ``bias_floor`` is the Monte-Carlo part of the bias, which is subtracted from it; how well ‖E g_ref‖ is known, which
    scales both, is not part of it.
    """

    cosine: float | None
    snr: float | None
    bias: float | None
    bias_floor: float | None


@dataclass(frozen=True)
class Cost:
    """Median milliseconds of a call, and its peak memory above that before it in 10⁶ bytes, None if not measured."""

    milliseconds: float
    megabytes: float | None


@dataclass(frozen=True)
class GradientReport:
    """Result of ``gradient_report``; prints as a table. Settings are those of the call.

    Attributes:
        quality: by name of the parameter, then of the estimator; also of one draw of the surrogate gradient.
        cost: by name of the estimator, alike.
        reference_cosine: by name of the parameter, the cosine that the mean of the reference calls has to its own
            expectation, which no estimate can exceed; None where it is not resolved.
        control: λ at the end, by name of each ``Counterfactual``, then of the neuron.
        zero: by name of each parameter whose gradient was exactly zero in all calls of the reference, the likely cause.

    Examples:
        >>> report = slr.gradient_report(net, loss_fn, images, labels, copies=2, repeats=2, reference=2)
        >>> print(report.table())
        2 copies, 2 calls of each estimator, 2 calls of the reference (vanilla), seed 0, cpu
        ...
    """

    quality: dict[str, dict[str, GradientQuality]]
    cost: dict[str, Cost]
    reference_cosine: dict[str, float | None]
    copies: int
    repeats: int
    reference: int
    seed: int
    device: str
    zero: dict[str, str] = field(default_factory=dict)
    control: dict[str, dict[str, float]] = field(default_factory=dict)

    def tables(self) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
        """Headers and lines of text: the quality of the gradients, and what they cost."""
        rows: list[Sequence[str]] = [
            (parameter, estimator, _text(quality.cosine), _text(self.reference_cosine[parameter]),
             _text(quality.snr, ".3g"), _text(quality.bias, ".2g"), _text(quality.bias_floor, ".2g"))
            for parameter, by_estimator in self.quality.items()
            for estimator, quality in by_estimator.items()
        ]  # fmt: skip
        costs: list[Sequence[str]] = [
            (name, _text(cost.milliseconds, ".3g"), _text(cost.megabytes, ".3g")) for name, cost in self.cost.items()
        ]
        return [(_HEADER, rows), (("estimator", "ms/call", "peak MB"), costs)]

    def notes(self) -> list[str]:
        """Words beside the tables: settings, gradients that are exactly zero and why, and a key."""
        settings = (
            f"{self.copies} copies, {self.repeats} calls of each estimator, {self.reference} calls of the reference "
            f"(vanilla), seed {self.seed}, {self.device}"
        )
        zero = [f"{name}: the gradient is exactly zero, {why}" for name, why in self.zero.items()]
        fitted = [
            f"λ of {name}: {', '.join(f'{neuron} {value:.2f}' for neuron, value in values.items())}"
            for name, values in self.control.items()
        ]
        return [settings, *("\n".join(lines) for lines in (zero, fitted) if lines), _NOTE]

    def table(self) -> str:
        """The figures as aligned plain text, with a key."""
        settings, *notes = self.notes()
        texts = [aligned(*table, left=left) for table, left in zip(self.tables(), (2, 1), strict=True)]
        return "\n\n".join((settings, *texts, *notes))

    __str__ = table

    def to_json(self) -> dict[str, Any]:
        """All figures and settings as plain dicts and numbers, ready for ``json.dump``."""
        return asdict(self)

    def plot(self) -> Figure:
        """Figure with bars of cosine, signal-to-noise and bias by parameter; a tick is the noise floor of the bias."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"matplotlib is missing: {install('experiments')}") from error
        parameters, estimators = list(self.quality), list(next(iter(self.quality.values())))
        figure = Figure(figsize=(11, 1.5 + 0.3 * len(parameters) * (1 + len(estimators) / 2)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        height = 0.8 / len(estimators)
        for index, estimator in enumerate(estimators):
            places = [place + (index + 0.5) * height - 0.4 for place in range(len(parameters))]
            shown = [self.quality[parameter][estimator] for parameter in parameters]
            # A logarithmic axis has no place for what is not resolved.
            bars = [(q.cosine, max(q.snr or 0, 0) or None, q.bias, q.bias_floor) for q in shown]
            *columns, floors = zip(*([math.nan if v is None else v for v in values] for values in bars), strict=True)
            for axes, values in zip(panels, columns, strict=True):
                axes.barh(places, values, height, label=estimator)
            panels[2].scatter(floors, places, marker="|", color="black", label="" if index else "noise floor", zorder=3)
        panels[0].set_yticks(range(len(parameters)), parameters)
        panels[0].invert_yaxis()
        panels[0].set(xlabel="cosine to the reference")
        panels[1].set(xlabel="signal-to-noise of a call", xscale="log")
        panels[2].set(xlabel="relative bias")
        figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=len(estimators) + 1)
        return figure


def _text(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def gradient_report(
    net: nn.Module,
    loss_fn: LossFn,
    inputs: Any,
    targets: Any,
    estimators: Sequence[str | Estimator] | Mapping[str, str | Estimator] = tuple(ESTIMATORS),
    copies: int = 16,
    repeats: int = 16,
    reference: int = 128,
    seed: int = 0,
) -> GradientReport:
    """Measures gradients of a network on one batch: how far to trust an estimator, and what it costs.

    ``reference`` calls of ``Vanilla``, which has no bias, give the reference gradient. Each estimator is called once to
    warm up, once to measure memory, and ``repeats`` times, with other noise than the reference. So is the surrogate
    gradient of one noise draw, ``reference`` times. The network is left as it was found: gradients, modes, buffers,
    states, and random numbers.

    Memory on a CUDA device is what torch's allocator counts. On a CPU it is that of the process, sampled each
    millisecond by a thread, and coarse; it needs psutil.

    Args:
        net: the network; its noise must be on, as in training mode.
        loss_fn: forward pass and loss, called as ``loss_fn(inputs, targets)``; returns one loss per sample.
        inputs: one batch, passed on as it is.
        targets: its targets.
        estimators: names or estimators of this network, or a dict of them under names of your own.
        copies: K of the reference and of the estimators given by name, at least 2; ``"counterfactual"`` has 1.
        repeats: calls of each estimator, at least 2.
        reference: calls of the reference, at least 2. Its noise bounds every cosine and every bias: take many.
        seed: of the noise.

    Raises:
        ValueError: if an argument is wrong, or the network or the losses would make a gradient wrong.

    Examples:
        >>> report = slr.gradient_report(net, loss_fn, images, labels, copies=2, repeats=2, reference=2)
        >>> sorted(report.cost)
        ['approximate', 'counterfactual', 'surrogate, 1 draw', 'vanilla']
    """
    for name, value in (("copies", copies), ("repeats", repeats), ("reference", reference)):
        if positive_integer(name, value) < 2:
            raise ValueError(f"{name} must be at least 2, got {value}")
    chosen = _named(estimators, net, copies)
    calls = _Calls(net, loss_fn, inputs, targets, seed)
    measured, control = {}, {}
    with left_as_found(net, gradients=True, modes=True, buffers=True, states=True, random=True), torch.enable_grad():
        with FirstCall(net, noisy(net)) as first:
            expected = calls.measure(Vanilla(net, copies).backward, reference).moments
        zero = {name: calls.why_zero(name, first) for name, moments in expected.items() if not moments.mean.any()}
        for name, estimator in chosen.items():
            # Each fits a λ of its own.
            with left_as_found(net, buffers=True, states=True):
                measured[name] = calls.measure(estimator.backward, repeats, expected)
                if isinstance(estimator, Counterfactual):
                    control[name] = _control(net, estimator)
        try:
            measured[SURROGATE] = calls.measure(calls.backpropagate, reference, expected)
        except RuntimeError as error:
            # Not enough memory for backpropagation through time is one of the reasons to be here.
            warn(f"there is no surrogate gradient to compare with: {error}")
    return GradientReport(
        quality={
            parameter: {name: _quality(found, parameter, expected[parameter]) for name, found in measured.items()}
            for parameter in calls.parameters
        },
        cost={name: Cost(statistics.median(found.times), found.megabytes) for name, found in measured.items()},
        reference_cosine={name: moments.reliability for name, moments in expected.items()},
        copies=int(copies), repeats=int(repeats), reference=int(reference), seed=seed, device=str(calls.device),
        zero=zero, control=control,
    )  # fmt: skip


class _Moments:
    """Running mean and total variance of a tensor (Welford's algorithm)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._scatter = 0.0

    def add(self, value: Tensor) -> None:
        self.count += 1
        before = value - self.mean
        self.mean = self.mean + before / self.count
        self._scatter += _dot(before, value - self.mean)

    @property
    def variance(self) -> float:
        """Trace of the covariance of one value, unbiased."""
        return self._scatter / (self.count - 1)

    @property
    def error(self) -> float:
        """Expected squared distance of the mean to its expectation."""
        return self.variance / self.count

    @property
    def reliability(self) -> float | None:
        """Cosine that the mean has to its expectation; None where it is not resolved."""
        square = _dot(self.mean, self.mean)
        return math.sqrt((square - self.error) / square) if _resolved(square, self.error) else None


class _Measured:
    """What the calls of one estimator gave: moments and cosines to the reference by parameter, milliseconds, memory."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.moments = {name: _Moments() for name in parameters}
        self.cosines: dict[str, list[float]] = {name: [] for name in parameters}
        self.times: list[float] = []
        self.megabytes: float | None = None


class _Calls:
    """Calls of estimators on one batch, each with other noise."""

    def __init__(self, net: nn.Module, loss_fn: LossFn, inputs: Any, targets: Any, seed: int) -> None:
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"{type(net).__name__} has no parameter that requires a gradient")
        # One on CUDA, if there is any.
        self.device = min((p.device for p in self.parameters.values()), key=lambda device: device.type != "cuda")
        self._net, self._data, self._seeds = net, (loss_fn, inputs, targets), torch.Generator().manual_seed(seed)

    def why_zero(self, name: str, first: FirstCall) -> str:
        """Likely cause of a gradient that is exactly zero in all calls."""
        if self.parameters[name].grad is None:
            return "the loss does not depend on it"
        return ", ".join(first.dead().values()) or "all copies had the same loss"

    def measure(
        self, backward: Callable[..., Any], count: int, expected: Mapping[str, _Moments] | None = None
    ) -> _Measured:
        """Calls ``backward(loss_fn, inputs, targets)`` with independent noise, so many times.

        Gradients are compared with ``expected``; two more calls then warm up and measure memory.
        """
        measured = _Measured(self.parameters)
        if expected is not None:
            self._call(backward)
            measured.megabytes = self._peak_megabytes(backward)
        for _ in range(count):
            measured.times.append(self._call(backward))
            for name, parameter in self.parameters.items():
                gradient = _gradient(parameter)
                measured.moments[name].add(gradient)
                mean = gradient if expected is None else expected[name].mean
                norms = math.sqrt(_dot(gradient, gradient) * _dot(mean, mean))
                if norms > 0:
                    measured.cosines[name].append(_dot(gradient, mean) / norms)
        return measured

    def backpropagate(self, loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        """The surrogate gradient of one noise draw."""
        with surrogate(self._net):
            loss_fn(inputs, targets).mean().backward()  # type: ignore[no-untyped-call]

    def _call(self, backward: Callable[..., Any]) -> float:
        """Leaves gradients in ``.grad``, and returns the milliseconds that they took."""
        self._forget()
        torch.manual_seed(int(torch.randint(2**62, (), generator=self._seeds)))
        started = time.perf_counter()
        backward(*self._data)
        self._synchronize()
        return 1000 * (time.perf_counter() - started)

    def _peak_megabytes(self, backward: Callable[..., Any]) -> float | None:
        """Peak memory of one call above that before it."""
        self._forget()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._call(backward)
            return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6
        return _peak_resident(lambda: self._call(backward))

    def _forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _quality(measured: _Measured, parameter: str, expected: _Moments) -> GradientQuality:
    own, cosines = measured.moments[parameter], measured.cosines[parameter]
    error, scale = own.error + expected.error, _dot(expected.mean, expected.mean)
    bias = floor = None
    if _resolved(scale, expected.error):
        scale -= expected.error
        difference = own.mean - expected.mean
        bias = math.sqrt(max(0.0, _dot(difference, difference) - error) / scale)
        floor = math.sqrt(error / scale)
    return GradientQuality(
        cosine=statistics.fmean(cosines) if cosines else None,
        snr=(_dot(own.mean, own.mean) - own.error) / own.variance if own.variance > 0 else None,
        bias=bias,
        bias_floor=floor,
    )


def _resolved(square: float, error: float) -> bool:
    """The norm of a mean is more than two standard errors."""
    return square > 4 * error


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum())


def _gradient(parameter: nn.Parameter) -> Tensor:
    # Sums of squares of half-precision gradients would overflow.
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    gradient = parameter.grad
    return torch.zeros_like(parameter, dtype=dtype) if gradient is None else gradient.detach().to(dtype)


def _control(net: nn.Module, estimator: Counterfactual) -> dict[str, float]:
    """λ that an estimator would use next, by neuron."""
    fixed = estimator.sampler.control
    return {
        name: float(neuron.control.value(neuron.noise.control.detach())) if fixed is None else fixed
        for name, neuron in noisy(net).items()
        if neuron.noise is not None
    }


def _named(
    estimators: Sequence[str | Estimator] | Mapping[str, str | Estimator], net: nn.Module, copies: int
) -> dict[str, Estimator]:
    """The estimators to measure, by name."""
    if not isinstance(estimators, Mapping):
        listed = [estimators] if isinstance(estimators, (str, Estimator)) else estimators
        names = [item if isinstance(item, str) else type(item).__name__.lower() for item in listed]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two estimators are called {twice.pop()!r}: give a dict with names of your own")
        estimators = dict(zip(names, listed, strict=True))
    if not estimators:
        raise ValueError("there is no estimator to measure")
    named: dict[str, Estimator] = {}
    for name, item in estimators.items():
        if isinstance(item, str):
            if item not in ESTIMATORS:
                raise ValueError(f"unknown estimator {item!r}; choose one of {', '.join(ESTIMATORS)}")
            item = ESTIMATORS[item](net, copies=1 if item == "counterfactual" else copies)
        elif item.net is not net:
            raise ValueError(f"the estimator {name!r} was made for another network")
        named[name] = item
    return named


def _peak_resident(call: Callable[[], object]) -> float | None:
    """Peak resident memory of the process during a call, in megabytes above its start; None without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    process, done = psutil.Process(), threading.Event()
    # Freed memory that glibc keeps is resident, and a call that uses it again would seem to need none.
    if psutil.LINUX and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    sizes = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(0.001):
            sizes.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        call()
        sizes.append(process.memory_info().rss)
    finally:
        done.set()
        thread.join()
    return float(max(sizes) - sizes[0]) / 1e6
