"""A network over time: states reset, and what does not change over time computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .convert import reset
from .estimators import positive_integer
from .network import spiking_neurons


def rollout(net: nn.Sequential, inputs: Tensor, num_steps: int | None = None) -> Any:
    """Runs a sequential network over time, from reset states.

    With ``num_steps`` the inputs are the same in each time step (direct coding): all modules in front of the first
    neuron are run once, and so is their backward pass.

    Args:
        net: modules in order; its neurons hold their states (``init_hidden=True``).
        inputs: ``[batch, ...]`` with ``num_steps``, otherwise ``[time, batch, ...]``.
        num_steps: time steps of a constant input.

    Returns:
        What the last module returned, over time, ``[time, batch, ...]``, or a tuple of such tensors (spikes and
        membrane potentials, if the last neuron has ``output=True``).

    Raises:
        TypeError: if the network is no ``nn.Sequential``.
        ValueError: if a neuron does not hold its state, a neuron in the middle returns it (``output=True``), or
            there is no time step.
    """
    if not isinstance(net, nn.Sequential):
        raise TypeError(
            f"rollout runs an nn.Sequential, not {type(net).__name__}: write the loop over time yourself, after "
            "snntorch_lr.reset(net)"
        )
    neurons = {neuron for _, neuron in spiking_neurons(net)}
    _check(net)
    steps = len(inputs) if num_steps is None else positive_integer("num_steps", num_steps)
    if not steps:
        raise ValueError(f"inputs of shape {tuple(inputs.shape)} have no time step: [time, batch, ...], or num_steps=")
    reset(net)
    modules = list(net)
    start = 0
    if num_steps is not None:
        start = next((i for i, module in enumerate(modules) if neurons & set(module.modules())), len(modules))
        for module in modules[:start]:
            inputs = module(inputs)
    record: list[Any] = []
    for step in range(steps):
        value = inputs if num_steps is not None else inputs[step]
        for module in modules[start:]:
            value = module(value)
        record.append(value)
    if isinstance(record[0], tuple):
        return tuple(torch.stack(part) for part in zip(*record, strict=True))
    return torch.stack(record)


def _check(net: nn.Sequential) -> None:
    last: nn.Module = net
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    for name, neuron in spiking_neurons(net):
        where = f"{name} ({type(neuron).__name__})"
        if not getattr(neuron, "init_hidden", True):
            raise ValueError(f"{where} does not hold its state: make it with init_hidden=True")
        if getattr(neuron, "output", False) and neuron is not last:
            raise ValueError(f"{where} returns its state to the module after it: make it with output=False")
