"""What is wrong with a network, a loss or an optimizer before training, and how good a gradient is, and how costly."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._messages import aligned, places, positive_integer, warn
from .gradients import ESTIMATORS, Approximate, Counterfactual, Estimator, LossFn, Vanilla
from .gradients.approximate import mixing_neurons
from .gradients.base import surrogate
from .gradients.counterfactual import dependent_neurons
from .network import left_as_found
from .optim import attached, estimator_called
from .validate import (
    FirstCall,
    check_network,
    check_optimizer,
    check_parameters,
    level_errors,
    network_errors,
    noisy,
    warn_about_batch_norm,
)

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
class Finding:
    """One error or warning of ``check``.

    Attributes:
        is_error: training would raise it; otherwise it would warn.
        message: the cause, the module, and the remedy.

    Examples:
        >>> slr.check(slr.remove_noise(net)).errors[0].is_error
        True
    """

    is_error: bool
    message: str

    def __str__(self) -> str:
        return f"{'error' if self.is_error else 'warning'}: {self.message}"


@dataclass(frozen=True)
class Findings:
    """Result of ``check``: true if there is no error; ``print`` lists everything.

    Examples:
        >>> bool(slr.check(slr.remove_noise(net)))
        False
    """

    found: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that training would raise."""
        return tuple(finding for finding in self.found if finding.is_error)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that it would warn of."""
        return tuple(finding for finding in self.found if not finding.is_error)

    def __str__(self) -> str:
        return "\n".join(f"- {finding}" for finding in self.found) or "nothing found"


def check(
    net: nn.Module,
    loss_fn: LossFn | None = None,
    inputs: Any = None,
    targets: Any = None,
    estimator: str | Callable[..., Estimator] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Findings:
    """Finds all errors and warnings of a network, loss and optimizer at once, instead of the first one in training.

    Weights, gradients, states, running statistics and random numbers of the network stay as they are. Gradients of
    other tensors that ``loss_fn`` uses, such as inputs that require one, are added to as by ``backward``.

    Args:
        net: a network with noisy neurons.
        loss_fn: forward pass and loss, run on the next two. ``"counterfactual"`` takes any loss that has a derivative,
            of any shape; the others need one loss per sample, as ``closure`` does. Without it only the network is
            looked at.
        inputs: of ``loss_fn``; a small batch is enough.
        targets: of ``loss_fn``.
        estimator: name of an estimator, or its class; by default that which is attached to the optimizer, with as many
            copies, or else ``"counterfactual"``.
        optimizer: the optimizer that is to train the network.
        **options: of the estimator.

    Returns:
        The findings; ``bool`` of them is False if there is an error.

    Raises:
        ValueError: if the name of the estimator is unknown.

    Examples:
        >>> findings = slr.check(net, loss_fn, images, labels)
        >>> print(findings)
        nothing found
    """
    if estimator is None and optimizer is not None and (own := attached(optimizer)) is not None:
        estimator, options = type(own), {"copies": own.copies} | options
    estimator = estimator or "counterfactual"
    make = estimator_called(estimator) if isinstance(estimator, str) else estimator
    findings = dict.fromkeys(Finding(True, message) for message in (*network_errors(net), *level_errors(net)))
    with _collecting(findings):
        check_parameters(net)
    # The constructors refuse the first one.
    refused: dict[Any, Callable[[nn.Module], Iterator[str]]] = {
        Counterfactual: dependent_neurons,
        Approximate: mixing_neurons,
    }
    if make in refused:
        findings |= dict.fromkeys(Finding(True, message) for message in refused[make](net))
    runs = loss_fn is not None and not findings
    if optimizer is not None:
        with _collecting(findings):
            check_optimizer(net, optimizer)
    with _collecting(findings):
        made = make(net, **options)
        if not isinstance(made, Counterfactual):
            warn_about_batch_norm(net)
        if runs:
            _run(made, loss_fn, inputs, targets)
    return Findings(tuple(findings))


@contextmanager
def _collecting(findings: dict[Finding, None]) -> Iterator[None]:
    """Context whose error and warnings become findings, the same one once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            known = isinstance(error, (ValueError, TypeError))
            message = str(error) if known else f"{type(error).__name__} in loss_fn: {error}"
            findings[Finding(True, "\n  ".join([message, *getattr(error, "__notes__", ())]))] = None
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            findings[Finding(False, str(warning.message))] = None


