"""Noise copies: one pass runs the network on K copies of each sample, each with other noise."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .graph import version


class Copies:
    """Context in which the first noisy neuron repeats its input for K copies, so that all layers after it run K times.

    Args:
        count: K.
        targets: of the samples, batch first. The first tensor among them has the batch size; without one it is that of
            the current of the first noisy neuron.
        neurons: the noisy neurons of the network; those of another network repeat nothing.
        any_rows: one copy, of any number of rows: nothing is repeated, and no loss belongs to a row.

    Attributes:
        ran: whether a noisy neuron was run.
    """

    def __init__(self, count: int, targets: Any = None, neurons: Iterable[object] = (), any_rows: bool = False) -> None:
        self.count = count
        self.neurons = frozenset(neurons)
        self.any_rows = any_rows
        sizes = [len(leaf) for leaf in tree_flatten(targets)[0] if isinstance(leaf, Tensor) and leaf.dim()]
        self.batch: int | None = sizes[0] if sizes else None
        self.ran = False
        self._repeated: tuple[weakref.ref[Tensor], tuple[int, int, int], Tensor] | None = None
        self._token: Token[Copies | None] | None = None

    def __enter__(self) -> Copies:
        self._token = _running.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _running.reset(self._token)
        self._repeated = None

    @property
    def rows(self) -> int:
        """Number of rows after the first noisy neuron."""
        return self.count * (self.batch or 0)

    def repeat(self, x: Tensor, what: str, dim: int = 0) -> Tensor:
        """A tensor of ``batch`` rows in dimension ``dim``, repeated copy-first; one that has been repeated as it is.

        Raises:
            ValueError: if it has another number of rows; the error calls it ``what``.
        """
        rows = x.shape[dim]
        if self.batch is None:
            self.batch = rows
        if self.any_rows or rows == self.rows:
            return x
        if rows != self.batch:
            raise ValueError(
                f"{what} has {rows} rows, but there are {self.batch} samples in {self.count} copies: the first "
                "dimension must be the batch; of [time, batch, ...] give one time step"
            )
        last = self._repeated
        if last is not None and last[0]() is x and last[1] == (version(x), dim, version(last[2])):
            # A current that enters in each time step: its gradients are added up before they go back.
            return last[2]
        repeated = torch.cat([x] * self.count, dim)
        self._repeated = weakref.ref(x), (version(x), dim, version(repeated)), repeated
        return repeated

    def repeat_state(self, state: Any) -> Any:
        """A state for all copies; with another number of rows it stays, and snnTorch replaces it by zeros."""
        fits = isinstance(state, Tensor) and state.dim() and len(state) == self.batch
        return self.repeat(state, "a state") if fits else state

    def targets(self, targets: Any) -> Any:
        """Targets, repeated for the copies."""
        return tree_map(lambda x: self.repeat(x, "a target") if isinstance(x, Tensor) and x.dim() else x, targets)


_running: ContextVar[Copies | None] = ContextVar("snntorch_lr_copies", default=None)


def running_copies() -> Copies | None:
    """The copies that are being run now; None outside of ``backward(loss_fn, ...)``."""
    return _running.get()


def per_copy(x: Tensor) -> Tensor:
    """A tensor repeated for the noise copies, to meet tensors behind the first noisy neuron; for ``loss_fn``.

    For skip connections around a noisy neuron, ``torch.cat`` with its spikes, and losses that compare with the inputs.
    Targets arrive repeated already. In a loop of your own, and for repeated tensors, it is the identity.

    Args:
        x: ``[batch, ...]``, or without dimensions.

    Returns:
        ``[copies * batch, ...]``.

    Raises:
        ValueError: if the first dimension is not the batch.

    Examples:
        >>> spikes = lif(fc1(images))
        >>> current = fc2(torch.cat([spikes, slr.per_copy(images)], 1))
    """
    copies = _running.get()
    return x if copies is None or not x.dim() else copies.repeat(x, "what is given to per_copy")
