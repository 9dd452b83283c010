"""Checks of network, losses and gradients, before any weight changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from ._messages import place, places, warn
from .graph import ancestors
from .network import named_parameters, noises, noisy_neurons, spiking_neurons
from .noise import Noise
from .noise_stream import resolved
from .noisy_neuron import NoisyNeuron


class Checks:
    """What is to hold before any weight changes, asked all at once: each question by itself waits for the device."""

    def __init__(self) -> None:
        self._filed: list[tuple[Tensor, Callable[[], str | None]]] = []

    def file(self, holds: Tensor, otherwise: Callable[[], str | None]) -> None:
        """Files what is to hold.

        Args:
            holds: one boolean, on any device.
            otherwise: asked for the error if it does not hold; it warns instead, or lets it pass, if it returns None.
        """
        self._filed.append((holds.detach(), otherwise))

    def take(self, other: Checks) -> None:
        """Takes over what another one has filed."""
        self._filed += other._filed
        other._filed = []

    def read(self) -> None:
        """Waits for the devices.

        Raises:
            ValueError: if something does not hold; of several, what was filed first.
        """
        filed, self._filed = self._filed, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for holds, _ in filed:
            by_device.setdefault(holds.device, []).append(holds)
        if all(bool(torch.stack(each).all()) for each in by_device.values()):
            return
        for holds, otherwise in filed:
            error = None if bool(holds) else otherwise()
            if error is not None:
                raise ValueError(error)


def network_errors(net: nn.Module) -> Iterator[str]:
    """Everything for which a network cannot be trained by the likelihood ratio, but for its noise levels."""
    neurons = noisy_neurons(net)
    if not neurons:
        yield (
            f"{type(net).__name__} has no noisy neuron, and the likelihood ratio needs noise to differentiate: build "
            "neurons with noise=True, or convert the network with snntorch_lr.add_noise(net)"
        )
        return
    active = _active(neurons)
    if not active:
        yield (
            f"the noise of {places(neurons)} is off: call net.train(), leave noise_off(net), or make the noise with "
            "at_eval=True"
        )
    for name, neuron in active.items():
        if neuron.meets_threshold_twice:
            yield (
                f"{place(name, neuron)}: with reset_delay=False snnTorch compares the membrane that was "
                "reset with the threshold once more, so that the gradient of a learned threshold would be biased; use "
                "reset_delay=True, reset_mechanism='zero', escape noise, or learn_threshold=False"
            )


def level_errors(net: nn.Module) -> Iterator[str]:
    """The noise levels for which a network cannot be trained."""
    for name, noise in noises(net).items():
        if noise.active and not bool(_is_level(noise)):
            yield _level_error(name, noise)


def check_levels(net: nn.Module, checks: Checks) -> None:
    """Has noise levels refused that are not positive and finite."""
    for name, noise in noises(net).items():
        if noise.active:
            checks.file(_is_level(noise), partial(_level_error, name, noise))


def _is_level(noise: Noise) -> Tensor:
    sigma = noise.sigma.detach()
    return ((sigma > 0) & sigma.isfinite()).all()


def _level_error(name: str, noise: Noise) -> str:
    sigma = noise.sigma.detach()
    return (
        f"{name}: sigma must be positive and finite, but is {sigma.min().item():.3g} to "
        f"{sigma.max().item():.3g}; lower its learning rate (a parameter group of its own) or freeze it"
    )


def _active(neurons: Mapping[str, NoisyNeuron]) -> dict[str, NoisyNeuron]:
    return {name: neuron for name, neuron in neurons.items() if neuron.noise is not None and neuron.noise.active}


def noisy(net: nn.Module) -> dict[str, NoisyNeuron]:
    """The noisy neurons of a network, by name.

    Raises:
        ValueError: if there are none.
    """
    neurons = noisy_neurons(net)
    if not neurons:
        raise ValueError(next(network_errors(net)))
    return neurons


def check_network(net: nn.Module) -> dict[str, NoisyNeuron]:
    """The noisy neurons of a network whose noise is on, by name.

    Raises:
        ValueError: if there are none, or if a learned threshold is met twice by one sample.
    """
    for error in network_errors(net):
        raise ValueError(error)
    return _active(noisy_neurons(net))


def check_parameters(net: nn.Module) -> None:
    """Refuses parameters that are not finite: spikes would hide them from the loss.

    Raises:
        ValueError: if there is one.
    """
    for name, parameter in net.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"the parameter {name} has values that are not finite; load or initialise it again")


def check_gradients(net: nn.Module, inputs: Any, half: bool, checks: Checks) -> None:
    """Has gradients refused that are not finite: a membrane potential that is NaN never spikes, and losses stay finite.

    Args:
        net: the network; new gradients are in ``.grad``.
        inputs: what they were computed from, to be named in the error.
        half: whether float16 had a part in them; then they may overflow for finite inputs, and a GradScaler, which
            has to see it, lowers its scale.
        checks: where that is filed.
    """
    found = {name: p.grad for name, p in named_parameters(net).items() if p.requires_grad and p.grad is not None}
    # A sum takes a tenth of the time of a look at each number. Sparse gradients know neither.
    sums = {name: gradient.to_dense().sum(dtype=resolved(gradient.dtype)) for name, gradient in found.items()}

    def error() -> str | None:
        # The sum of finite numbers may overflow.
        bad = [name for name, gradient in found.items() if not bool(gradient.to_dense().isfinite().all())]
        if not bad:
            return None
        tensors = [each for each in tree_flatten(inputs)[0] if isinstance(each, Tensor)]
        count, total = sum(int((~each.isfinite()).sum()) for each in tensors), sum(each.numel() for each in tensors)
        if half and not count:
            return None
        cause = f". {count} of {total} numbers in the inputs are not finite" if count else ": lower the learning rate"
        return f"the new gradient is not finite in {', '.join(bad)}; no .grad and no weight changed{cause}"

    for each in sums.values():
        checks.file(each.isfinite(), error)


def warn_about_batch_norm(net: nn.Module, known: Set[str] = frozenset()) -> set[str]:
    """Warns of BatchNorm layers in training mode, which make one sample's loss depend on the noise of others.

    Args:
        net: the network.
        known: names that were warned of already.

    Returns:
        The names that were warned of now.
    """
    # snnTorch's BatchNormTT is built of these.
    training = {name for name, module in net.named_modules() if isinstance(module, _BatchNorm) and module.training}
    names = sorted(training - known)
    if names:
        warn(
            f"BatchNorm {', '.join(names)} is in training mode: after the first noisy neuron it couples samples and "
            'copies, and the per-sample likelihood ratio is biased. Use estimator="counterfactual", which takes it, or '
            "GroupNorm or LayerNorm"
        )
    return set(names)


def check_losses(losses: Any, copies: int, batch: int, net: nn.Module, checks: Checks) -> Tensor:
    """One finite loss per copy and sample, or an error that says what loss_fn should return.

    Args:
        losses: what ``loss_fn`` returned.
        copies: number of noise copies.
        batch: number of samples.
        net: the network, to look for the first layer with numbers that are not finite.
        checks: where values that are not finite are filed to be refused.

    Returns:
        The losses, shape ``[copies * batch]``.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it has another shape.
    """
    rows = copies * batch
    if not rows:
        raise ValueError("there are no samples: the batch is empty, or loss_fn does not run the network")
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a tensor of per-sample losses, not {type(losses).__name__}")
    checked: Tensor = losses
    if not losses.is_floating_point():
        # A 0-1 loss needs no derivative here: it is a loss like any other.
        checked = losses.to(torch.get_default_dtype())
    if losses.numel() == 1 and rows != 1:
        raise ValueError(
            "loss_fn returned one number, a mean or sum over the batch; the likelihood ratio needs one loss per sample "
            f"(shape [{rows}]): use reduction='none'"
        )
    if losses.shape != (rows,):
        hint = ""
        if losses.dim() > 1 and losses.shape[0] == rows:
            hint = ": average it over the other dimensions, as in losses.flatten(1).mean(1)"
        elif losses.shape[:1] == (batch,):
            hint = (
                ": does the forward pass go through the noisy neurons, and does the loss use the targets passed to it?"
            )
        raise ValueError(
            f"loss_fn returned losses of shape {tuple(losses.shape)}, but {copies} copies of {batch} samples need "
            f"shape ({rows},){hint}"
        )
    finite = losses.detach().isfinite()
    checks.file(
        finite.all(),
        lambda: (
            f"{int((~finite).sum())} of {rows} losses are not finite{_first_non_finite(net)}; no .grad and no weight "
            "changed. Check the inputs, and lower the learning rate"
        ),
    )
    return checked


def check_repeats(first: Tensor, second: Tensor, checks: Checks) -> None:
    """Has two passes refused with the same noise whose losses differ: scores of one would meet the losses of the other.

    They differ if they do by more than rounding, in more rows than rounding can make spike otherwise.

    Args:
        first: losses of the pass that looked for them.
        second: losses of the pass that had a gradient.
        checks: where that is filed.
    """
    count = ((first - second).abs() > 1e-3 * first.abs().mean() + 1e-6).sum()
    checks.file(
        count <= 0.05 * len(first),
        lambda: (
            f"two passes with the same noise differ in {int(count)} of {len(first)} losses; no .grad and no weight "
            "changed. loss_fn holds a state that a pass changes, or draws from a generator of its own, as "
            "numpy.random.default_rng() is: give it the same state and random numbers in each pass, or use "
            'memory="store" without chunk, which runs once'
        ),
    )


def _first_non_finite(net: nn.Module) -> str:
    for name, value in net.named_parameters():
        if not bool(value.isfinite().all()):
            return f", nor is the parameter {name}"
    for name, neuron in spiking_neurons(net):
        mem = getattr(neuron, "mem", None)
        if isinstance(mem, Tensor) and not bool(mem.isfinite().all()):
            return f", nor is the membrane potential of {place(name, neuron)}"
    return ""


class NoiseFreeNeurons:
    """Watches what noise-free spiking neurons feed during one forward pass.

    A context around the forward pass; ``check`` afterwards. Spikes of a noise-free neuron are a step function of the
    weights before it: the likelihood ratio has no score for them, and their surrogate gradient is biased.

    Args:
        net: the network.
        noisy: its noisy neurons.
    """

    def __init__(self, net: nn.Module, noisy: Mapping[str, NoisyNeuron]) -> None:
        noisy_ids = {id(neuron) for neuron in noisy.values()}
        self._watched = [(name, neuron) for name, neuron in spiking_neurons(net) if id(neuron) not in noisy_ids]
        self._spikes: dict[Node, str] = {}
        self._membranes: dict[Node, str] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> NoiseFreeNeurons:
        for name, neuron in self._watched:
            self._handles.append(neuron.register_forward_hook(self._hook(place(name, neuron))))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def watch(neuron: nn.Module, _: Any, output: Any) -> None:
            spikes = output[0] if isinstance(output, tuple) else output
            if isinstance(spikes, Tensor) and spikes.grad_fn is not None:
                self._spikes[spikes.grad_fn] = name
            if getattr(neuron, "reset_mechanism", "none") != "none":
                mem = getattr(neuron, "mem", None)
                if isinstance(mem, Tensor) and mem.grad_fn is not None:
                    self._membranes[mem.grad_fn] = name

        return watch

    def check(self, means: Iterable[Tensor], losses: Tensor) -> None:
        """Looks for noise-free spikes among what noisy neurons and the loss were computed from.

        Args:
            means: what noisy neurons sampled around, with their graphs.
            losses: the losses, with their graph.

        Raises:
            ValueError: if noise-free spikes feed a noisy neuron.
        """
        if not self._spikes:
            return
        feeding = {self._spikes[node] for node in ancestors(means) if node in self._spikes}
        if feeding:
            names = ", ".join(sorted(feeding))
            raise ValueError(
                f"the spikes of {names} have no noise, but feed noisy neurons: the likelihood ratio knows no gradient "
                f"for the weights before {names}. Give it noise too (noise=True, or add_noise(net)), or freeze those "
                "weights with requires_grad_(False)"
            )
        read = list(ancestors([losses]))
        spiking = sorted({self._spikes[node] for node in read if node in self._spikes})
        if spiking:
            warn(
                f"the loss reads spikes of {', '.join(spiking)}, which has no noise: the weights before it get their "
                "surrogate gradient, which is biased. Give it noise too, or read its membrane potential with "
                "reset_mechanism='none'"
            )
        resetting = sorted({self._membranes[node] for node in read if node in self._membranes} - set(spiking))
        if resetting:
            warn(
                f"the loss reads the membrane potential of {', '.join(resetting)}, which has no noise and resets: the "
                "gradient ignores that a weight changes when it resets. Use reset_mechanism='none' for a readout"
            )


def check_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Looks for what the optimizer does not update.

    Warns of noise levels, which did not exist yet when it was built.

    Raises:
        ValueError: if it holds none of the parameters that the network has to learn.
    """
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    learned = [parameter for parameter in named_parameters(net).values() if parameter.requires_grad]
    if learned and not any(id(parameter) in updated for parameter in learned):
        raise ValueError(
            f"the optimizer holds none of the parameters of {type(net).__name__} that require a gradient: build it "
            "from net.parameters() of this very network, and no copy"
        )
    missing = [
        name
        for name, noise in noises(net).items()
        if noise.log_sigma.requires_grad and id(noise.log_sigma) not in updated
    ]
    if missing:
        warn(
            f"the optimizer does not update the noise levels of {', '.join(missing)}: build it after add_noise(net), "
            "or pass learn=False"
        )
