"""Neurons whose time steps are fused, and steps of them that are computed before they are asked for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import origin, version
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


class Current:
    """The input of a neuron in a time step, as it came and repeated for the copies.

    Args:
        raw: as it came.
        may_come_again: whether it is worth finding out if another tensor was computed like this one, as that of a layer
            is that gets the same input in each time step.

    Attributes:
        repeated: for all rows; None as long as nobody has asked for it.
    """

    def __init__(self, raw: Tensor, may_come_again: bool = True) -> None:
        self.raw = raw
        self.repeated: Tensor | None = None
        self.count = version(raw)
        self._origin = origin(raw) if may_come_again else None

    def still_is(self, x: Tensor) -> bool:
        """The tensor is this very one, with the same numbers, or was computed from the same in the same way."""
        if self.raw is x or self._origin is None:
            return self.raw is x and version(x) == self.count
        if version(self.raw) != self.count or origin(x) != self._origin:
            return False
        # What is changed through ``.data`` is not counted; on other devices a look would wait for them.
        return x.device.type != "cpu" or torch.equal(x, self.raw)

    def then(self, x: Tensor) -> Current:
        """The current of the next time step, the same one if it still is."""
        return self if self.still_is(x) else Current(x, may_come_again=False)


@dataclass(frozen=True)
class Plan:
    """What one pass tells the next about a neuron: how many time steps had the same current.

    Attributes:
        steps: their number; one if that current changed.
        stride: from the number of a step's draw to that of the next.
    """

    steps: int = 1
    stride: int = 0


class Ahead:
    """Time steps of a neuron in one pass, of which some are computed before they are asked for.

    As long as a current stays the same, a neuron needs nobody else to go on. If it was so in the last pass, several
    steps are computed at once, without going to memory in between. If it is otherwise this time, they are computed
    again, from the start; the noise is the same, since it comes from a counter.

    Args:
        plan: from the last pass.

    Attributes:
        current: of the first step.
        start: membrane potential and reset before that, in all rows.
        steps: number of those that were asked for.
        waiting: spikes and membrane potentials of the train that goes on, in steps that were not.
        full: the states after these, in all rows, and the spikes that they are to be reset by.
        stride: from the number of a step's draw to that of the next.
    """

    # Of what waits; of large layers so many steps all the same, which take as much memory as their sums over time.
    most_bytes, steps_of_large_layers = 8_000_000, 6

    def __init__(self, plan: Plan) -> None:
        self.current: Current | None = None
        self.start: tuple[Tensor, Tensor] | None = None
        self.steps = 0
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()
        self.full: tuple[Mapping[str, Tensor], tuple[Tensor, Tensor, int] | None] = ({}, None)
        self._plan = plan
        self._first = 0
        self.stride = plan.stride
        self._regular = True

    @property
    def found(self) -> Plan:
        """For the next pass."""
        return Plan(self.steps, self.stride) if self._regular and self.steps > 1 else Plan()

    @property
    def next_draw(self) -> int:
        """Number of the next step's draw."""
        return self._first + self.steps * self.stride

    def is_next(self, x: Tensor, draw: int) -> bool:
        """A step waits, and it is the one with this current and this draw."""
        return bool(self.waiting) and self.current is not None and self.current.still_is(x) and draw == self.next_draw

    def ask(self, neuron: NoisyNeuron, current: Current, draw: int, size: int) -> int:
        """How many steps are worth computing, the one that is asked for among them.

        Args:
            neuron: the neuron, with the states before the step.
            current: its current.
            draw: number of the step's draw.
            size: bytes of what waits of a step.
        """
        if not self.steps:
            self.current, self.start, self._first = current, (neuron.mem, neuron.reset), draw
        elif self.steps == 1:
            self._regular &= self._plan.steps == 1 or self.stride == draw - self._first
            self.stride = draw - self._first
        self._regular &= current is self.current and draw == self.next_draw
        left = self._plan.steps - self.steps
        # Otherwise the derivative by the current depends on the spikes in between.
        same_gain = neuron.reset_mechanism != "zero" or neuron.has_unit_gain
        if left < 2 or not (self._regular and same_gain and neuron.state_names == ("mem",)):
            return 1
        runs = math.ceil(left / max(self.steps_of_large_layers, self.most_bytes // size))
        return math.ceil(left / runs)

    def give_up(self) -> None:
        """Computes no more steps before they are asked for."""
        self.waiting.clear()
        self._regular = False
