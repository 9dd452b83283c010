"""All that is wrong with a network, its loss or its optimizer, found before training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..left_as_found import left_as_found
from ..validate import check_optimizer, check_parameters, level_errors, network_errors, warn_about_batch_norm
from . import ESTIMATORS
from .base import Call, Estimator, LossFn
from .vanilla import look


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        is_error: the first ``backward`` would raise it; otherwise it would warn.
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
        """Findings that the first ``backward`` would raise."""
        return tuple(each for each in self.found if each.is_error)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that it would warn of."""
        return tuple(each for each in self.found if not each.is_error)

    def __str__(self) -> str:
        return "\n".join(f"- {each}" for each in self.found) or "nothing found"


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
        for each in said:
            if issubclass(each.category, UserWarning):
                self.add(False, str(each.message))

    def add(self, is_error: bool, message: str) -> None:
        """Adds a finding."""
        self.found[Finding(is_error, message)] = None

    @property
    def has_errors(self) -> bool:
        return any(each.is_error for each in self.found)


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
        loss_fn: as for ``closure``: it is run on the next two. Without it only the network is looked at.
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
    runs = not collector.has_errors
    if optimizer is not None:
        with collector.collecting():
            check_optimizer(net, optimizer)
    made: Estimator | None = None
    with collector.collecting():
        made = estimator(net, **options)
        if not made.takes_batch_norm:
            warn_about_batch_norm(net)
    if loss_fn is not None and made is not None and runs:
        _run(made, loss_fn, inputs, targets, collector)
    return Findings(tuple(collector.found))


def _run(estimator: Estimator, loss_fn: LossFn, inputs: Any, targets: Any, collector: _Collector) -> None:
    """The parts of a first ``backward``, each by itself: what one of them refuses hides nothing of the others."""
    net = estimator.net
    with left_as_found(net, gradients=True, modes=True, buffers=True, states=True, random=True), torch.enable_grad():
        call = Call.of(net, loss_fn, inputs, targets)
        with collector.collecting():
            estimator.check_rows(call)
        with collector.collecting():
            look(estimator, call)
        with collector.collecting():
            estimator.checked_estimate(call)
