"""Modules that can be pickled and copied although they hold surrogate gradients and states of a forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pickle import PicklingError
from types import FunctionType
from typing import Any

from snntorch import surrogate
from torch import Tensor


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
        factory = getattr(surrogate, self.function.__qualname__.partition(".")[0], None)
        arguments = inspect.getclosurevars(self.function).nonlocals
        if self.function.__module__ != surrogate.__name__ or not isinstance(factory, FunctionType):
            raise PicklingError(self._remedy())
        try:
            bound = inspect.signature(factory).bind(**arguments)
        except TypeError:
            raise PicklingError(self._remedy()) from None
        return factory, bound.args

    def _remedy(self) -> str:
        return (
            f"{self.owner} is a function made inside {self.function.__qualname__.partition('.')[0]}, which pickle "
            "cannot find again: save net.state_dict(), or use one of snntorch.surrogate or a function that is defined "
            "at the top level of a module"
        )


def _without_graph(value: Any) -> Any:
    # What hangs on a state, for its next time step, is not meant for a copy.
    if isinstance(value, Tensor) and (value.grad_fn is not None or vars(value)):
        return value.detach()
    if type(value) is tuple:
        return tuple(_without_graph(item) for item in value)
    return value
