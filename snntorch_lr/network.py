"""Neurons of a network: found, reset, run over time, and given another derivative of their spikes."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .noise import Noise, NoisyInput
from .noisy_neuron import UNSUPPORTED, NoisyNeuron

# snnTorch 0.9.4 lacks some of those that are not supported.
_SPIKING_TYPES = (snn.SpikingNeuron, *(getattr(snn, name) for name in UNSUPPORTED if hasattr(snn, name)))
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_SEARCHED: dict[int, tuple[Sequence[tuple[str, nn.Module]], dict[str, NoisyInput]]] = {}


def spiking_neurons(net: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    """All snnTorch neurons of a network, with their names, each once.

    Finds them at any depth, and also in plain lists, tuples and dicts, which ``net.modules()`` does not see.
    """
    searched = _SEARCHED.get(id(net))
    return list(_visit("", net, set())) if searched is None else searched[0]


@contextmanager
def searched_once(*nets: nn.Module) -> Iterator[None]:
    """Context in which each network is searched for neurons and noisy inputs once; for passes that add none."""
    new = {id(net): (spiking_neurons(net), noisy_inputs(net)) for net in nets if id(net) not in _SEARCHED}
    _SEARCHED.update(new)
    try:
        yield
    finally:
        for key in new:
            _SEARCHED.pop(key, None)


def _visit(name: str, value: object, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _visit(f"{name}.{index}", item, seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _visit(f"{name}.{key}", item, seen)
    elif isinstance(value, nn.Module) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, _SPIKING_TYPES):
            yield name, value
            return
        prefix = f"{name}." if name else ""
        for child, module in value.named_children():
            yield from _visit(prefix + child, module, seen)
        for attribute, held in vars(value).items():
            if attribute not in _MODULE_INTERNALS and isinstance(held, (list, tuple, dict)):
                yield from _visit(prefix + attribute, held, seen)


def noisy_neurons(net: nn.Module) -> dict[str, NoisyNeuron]:
    """The neurons of a network that have noise, by name, whether it is on or off now."""
    return {
        name: neuron
        for name, neuron in spiking_neurons(net)
        if isinstance(neuron, NoisyNeuron) and neuron.noise is not None
    }


def noisy_inputs(net: nn.Module) -> dict[str, NoisyInput]:
    """The modules of a network that add noise to an input, by name."""
    searched = _SEARCHED.get(id(net))
    if searched is not None:
        return searched[1]
    return {name: module for name, module in net.named_modules() if isinstance(module, NoisyInput)}


def noises(net: nn.Module) -> dict[str, Noise]:
    """All noise of a network, of its neurons and inputs, by name."""
    of_neurons = {f"{name}.noise": neuron.noise for name, neuron in noisy_neurons(net).items()}
    return {name: noise for name, noise in (of_neurons | noisy_inputs(net)).items() if noise is not None}


def named_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a network and of its neurons, each once, also of neurons in plain lists and dicts."""
    names: dict[nn.Parameter, str] = {}
    for at, module in _parts(net):
        for name, parameter in module.named_parameters():
            names.setdefault(parameter, at + name)
    return {name: parameter for parameter, name in names.items()}


