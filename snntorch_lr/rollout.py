"""A sequential network over time, layer by layer: whole sequences go through blocks and neurons at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ._messages import place, positive_integer
from .blocks import SPIKES, WORTH_KEEPING_AS_BITS, Emitted, RememberingConv2d, RememberingLinear
from .gradients.approximate import BlockAtMeanInput, ExactBlock, in_rollout
from .gradients.counterfactual import CounterfactualCredit
from .graph import version
from .network import noisy_inputs, reset, spiking_neurons
from .neurons import integrate, integrates
from .validate import Look

# Modules of torch that treat every row alone and draw nothing: time steps may be rows of one call.
_ROW_BY_ROW = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Flatten,
    nn.Unflatten, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.LeakyReLU,
    nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Upsample, RememberingLinear, RememberingConv2d,
)  # fmt: skip
# Time steps that go through all layers before the next ones do. Fewer of a longer sequence, whose spikes as numbers
# take less memory so; and where neurons go step by step, for what lies between layers stays in the cache then.
_PIECE, _SHORT_PIECE = 32, 5
# Bytes of spikes; more than in a loop, for numbers are sooner at hand and one piece is soon let go.
_WORTH_KEEPING_AS_BITS_AT_ONCE = 16_000_000


def rollout(net: nn.Sequential, inputs: Tensor, num_steps: int | None = None) -> Any:
    """Runs a sequential network over time, from reset states, layer by layer.

    The numbers are those of a loop over time. With ``num_steps`` the inputs are the same in each time step (direct
    coding): all modules in front of the first neuron are run once, and so is their backward pass; from a ``NoisyInput``
    that is not frozen on, in each time step. A block between neurons runs once for all time steps if torch's modules
    in it treat every row alone; otherwise, as BatchNorm in training mode and dropout, in each time step. The time steps
    of ``Leaky``, ``Lapicque`` and ``Synaptic`` with counterfactual credit are one kernel; those of a ``Leaky`` without
    noise and reset are a sum. Neurons that others watch by hooks, and all others, go step by step.

    With the gradient ``"approximate"`` (``attach``, ``use_gradient``) such a block between neurons goes back at the
    mean of its inputs over 32 time steps, and keeps none of them. What comes before the first neuron or after the last
    one, and modules that need each time step, have their exact gradient.

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

    Examples:
        >>> slr.rollout(net, images, num_steps=5).shape
        torch.Size([5, 4, 10])
    """
    if not isinstance(net, nn.Sequential):
        raise TypeError(
            f"rollout runs an nn.Sequential, not {type(net).__name__}: write the loop over time yourself, after "
            "snntorch_lr.reset(net)"
        )
    _check(net)
    steps = len(inputs) if num_steps is None else positive_integer("num_steps", num_steps)
    if not steps:
        raise ValueError(f"inputs of shape {tuple(inputs.shape)} have no time step: [time, batch, ...], or num_steps=")
    reset(net)
    neurons: set[nn.Module] = {neuron for _, neuron in spiking_neurons(net)}
    changing = neurons | {noise for noise in noisy_inputs(net).values() if noise.active and not noise.frozen}
    modules = list(_flat(net))
    constant, start = num_steps is not None, 0
    if constant:
        start = next((i for i, module in enumerate(modules) if changing & set(module.modules())), len(modules))
        for module in modules[:start]:
            inputs = module(inputs)
    modules = modules[start:]
    with in_rollout(net) as at_mean:
        if not all(_goes_by_layers(neuron) for neuron in neurons):
            return _step_by_step(modules, inputs, steps, constant)
        if at_mean:
            modules = list(_blocks(modules, neurons))
        pieces = []
        fuses = any(_has_credit(neuron) for neuron in neurons)
        length = _PIECE if at_mean or (fuses and steps <= _PIECE) else _SHORT_PIECE
        bits_from = 0 if at_mean else _WORTH_KEEPING_AS_BITS_AT_ONCE if steps <= length else WORTH_KEEPING_AS_BITS
        for first in range(0, steps, length):
            count = min(length, steps - first)
            piece = inputs if constant else inputs[first : first + count]
            pieces.append(_by_layers(modules, neurons, piece, count, constant, bits_from))
    if isinstance(pieces[0], tuple):
        return tuple(torch.cat(part) for part in zip(*pieces, strict=True))
    return torch.cat(pieces)


def _blocks(modules: list[nn.Module], neurons: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules, those that treat every row alone as blocks: at the mean input between neurons, exact before them."""
    with_neurons = [i for i, module in enumerate(modules) if neurons & set(module.modules())] or [0]
    first, last = with_neurons[0], with_neurons[-1]
    for part, block in (modules[:first], ExactBlock), (modules[first:last], BlockAtMeanInput):
        for row_by_row, group in groupby(part, _is_row_by_row):
            if row_by_row:
                yield block(*group)
            else:
                yield from group
    yield from modules[last:]


