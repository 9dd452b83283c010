"""All that is wrong with a network, its loss or its optimizer, found before training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._messages import places, warn
from .gradients import ESTIMATORS, Approximate, Counterfactual, Estimator, LossFn
from .gradients.approximate import mixing_neurons
from .gradients.counterfactual import dependent_neurons
from .gradients.vanilla import RowLosses
from .network import left_as_found
from .validate import (
    check_network,
    check_optimizer,
    check_parameters,
    level_errors,
    network_errors,
    warn_about_batch_norm,
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

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


class _Collector:
    """Collects errors and warnings of checks that run one after the other, each once."""

    def __init__(self) -> None:
        self.found: dict[Finding, None] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Context whose error and warnings become findings."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:
                known = isinstance(error, (ValueError, TypeError))
                message = str(error) if known else f"{type(error).__name__} in loss_fn: {error}"
                self.add(True, "\n  ".join([message, *getattr(error, "__notes__", ())]))
        for warning in said:
            if issubclass(warning.category, UserWarning):
                self.add(False, str(warning.message))

    def add(self, is_error: bool, message: str) -> None:
        """Adds a finding."""
        self.found[Finding(is_error, message)] = None

    @property
    def has_errors(self) -> bool:
        return any(finding.is_error for finding in self.found)


def check(
    net: nn.Module,
    loss_fn: LossFn | None = None,
    inputs: Any = None,
    targets: Any = None,
    estimator: str | Callable[..., Estimator] = "counterfactual",
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
        estimator: name of an estimator, or its class.
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
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
        estimator = ESTIMATORS[estimator]
    collector = _Collector()
    for message in (*network_errors(net), *level_errors(net)):
        collector.add(True, message)
    with collector.collecting():
        check_parameters(net)
    # The constructors refuse the first one.
    refused = {Counterfactual: dependent_neurons, Approximate: mixing_neurons}
    for message in refused[estimator](net) if estimator in refused else ():
        collector.add(True, message)
    runs = not collector.has_errors
    if optimizer is not None:
        with collector.collecting():
            check_optimizer(net, optimizer)
    made: Estimator | None = None
    with collector.collecting():
        made = estimator(net, **options)
        if not isinstance(made, Counterfactual):
            warn_about_batch_norm(net)
    if loss_fn is not None and made is not None and runs:
        _run(made, loss_fn, inputs, targets, collector)
    return Findings(tuple(collector.found))


def _run(estimator: Estimator, loss_fn: LossFn, inputs: Any, targets: Any, collector: _Collector) -> None:
    """A first ``backward``, of which one part hides nothing of the others."""
    net = estimator.net
    with left_as_found(net, gradients=True, modes=True, buffers=True, states=True, random=True), torch.enable_grad():
        neurons = check_network(net)
        for neuron in neurons.values():
            # Of a computed state it is said once; here again.
            neuron.warned = False
        if isinstance(estimator, RowLosses):
            with collector.collecting():
                estimator.check_rows(neurons, loss_fn, inputs, targets)
            # Found before the method of the class, which would refuse the same once more.
            vars(estimator)["check_rows"] = lambda *_: None
        before = {name: neuron.control.steps for name, neuron in neurons.items()}
        with collector.collecting():
            estimator.backward(loss_fn, inputs, targets)
            if isinstance(estimator, Counterfactual):
                cut = {name: neuron for name, neuron in neurons.items() if neuron.control.steps == before[name]}
                _refuse_if_not_reached(cut, everything=len(cut) == len(neurons))


def _refuse_if_not_reached(cut: Mapping[str, nn.Module], everything: bool) -> None:
    """Says which neurons a backward pass did not go through.

    Raises:
        ValueError: if there is none that it went through.
    """
    if not cut:
        return
    message = (
        f"loss.backward() did not reach {places(cut)}: the weights before it learn nothing by it. Look for net.eval(), "
        "noise_off(net), no_grad() or detach() in loss_fn, or for a neuron that is not called"
    )
    if everything:
        raise ValueError(message)
    warn(message)
