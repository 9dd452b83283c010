"""The neurons of a network, wherever it holds them."""

from __future__ import annotations

from collections.abc import Iterator

import snntorch as snn
from torch import Tensor, nn

from .defects import UNSUPPORTED
from .noisy import NoisyNeuron

# snnTorch 0.9.4 lacks some of those that are not supported.
_SPIKING_TYPES = (snn.SpikingNeuron, *(getattr(snn, name) for name in UNSUPPORTED if hasattr(snn, name)))
_MODULE_INTERNALS = frozenset(vars(nn.Module()))


def spiking_neurons(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All snnTorch neurons of a network, with their names, each once.

    Finds them at any depth, and also in plain lists, tuples and dicts, which ``net.modules()`` does not see.
    """
    yield from _visit("", net, set())


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


def named_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a network and of its neurons, each once, also of neurons in plain lists and dicts."""
    modules = [("", net), *((f"{name}.", neuron) for name, neuron in spiking_neurons(net) if name)]
    names: dict[nn.Parameter, str] = {}
    for at, module in modules:
        for name, parameter in module.named_parameters():
            names.setdefault(parameter, at + name)
    return {name: parameter for parameter, name in names.items()}


def parameters(net: nn.Module) -> list[nn.Parameter]:
    """The same, without their names."""
    return list(named_parameters(net).values())


def not_finite(net: nn.Module) -> list[str]:
    """Names of the parameters that hold a NaN or infinite value, and of the buffers that hold a NaN.

    A buffer may be infinite on purpose, as masks are.
    """
    found = [name for name, parameter in named_parameters(net).items() if not parameter.isfinite().all()]
    modules = [("", net), *((f"{name}.", neuron) for name, neuron in spiking_neurons(net) if name)]
    found += [at + name for at, module in modules for name, b in module.named_buffers() if b.isnan().any()]
    return list(dict.fromkeys(found))


def reset_state(neuron: nn.Module) -> None:
    """Zeroes the state of one snnTorch neuron and cuts it from the graph of the last forward pass."""
    reset_mem = getattr(neuron, "reset_mem", None)
    if callable(reset_mem):
        reset_mem()
    for attribute, value in vars(neuron).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            vars(neuron)[attribute] = value.detach()
