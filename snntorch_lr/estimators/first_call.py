"""What an estimator looks at in its first call: whether there is anything to learn from, and whether rows are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from .._messages import warn
from ..noise import EscapeNoise, MembraneNoise
from ..noisy_neuron import NoisyNeuron
from .recording import Copies, Recording, Step


class Firing:
    """Context that watches whether noisy neurons fire.

    Args:
        neurons: by name.
    """

    def __init__(self, neurons: Mapping[str, NoisyNeuron]) -> None:
        self._neurons = neurons
        self._least: dict[str, Tensor] = {}
        self._most: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Firing:
        self._handles = [each.register_forward_hook(_Look(self, name)) for name, each in self._neurons.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def look(self, name: str, spikes: Tensor) -> None:
        """Adds the spikes of a step."""
        fired = spikes.detach() != 0
        most, least = fired.any(), fired.all()
        self._most[name] = self._most[name] | most if name in self._most else most
        self._least[name] = self._least[name] & least if name in self._least else least

    def dead(self) -> dict[str, str]:
        """What is wrong with the spikes of each layer that tells nothing by them."""
        found = {}
        for name, neuron in self._neurons.items():
            place = name or type(neuron).__name__
            if name not in self._most:
                found[name] = f"{place} was not called"
            elif not bool(self._most[name]):
                found[name] = f"{place} never fired"
            elif bool(self._least[name]):
                found[name] = f"all of {place} fired in every step"
        return found

    def warn(self) -> None:
        """Warns of layers that tell nothing by their spikes, but for readouts that are not to fire."""
        dead = [said for name, said in self.dead().items() if self._neurons[name].reset_mechanism != "none"]
        if dead:
            warn(
                f"{', '.join(dead)} in the first call: spikes that never change tell nothing, and weights around them "
                "learn nothing or by chance. Change the threshold, the noise level or the weights in front of it; "
                "where only the membrane potential is read, nothing is wrong"
            )


class _Look:
    """Forward hook of a neuron; a copy or pickle of the neuron has one that looks at nothing."""

    def __init__(self, firing: Firing | None = None, name: str = "") -> None:
        self._firing = firing
        self._name = name

    def __call__(self, neuron: NoisyNeuron, _: Any, output: Any) -> None:
        if self._firing is not None and not isinstance(neuron.sampler, Forced):
            self._firing.look(self._name, output[0] if isinstance(output, tuple) else output)

    def __reduce__(self) -> tuple[type[_Look], tuple[()]]:
        return _Look, ()


class _ForcedStep(Step):
    """A time step of two copies, of which the first one samples."""

    recording: Forced

    def sample(self, noise: MembraneNoise, mean: Tensor) -> Tensor:
        """A membrane potential, in the second copy on one side of the threshold."""
        sampled = super().sample(noise, mean)
        threshold = self.neuron.threshold
        margin = 1.0 if self.recording.fires else -1.0
        sampled[len(sampled) // 2 :] = margin if threshold.requires_grad else threshold + margin
        return sampled

    def fire(self, noise: EscapeNoise, margin: Tensor) -> Tensor:
        """Spikes, in the second copy all of them or none."""
        spikes = super().fire(noise, margin)
        spikes[len(spikes) // 2 :] = float(self.recording.fires)
        return spikes


class Forced(Recording):
    """A pass of two copies, of which the second one's neurons all fire in every step, or never."""

    step_type = _ForcedStep

    def __init__(self, copies: Copies, fires: bool) -> None:
        super().__init__(copies)
        self.fires = fires


def check_rows_are_apart(losses: Callable[[bool], Tensor | None]) -> None:
    """Refuses losses of rows that change with the spikes of other rows.

    Each row's loss meets the score of that row alone. A term over all rows is the same for each of them, and vanishes
    against a baseline. Rows of one copy may be coupled, as in a vote.

    Args:
        losses: those of one copy, while all neurons of the other fire always, or never; None if there are none.

    Raises:
        ValueError: if they differ.
    """
    never, always = losses(False), losses(True)
    if never is None or always is None or _same(never, always):
        return
    again = losses(False)
    if again is None or not _same(never, again):
        # They change by themselves.
        return
    raise ValueError(
        "the loss of a sample changes with the spikes of other rows: the likelihood ratio gives a term over all rows, "
        "such as clamp(spikes.mean() - 0.15, min=0), no gradient or a wrong one. Give each row its own, a mean over "
        "time and neurons only: losses + 0.1 * snntorch_lr.objectives.rate_above(spikes, 0.15), with spikes "
        "[time, rows, ...], returns one number per row"
    )


def _same(first: Tensor, second: Tensor) -> bool:
    # Room for other orders of summation, where the hardware takes them.
    first, second = first.double(), second.double()
    room = 1e-5 * first.abs().nan_to_num(0, 0, 0).max().clamp(min=1e-30)
    return bool(((first == second) | ((first - second).abs() <= room) | (first.isnan() & second.isnan())).all())


def use_running_statistics(net: nn.Module) -> None:
    """Switches BatchNorm layers to evaluation mode: the rows that they couple have a warning of their own."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.training = False
