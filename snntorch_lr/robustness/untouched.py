"""Networks as they were found, whatever attacks do to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..left_as_found import RandomState
from ..network import parameters, spiking_neurons


@contextmanager
def untouched(nets: Sequence[nn.Module]) -> Iterator[None]:
    """Context after which modes, gradients, neuron states and torch's global random state are as before."""
    random_state = RandomState.capture()
    modes = [(module, module.training) for net in nets for module in net.modules()]
    gradients = [(parameter, parameter.grad) for net in nets for parameter in parameters(net)]
    neurons = [neuron for net in nets for _, neuron in spiking_neurons(net)]
    states = [(neuron, dict(neuron._buffers), _tensors(neuron)) for neuron in neurons]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for neuron, buffers, tensors in states:
            neuron._buffers.update(buffers)
            vars(neuron).update(tensors)
        random_state.restore()


def _tensors(neuron: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(neuron).items() if isinstance(value, Tensor)}
