"""Neurons whose time steps are fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import version
from ..kernels import fused_on
from ..kernels.kinds import ERASE, NONE, SUBTRACT, ZERO
from ..noise_stream import NoiseStream
from ..noisy_neuron import NoisyNeuron


def _fits(value: Tensor, x: Tensor) -> bool:
    """One number, or one for each neuron of a row: it broadcasts against a row without making more of it."""
    missing = x.dim() - value.dim()
    row = (1, *x.shape[1:])
    return missing >= 0 and all(a in (1, b) for a, b in zip(value.shape, row[missing:], strict=True))


def _given(neuron: NoisyNeuron) -> tuple[Tensor, ...]:
    assert neuron.noise is not None
    return *(getattr(neuron, name) for name in neuron.update_parameters), neuron.threshold, neuron.noise.log_sigma


def _mechanism(neuron: NoisyNeuron) -> int:
    if neuron.reset_mechanism == "zero":
        return ZERO if neuron.resets_before_current else ERASE
    return SUBTRACT if neuron.reset_mechanism == "subtract" else NONE


@dataclass(frozen=True)
class Fused:
    """Constants of a neuron during a forward pass, as a fused time step takes them.

    Attributes:
        kernels: the module with fused steps for the device.
        kind: of the noise.
        mechanism: of the reset.
        keys: of the noise, one for each set of rows, as int64.
        leak: of the membrane potential, one number for each neuron of a row, as the next four.
        share: what the current adds to that.
        alpha: leak of the synaptic current; zero where there is none.
        threshold: threshold.
        sigma: noise level.
        shape: of a row.
        dtype: of all.
        placeholder: a number that takes any shape.
        given: the tensors of the neuron that these are made of, with how often they had been changed.
        known_weights: those that were asked for.
    """

    kernels: Any
    kind: int
    mechanism: int
    keys: Tensor
    leak: Tensor
    share: Tensor
    alpha: Tensor
    threshold: Tensor
    sigma: Tensor
    shape: torch.Size
    dtype: torch.dtype
    placeholder: Tensor
    given: tuple[tuple[Tensor, int], ...]
    known_weights: dict[tuple[float, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def can_be(neuron: NoisyNeuron, x: Tensor) -> bool:
        """A neuron of which nothing but the noise level is learned, and that fires above its threshold."""
        noise = neuron.noise
        return (
            noise is not None
            and noise.kind is not None
            and neuron.has_known_graph
            and neuron.fires_above_threshold
            and type(neuron).fire is NoisyNeuron.fire
            and type(neuron).mem_reset is NoisyNeuron.mem_reset
            and x.dim() > 1
            and x.numel() > 0
            and all(_fits(value, x) for value in _given(neuron))
            and all(torch.result_type(value, x) == x.dtype for value in _given(neuron)[:-1])
            and fused_on(x.device, x.dtype) is not None
        )

    @classmethod
    def of(cls, neuron: NoisyNeuron, x: Tensor, streams: Sequence[NoiseStream]) -> Fused:
        """The constants of a neuron, given its input."""

        one = x.new_ones(())
        leak, share = neuron.leak_and_share(one)

        def spread(value: Tensor) -> Tensor:
            return value.detach().to(x.device, x.dtype).expand(1, *x.shape[1:]).reshape(-1).contiguous()

        assert neuron.noise is not None
        assert neuron.noise.kind is not None
        keys = np.array([stream.key for stream in streams], np.uint64).view(np.int64)
        return cls(
            fused_on(x.device, x.dtype),
            neuron.noise.kind,
            _mechanism(neuron),
            torch.from_numpy(keys).to(x.device, non_blocking=True),
            spread(leak),
            spread(one if share is None else share),
            spread(neuron.alpha.clamp(0, 1) if "syn" in neuron.state_names else 0 * one),
            spread(neuron.threshold),
            spread(neuron.noise.sigma),
            x.shape[1:],
            x.dtype,
            one,
            tuple((value, version(value)) for value in _given(neuron)),
        )

    def weights(self, values: tuple[float, ...]) -> Tensor:
        """Weights of time steps in sums of spikes, as a kernel takes them."""
        if values not in self.known_weights:
            found = torch.tensor(values, dtype=self.dtype)
            self.known_weights[values] = found.to(self.placeholder.device, non_blocking=True)
        return self.known_weights[values]

    def suits(self, neuron: NoisyNeuron, x: Tensor) -> bool:
        """The constants still hold: a neuron may serve layers of several sizes, and its threshold may be changed."""
        same = all(a is b and version(a) == count for a, (b, count) in zip(_given(neuron), self.given, strict=True))
        return same and x.shape[1:] == self.shape and x.dtype == self.dtype

    def shaped(self, x: Tensor, rows: int) -> Tensor:
        """A tensor without memory, in the shape of an input of so many rows."""
        return self.placeholder.expand(rows, *x.shape[1:])
