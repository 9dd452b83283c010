"""Questions about tensors and their autograd graphs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

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


def version(tensor: Tensor) -> int:
    """Number of changes of a tensor in place; 0 for tensors of inference mode, which are not counted."""
    return 0 if tensor.is_inference() else tensor._version
