"""Questions about autograd graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node


def ancestors(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """All nodes of the graph that the tensors were computed by, each once."""
    stack = [tensor.grad_fn for tensor in tensors]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parameters (leaf tensors) that a backward pass from the tensors would reach."""
    found = [node.variable for node in ancestors(tensors) if hasattr(node, "variable")]
    return found
