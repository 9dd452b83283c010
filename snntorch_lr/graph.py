"""Questions about tensors and their autograd graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


def ancestors(tensors: Iterable[Tensor], stop: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """All nodes of the graph that the tensors were computed by, each once.

    Args:
        tensors: from which to go back.
        stop: asked of each node; nothing that lies only behind nodes for which it is true is looked at.
    """
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
    """A function that ``torch.compile`` leaves to Python; call it only where ``torch.compiler.is_compiling()``.

    As ``torch.compiler.disable``, which imports ``torch._dynamo`` at once: that takes a second.
    """
    disable: Any = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
    apart: Callable[..., Any] = disable(function)
    return apart


def version(tensor: Tensor) -> int:
    """Number of changes of a tensor in place; 0 for tensors of inference mode, which are not counted."""
    return 0 if tensor.is_inference() else tensor._version
