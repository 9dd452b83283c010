"""Spikes of snnTorch neurons with another derivative, and the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .network import spiking_neurons

Derivative = Callable[[Tensor], Tensor]
"""Derivative of the spike at the margin (membrane potential − threshold), element by element."""


@contextmanager
def spike_derivatives(net: nn.Module, of: Callable[[nn.Module], Derivative]) -> Iterator[None]:
    """Context in which the spikes of every snnTorch neuron have another derivative.

    The derivative is asked once for each spike that is emitted while a graph is built: snnTorch calls ``spike_grad``
    for the reset too, but detaches that.

    Args:
        net: the network.
        of: from a neuron to the derivative of its spikes.

    Example:
        >>> import torch, snntorch as snn
        >>> neuron, x = snn.Leaky(beta=0.9, init_hidden=True), torch.tensor([0.3, 7.0], requires_grad=True)
        >>> with spike_derivatives(neuron, lambda neuron: torch.ones_like):
        ...     torch.autograd.grad(neuron(x).sum(), x)
        (tensor([1., 1.]),)
    """
    with ExitStack() as stack:
        for _, neuron in spiking_neurons(net):
            stack.enter_context(_replaced(neuron, of(neuron)))
        yield


@contextmanager
def _replaced(neuron: nn.Module, derivative: Derivative) -> Iterator[None]:
    spike_grad: Callable[[Tensor], Tensor] = getattr(neuron, "spike_grad")  # noqa: B009
    mem_reset: Callable[[Tensor], Tensor] | None = getattr(neuron, "mem_reset", None)
    resetting = False

    def spike(margin: Tensor) -> Tensor:
        with torch.no_grad():
            spikes = spike_grad(margin)
        if resetting or not (torch.is_grad_enabled() and margin.requires_grad):
            return spikes
        slope = derivative(margin.detach())
        return with_derivative(margin, spikes, lambda: slope)

    def reset(mem: Tensor) -> Tensor:
        nonlocal resetting
        assert mem_reset is not None
        resetting = True
        try:
            return mem_reset(mem)
        finally:
            resetting = False

    replaced: dict[str, Any] = {"spike_grad": spike} | ({"mem_reset": reset} if mem_reset is not None else {})
    held = {name: vars(neuron)[name] for name in replaced if name in vars(neuron)}
    # Found before a method of the class, and before a module that is registered under this name.
    vars(neuron).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(neuron)[name]
        vars(neuron).update(held)


def with_derivative(x: Tensor, spikes: Tensor, derivative: Callable[[], Tensor]) -> Tensor:
    """Spikes whose derivative with respect to a tensor is given; all of the same shape.

    Args:
        x: what the spikes are to be differentiated with respect to, element by element.
        spikes: their values.
        derivative: asked for in the backward pass.
    """
    result: Tensor = _Spike.apply(x, spikes, derivative)
    return result


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spikes: Tensor, derivative: Callable[[], Tensor]) -> Tensor:
        ctx.derivative = derivative
        return spikes.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        derivative = ctx.derivative()
        return grads[0].to(derivative.dtype) * derivative, None, None
