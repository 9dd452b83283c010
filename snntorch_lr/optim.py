"""The optimizer hook: ``optimizer.step(closure)`` takes its gradient from a likelihood-ratio estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .estimators import ESTIMATORS
from .estimators.base import Estimator, LossFn
from .graph import leaves
from .validate import check_optimizer


class Closure:
    """A forward pass and its data, for ``optimizer.step``. Made by ``closure``.

    An optimizer that ``attach`` was called on hands it to the estimator. Otherwise it is an ordinary PyTorch closure:
    called, it clears the gradients of the parameters that the loss reaches, and backpropagates the mean loss.
    """

    def __init__(self, loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        self.loss_fn = loss_fn
        self.inputs = inputs
        self.targets = targets

    def __call__(self) -> Any:  # a tensor; torch types closures as returning float
        """Backpropagates, and returns the mean loss, detached."""
        with torch.enable_grad():
            loss = self.loss_fn(self.inputs, self.targets).mean()
            for parameter in leaves([loss]):
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def closure(loss_fn: LossFn, inputs: Any, targets: Any) -> Closure:
    """Closure for ``optimizer.step``: ``optimizer.step(closure(loss_fn, images, labels))``.

    Args:
        loss_fn: forward pass and loss, called as ``loss_fn(inputs, targets)``; returns one loss per sample,
            shape ``[batch]``.
        inputs: passed on as they are.
        targets: batch first; with an estimator they arrive repeated for every noise copy.

    Raises:
        TypeError: if ``loss_fn`` cannot be called, as the losses themselves.

    Examples:
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> loss = optimizer.step(slr.closure(loss_fn, images, labels))  # without attach: backpropagation
    """
    if not callable(loss_fn):
        raise TypeError(
            f"closure(loss_fn, inputs, targets): loss_fn must be a function of inputs and targets, not {_kind(loss_fn)}"
        )
    return Closure(loss_fn, inputs, targets)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class Hook:
    """Handle of an optimizer that ``attach`` was called on; ``remove()`` gives it back to backpropagation.

    Attributes:
        estimator: what computes the gradients.
        optimizer: the optimizer, unchanged and reachable.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, estimator: Estimator) -> None:
        self.optimizer = optimizer
        self.estimator = estimator
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Takes the hook off and clears the gradients it left; ``optimizer.step`` works as if it had not been there."""
        self._handle.remove()
        self.optimizer.zero_grad()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # args[0] is the optimizer itself.
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if not isinstance(given, Closure):
            got = "step() was called without a closure" if given is None else "step() got an ordinary closure"
            raise RuntimeError(
                f"{got}, but this optimizer takes its gradients from a likelihood-ratio estimator: call "
                "optimizer.step(snntorch_lr.closure(loss_fn, inputs, targets)). For a loop of your own, call "
                "hook.remove() and estimator.backward(loss_fn, inputs, targets) before step(). A GradScaler, whose "
                "step(optimizer) passes no closure on, needs such a loop, with a loss_fn that returns "
                "scaler.scale(losses); bfloat16 needs no scaler"
            )

        def estimate() -> Tensor:
            before = [(parameter, parameter.grad) for group in optimizer.param_groups for parameter in group["params"]]
            optimizer.zero_grad()
            try:
                return self.estimator.backward(given.loss_fn, given.inputs, given.targets)
            except BaseException:
                for parameter, gradient in before:
                    parameter.grad = gradient
                raise

        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], estimate, *args[2:]), rest


def attach(
    optimizer: torch.optim.Optimizer,
    net: nn.Module,
    estimator: str | Estimator = "counterfactual",
    copies: int | None = None,
    **options: Any,
) -> Hook:
    """Makes an optimizer train by the likelihood ratio: ``step(closure(...))`` fills ``.grad`` and updates.

    Each ``step`` clears the gradients, lets the estimator add its own, and updates. For gradient clipping or
    accumulation use the estimator without a hook.

    Args:
        optimizer: any ``torch.optim`` optimizer, with any parameter groups.
        net: the network that it trains.
        estimator: ``"counterfactual"``, ``"vanilla"``, ``"approximate"``, or an estimator of this network.
        copies: K, noise copies of each sample; by default 2 for ``"counterfactual"`` and 16 for the others.
        **options: further arguments of the estimator (``over_time=``, ``baseline=``, ``memory=``, ``seed=``, ...).

    Returns:
        A handle with ``remove()``.

    Raises:
        TypeError: if the optimizer or the estimator is something else.
        ValueError: if the network has no noisy neuron, the optimizer has a hook already, or an option is wrong.

    Examples:
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> hook = slr.attach(optimizer, net)
        >>> loss = optimizer.step(slr.closure(loss_fn, images, labels))
        >>> hook.remove()
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"attach(optimizer, net): optimizer must be a torch.optim.Optimizer, not {_kind(optimizer)}")
    if copies is not None:
        options["copies"] = copies
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
        estimator = ESTIMATORS[estimator](net, **options)
    elif not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator must be one of {', '.join(ESTIMATORS)}, or an estimator that was made for this network, not "
            f"{_kind(estimator)}"
        )
    elif options:
        raise ValueError(f"{', '.join(options)} belongs to the estimator; give it when you make the estimator")
    elif estimator.net is not net:
        raise ValueError("the estimator was made for another network than the one that is attached")
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), Hook) for hook in hooks):
        raise ValueError("this optimizer has a likelihood-ratio hook already; call remove() on it first")
    check_optimizer(net, optimizer)
    return Hook(optimizer, estimator)
