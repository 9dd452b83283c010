"""Noise levels: set by what a batch does to the membrane potentials, and lowered during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._messages import aligned, places, positive_integer, warn
from .network import left_as_found, noises, reset_state, spiking_neurons
from .noisy_neuron import NoisyNeuron
from .validate import noisy

_STEP_UP = 1.25


@dataclass(frozen=True)
class CalibratedLayer:
    """Measurements and the noise level of ``calibrate`` at one noisy neuron.

    Attributes:
        name: of the neuron, as in ``net.named_modules()``.
        readout: whether it is the last, with nothing learned after it.
        spread: standard deviation of the membrane potential over batch, neurons and time, without its own noise.
        sigma: noise level that was set; the mean, if neurons have their own.
        rate_off: spikes per neuron and time step without noise.
        rate_on: the same with noise at all layers.
    """

    name: str
    readout: bool
    spread: float
    sigma: float
    rate_off: float
    rate_on: float


@dataclass(frozen=True)
class Calibration:
    """Result of ``calibrate``, layer by layer in the order in which data flows; ``print`` shows a table.

    Examples:
        >>> calibration = slr.calibrate(net, images, lambda x: slr.rollout(net, x, num_steps=5))
        >>> [layer.name for layer in calibration.layers]
        ['1']
    """

    layers: tuple[CalibratedLayer, ...]

    def __str__(self) -> str:
        """An aligned table."""
        return aligned(
            ["layer", "rate, noise off", "rate, noise on", "spread", "σ"],
            [
                [
                    f"{layer.name} (readout)" if layer.readout else layer.name,
                    f"{layer.rate_off:.3f}",
                    f"{layer.rate_on:.3f}",
                    f"{layer.spread:.3g}",
                    f"{layer.sigma:.3g}",
                ]
                for layer in self.layers
            ],
        )


@torch.no_grad()
def calibrate(
    net: nn.Module,
    sample: Any,
    forward: Callable[[Any], Any] | None = None,
    sigma: float | Tensor = 0.25,
    min_rate: float = 0.02,
) -> Calibration:
    """Sets the noise level of each neuron by its membrane potentials on a batch.

    Layer by layer, in the order in which data flows, with noise in the layers before: σ of a hidden layer becomes
    ``sigma`` times the standard deviation of its membrane potentials, or as much more as it takes to fire at
    ``min_rate``: the deeper layers of fresh networks often never fire, and then tell nothing. σ of a spiking readout
    becomes its threshold. It needs that much: silent outputs are a minimum of most losses, with no way out without
    noise.

    Predict by what the loss reads. A loss of membrane potentials does not care for the spikes of the readout, which
    may fall silent: then a prediction by spike counts fails, however small the loss is. ``calibrate`` cannot see that.

    Args:
        net: a network with noisy neurons (see ``add_noise``), changed in place.
        sample: a batch of inputs.
        forward: runs the network over all time steps, called as ``forward(sample)``; by default ``net(sample)``. To
            run it as a loss does: ``lambda images: loss_fn(images, labels)``.
        sigma: noise level of hidden layers, in units of the standard deviation of their membrane potentials.
        min_rate: spikes per neuron and time step that a hidden layer fires at least, with noise; 0 to leave σ as
            ``sigma`` says.

    Returns:
        What was measured and set, as a table to print.

    Raises:
        ValueError: if the network has no noisy neuron, ``forward`` does not run all of them, or ``min_rate`` is not
            in [0, 0.5).

    Examples:
        >>> print(slr.calibrate(net, images, lambda x: slr.rollout(net, x, num_steps=5)))
        layer  rate, noise off  rate, noise on  spread ... σ
        ...
    """
    if not 0 <= min_rate < 0.5:
        raise ValueError(f"min_rate is in spikes per neuron and time step, in [0, 0.5), got {min_rate!r}")
    neurons = noisy(net)
    run = _Run(net, neurons, lambda: (net if forward is None else forward)(sample))
    levels = {name: neuron.noise for name, neuron in neurons.items() if neuron.noise is not None}
    measured = []
    with left_as_found(net, buffers=True), ExitStack() as at_end:
        for noise in levels.values():
            at_end.callback(setattr, noise, "forced", noise.forced)
            noise.forced = False
        for name, readout in run.order():
            noise, threshold, spread = levels[name], float(neurons[name].threshold.mean()), run.meters()[name].spread
            level = torch.as_tensor(threshold if readout else sigma * (spread or threshold))
            noise.log_sigma.copy_(level.log())
            noise.forced = True
            # At the threshold, noise alone makes a neuron fire in a quarter of the steps or so.
            while not readout and bool(level.max() < threshold) and run.meters()[name].rate < min_rate:
                level = (level * _STEP_UP).clamp(max=threshold)
                noise.log_sigma.copy_(level.log())
            measured.append((name, readout, spread, float(noise.sigma.mean())))
        on = run.meters()
        for noise in levels.values():
            noise.forced = False
        off = run.meters()
    run.reset()
    layers = tuple(CalibratedLayer(*values, off[values[0]].rate, on[values[0]].rate) for values in measured)
    silent = {layer.name: neurons[layer.name] for layer in layers if layer.rate_on == 0}
    if silent:
        warn(
            f"{places(silent)} never fired on the sample, even with noise: nothing before it can learn. In a fresh "
            "network draw larger weights (torch.nn.init.kaiming_normal_); otherwise a higher sigma, or check the inputs"
        )
    return Calibration(layers)


class _Meter:
    """Sums over the membrane potentials and spikes of one neuron."""

    def __init__(self) -> None:
        self.count = 0
        self.fired = self.total = self.square = 0.0

    def add(self, mem: Tensor, spikes: Tensor) -> None:
        self.count += mem.numel()
        self.fired += float((spikes != 0).sum())
        self.total += float(mem.double().sum())
        self.square += float(mem.double().square().sum())

    @property
    def rate(self) -> float:
        return self.fired / self.count

    @property
    def spread(self) -> float:
        return math.sqrt(max(self.square / self.count - (self.total / self.count) ** 2, 0.0))


class _Run:
    """Runs a network from fresh states, and watches."""

    def __init__(self, net: nn.Module, neurons: Mapping[str, NoisyNeuron], forward: Callable[[], Any]) -> None:
        self._forward = forward
        self._neurons = neurons
        self._spiking = [neuron for _, neuron in spiking_neurons(net)]
        inside = {part for neuron in self._spiking for part in neuron.modules()}
        self._learned = [module for module in net.modules() if module not in inside and _has_weights(module)]

    def order(self) -> list[tuple[str, bool]]:
        """Names of the noisy neurons as data flows, and whether nothing learned comes after each.

        Raises:
            ValueError: if one did not run.
        """
        called: dict[nn.Module, None] = {}
        self._watch([*self._spiking, *self._learned], lambda module, _: called.setdefault(module))
        missing = {name: neuron for name, neuron in self._neurons.items() if neuron not in called}
        if missing:
            raise ValueError(
                f"the forward pass did not run {places(missing)}, whose membrane potentials are to be measured: "
                "pass forward=, a function that runs the whole network on the sample"
            )
        names: dict[nn.Module, str] = {neuron: name for name, neuron in self._neurons.items()}
        last = [*called][-1]
        return [(names[module], module is last) for module in called if module in names]

    def meters(self) -> dict[str, _Meter]:
        """Rates and spreads of the noisy neurons in one run."""
        meters: dict[nn.Module, _Meter] = {neuron: _Meter() for neuron in self._neurons.values()}
        self._watch(meters, lambda neuron, spikes: meters[neuron].add(neuron.mem, spikes))
        return {name: meters[neuron] for name, neuron in self._neurons.items()}

    def _watch(self, modules: Iterable[Any], look: Callable[[Any, Any], object]) -> None:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            look(module, output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(hook) for module in modules]
        try:
            self.reset()
            self._forward()
        finally:
            for handle in handles:
                handle.remove()

    def reset(self) -> None:
        """Zeroes the state of all neurons."""
        for neuron in self._spiking:
            reset_state(neuron)


def _has_weights(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.requires_grad


class Anneal:
    """Scheduler of noise levels, made by ``anneal``; arguments as there."""

    def __init__(self, net: nn.Module, steps: int, to: float) -> None:
        self.steps = positive_integer("steps", steps)
        if not isinstance(to, (int, float)) or not 0 < to <= 1:
            raise ValueError(f"to must be in (0, 1], as a fraction of the noise level, got {to!r}")
        self.to = float(to)
        self.done = 0
        self._noises = noises(net)
        if not self._noises:
            raise ValueError(
                f"{type(net).__name__} has no noise to anneal: build neurons with noise=True, or call "
                "snntorch_lr.add_noise(net)"
            )
        self._set()

    @property
    def factor(self) -> float:
        """Factor of the levels now."""
        return float(self.to ** (min(self.done, self.steps) / self.steps))

    def step(self) -> None:
        """Lets the levels fall; after ``steps`` calls they stay."""
        self.done += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """The position of the schedule; the levels themselves are in the ``state_dict`` of the network."""
        return {"steps": self.steps, "to": self.to, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state_dict()``."""
        self.steps, self.to, self.done = int(state["steps"]), float(state["to"]), int(state["done"])
        self._set()

    def _set(self) -> None:
        with torch.no_grad():
            for noise in self._noises.values():
                noise.annealed.fill_(self.factor)


def anneal(net: nn.Module, steps: int, to: float = 1 / 3) -> Anneal:
    """Lets the noise levels of a network fall during training: a scheduler as those of ``torch.optim.lr_scheduler``.

    ``net.eval()`` turns the noise off, and a network without its noise is another one: on spoken digits its accuracy
    fell from .89 to .70. With levels that fall geometrically the two come together. Learned levels go on to be learned:
    ``step`` sets a factor on them.

    Args:
        net: a network with noisy neurons or inputs.
        steps: number of calls of ``step`` until the end, as many as optimizer steps, or epochs.
        to: the factor at the end, in (0, 1].

    Returns:
        A scheduler with ``step()``, ``state_dict()`` and ``load_state_dict()``.

    Raises:
        ValueError: if the network has no noise, or an argument is wrong.

    Examples:
        >>> scheduler = slr.anneal(net, steps=2, to=0.25)
        >>> scheduler.step()
        >>> round(float(net[1].noise.sigma), 3)  # 0.5 before
        0.25
    """
    return Anneal(net, steps, to)
