"""Questions about tensors and their autograd graphs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


def ancestors(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """All nodes of the graph that the tensors were computed by, each once."""
    return nodes_behind([tensor.grad_fn for tensor in tensors])


def nodes_behind(start: Iterable[Node | None], stop: Container[Node] = ()) -> Iterator[Node]:
    """The nodes and all that lies behind them, each once, but nothing that lies only behind a node of ``stop``."""
    stack = list(start)
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stop:
            stack.extend(parent for parent, _ in node.next_functions)


def normalises(node: Node) -> bool:
    """The node normalises by statistics of its own input; that of BatchNorm in evaluation mode does not."""
    return "NormBackward" in node.name() and bool(getattr(node, "_saved_training", True))


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parameters (leaf tensors) that a backward pass from the tensors would reach."""
    found = [node.variable for node in ancestors(tensors) if hasattr(node, "variable")]
    return found


def same_numbers(first: Tensor, second: Tensor) -> bool:
    """Two tensors are one, or one is the other detached or copied."""
    if first is second:
        return True
    if first.shape != second.shape or first.device != second.device:
        return False
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


# Of operations whose result follows from their inputs: the constants that they save, and the name under which each
# input is saved, in case that it has no graph of its own.
_POOL = ("ceil_mode", "kernel_size", "padding", "stride")
_OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AddmmBackward0": (("alpha", "beta"), ("", "mat1", "mat2")),
    "MmBackward0": ((), ("self", "mat2")),
    "TBackward0": ((), ("",)),
    "AddBackward0": (("alpha",), ("", "")),
    "ConvolutionBackward0": (
        ("bias_sym_sizes_opt", "dilation", "groups", "output_padding", "padding", "stride", "transposed"),
        ("input", "weight", ""),
    ),
    "MaxPool2DWithIndicesBackward0": ((*_POOL, "dilation"), ("",)),
    "AvgPool2DBackward0": ((*_POOL, "count_include_pad", "divisor_override"), ("",)),
}


def origin(tensor: Tensor) -> Any:
    """What a tensor was computed from, and how: two with the same origin have the same numbers and the same gradient.

    Returns:
        Tuples to be compared, for as long as the tensor is there; None where the graph does not tell, or where
        something waits for the gradient of this very tensor.
    """
    node = tensor.grad_fn
    if node is None or version(tensor) or tensor._backward_hooks or tensor.retains_grad:
        return None
    try:
        return tensor.shape, tensor.dtype, _origin(node)
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """A graph that does not tell what was computed."""


def _origin(node: Any) -> Any:
    if hasattr(node, "variable"):
        return _identity(node.variable)
    name = node.name()
    if name not in _OPERATIONS:
        raise _UnknownError
    constants, inputs = _OPERATIONS[name]
    try:
        found: list[Any] = [name, *(getattr(node, f"_saved_{constant}") for constant in constants)]
        for (behind, output), saved in zip(node.next_functions, inputs, strict=True):
            if behind is not None:
                found += [output, _origin(behind)]
            elif saved:
                found.append(_identity(getattr(node, f"_saved_{saved}")))
            elif name != "ConvolutionBackward0" or tuple(node._saved_bias_sym_sizes_opt) != (0,):
                raise _UnknownError
    except (RuntimeError, AttributeError, TypeError):
        # It was changed in place, or is not kept.
        raise _UnknownError from None
    return tuple(found)


def _identity(tensor: Tensor) -> Any:
    return tensor.data_ptr(), version(tensor), tensor.shape, tensor.stride(), tensor.dtype


def version(tensor: Tensor) -> int:
    """Number of changes of a tensor in place; 0 for tensors of inference mode, which are not counted."""
    return 0 if tensor.is_inference() else tensor._version
