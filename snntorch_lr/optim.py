"""Chooses the gradient of a network: ``attach`` for an optimizer's loop, ``use_gradient`` without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._messages import places
from .blocks import forget_constant_inputs, remember_constant_inputs
from .gradients import ESTIMATORS, Approximate, Counterfactual, CounterfactualCredit, Estimator, LossFn
from .gradients.approximate import MeanInputCredit
from .gradients.counterfactual import check_independent
from .graph import ancestors
from .network import noisy_neurons
from .noisy_neuron import NoisyNeuron
from .validate import FirstCall, check_finite_gradients, check_optimizer, noisy, refuse, thresholds_met_twice


class Closure:
    """A forward pass and its data, for ``optimizer.step``, made by ``closure``.

    After ``attach`` the optimizer hands it to the estimator. Otherwise it is an ordinary PyTorch closure: it clears the
    gradients of the parameters that the loss reaches, and backpropagates the mean loss.
    """

    def __init__(self, loss_fn: LossFn, inputs: Any, targets: Any) -> None:
        self.loss_fn = loss_fn
        self.inputs = inputs
        self.targets = targets

    def __call__(self) -> Any:  # a tensor; torch types closures as returning float
        """Backpropagates; returns the mean loss, detached."""
        with torch.enable_grad():
            loss = self.loss_fn(self.inputs, self.targets).mean()
            for node in ancestors([loss]):
                if hasattr(node, "variable"):
                    node.variable.grad = None
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
        TypeError: if ``loss_fn`` is no function.

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


def estimator_called(name: str) -> Callable[..., Estimator]:
    """The class of an estimator, by its name.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; choose one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def use_gradient(
    net: nn.Module, gradient: str = "counterfactual", discount: float | None = None, control: float | None = None
) -> None:
    """Chooses the gradient that ``loss.backward()`` gives the spikes of a network, in any training loop.

    ``attach`` does it for an optimizer, and looks after its updates too. This is for loops that build their optimizer
    elsewhere, such as a Lightning module, and for sweeps.

    Args:
        net: a network with noisy neurons.
        gradient: ``"counterfactual"`` for the likelihood ratio by counterfactual credit; ``"approximate"`` for the same
            in ``rollout``, where layers between neurons go back once, at their mean input over time, and a loop of
            your own is an error; ``"surrogate"`` for snnTorch's surrogate gradients with reparameterised noise.
        discount: γ of counterfactual credit in [0, 1], .7 by default: how much a later time step counts in what a
            spike does through its reset. 1 has no bias, and much variance in long sequences.
        control: λ of counterfactual credit in [0, 1]; by default it is fitted, layer by layer.

    Raises:
        ValueError: if the name is unknown, the network has no noisy neuron, a neuron cannot be given this gradient
            (LSTM cells, inhibition), or an option is wrong.

    Examples:
        >>> slr.use_gradient(net, "counterfactual")
        >>> torch.nn.functional.cross_entropy(slr.rollout(net, images, num_steps=5).sum(0), labels).backward()
        >>> slr.use_gradient(net, "surrogate")
    """
    if gradient == "surrogate":
        if discount is not None or control is not None:
            raise ValueError('discount and control belong to the gradients "counterfactual" and "approximate"')
        forget_constant_inputs(net)
        for neuron in noisy_neurons(net).values():
            neuron.sampler = None
        return
    credits = {"counterfactual": CounterfactualCredit, "approximate": MeanInputCredit}
    if gradient not in credits:
        hint = (
            f'; "{gradient}" needs copies of each sample and runs the forward pass itself: use attach(optimizer, net, '
            f'estimator="{gradient}") with closure(), or its class'
        )
        raise ValueError(
            f'unknown gradient {gradient!r}; choose "counterfactual", "approximate" or "surrogate"'
            + (hint if gradient in ESTIMATORS else "")
        )
    choose_credit(net, credits[gradient](**{} if discount is None else {"discount": discount}, control=control))


