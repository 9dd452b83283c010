"""What is looked at while a network is run for the first time: layers that never fire, spikes without noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._messages import place, warn
from .graph import ancestors
from .network import spiking_neurons
from .noisy_neuron import NoisyNeuron


class FirstCall:
    """Context of a first forward pass: watches whether noisy neurons fire, and what noise-free ones feed.

    Spikes of a noise-free neuron are a step function of the weights before it: the likelihood ratio has no score for
    them, and their surrogate gradient is biased.

    Args:
        net: the network.
        noisy: its noisy neurons, by name.
        until: where no context ends it: the first pass after this is true ends it, with the warnings that are due.
    """

    def __init__(
        self, net: nn.Module, noisy: Mapping[str, NoisyNeuron], until: Callable[[], bool] | None = None
    ) -> None:
        self._until = until
        self._noisy = dict(noisy)
        ids = {id(neuron) for neuron in noisy.values()}
        self._plain = {name: neuron for name, neuron in spiking_neurons(net) if id(neuron) not in ids}
        self._least: dict[str, Tensor] = {}
        self._most: dict[str, Tensor] = {}
        # By number of the node that made them, which tells it from all others of the graph.
        self._spikes: dict[int, str] = {}
        self._membranes: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> FirstCall:
        for name, neuron in self._noisy.items():
            self._handles.append(neuron.register_forward_hook(_Look(self._fired, name)))
            self._handles.append(neuron.register_forward_pre_hook(_Look(self._before, name)))
        for name, plain in self._plain.items():
            self._handles.append(plain.register_forward_hook(_Look(self._emitted, place(name, plain))))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Watches no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Watches no longer, and says what was seen in a loop of the user's own, whose loss is not known."""
        if self._handles:
            self.stop()
            self.warn_about_noise_free()
            self.warn_about_silence()

    def _fired(self, name: str, neuron: Any, args: Any, output: Any) -> None:
        if not neuron.noise.active:
            if any(other.noise is not None and other.noise.active for other in self._noisy.values()):
                self._emitted(place(name, neuron), neuron, args, output)
            return
        fired = (output[0] if isinstance(output, tuple) else output).detach() != 0
        most, least = fired.any(), fired.all()
        self._most[name] = self._most[name] | most if name in self._most else most
        self._least[name] = self._least[name] & least if name in self._least else least

    def _emitted(self, name: str, neuron: Any, _: Any, output: Any) -> None:
        spikes = output[0] if isinstance(output, tuple) else output
        if isinstance(spikes, Tensor) and spikes.grad_fn is not None:
            self._spikes[spikes.grad_fn._sequence_nr()] = name
        mem = getattr(neuron, "mem", None)
        resets = getattr(neuron, "reset_mechanism", "none") != "none" or hasattr(neuron, "recurrent")
        if resets and isinstance(mem, Tensor) and mem.grad_fn is not None:
            self._membranes[mem.grad_fn._sequence_nr()] = name

    def _before(self, name: str, neuron: Any, args: Any) -> None:
        if self._until is not None and self._until():
            self.finish()
            return
        current = args[0] if args else None
        if not self._spikes or not isinstance(current, Tensor) or current.grad_fn is None or not neuron.noise.active:
            return
        first = min(self._spikes)
        numbers = {node._sequence_nr() for node in ancestors([current], lambda node: node._sequence_nr() < first)}
        feeding = sorted({self._spikes[number] for number in numbers & self._spikes.keys()})
        if feeding:
            names = ", ".join(feeding)
            raise ValueError(
                f"the spikes of {names} have no noise, but feed {place(name, neuron)}: the likelihood ratio knows no "
                f"gradient for the weights before {names}. Give it noise too (noise=True, or add_noise(net)), or "
                "freeze those weights with requires_grad_(False)"
            )

    def check_losses(self, losses: Tensor, *roots: Tensor) -> None:
        """Warns of a loss that reads what noise-free neurons emit; refuses one that nothing was learned by.

        Args:
            losses: with their graph.
            *roots: from where else the gradient comes.

        Raises:
            ValueError: if no parameter would get a gradient.
        """
        if not any(hasattr(node, "variable") for node in ancestors([losses, *roots])):
            raise ValueError(
                "there is nothing to learn: all parameters that loss_fn uses are frozen, noise levels too; call "
                "requires_grad_() on those to train, or on the inputs"
            )
        self.warn_about_noise_free({node._sequence_nr() for node in ancestors([losses])})

    def warn_about_noise_free(self, read: set[int] | None = None) -> None:
        """Warns of noise-free neurons whose spikes or membranes are read.

        Args:
            read: numbers of the nodes that are behind the loss; None if that is not known.
        """
        spiking = {name for number, name in self._spikes.items() if read is None or number in read}
        resetting = {name for number, name in self._membranes.items() if read is None or number in read} - spiking
        if read is None:
            spiking = {name for name in spiking if name in self._membranes.values()}
        condition = "if the loss reads them, " if read is None else ""
        if spiking:
            warn(
                f"the spikes of {', '.join(sorted(spiking))} have no noise: {condition}the weights before it get their "
                "surrogate gradient, which is biased. Give it noise too, or read its membrane potential with "
                "reset_mechanism='none'"
            )
        if resetting and read is not None:
            warn(
                f"the loss reads the membrane potential of {', '.join(sorted(resetting))}, which has no noise and "
                "resets: the gradient ignores that a weight changes when it resets. Use reset_mechanism='none' for a "
                "readout"
            )

    def dead(self) -> dict[str, str]:
        """Layers whose spikes tell nothing, and why."""
        found = {}
        for name, neuron in self._noisy.items():
            where = place(name, neuron)
            if name not in self._most:
                found[name] = f"{where} was not called"
            elif not bool(self._most[name]):
                found[name] = f"{where} never fired"
            elif bool(self._least[name]):
                found[name] = f"all of {where} fired in every step"
        return found

    def warn_about_silence(self) -> None:
        """Warns of layers that tell nothing by their spikes, but for readouts that are not to fire."""
        dead = [said for name, said in self.dead().items() if self._noisy[name].reset_mechanism != "none"]
        if dead:
            warn(
                f"{', '.join(dead)} in the first call: spikes that never change tell nothing, and weights around them "
                "learn nothing or by chance. Change the threshold, the noise level or the weights in front of it; "
                "where only the membrane potential is read, nothing is wrong"
            )


class _Look:
    """Hook of a neuron; a copy or pickle of the neuron has one that looks at nothing."""

    def __init__(self, look: Any = None, name: str = "") -> None:
        self._look = look
        self._name = name

    def __call__(self, neuron: Any, *given: Any) -> None:
        if self._look is not None and torch.is_grad_enabled():
            self._look(self._name, neuron, *given)

    def __reduce__(self) -> tuple[type[_Look], tuple[()]]:
        return _Look, ()
