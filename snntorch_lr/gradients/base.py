"""Base class of the estimators: noise copies, one loss per sample, and gradients that are added or left alone."""

from __future__ import annotations

import operator
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import places, positive_integer
from ..copies import Copies
from ..network import Buffers, left_as_found, noisy_inputs, noisy_neurons, parameters
from ..noisy_neuron import NoisyNeuron, Sampler
from ..validate import FirstCall, check_finite_gradients, check_levels, check_network, check_parameters, noisy

LossFn = Callable[[Any, Any], Tensor]
"""Forward pass and loss: from inputs and targets to one loss per row of the targets."""


class SamplerOfOnePass:
    """Mixin of samplers that keep what they see: copies of the network that are made meanwhile have none of it."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Estimator(ABC):
    """Base class of the estimators: runs ``loss_fn`` on noise copies, and adds a gradient into ``.grad``.

    A new estimator implements ``estimate``; see docs/contributing-estimator.md.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample. Only what comes after the first noisy neuron is computed K times.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, or an argument is wrong.

    Attributes:
        needs_rows: each row of what enters a noisy neuron has a loss of its own; False if any loss will do, which one
            copy then runs as a plain loop would.

    Examples:
        >>> estimator: slr.Estimator = slr.Counterfactual(net, copies=2)
        >>> loss = estimator.backward(loss_fn, images, labels)
    """

    needs_rows = True

    def __init__(self, net: nn.Module, copies: int, seed: int | None = None) -> None:
        self.copies = positive_integer("copies", copies)
        try:
            self.seed = None if seed is None else operator.index(seed)
        except TypeError:
            raise ValueError(f"seed must be an integer, or None for torch's global generator, got {seed!r}") from None
        noisy(net)
        self.net = net
        self._generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        self._inspected = False

    def backward(self, loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Adds the estimated gradient into ``.grad`` of the parameters, as ``loss.backward()`` does.

        Args:
            loss_fn: forward pass and loss, called as ``loss_fn(inputs, targets)``; returns one loss per row of the
                targets that it is given. It must start from fresh states (``reset(net)``, or ``reset_mem()``).
            inputs: passed on as they are.
            targets: tensor, or nested lists, tuples and dicts of tensors, batch first; passed on repeated for the
                copies. None if there are none.

        Returns:
            Mean loss over samples and copies, detached.

        Raises:
            ValueError: if the network or the losses would make the gradient wrong, there is nothing to learn, loss_fn
                does not run the network, or the gradient is not finite. ``.grad`` of the network's parameters is
                untouched then, as after any other error, and so are running statistics.
        """
        neurons = check_network(self.net)
        check_levels(self.net)
        if not self._inspected:
            check_parameters(self.net)
        before = [(parameter, parameter.grad) for parameter in parameters(self.net)]
        statistics = Buffers(self.net, statistics_only=True)
        for parameter, _ in before:
            parameter.grad = None
        try:
            with self._own_noise(neurons), torch.enable_grad():
                loss = self.estimate(neurons, loss_fn, inputs, targets)
            check_finite_gradients(self.net, inputs)
        except BaseException:
            statistics.restore()
            for parameter, gradient in before:
                parameter.grad = gradient
            raise
        for parameter, gradient in before:
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        self._inspected = True
        return loss

    @abstractmethod
    def estimate(self, neurons: Mapping[str, NoisyNeuron], loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Adds the gradient into ``.grad``.

        Args:
            neurons: those that draw noise now, by name.
            loss_fn: as for ``backward``, as the others.
            inputs: see there.
            targets: see there.

        Returns:
            The mean loss, detached.
        """

    @contextmanager
    def first_call(self, neurons: Mapping[str, NoisyNeuron]) -> Iterator[FirstCall | None]:
        """Context of a forward pass, which is looked at in the first call; None in later ones."""
        if self._inspected:
            yield None
            return
        with FirstCall(self.net, neurons) as first:
            yield first
        first.warn_about_silence()

    def run(
        self, neurons: Mapping[str, NoisyNeuron], sampler: Sampler, loss_fn: LossFn, inputs: Any, targets: Any
    ) -> tuple[Any, Copies]:
        """What ``loss_fn`` returns while a sampler gives the spikes of the neurons their gradient; and the copies."""
        copies = Copies(self.copies, targets, neurons.values(), self.copies == 1 and not self.needs_rows)
        for noise in noisy_inputs(self.net).values():
            noise.reset()
        with sampling(neurons, sampler), copies:
            try:
                losses = loss_fn(inputs, copies.targets(targets))
            except (RuntimeError, ValueError, IndexError) as error:
                _explain(error, copies)
                raise
        if not copies.ran:
            raise ValueError(
                f"loss_fn ran none of {places(neurons)}, the noisy neurons of {type(self.net).__name__}: "
                "call in it the very network that the estimator was made for, no copy of it, with its noise on"
            )
        return losses, copies

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context of passes without a graph that leave no trace; whatever they warn of is said by the real ones."""
        generator = None if self._generator is None else self._generator.get_state()
        restored = left_as_found(self.net, buffers=True, states=True, random=True, modes=True)
        try:
            with warnings.catch_warnings(), torch.no_grad(), restored:
                warnings.simplefilter("ignore")
                yield
        finally:
            if self._generator is not None and generator is not None:
                self._generator.set_state(generator)

    @contextmanager
    def _own_noise(self, neurons: Mapping[str, NoisyNeuron]) -> Iterator[None]:
        """Context in which noise is drawn from the estimator's own generator, if it has one."""
        if self._generator is None:
            yield
            return
        noises = [neuron.noise for neuron in neurons.values() if neuron.noise is not None]
        before = [noise.generator for noise in noises]
        for noise in noises:
            noise.generator = self._generator
        try:
            yield
        finally:
            for noise, generator in zip(noises, before, strict=True):
                noise.generator = generator


@contextmanager
def sampling(neurons: Mapping[str, NoisyNeuron], sampler: Sampler | None) -> Iterator[None]:
    """Context in which a sampler gives the spikes of neurons their gradient; None for the surrogate gradient."""
    before = [(neuron, neuron.sampler) for neuron in neurons.values()]
    for neuron in neurons.values():
        neuron.sampler = sampler
    try:
        yield
    finally:
        for neuron, was in before:
            neuron.sampler = was


def surrogate(net: nn.Module) -> Any:
    """Context in which the spikes of a network have their surrogate gradient, whatever was chosen for it."""
    return sampling(noisy_neurons(net), None)


def _explain(error: Exception, copies: Copies) -> None:
    """Says in a note how many rows there are, in case that this is what does not fit (Python 3.11 and later)."""
    if copies.count > 1 and copies.batch and sys.version_info >= (3, 11):
        error.add_note(
            f"In loss_fn there are {copies.batch} samples in {copies.count} copies: {copies.rows} rows after the first "
            "noisy neuron, and in the targets; the inputs have as many rows as they were given. Where the two meet "
            "(skip connections, torch.cat, losses that compare with the inputs) use snntorch_lr.per_copy(x)"
        )
