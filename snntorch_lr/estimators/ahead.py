"""Time steps that are computed before they are asked for, as long as a current stays the same."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..noisy_neuron import NoisyNeuron
from .recording import Current


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

    # Of what waits; a few steps at once are as good as many.
    most_bytes = 8_000_000

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
        runs = math.ceil(left / max(1, self.most_bytes // size))
        return math.ceil(left / runs)

    def give_up(self) -> None:
        """Computes no more steps before they are asked for."""
        self.waiting.clear()
        self._regular = False
