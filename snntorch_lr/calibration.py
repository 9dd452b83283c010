"""Noise levels: set by what a batch does to the membrane potentials, and lowered during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ._messages import aligned, places, positive_integer, warn
from .network import left_as_found, noises, reset_state, spiking_neurons
from .noise import EscapeNoise
from .noisy_neuron import NoisyNeuron
from .validate import Credits, Look, comes_near, noisy

_STEP_UP = 1.25
# Spikes per neuron and time step at which a readout learns by itself; fewer are a silent minimum of most losses.
_READOUT = 0.05
# A layer that needs noise of so many spreads to fire carries no signal any more.
_MOST_SPREADS = 10


@dataclass(frozen=True)
class CalibratedLayer:
    """Measurements and the noise level of ``calibrate`` at one noisy neuron.

    Attributes:
        name: of the neuron, as in ``net.named_modules()``.
        readout: whether it is the last, with nothing learned after it.
        read: what reaches the output or the loss: ``"spikes"``, ``"membrane"``, ``"both"``, ``"first spike"`` (one
            of all spikes of a neuron), or ``"unknown"`` if there is no derivative.
        spread: standard deviation of the membrane potential over batch, neurons and time, without its own noise.
        sigma: noise level that was set; the mean, if neurons have their own; 0 where the noise was removed.
        rate_off: spikes per neuron and time step without noise.
        rate_on: the same with noise at all layers.
        note: what a user should know, or nothing.
    """

    name: str
    readout: bool
    read: str
    spread: float
    sigma: float
    rate_off: float
    rate_on: float
    note: str = ""


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
        """An aligned table, and the notes under it."""
        table = aligned(
            ["layer", "read", "rate, noise off", "rate, noise on", "spread", "σ"],
            [
                [
                    f"{layer.name} (readout)" if layer.readout else layer.name,
                    layer.read,
                    f"{layer.rate_off:.3f}",
                    f"{layer.rate_on:.3f}",
                    f"{layer.spread:.3g}",
                    f"{layer.sigma:.3g}" if layer.sigma else "no noise",
                ]
                for layer in self.layers
            ],
            left=2,
        )
        return "\n".join([table, *(f"{layer.name}: {layer.note}" for layer in self.layers if layer.note)])


@torch.no_grad()
def calibrate(
    net: nn.Module,
    sample: Any,
    forward: Callable[[Any], Any] | None = None,
    sigma: float | Tensor = 0.25,
    min_rate: float = 0.02,
    loss_fn: Callable[..., Any] | None = None,
) -> Calibration:
    """Sets the noise level of each neuron by its membrane potentials on a batch.

    Layer by layer, in the order in which data flows, with noise in the layers before: σ becomes ``sigma`` times the
    standard deviation of the membrane potentials, or as much more as the layer needs to fire at ``min_rate``: the
    deeper layers of fresh networks often never fire, and then tell nothing. A readout whose spikes are read, and which
    fires at less than .05, gets its threshold as σ: silent outputs are a minimum of most losses, with no way out
    without noise. If the loss reads first spikes alone, escape noise is only as large as it takes to fire at twice
    ``min_rate``: early spikes by chance drown the others. σ exceeds neither the threshold nor ten times the spread.

    One backward pass from the output, or from the loss, tells what of a neuron is read. Where that is the membrane
    potential alone, and nothing resets it (``reset_mechanism="none"``, or a threshold that it never comes near), noise
    would only disturb: it is removed, with a warning.

    Predict by what the loss reads. A loss of membrane potentials does not care for the spikes of the readout, which
    may fall silent: then a prediction by spike counts fails, however small the loss is. With ``loss_fn`` the table says
    where that may happen.

    Args:
        net: a network with noisy neurons (see ``add_noise``), changed in place.
        sample: a batch of inputs; with ``loss_fn`` also ``(inputs, targets)``.
        forward: runs the network over all time steps, called as ``forward(sample)``; by default ``net(sample)``.
        sigma: noise level, in units of the standard deviation of the membrane potentials.
        min_rate: spikes per neuron and time step that a hidden layer fires at least, with noise; 0 to leave the σ of
            all layers as ``sigma`` says.
        loss_fn: forward pass and loss, in place of ``forward``, called as ``loss_fn(*sample)`` if the sample is a
            tuple, as ``loss_fn(sample)`` otherwise.

    Returns:
        What was measured and set, as a table to print.

    Raises:
        ValueError: if the network has no noisy neuron, ``forward`` does not run all of them, both ``forward`` and
            ``loss_fn`` are given, or ``min_rate`` is not in [0, 0.5).

    Examples:
        >>> print(slr.calibrate(net, images, lambda x: slr.rollout(net, x, num_steps=5)))
        layer  read    rate, noise off  rate, noise on  spread ... σ
        ...
    """
    if not 0 <= min_rate < 0.5:
        raise ValueError(f"min_rate is in spikes per neuron and time step, in [0, 0.5), got {min_rate!r}")
    if forward is not None and loss_fn is not None:
        raise ValueError("give forward, which returns the output, or loss_fn, which runs the network itself")
    neurons = noisy(net)
    inputs = sample if loss_fn is not None and isinstance(sample, tuple) else (sample,)
    run = _Run(net, neurons, lambda: (loss_fn or forward or net)(*inputs))
    levels = {name: neuron.noise for name, neuron in neurons.items() if neuron.noise is not None}
    measured: list[CalibratedLayer] = []
    with left_as_found(net, buffers=True), ExitStack() as at_end:
        for noise in levels.values():
            at_end.callback(setattr, noise, "forced", noise.forced)
            noise.forced = False
        order, off = run.order(), run.meters()
        if broken := {name: neurons[name] for name, meter in off.items() if not math.isfinite(meter.spread)}:
            raise ValueError(
                f"the membrane potentials of {places(broken)} are not finite on the sample; no noise level changed. "
                "Look for NaN in the sample and in the weights"
            )
        # With noise, for first spikes of silent neurons are no time.
        for noise in levels.values():
            noise.forced = True
        read = run.read()
        for noise in levels.values():
            noise.forced = False
        for name, readout in order:
            neuron, noise, meter = neurons[name], levels[name], run.meters()[name]
            threshold, least = float(neuron.threshold.mean()), min_rate
            level = torch.as_tensor(sigma * (meter.spread or threshold))
            most = min(threshold, _MOST_SPREADS * (meter.spread or threshold))
            if read[name] == "membrane":
                if neuron.reset_mechanism == "none" or not meter.near:
                    neuron.noise = None
                    measured.append(CalibratedLayer(name, readout, "membrane", meter.spread, 0, 0, 0))
                    continue
                least = 0
            elif readout and min_rate and meter.rate < _READOUT:
                if read[name] == "first spike" and isinstance(noise, EscapeNoise):
                    least = 2 * min_rate
                else:
                    level = level.clamp(min=most)
            noise.log_sigma.copy_(level.log())
            noise.forced = True
            while bool(level.max() < most) and run.meters()[name].rate < least:
                level = (level * _STEP_UP).clamp(max=most)
                noise.log_sigma.copy_(level.log())
            mean = float(noise.sigma.mean())
            measured.append(CalibratedLayer(name, readout, read[name], meter.spread, mean, 0, rate_on=least))
        on = run.meters()
    run.reset()
    layers = [
        replace(layer, rate_off=off[layer.name].rate, rate_on=on[layer.name].rate, note=_note(layer, on[layer.name]))
        for layer in measured
    ]
    _warn(neurons, layers)
    return Calibration(tuple(layers))


def _note(layer: CalibratedLayer, on: _Meter) -> str:
    """What a user should know of a layer, whose ``rate_on`` is what it should fire at."""
    if not layer.sigma:
        return "only its membrane potential is read, and nothing resets it: its noise was removed"
    if layer.read == "membrane":
        return "the loss reads only its membrane potential, so its spikes may fall silent: predict by it too"
    # Measured once more, with other noise.
    if on.rate < layer.rate_on / 2:
        return (
            f"fires at {on.rate:.2g} even with noise: little can be learned before it; larger weights "
            "(torch.nn.init.kaiming_normal_) or a normalisation before it help"
        )
    return ""


def _warn(neurons: Mapping[str, NoisyNeuron], layers: Iterable[CalibratedLayer]) -> None:
    removed = {layer.name: neurons[layer.name] for layer in layers if not layer.sigma}
    if removed:
        warn(
            f"{places(removed)} got no noise: only the membrane potential is read, and nothing resets it. Pass "
            "loss_fn= if the loss reads the spikes after all"
        )
    silent = {layer.name: neurons[layer.name] for layer in layers if layer.sigma and layer.rate_on == 0}
    if silent:
        warn(
            f"{places(silent)} never fired on the sample, even with noise: nothing before it can learn. In a fresh "
            "network draw larger weights (torch.nn.init.kaiming_normal_); otherwise a higher sigma, or check the inputs"
        )


class _Meter:
    """Sums over the membrane potentials and spikes of one neuron."""

    def __init__(self) -> None:
        self.count = 0
        self.fired = self.total = self.square = 0.0
        self.near = False

    def add(self, neuron: NoisyNeuron, spikes: Tensor) -> None:
        mem = neuron.mem
        self.count += mem.numel()
        self.fired += float((spikes != 0).sum())
        self.total += float(mem.double().sum())
        self.square += float(mem.double().square().sum())
        self.near = self.near or bool(comes_near(neuron))

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

    def read(self) -> dict[str, str]:
        """What of each noisy neuron reaches what the forward pass returns: spikes, membrane, both, or unknown."""
        probes = {neuron: [torch.zeros((), requires_grad=True) for _ in range(2)] for neuron in self._neurons.values()}
        credits = {neuron: Credits() for neuron in probes}

        def before(neuron: Any, args: Any, options: Any) -> tuple[Any, Any]:
            # A path through the neuron's own next time step is no reader.
            for name in neuron.all_states:
                if isinstance(state := neuron._buffers.get(name), Tensor):
                    neuron.hold(name, state.detach())
            current, *states = args
            return (current, *map(_detached, states)), {name: _detached(value) for name, value in options.items()}

        def after(neuron: Any, args: Any, options: Any, output: Any) -> Any:
            of_spikes, of_mem = probes[neuron]
            spikes = (output[0] if isinstance(output, tuple) else output) + of_spikes
            credits[neuron].watch(spikes)
            if not isinstance(output, tuple):
                neuron.hold("mem", neuron.mem + of_mem)
                return spikes
            outputs = (spikes, *output[1:-1], output[-1] + of_mem)
            if neuron.init_hidden:
                neuron.hold("mem", outputs[-1])
            return outputs

        handles, samplers = [], {neuron: neuron.sampler for neuron in probes}
        Look.looks = False
        for neuron in probes:
            # Spikes by the surrogate: λ is not to be fitted by this pass, and "approximate" would refuse a loop.
            neuron.sampler = None
            handles += [
                neuron.register_forward_pre_hook(before, with_kwargs=True),
                neuron.register_forward_hook(after, with_kwargs=True),
            ]
        try:
            self.reset()
            with torch.enable_grad():
                outputs = [value for value in tree_flatten(self._forward())[0] if isinstance(value, Tensor)]
                ends = [value.sum() for value in outputs if value.grad_fn is not None]
                pairs = [probe for pair in probes.values() for probe in pair]
                gradients = torch.autograd.grad(ends, pairs, allow_unused=True) if ends else [None] * len(pairs)
        finally:
            Look.looks = True
            for neuron, sampler in samplers.items():
                neuron.sampler = sampler
            for handle in handles:
                handle.remove()
            self.reset()
        read = {}
        for index, (name, neuron) in enumerate(self._neurons.items()):
            spikes = gradients[2 * index] is not None or hasattr(neuron, "recurrent")
            mem = gradients[2 * index + 1] is not None
            read[name] = ("both" if mem else "spikes") if spikes else "membrane" if mem else "unknown"
            if read[name] == "spikes" and credits[neuron].of_first_spikes:
                read[name] = "first spike"
        return read

    def meters(self) -> dict[str, _Meter]:
        """Rates and spreads of the noisy neurons in one run."""
        meters: dict[nn.Module, _Meter] = {neuron: _Meter() for neuron in self._neurons.values()}
        self._watch(meters, lambda neuron, spikes: meters[neuron].add(neuron, spikes))
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


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


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
