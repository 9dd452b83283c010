"""Checks of network, losses and gradients, before any weight changes; and what is looked at in a first forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from ._messages import place, places, warn
from .graph import ancestors
from .network import named_parameters, noises, noisy_neurons, spiking_neurons
from .noise import MembraneNoise
from .noisy_neuron import NoisyNeuron
from .philox import resolved


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
    yield from thresholds_met_twice(active)


def thresholds_met_twice(neurons: Mapping[str, NoisyNeuron]) -> Iterator[str]:
    """What is wrong with neurons one sample of whose membrane potential meets a learned threshold twice."""
    for name, neuron in neurons.items():
        at_once = neuron.resets_at_once and neuron.reset_mechanism == "subtract"
        if at_once and neuron.threshold.requires_grad and isinstance(neuron.noise, MembraneNoise):
            yield (
                f"{place(name, neuron)}: with reset_delay=False snnTorch compares the membrane that was reset with "
                "the threshold once more, so that the gradient of a learned threshold would be biased; use "
                "reset_delay=True, reset_mechanism='zero', escape noise, or learn_threshold=False"
            )


def refuse_thresholds_met_twice(neurons: Mapping[str, NoisyNeuron]) -> None:
    """Refuses neurons one sample of whose membrane potential meets a learned threshold twice.

    Raises:
        ValueError: if there is one.
    """
    for error in thresholds_met_twice(neurons):
        raise ValueError(error)


def level_errors(net: nn.Module) -> Iterator[str]:
    """The noise levels for which a network cannot be trained."""
    for name, noise in noises(net).items():
        sigma = noise.sigma.detach()
        if noise.active and not bool(((sigma > 0) & sigma.isfinite()).all()):
            yield (
                f"{name}: sigma must be positive and finite, but is {sigma.min().item():.3g} to "
                f"{sigma.max().item():.3g}; lower its learning rate (a parameter group of its own) or freeze it"
            )


def check_levels(net: nn.Module) -> None:
    """Refuses noise levels that are not positive and finite.

    Raises:
        ValueError: if there is one.
    """
    for error in level_errors(net):
        raise ValueError(error)


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


def check_finite_gradients(net: nn.Module, inputs: Any = None) -> None:
    """Refuses gradients that are not finite: a membrane potential that is NaN never spikes, and losses stay finite.

    Args:
        net: the network; gradients are in ``.grad``.
        inputs: what they were computed from, to be named in the error.

    Raises:
        ValueError: if there is one.
    """
    found = {name: p.grad for name, p in named_parameters(net).items() if p.requires_grad and p.grad is not None}
    # A sum takes a tenth of the time of a look at each number, and all sums are waited for at once. Sparse gradients
    # know neither.
    sums = [gradient.to_dense().sum(dtype=resolved(gradient.dtype)) for gradient in found.values()]
    if not sums or all(math.isfinite(value) for value in _on_host(sums)):
        return
    # The sum of finite numbers may overflow.
    bad = [name for name, gradient in found.items() if not bool(gradient.to_dense().isfinite().all())]
    if not bad:
        return
    tensors = [each for each in tree_flatten(inputs)[0] if isinstance(each, Tensor)]
    count, total = sum(int((~each.isfinite()).sum()) for each in tensors), sum(each.numel() for each in tensors)
    cause = ": look for NaN in the inputs, or lower the learning rate"
    if count:
        cause = f". {count} of {total} numbers in the inputs are not finite"
    raise ValueError(f"the new gradient is not finite in {', '.join(bad)}; no weight changed{cause}")


def _on_host(values: Sequence[Tensor]) -> list[float]:
    """Numbers without dimensions from any devices, waited for once each."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in values:
        by_device.setdefault(value.device, []).append(value.double())
    return [number for each in by_device.values() for number in torch.stack(each).tolist()]


def use_running_statistics(net: nn.Module) -> None:
    """Switches BatchNorm layers to evaluation mode: the rows that they couple have a warning of their own."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.training = False


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


def check_loss(loss: Any, net: nn.Module) -> Tensor:
    """The mean of what ``loss_fn`` returned, which has to have a derivative; for counterfactual credit.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it is not finite, or has no derivative.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, not {type(loss).__name__}")
    if not loss.numel():
        raise ValueError("there are no losses: the batch is empty")
    _refuse_if_not_finite(loss, net)
    if loss.grad_fn is None:
        raise ValueError(
            "the loss has no derivative: counterfactual credit goes by what a spike does to it. Use "
            'estimator="vanilla" for a 0-1 loss or a reward; otherwise look for a detach(), argmax or no_grad between '
            "spikes and loss, or for frozen weights"
        )
    return loss.mean()


def check_losses(losses: Any, copies: int, batch: int, net: nn.Module) -> Tensor:
    """One finite loss per copy and sample, or an error that says what loss_fn should return.

    Args:
        losses: what ``loss_fn`` returned.
        copies: number of noise copies.
        batch: number of samples.
        net: the network, to look for the first layer with numbers that are not finite.

    Returns:
        The losses, shape ``[copies * batch]``.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it has another shape, or is not finite.
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
            "loss_fn returned one number, a mean or sum over the batch; the plain likelihood ratio needs one loss per "
            f"sample (shape [{rows}]): use reduction='none'"
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
    _refuse_if_not_finite(losses, net)
    return checked


def _refuse_if_not_finite(losses: Tensor, net: nn.Module) -> None:
    finite = losses.detach().isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"{int((~finite).sum())} of {losses.numel()} losses are not finite{_first_non_finite(net)}; no .grad and "
            "no weight changed. Check the inputs, and lower the learning rate"
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
            self._handles.append(neuron.register_forward_hook(Look(self._fired, name)))
            self._handles.append(neuron.register_forward_pre_hook(Look(self._before, name)))
        for name, plain in self._plain.items():
            self._handles.append(plain.register_forward_hook(Look(self._emitted, place(name, plain))))
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


class Look:
    """Hook of a neuron; a copy or pickle of the neuron has one that looks at nothing."""

    def __init__(self, look: Any = None, name: str = "") -> None:
        self._look = look
        self._name = name

    def __call__(self, neuron: Any, *given: Any) -> None:
        """Looks at a call, if it has a graph."""
        if self._look is not None and torch.is_grad_enabled():
            self._look(self._name, neuron, *given)

    def __reduce__(self) -> tuple[type[Look], tuple[()]]:
        return Look, ()