def parameters(net: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network and of its neurons, without their names."""
    return list(named_parameters(net).values())


def not_finite(net: nn.Module) -> list[str]:
    """Names of the parameters that hold a NaN or infinite value, and of the buffers that hold a NaN.

    A buffer may be infinite on purpose, as masks are.
    """
    names = [name for name, parameter in named_parameters(net).items() if not parameter.isfinite().all()]
    names += [at + name for at, module in _parts(net) for name, b in module.named_buffers() if b.isnan().any()]
    return list(dict.fromkeys(names))


def _parts(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """A network and its neurons, also those in plain lists and dicts, with prefixes of names."""
    return [("", net), *((f"{name}.", neuron) for name, neuron in spiking_neurons(net) if name)]


def reset_state(neuron: nn.Module) -> None:
    """Zeroes the state of one snnTorch neuron and cuts it from the graph of the last forward pass."""
    reset_mem = getattr(neuron, "reset_mem", None)
    if callable(reset_mem):
        reset_mem()
    for attribute, value in vars(neuron).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            vars(neuron)[attribute] = value.detach()


def reset(net: nn.Module) -> None:
    """Zeroes the state of every snnTorch neuron of this network, nested or not, and of no other network.

    Call it at the start of a forward pass, in place of ``snntorch.utils.reset``. States are also cut from the graph
    of the last forward pass, so that the network can be deep-copied. Frozen noise of inputs is drawn anew.

    Examples:
        >>> slr.reset(net)
        >>> bool(net[1].mem.any())
        False
    """
    # First, for torch.compile walks no module that was changed before.
    for noise in noisy_inputs(net).values():
        noise.reset()
    for _, neuron in spiking_neurons(net):
        reset_state(neuron)


Derivative = Callable[[Tensor], Tensor]
"""Derivative of the spike at the margin (membrane potential − threshold), element by element."""


@contextmanager
def spike_derivatives(net: nn.Module, of: Callable[[nn.Module], Derivative]) -> Iterator[None]:
    """Context in which the spikes of every snnTorch neuron have another derivative.

    It is computed once in each time step with a graph: snnTorch calls ``spike_grad`` for the reset too, but detaches
    that.

    Args:
        net: the network.
        of: from a neuron to the derivative of its spikes.

    Examples:
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
    """Spikes with a derivative by ``x``, element by element, which the backward pass asks for; all of one shape."""
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


@dataclass(frozen=True)
class RandomState:
    """State of the global random generators of torch, on the CPU and on every CUDA device in use, NumPy and Python."""

    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> RandomState:
        """The state now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), python_random.getstate())

    def restore(self) -> None:
        """Goes back to the state that was captured."""
        torch.set_rng_state(self.cpu)
        # An empty list changes nothing, also without CUDA.
        torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        python_random.setstate(self.python)


class Buffers:
    """Buffers of a network, to undo updates of them; states of neurons are not among them.

    Args:
        net: the network.
        statistics_only: only those of normalisations in training mode, which forward passes update.
    """

    def __init__(self, net: nn.Module, statistics_only: bool = False) -> None:
        neurons = {neuron for _, neuron in spiking_neurons(net)}
        self._saved = [
            (module, name, buffer, buffer.clone())
            for module in net.modules()
            if module not in neurons and (not statistics_only or (isinstance(module, _NormBase) and module.training))
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Puts back what was captured."""
        for module, name, buffer, value in self._saved:
            # A graph that was built meanwhile holds the buffer, but does not read it: not to be counted as a change.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def left_as_found(
    *nets: nn.Module,
    gradients: bool = False,
    modes: bool = False,
    buffers: bool = False,
    states: bool = False,
    random: bool = False,
) -> Iterator[None]:
    """Context after which networks and random numbers are as before, whatever happens in it.

    Args:
        *nets: the networks.
        gradients: ``.grad`` of the parameters, which is None at the start of the context.
        modes: training or evaluation, module by module.
        buffers: all buffers outside the neurons, such as running statistics.
        states: states and other attributes of the neurons.
        random: the global generators of torch, NumPy and Python.

    Examples:
        >>> with left_as_found(net, modes=True):
        ...     logits = net.eval()(images)
    """
    with ExitStack() as at_end:
        if random:
            at_end.callback(RandomState.capture().restore)
        for net in nets:
            if buffers:
                at_end.callback(Buffers(net).restore)
            for _, neuron in spiking_neurons(net) if states else ():
                for held in (vars(neuron), neuron._buffers):
                    at_end.callback(held.update, dict(held))
                    at_end.callback(held.clear)
                # The sums that λ is fitted by are in an object: the context has one of its own.
                vars(neuron).pop("_control", None)
            for module in net.modules() if modes else ():
                at_end.callback(setattr, module, "training", module.training)
            for parameter in parameters(net) if gradients else ():
                at_end.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
        yield