def _run(estimator: Estimator, loss_fn: Any, inputs: Any, targets: Any) -> None:
    """A first ``backward``, which leaves everything as it was.

    Raises:
        ValueError: if it went through no noisy neuron.
    """
    net = estimator.net
    with left_as_found(net, gradients=True, modes=True, buffers=True, states=True, random=True), torch.enable_grad():
        neurons = check_network(net)
        for neuron in neurons.values():
            # A neuron warns of a computed state once; here again.
            neuron.warned = False
        before = {name: neuron.control.steps for name, neuron in neurons.items()}
        estimator.backward(loss_fn, inputs, targets)
        cut = {name: neuron for name, neuron in neurons.items() if neuron.control.steps == before[name]}
    if not cut or not isinstance(estimator, Counterfactual):
        return
    message = (
        f"loss.backward() did not reach {places(cut)}: the weights before it learn nothing by it. Look for net.eval(), "
        "noise_off(net), no_grad() or detach() in loss_fn, or for a neuron that is not called"
    )
    if len(cut) == len(neurons):
        raise ValueError(message)
    warn(message)


@dataclass(frozen=True)
class GradientQuality:
    """Quality of the gradient of one parameter tensor by one estimator; None where a figure is not resolved.

    The key below the table of a report defines the figures. ``snr`` has an unbiased numerator, and may be below zero.
    ``bias_floor`` is the Monte-Carlo part of the bias, and is subtracted from it; the error of ‖E g_ref‖, which scales
    both, is not part of it.
    """

    cosine: float | None
    snr: float | None
    bias: float | None
    bias_floor: float | None


@dataclass(frozen=True)
class Cost:
    """Median milliseconds of a call, and on CUDA its peak memory above that before it, in 10⁶ bytes."""

    milliseconds: float
    megabytes: float | None


@dataclass(frozen=True)
class GradientReport:
    """Result of ``gradient_report``, which prints as a table; its settings are those of the call.

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

    def table(self) -> str:
        """The figures as aligned plain text, with a key."""
        settings = (
            f"{self.copies} copies, {self.repeats} calls of each estimator, {self.reference} calls of the reference "
            f"(vanilla), seed {self.seed}, {self.device}"
        )
        rows = [
            (parameter, estimator, _text(quality.cosine), _text(self.reference_cosine[parameter]),
             _text(quality.snr, ".3g"), _text(quality.bias, ".2g"), _text(quality.bias_floor, ".2g"))
            for parameter, by_estimator in self.quality.items()
            for estimator, quality in by_estimator.items()
        ]  # fmt: skip
        costs = [
            (name, _text(cost.milliseconds, ".3g"), _text(cost.megabytes, ".3g")) for name, cost in self.cost.items()
        ]
        zero = [f"{name}: the gradient is exactly zero, {why}" for name, why in self.zero.items()]
        fitted = [
            f"λ of {name}: {', '.join(f'{neuron} {value:.2f}' for neuron, value in values.items())}"
            for name, values in self.control.items()
        ]
        parts = settings, aligned(_HEADER, rows, left=2), aligned(("estimator", "ms/call", "peak MB"), costs)
        return "\n\n".join((*parts, *("\n".join(lines) for lines in (zero, fitted) if lines), _NOTE))

    __str__ = table

    def to_json(self) -> dict[str, Any]:
        """All figures and settings as plain dicts and numbers, ready for ``json.dump``."""
        return asdict(self)


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
    """Measures the quality and the cost of gradients on one batch: how far to trust an estimator.

    ``reference`` calls of ``Vanilla``, which has no bias, give the reference gradient. Each estimator is called twice
    to warm up, and ``repeats`` times with other noise than the reference. So is the surrogate gradient of one noise
    draw, ``reference`` times. The network is left as it was found: gradients, modes, buffers, states, random numbers.

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
    moments, cost, control = {}, {}, {}
    with left_as_found(net, gradients=True, modes=True, buffers=True, states=True, random=True), torch.enable_grad():
        with FirstCall(net, noisy(net)) as first:
            expected, _ = calls.measure(Vanilla(net, copies).backward, reference)
        zero = {name: calls.why_zero(name, first) for name, moment in expected.items() if not moment.mean.any()}
        for name, estimator in chosen.items():
            # Each fits a λ of its own.
            with left_as_found(net, buffers=True, states=True):
                moments[name], cost[name] = calls.measure(estimator.backward, repeats, expected)
                if isinstance(estimator, Counterfactual):
                    control[name] = _control(net, estimator)
        try:
            moments[SURROGATE], cost[SURROGATE] = calls.measure(calls.backpropagate, reference, expected)
        except RuntimeError as error:
            # Not enough memory for backpropagation through time is one of the reasons to be here.
            warn(f"there is no surrogate gradient to compare with: {error}")
    return GradientReport(
        quality={
            parameter: {name: by_parameter[parameter].quality(reference) for name, by_parameter in moments.items()}
            for parameter, reference in expected.items()
        },
        cost=cost, reference_cosine={name: moment.reliability for name, moment in expected.items()},
        copies=int(copies), repeats=int(repeats), reference=int(reference), seed=seed, device=str(calls.device),
        zero=zero, control=control,
    )  # fmt: skip


