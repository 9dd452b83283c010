"""Noise added to a network or removed from it, switched on and off, left out of statistics or an export."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._messages import warn
from .blocks import forget_constant_inputs
from .calibration import calibrate
from .network import left_as_found, noises, noisy_neurons, reset, spiking_neurons
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
    loss_fn: Callable[..., Any] | None = None,
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
            which also prints what it did.
        forward: runs the network on the sample; ``net(sample)`` by default.
        loss_fn: forward pass and loss, in place of ``forward``: tells what of the output is read; see ``calibrate``.

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
    kept = [] if todo else [neurons[name].noise for name in chosen]
    sets_level = sigma is not None and sample is None
    if kept and (sets_level or any(_is_other(noise, kind, distribution) for noise in kept)):
        warn(
            f"{', '.join(chosen)} had noise before, which add_noise leaves as it is: call remove_noise(net) first for "
            "noise of another level, kind or distribution"
        )
    with ExitStack() as undo:
        for name, neuron in todo.items():
            values = [value for value in (*neuron.parameters(), *neuron.buffers()) if value.is_floating_point()]
            noise = KINDS[kind](0.5 if sigma is None else sigma, learn, distribution).train(neuron.training)
            was_ours = isinstance(neuron, NoisyNeuron)
            # Where the neuron is, in its dtype.
            to_noisy(neuron, noise.to(values[0]) if values else noise, name)
            undo.callback(setattr, neuron, "noise", None) if was_ours else undo.callback(to_plain, neuron)
        undo.pop_all()
    if sample is not None:
        calibrate(net, sample, forward, 0.25 if sigma is None else sigma, loss_fn=loss_fn)
    return net


def _is_other(noise: Any, kind: str, distribution: str | None) -> bool:
    """Another kind or distribution of noise was asked for; the default kind does not count."""
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
    before = [(noise, noise.forced, noise.generator) for noise in noises(net).values()]
    for noise, *_ in before:
        noise.forced, noise.generator = forced, generator
    try:
        yield
    finally:
        for noise, was_forced, was_generator in before:
            noise.forced, noise.generator = was_forced, was_generator


def update_batch_norm(net: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> None:
    """Computes the running statistics of BatchNorm again without noise, for a network that is used without.

    In training they follow the currents of the noisy network. This is ``torch.optim.swa_utils.update_bn`` within
    ``noise_off``, from fresh states for each batch.

    Args:
        net: the network, whose mode stays.
        batches: training inputs, or pairs of inputs and labels, as a data loader gives them.
        forward: called as ``forward(inputs)``; by default ``net(inputs)``.

    Examples:
        >>> slr.update_batch_norm(net, [images], lambda x: slr.rollout(net, x, num_steps=5))
    """

    class _Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Any) -> Any:
            reset(net)
            return net(inputs) if forward is None else forward(inputs)

    with noise_off(net), left_as_found(net, modes=True):
        torch.optim.swa_utils.update_bn(batches, _Run())
    reset(net)


def noise_gap(off: Tensor, on: Tensor) -> str | None:
    """A warning if the accuracy of a network without its noise differs from that with it.

    An exact McNemar test compares the two, on the samples that only one of them classifies right.

    Args:
        off: samples that are right without noise, Boolean, ``[samples]``.
        on: samples that are right with noise, by one draw or by the majority of several.

    Returns:
        Both accuracies, and the remedies; None where they differ by no more than chance (p ≥ .01).

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> off, on = torch.arange(100) < 70, torch.arange(100) < 89
        >>> print(noise_gap(off, on))
        accuracy is 70.0 % without the noise, as after net.eval(), and 89.0 % with it: ...
        >>> noise_gap(off, off) is None
        True
    """
    if off.shape != on.shape:
        raise ValueError(
            f"the same samples are needed without and with noise; got {tuple(off.shape)}, {tuple(on.shape)}"
        )
    only_off, only_on = int((off & ~on).sum()), int((on & ~off).sum())
    differ = only_off + only_on
    if not differ:
        return None
    # Twice the tail of a binomial distribution with probability one half; by logarithms, for there may be thousands.
    k = torch.arange(min(only_off, only_on) + 1, dtype=torch.float64)
    chances = math.lgamma(differ + 1) - torch.lgamma(k + 1) - torch.lgamma(differ - k + 1) - differ * math.log(2)
    if 2 * float(chances.exp().sum()) >= 0.01:
        return None
    return (
        f"accuracy is {100 * float(off.double().mean()):.1f} % without the noise, as after net.eval(), and "
        f"{100 * float(on.double().mean()):.1f} % with it: a network without its noise is another one. Let the noise "
        "levels fall during training (snntorch_lr.anneal), or test with the noise on and let several draws vote "
        "(snntorch_lr.noise_on), or compute the statistics of BatchNorm again without noise "
        "(snntorch_lr.update_batch_norm)"
    )


def export_to_nir(net: nn.Module, sample_data: Tensor, **options: Any) -> Any:
    """A network in the Neuromorphic Intermediate Representation, without its noise: NIR has no place for σ.

    ``snntorch.export_nir.export_to_nir`` of a copy of the network after ``remove_noise``. snnTorch's function accepts a
    noisy network too, but says nothing of its noise.

    Args:
        net: the network; only its states change: they are reset.
        sample_data: an input of its forward pass.
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