def choose_credit(net: nn.Module, credit: CounterfactualCredit) -> FirstCall:
    """Gives spikes their gradient by counterfactual credit, and watches the first forward pass.

    Raises:
        ValueError: see ``use_gradient``.
    """
    neurons = noisy(net)
    check_independent(net)
    refuse(thresholds_met_twice(neurons))
    done = _steps(neurons)
    first = FirstCall(net, neurons, until=lambda: _steps(neurons) > done)
    first.__enter__()
    for neuron in neurons.values():
        neuron.sampler = credit
    remember_constant_inputs(net)
    return first


def _steps(neurons: dict[str, NoisyNeuron]) -> int:
    """Number of time steps of the neurons in backward passes so far."""
    return sum(neuron.control.steps for neuron in neurons.values())


# Updates between two looks for layers that have fallen silent, or reset now, during training.
_LOOKS = 100


class Hook:
    """Handle of ``attach``; ``remove()`` gives the optimizer back to backpropagation.

    Attributes:
        optimizer: the optimizer, unchanged.
        estimator: computes the gradients of closures.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, estimator: Estimator, copies: int) -> None:
        self.optimizer = optimizer
        self.estimator = estimator
        # Only closures have copies.
        self._copies = copies
        self._first: FirstCall | None = None
        if isinstance(estimator, (Counterfactual, Approximate)):
            self._first = choose_credit(estimator.net, estimator.sampler)
        remember_constant_inputs(estimator.net)
        self._neurons = noisy_neurons(estimator.net)
        self._updates = 0
        self._look: FirstCall | None = None
        self._told: set[str] = set()
        self._done = _steps(self._neurons)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Takes the hook off and clears the gradients it left; spikes have their surrogate gradient again."""
        self._handle.remove()
        if self._look is not None:
            self._look.stop()
        if self._first is not None:
            self._first.stop()
            use_gradient(self.estimator.net, "surrogate")
        forget_constant_inputs(self.estimator.net)
        self.optimizer.zero_grad()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._updates += 1
        # args[0] is the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None and self._first is not None:
            self._check()
            return None
        if not isinstance(closure, Closure) and self._first is None:
            got = "step() was called without a closure" if closure is None else "step() got an ordinary closure"
            name = type(self.estimator).__name__
            raise RuntimeError(
                f"{got}, but this optimizer takes its gradients from {name}, which runs the forward pass itself: call "
                "optimizer.step(snntorch_lr.closure(loss_fn, inputs, targets)). For a loop of your own, call "
                "hook.remove() and estimator.backward(loss_fn, inputs, targets) before step(), or use "
                'estimator="counterfactual", for which loss.backward() is enough'
            )
        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        run: Callable[..., Any] = self._estimate if isinstance(closure, Closure) else self._checked
        return (args[0], partial(run, closure), *args[2:]), rest

    def _estimate(self, closure: Closure) -> Tensor:
        if self._first is not None:
            # The estimator has its own look.
            self._first.stop()
        before = [(parameter, parameter.grad) for parameter in self._parameters()]
        self.optimizer.zero_grad()
        try:
            loss = self.estimator.backward(closure.loss_fn, closure.inputs, closure.targets)
        except BaseException:
            for parameter, gradient in before:
                parameter.grad = gradient
            raise
        self._done = _steps(self._neurons)
        self._look_again()
        return loss

    def _checked(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._check()
        return loss

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _check(self) -> None:
        """Refuses gradients of the user's own loop that are no likelihood-ratio gradients, or not finite.

        Raises:
            ValueError: if there are some.
        """
        if self._copies > 1:
            raise ValueError(
                f"copies={self._copies} is for optimizer.step(closure(loss_fn, inputs, targets)): in a loop "
                "of your own each sample has one noise copy for each time that it is in the batch; leave copies out"
            )
        steps = _steps(self._neurons)
        took_part, self._done = steps > self._done, steps
        if not took_part and any(parameter.grad is not None for parameter in self._parameters()):
            off = [name for name, neuron in self._neurons.items() if neuron.noise is None or not neuron.noise.active]
            cause = (
                f"the noise of {places({name: self._neurons[name] for name in off})} is off: call net.train(), or "
                "leave noise_off(net)"
                if off
                else "loss.backward() did not reach them: is it the network that was attached, and no copy of it?"
            )
            raise ValueError(
                "no noisy neuron had a part in these gradients, which are no likelihood-ratio gradients; no weight "
                f"changed. {cause}"
            )
        # With found_inf, torch's own scaler skips updates that overflow; a captured graph cannot wait for the device.
        scaled = getattr(self.optimizer, "found_inf", None) is not None
        if not scaled and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            check_finite_gradients(self.estimator.net)
        if self._first is not None and took_part:
            self._first.finish()
            self._look_again()

    def _look_again(self) -> None:
        """Watches one update in a hundred, and warns of what was right in the first call, and is no longer."""
        if self._look is not None:
            self._look.stop()
            self._told |= self._look.warn_about_noise_free(known=self._told)
            self._told |= self._look.warn_about_silence(f"in update {self._updates}", self._told)
            self._look = None
        elif self._updates % _LOOKS == 0:
            self._look = FirstCall(self.estimator.net, self._neurons)
            self._look.__enter__()


def attached(optimizer: torch.optim.Optimizer) -> Estimator | None:
    """The estimator that ``attach`` gave an optimizer, if it did."""
    hooks = (getattr(hook, "__self__", None) for hook in getattr(optimizer, "_optimizer_step_pre_hooks", {}).values())
    return next((hook.estimator for hook in hooks if isinstance(hook, Hook)), None)


def attach(
    optimizer: torch.optim.Optimizer,
    net: nn.Module,
    estimator: str | Estimator = "counterfactual",
    copies: int | None = None,
    **options: Any,
) -> Hook:
    """Makes ``loss.backward()`` the likelihood-ratio gradient of a network, for an optimizer that trains it.

    With ``"counterfactual"``, the default, the training loop stays as it is: any loss with a derivative, accumulation,
    clipping, autocast, DDP, Lightning. Each ``optimizer.step()`` first refuses gradients that are not finite, or in
    which no noisy neuron had a part.

    With ``"approximate"`` so does a loop whose forward pass is ``rollout``: layers between neurons go back once, at
    their mean input over time. Another forward pass with a graph is an error.

    ``"vanilla"`` runs the forward pass itself, on K copies of each sample:
    ``optimizer.step(closure(loss_fn, images, labels))`` clears the gradients, fills them and updates. So does
    ``"approximate"``, and then needs no derivative of the loss.

    Args:
        optimizer: any ``torch.optim`` optimizer, with any parameter groups.
        net: the network that it trains.
        estimator: ``"counterfactual"``, ``"vanilla"``, ``"approximate"``, or an estimator of this network.
        copies: K, noise copies of each sample of a closure; by default 1 for ``"counterfactual"``, 16 for the others.
        **options: further arguments of the estimator (``discount=``, ``control=``, ``baseline=``, ``seed=``).

    Returns:
        A handle with ``remove()``.

    Raises:
        TypeError: if the optimizer or the estimator is something else.
        ValueError: if the network has no noisy neuron, the optimizer has a hook already, or an option is wrong.

    Examples:
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> hook = slr.attach(optimizer, net)
        >>> loss = torch.nn.functional.cross_entropy(slr.rollout(net, images, num_steps=5).sum(0), labels)
        >>> loss.backward()
        >>> optimizer.step()
        >>> hook.remove()
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"attach(optimizer, net): optimizer must be a torch.optim.Optimizer, not {_kind(optimizer)}")
    if copies is not None:
        options["copies"] = copies
    if isinstance(estimator, str):
        estimator = estimator_called(estimator)(net, **options)
        asked = copies or 1
    elif not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator must be one of {', '.join(ESTIMATORS)}, or an estimator that was made for this network, not "
            f"{_kind(estimator)}"
        )
    elif options:
        raise ValueError(f"{', '.join(options)} belongs to the estimator; give it when you make the estimator")
    elif estimator.net is not net:
        raise ValueError("the estimator was made for another network than the one that is attached")
    else:
        asked = estimator.copies
    if attached(optimizer) is not None:
        raise ValueError("this optimizer has a likelihood-ratio hook already; call remove() on it first")
    check_optimizer(net, optimizer)
    return Hook(optimizer, estimator, asked)