def _by_layers(
    modules: Iterable[nn.Module], neurons: set[nn.Module], value: Any, steps: int, constant: bool, bits_from: int
) -> Any:
    """What the last module returns in some time steps, each layer after the one before it."""
    for module in modules:
        if module in neurons:
            value = _neuron(module, value, steps, constant)
        elif isinstance(module, (BlockAtMeanInput, ExactBlock)):
            value = module(value)
        elif not constant and _is_row_by_row(module):
            value = _in_rows(module, value, steps, bits_from)
        elif constant and _is_row_by_row(module):
            value = module(value)
            continue
        else:
            value = _stack([module(value if constant else value[step]) for step in range(steps)])
        constant = False
    return value.expand(steps, *value.shape) if constant else value


def _in_rows(module: nn.Module, value: Tensor, steps: int, bits_from: int) -> Tensor:
    """What a module returns in some time steps, as rows of one call.

    Args:
        module: treats every row alone.
        value: ``[time, batch, ...]``.
        steps: number of time steps.
        bits_from: so many bytes of spikes are kept for the backward pass as the neuron keeps them, in bits.
    """
    rows = value.flatten(0, 1)
    emitted: Emitted | None = getattr(value, SPIKES, None)
    if emitted is None or emitted.version != version(value):
        output: Tensor = module(rows).unflatten(0, (steps, -1))
        return output
    size = WORTH_KEEPING_AS_BITS if emitted.bytes >= bits_from else 0
    setattr(rows, SPIKES, replace(emitted, version=version(rows), bytes=size))
    output = module(rows).unflatten(0, (steps, -1))
    if type(module) is nn.Flatten and module.end_dim == -1:
        setattr(output, SPIKES, replace(emitted, code=emitted.code.flatten(2), version=version(output)))
    return output


def _flat(net: nn.Sequential) -> Iterator[nn.Module]:
    """The modules of nested sequences in order; a sequence that others watch by hooks stays one module."""
    for module in net:
        watched = module._forward_hooks or module._forward_pre_hooks
        if type(module) is nn.Sequential and not watched:
            yield from _flat(module)
        else:
            yield module


def _check(net: nn.Sequential) -> None:
    last: nn.Module = net
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    for name, neuron in spiking_neurons(net):
        where = place(name, neuron)
        if not getattr(neuron, "init_hidden", True):
            raise ValueError(f"{where} does not hold its state: make it with init_hidden=True")
        if getattr(neuron, "output", False) and neuron is not last:
            raise ValueError(f"{where} returns its state to the module after it: make it with output=False")


def _goes_by_layers(neuron: nn.Module) -> bool:
    """All time steps of a layer may be run before the next layer: not where an estimator keeps sums over time."""
    sampler = getattr(neuron, "sampler", None)
    return sampler is None or isinstance(sampler, CounterfactualCredit)


def _is_row_by_row(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, (_BatchNorm, _DropoutNd)):
        return not module.training
    return type(module) in _ROW_BY_ROW and getattr(module, "start_dim", 1) == 1


def _step_by_step(modules: list[nn.Module], inputs: Tensor, steps: int, constant: bool) -> Any:
    record: list[Any] = []
    for step in range(steps):
        value: Any = inputs if constant else inputs[step]
        for module in modules:
            value = module(value)
        record.append(value)
    return _stack(record)


def _stack(record: list[Any]) -> Any:
    if isinstance(record[0], tuple):
        return tuple(torch.stack(part) for part in zip(*record, strict=True))
    return torch.stack(record)


def _has_credit(neuron: Any) -> bool:
    """A neuron draws noise, and has counterfactual credit."""
    return isinstance(getattr(neuron, "sampler", None), CounterfactualCredit) and neuron.noise.active


def _neuron(neuron: Any, current: Tensor, steps: int, constant: bool) -> Any:
    """What a neuron returns in all time steps."""
    before, after = [*neuron._forward_pre_hooks.values()], [*neuron._forward_hooks.values()]
    sequence = neuron.sampler.sequence if _has_credit(neuron) else integrate if integrates(neuron) else None
    # Those of the first call look at all time steps as well: it computes what later calls do.
    if sequence is not None and all(isinstance(hook, Look) for hook in before + after):
        for hook in before:
            hook(neuron, (current,))
        outputs = sequence(neuron, current, steps, constant)
        if outputs is not None:
            for hook in after:
                hook(neuron, (current,), outputs)
            return outputs if neuron.output else outputs[0]
    return _stack([neuron(current if constant else current[step]) for step in range(steps)])
