"""Sets noise levels, and if asked the scale of weights, by what a batch does to the membrane potentials."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._messages import aligned, places, warn
from .network import left_as_found, reset_state, spiking_neurons
from .noisy_neuron import NoisyNeuron
from .validate import noisy

# A layer that resets does not answer to the scale of its weights in proportion: one division is not enough.
_TRIES = 5
_CLOSE = 0.05
_STEP_UP = 1.25


@dataclass(frozen=True)
class CalibratedLayer:
    """Measurements and settings of ``calibrate`` at one noisy neuron.

    Attributes:
        name: of the neuron, as in ``net.named_modules()``.
        readout: whether it is the last, with nothing learned after it.
        spread: standard deviation of the membrane potential over batch, neurons and time, without its own noise.
        sigma: noise level that was set; the mean, if neurons have their own.
        gain: what the weights in front were multiplied with; None if they were left as they are.
        rate_off: spikes per neuron and time step without noise.
        rate_on: the same with noise at all layers.
    """

    name: str
    readout: bool
    spread: float
    sigma: float
    gain: float | None
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
            ["layer", "rate, noise off", "rate, noise on", "spread", "σ", "gain"],
            [
                [
                    f"{each.name} (readout)" if each.readout else each.name,
                    f"{each.rate_off:.3f}",
                    f"{each.rate_on:.3f}",
                    f"{each.spread:.3g}",
                    f"{each.sigma:.3g}",
                    "" if each.gain is None else f"{each.gain:.3g}",
                ]
                for each in self.layers
            ],
        )


@torch.no_grad()
def calibrate(
    net: nn.Module,
    sample: Any,
    forward: Callable[[Any], Any] | None = None,
    sigma: float | Tensor = 0.25,
    scale_weights: bool = False,
    min_rate: float = 0.02,
) -> Calibration:
    """Sets the noise level of each neuron by its membrane potentials on a batch; scales weights so that layers fire.

    Layer by layer, in the order in which data flows, with noise in the layers before: σ of a hidden layer becomes
    ``sigma`` times the standard deviation of its membrane potentials, or as much more as it takes to fire at
    ``min_rate``: the deeper layers of fresh networks often never fire, and then tell nothing. σ of a spiking readout
    becomes its threshold. It needs that much, because silent outputs are a minimum of most losses, and without noise
    one with no way out.

    Predict by what the loss reads. A loss of membrane potentials does not care for the spikes of the readout, which
    may fall silent: then a prediction by spike counts fails, however small the loss is. No one can see that from here.

    Args:
        net: a network with noisy neurons (see ``add_noise``), changed in place.
        sample: a batch of inputs.
        forward: runs the network over all time steps, called as ``forward(sample)``; by default ``net(sample)``. To
            run it as a loss does: ``lambda images: loss_fn(images, labels)``.
        sigma: noise level of hidden layers, in units of the standard deviation of their membrane potentials.
        scale_weights: multiply weight and bias of the module in front of each neuron with one number, so that the
            standard deviation of the membrane potentials becomes the threshold. For fresh networks that hardly fire
            and train slowly without; not for trained ones.
        min_rate: spikes per neuron and time step that a hidden layer fires at least, with noise; 0 to leave σ as
            ``sigma`` says.

    Returns:
        What was measured and set, as a table to print.

    Raises:
        ValueError: if the network has no noisy neuron, ``forward`` does not run all of them, or ``min_rate`` is not
            in [0, 0.5).

    Examples:
        >>> print(slr.calibrate(net, images, lambda x: slr.rollout(net, x, num_steps=5), scale_weights=True))
        layer  rate, noise off  rate, noise on  spread     σ  gain
        ...
    """
    if not 0 <= min_rate < 0.5:
        raise ValueError(f"min_rate is in spikes per neuron and time step, in [0, 0.5), got {min_rate!r}")
    neurons = noisy(net)
    run = _Run(net, neurons, lambda: (net if forward is None else forward)(sample))
    measured = []
    with left_as_found(net, buffers=True), _forced_back(neurons):
        _force(neurons.values(), False)
        for stop in run.stops():
            neuron = neurons[stop.name]
            threshold, spread, gain = float(neuron.threshold.mean()), run.meters()[stop.name].spread, None
            for _ in range(_TRIES if scale_weights and stop.block else 0):
                if spread == 0 or abs(math.log(spread / threshold)) < _CLOSE:
                    break
                gain = (gain or 1.0) * threshold / spread
                for parameter in stop.block:
                    parameter.mul_(threshold / spread)
                spread = run.meters()[stop.name].spread
            level = torch.as_tensor(threshold if stop.readout else sigma * (spread or threshold))
            assert neuron.noise is not None
            neuron.noise.log_sigma.copy_(level.log())
            _force([neuron], True)
            # At the threshold, noise alone makes a neuron fire in a quarter of the steps or so.
            while not stop.readout and bool(level.max() < threshold) and run.meters()[stop.name].rate < min_rate:
                level = (level * _STEP_UP).clamp(max=threshold)
                neuron.noise.log_sigma.copy_(level.log())
            measured.append((stop.name, stop.readout, spread, float(neuron.noise.sigma.mean()), gain))
        on = run.meters()
        _force(neurons.values(), False)
        off = run.meters()
    run.reset()
    layers = tuple(CalibratedLayer(*each, off[each[0]].rate, on[each[0]].rate) for each in measured)
    _warn_about_silence(layers, neurons)
    return Calibration(layers)


class _Meter:
    """Sums over what one neuron does."""

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


@dataclass(frozen=True)
class _Stop:
    """A neuron on the way of the data, the weight and bias in front of it, and whether nothing learned comes after."""

    name: str
    block: list[nn.Parameter]
    readout: bool


class _Run:
    """Runs a network from fresh states, and watches."""

    def __init__(self, net: nn.Module, neurons: Mapping[str, NoisyNeuron], forward: Callable[[], Any]) -> None:
        self._forward = forward
        self._neurons = neurons
        self._spiking = [neuron for _, neuron in spiking_neurons(net)]
        inside = {part for neuron in self._spiking for part in neuron.modules()}
        self._blocks = {module: own for module in net.modules() if module not in inside and (own := _learned(module))}

    def stops(self) -> list[_Stop]:
        """The noisy neurons as data flows.

        Raises:
            ValueError: if one did not run.
        """
        called: dict[nn.Module, None] = {}
        self._watch([*self._spiking, *self._blocks], lambda module, _: called.setdefault(module))
        names: dict[nn.Module, str] = {neuron: name for name, neuron in self._neurons.items()}
        way = list(called)
        missing = {name: neuron for name, neuron in self._neurons.items() if neuron not in called}
        if missing:
            raise ValueError(
                f"the forward pass did not run {places(missing)}, whose membrane potentials are to be measured: "
                "pass forward=, a function that runs the whole network on the sample"
            )
        return [
            _Stop(names[module], self._blocks.get(way[place - 1], []) if place else [], module is way[-1])
            for place, module in enumerate(way)
            if module in names
        ]

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


def _learned(module: nn.Module) -> list[nn.Parameter]:
    """Weight and bias of a module whose output they scale."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return []
    bias = getattr(module, "bias", None)
    return [weight, bias] if isinstance(bias, nn.Parameter) else [weight]


@contextmanager
def _forced_back(neurons: Mapping[str, NoisyNeuron]) -> Iterator[None]:
    before = [(neuron.noise, neuron.noise.forced) for neuron in neurons.values() if neuron.noise is not None]
    try:
        yield
    finally:
        for noise, forced in before:
            noise.forced = forced


def _force(neurons: Iterable[NoisyNeuron], on: bool) -> None:
    for neuron in neurons:
        if neuron.noise is not None:
            neuron.noise.forced = on


def _warn_about_silence(layers: Iterable[CalibratedLayer], neurons: Mapping[str, NoisyNeuron]) -> None:
    silent = {each.name: neurons[each.name] for each in layers if each.rate_on == 0}
    if silent:
        warn(
            f"{places(silent)} never fired on the sample, even with noise: nothing before it can learn. For a fresh "
            "network use scale_weights=True; otherwise a higher sigma, or check the inputs"
        )
