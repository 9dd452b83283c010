"""Noise added to a network or removed from it, switched on and off, or left out of an export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._messages import warn
from .blocks import forget_constant_inputs
from .calibration import calibrate
from .network import noises, noisy_neurons, reset, spiking_neurons
from .neurons import to_noisy, to_plain
from .noise import KINDS
from .noisy_neuron import NoisyNeuron

Net = TypeVar("Net", bound=nn.Module)


def add_noise(
    net: Net,
    sigma: float | Tensor | None = None,
    learn: bool = True,
    only: Iterable[str] | None = None,
    kind: str = "membrane",
    distribution: str | None = None,
    sample: Any = None,
    forward: Callable[[Any], Any] | None = None,
    scale_weights: bool = False,
) -> Net:
    """Gives every snnTorch neuron of a network noise with a learnable level, in place.

    The neurons stay the same objects, so parameters, buffers, settings, shared modules, hooks and optimizers that hold
    the weights are kept. The new noise levels are parameters: build the optimizer afterwards, or add them to it.
    Neurons that have noise already are left as they are, with a warning if other noise is asked for and all have some.

    Args:
        net: any module; neurons are found at any depth, and in plain lists and dicts too.
        sigma: initial noise level of every neuron, in units of the membrane potential, 0.5 by default; a float, or a
            tensor that broadcasts against the membrane of every neuron. With ``sample``, see there.
        learn: whether the noise levels are parameters.
        only: names of the neurons to convert, as in ``net.named_modules()``; all by default.
        kind: ``"membrane"`` or ``"escape"``, see ``MembraneNoise`` and ``EscapeNoise``.
        distribution: of the noise, as these offer it; None for Gaussian membrane noise, or logistic escape noise.
        sample: a batch of inputs; with it the levels of all noisy neurons are set by what it does to the membrane
            potentials, and ``sigma`` is in units of their standard deviation, 0.25 by default: see ``calibrate``,
            which also shows what it did, and explains ``forward`` and ``scale_weights``.
        forward: runs the network on the sample; ``net(sample)`` by default.
        scale_weights: also scale weights; for fresh networks that hardly fire.

    Returns:
        The same network.

    Raises:
        ValueError: if there is no snnTorch neuron, a name in ``only`` is not one, the kind is unknown, or a neuron
            cannot have noise. The network is not changed then. As ``calibrate``, which leaves the noise in place.

    Examples:
        >>> net = nn.Sequential(nn.Linear(784, 100), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(100, 10))
        >>> slr.add_noise(net, sigma=0.5)[1]
        Leaky(
          (noise): MembraneNoise(sigma=0.5, learn=True, distribution='gaussian')
        )
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of noise {kind!r}; choose one of {', '.join(KINDS)}")
    neurons = dict(spiking_neurons(net))
    if not neurons:
        raise ValueError(f"{type(net).__name__} has no snnTorch neuron to add noise to")
    chosen = list(neurons) if only is None else [only] if isinstance(only, str) else list(only)
    unknown = [name for name in chosen if name not in neurons]
    if unknown:
        raise ValueError(f"no snnTorch neuron is called {', '.join(map(str, unknown))}; there are {', '.join(neurons)}")
    todo = {name: neurons[name] for name in chosen if name not in noisy_neurons(net)}
    known = [] if todo else [neurons[name].noise for name in chosen]
    sets_level = sigma is not None and sample is None
    if known and (sets_level or any(_is_other(noise, kind, distribution) for noise in known)):
        warn(
            f"{', '.join(chosen)} had noise before, which add_noise leaves as it is: call remove_noise(net) first for "
            "noise of another level, kind or distribution"
        )
    undo: list[Callable[[], None]] = []
    try:
        for name, neuron in todo.items():
            noise = KINDS[kind](0.5 if sigma is None else sigma, learn, distribution).train(neuron.training)
            undo.append(_undo(neuron))
            to_noisy(neuron, noise.to(_placement(neuron)), name)
    except BaseException:
        for step in undo:
            step()
        raise
    if sample is not None:
        calibrate(net, sample, forward, 0.25 if sigma is None else sigma, scale_weights)
    return net