class _Moments:
    """Running mean and total variance of a gradient (Welford's algorithm), and its cosines to a reference."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.cosines: list[float] = []
        self._scatter = 0.0

    def add(self, gradient: Tensor, reference: _Moments | None) -> None:
        self.count += 1
        before = gradient - self.mean
        self.mean = self.mean + before / self.count
        self._scatter += _dot(before, gradient - self.mean)
        if reference is not None:
            norms = math.sqrt(_dot(gradient, gradient) * _dot(reference.mean, reference.mean))
            if norms > 0:
                self.cosines.append(_dot(gradient, reference.mean) / norms)

    @property
    def variance(self) -> float:
        """Trace of the covariance of one gradient, unbiased."""
        return self._scatter / (self.count - 1)

    @property
    def error(self) -> float:
        """Expected squared distance of the mean to its expectation."""
        return self.variance / self.count

    @property
    def square(self) -> float:
        """Squared norm of the mean."""
        return _dot(self.mean, self.mean)

    @property
    def is_resolved(self) -> bool:
        """The norm of the mean is more than two standard errors."""
        return self.square > 4 * self.error

    @property
    def reliability(self) -> float | None:
        """Cosine of the mean to its expectation; None where it is not resolved."""
        return math.sqrt((self.square - self.error) / self.square) if self.is_resolved else None

    def quality(self, reference: _Moments) -> GradientQuality:
        """The figures of this gradient beside those of the reference."""
        bias = floor = None
        if reference.is_resolved:
            error, scale = self.error + reference.error, reference.square - reference.error
            difference = self.mean - reference.mean
            bias = math.sqrt(max(0.0, _dot(difference, difference) - error) / scale)
            floor = math.sqrt(error / scale)
        return GradientQuality(
            cosine=statistics.fmean(self.cosines) if self.cosines else None,
            snr=(self.square - self.error) / self.variance if self.variance > 0 else None,
            bias=bias,
            bias_floor=floor,
        )


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum())


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
    ) -> tuple[dict[str, _Moments], Cost]:
        """Moments of the gradients of ``count`` calls, by parameter, and the cost of a call.

        With ``expected``, to which they are compared, two more calls warm up, the second of which measures memory.
        """
        megabytes = None
        for _ in range(0 if expected is None else 2):
            _, megabytes = self._call(backward)
        moments, times = {name: _Moments() for name in self.parameters}, []
        for _ in range(count):
            milliseconds, _ = self._call(backward)
            times.append(milliseconds)
            for name, parameter in self.parameters.items():
                moments[name].add(_gradient(parameter), None if expected is None else expected[name])
        return moments, Cost(statistics.median(times), megabytes)

    def backpropagate(self, loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        """The surrogate gradient of one noise draw."""
        with surrogate(self._net):
            loss_fn(inputs, targets).mean().backward()  # type: ignore[no-untyped-call]

    def _call(self, backward: Callable[..., Any]) -> tuple[float, float | None]:
        """Leaves gradients in ``.grad``; returns milliseconds, and on CUDA the peak memory in 10⁶ bytes."""
        on_cuda, megabytes = self.device.type == "cuda", None
        for parameter in self.parameters.values():
            parameter.grad = None
        torch.manual_seed(int(torch.randint(2**62, (), generator=self._seeds)))
        if on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        started = time.perf_counter()
        backward(*self._data)
        if on_cuda:
            torch.cuda.synchronize(self.device)
            megabytes = (torch.cuda.max_memory_allocated(self.device) - before) / 1e6
        return 1000 * (time.perf_counter() - started), megabytes


def _gradient(parameter: nn.Parameter) -> Tensor:
    # Sums of squares of half-precision gradients would overflow.
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    gradient = parameter.grad
    return torch.zeros_like(parameter, dtype=dtype) if gradient is None else gradient.detach().to(dtype)


def _control(net: nn.Module, estimator: Counterfactual) -> dict[str, float]:
    """λ of the next call of an estimator, by neuron."""
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
        names = [choice if isinstance(choice, str) else type(choice).__name__.lower() for choice in listed]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two estimators are called {twice.pop()!r}: give a dict with names of your own")
        estimators = dict(zip(names, listed, strict=True))
    if not estimators:
        raise ValueError("there is no estimator to measure")
    named: dict[str, Estimator] = {}
    for name, choice in estimators.items():
        if isinstance(choice, str):
            choice = estimator_called(choice)(net, copies=1 if choice == "counterfactual" else copies)
        elif choice.net is not net:
            raise ValueError(f"the estimator {name!r} was made for another network")
        named[name] = choice
    return named
