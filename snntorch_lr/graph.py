"""Autograd graphs: walked back from a tensor, hidden from ``torch.compile``, left out of pickles and copies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pickle import PicklingError
from types import FunctionType
from typing import Any

import torch
from snntorch import surrogate
from torch import Tensor
from torch.autograd.graph import Node


def ancestors(tensors: Iterable[Tensor], stop: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """All nodes of the graph behind some tensors, each once; what lies only behind a node that stops is left out."""
    stack: list[Node | None] = [tensor.grad_fn for tensor in tensors]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            stack.extend(parent for parent, _ in node.next_functions)


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that ``torch.compile`` leaves to Python; call it only where ``torch.compiler.is_compiling()``."""
    # torch.compiler.disable imports torch._dynamo at once: that takes a second.
    disable: Any = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
    apart: Callable[..., Any] = disable(function)
    return apart


def version(tensor: Tensor) -> int:
    """Number of changes of a tensor in place; 0 for tensors of inference mode, which are not counted."""
    return 0 if tensor.is_inference() else tensor._version


class Portable:
    """Mixin for modules: pickles snnTorch's surrogate gradients by name and arguments, and states without a graph.

    Attributes:
        transient: attributes that a context sets for a while; copies have those of the class instead.
    """

    transient: tuple[str, ...] = ()
    _buffers: dict[str, Tensor | None]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: _without_graph(value) for name, value in vars(self).items() if name not in self.transient}
        state["_buffers"] = {name: _without_graph(value) for name, value in self._buffers.items()}
        for name, value in state.items():
            if isinstance(value, FunctionType) and "<locals>" in value.__qualname__:
                state[name] = _Local(value, f"{type(self).__name__}.{name}")
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = {name: value.function if isinstance(value, _Local) else value for name, value in state.items()}
        super().__setstate__(made)  # type: ignore[misc]


class _Local:
    """A function made inside another one: copied as it is, and pickled as a call of the one that made it."""

    def __init__(self, function: FunctionType, owner: str) -> None:
        self.function = function
        self.owner = owner

    def __deepcopy__(self, _: dict[int, Any]) -> _Local:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        name = self.function.__qualname__.partition(".")[0]
        factory = getattr(surrogate, name, None)
        if self.function.__module__ == surrogate.__name__ and isinstance(factory, FunctionType):
            with suppress(TypeError):
                return factory, inspect.signature(factory).bind(**inspect.getclosurevars(self.function).nonlocals).args
        raise PicklingError(
            f"{self.owner} is a function made inside {name}, which pickle cannot find again: save net.state_dict(), or "
            "use one of snntorch.surrogate or a function that is defined at the top level of a module"
        )


def _without_graph(value: Any) -> Any:
    """A state for a copy: cut from its graph, and without what hangs on the tensor for the next time step."""
    if isinstance(value, Tensor) and (value.grad_fn is not None or vars(value)):
        return value.detach()
    if type(value) is tuple:
        return tuple(_without_graph(item) for item in value)
    return value