def _is_other(noise: Any, kind: str, distribution: str | None) -> bool:
    """The noise is not of the kind and distribution that were asked for; a kind by default is not asked for."""
    asked = kind != "membrane" and not isinstance(noise, KINDS[kind])
    return asked or distribution not in (None, noise.distribution)


def remove_noise(net: Net) -> Net:
    """Turns noisy neurons back into snnTorch's own, in place; weights, buffers and settings stay, σ is dropped.

    Returns:
        The same network, which then runs without this package.

    Examples:
        >>> type(slr.remove_noise(net)[1])
        <class 'snntorch._neurons.leaky.Leaky'>
    """
    forget_constant_inputs(net)
    for _, neuron in spiking_neurons(net):
        if isinstance(neuron, NoisyNeuron):
            to_plain(neuron)
    return net


def noise_off(net: nn.Module) -> AbstractContextManager[None]:
    """Context in which the network runs without noise, whatever its mode; the former state comes back afterwards.

    Examples:
        >>> with slr.noise_off(net):
        ...     spikes = slr.rollout(net, images, num_steps=5)
    """
    return _switched(net, False, None)


def noise_on(net: nn.Module, generator: torch.Generator | None = None) -> AbstractContextManager[None]:
    """Context in which the network runs with noise, also in evaluation mode.

    Args:
        net: a network with noisy neurons or inputs.
        generator: where the noise is drawn from, instead of torch's global generator; on the network's device.

    Examples:
        >>> with slr.noise_on(net.eval()):
        ...     spikes = slr.rollout(net, images, num_steps=5)
    """
    return _switched(net, True, generator)


@contextmanager
def _switched(net: nn.Module, forced: bool, generator: torch.Generator | None) -> Iterator[None]:
    found = noises(net).values()
    before = [(noise, noise.forced, noise.generator) for noise in found]
    for noise in found:
        noise.forced, noise.generator = forced, generator
    try:
        yield
    finally:
        for noise, was_forced, was_generator in before:
            noise.forced, noise.generator = was_forced, was_generator


def _undo(neuron: nn.Module) -> Callable[[], None]:
    """A function that takes the noise of a neuron away again."""
    if isinstance(neuron, NoisyNeuron):
        return lambda: setattr(neuron, "noise", None)
    return lambda: to_plain(neuron) if isinstance(neuron, NoisyNeuron) else None


def _placement(neuron: nn.Module) -> Tensor:
    """A tensor whose device and floating dtype the neuron's own parameters have."""
    floating = [value for value in (*neuron.parameters(), *neuron.buffers()) if value.is_floating_point()]
    return floating[0] if floating else torch.zeros(())


def export_to_nir(net: nn.Module, sample_data: Tensor, **options: Any) -> Any:
    """A network in the Neuromorphic Intermediate Representation, without its noise: NIR has no place for σ.

    ``snntorch.export_nir.export_to_nir`` of a copy of the network after ``remove_noise``. snnTorch's function accepts a
    noisy network too, but says nothing of the noise, and what the network computes is random.

    Args:
        net: the network; its states are reset, and nothing else is changed.
        sample_data: an input, as its forward pass takes it.
        **options: of snnTorch's function; with a batch dimension in the sample pass ``ignore_dims=[0]``.

    Returns:
        The ``nir.NIRGraph``.

    Raises:
        ImportError: if ``nir`` and ``nirtorch`` are not installed.

    Examples:
        >>> graph = slr.export_to_nir(net, images)  # doctest: +SKIP
    """
    try:
        from snntorch.export_nir import export_to_nir as export
    except ImportError as error:
        raise ImportError("NIR export needs more packages: pip install nir nirtorch") from error
    noisy = noisy_neurons(net)
    if noisy:
        warn(f"NIR has no noise: the levels of {', '.join(noisy)} are left out of the export")
    reset(net)
    return export(remove_noise(copy.deepcopy(net)), sample_data, **options)
