"""Checks of networks, losses, gradients and optimizers before any weight changes, and of the first forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
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


def refuse(errors: Iterable[str]) -> None:
    """Raises the first of some errors.

    Raises:
        ValueError: if there is one.
    """
    for error in errors:
        raise ValueError(error)


def network_errors(net: nn.Module) -> Iterator[str]:
    """All reasons why a network cannot be trained by the likelihood ratio, except for its noise levels."""
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
    """Errors of neurons that compare one sample of their membrane potential with a learned threshold twice."""
    for name, neuron in neurons.items():
        at_once = neuron.resets_at_once and neuron.reset_mechanism == "subtract"
        if at_once and neuron.threshold.requires_grad and isinstance(neuron.noise, MembraneNoise):
            yield (
                f"{place(name, neuron)}: with reset_delay=False snnTorch compares the membrane that was reset with "
                "the threshold once more, so that the gradient of a learned threshold would be biased; use "
                "reset_delay=True, reset_mechanism='zero', escape noise, or learn_threshold=False"
            )


def level_errors(net: nn.Module) -> Iterator[str]:
    """Errors of the noise levels of a network."""
    for name, noise in noises(net).items():
        sigma = noise.sigma.detach()
        if noise.active and not bool(((sigma > 0) & sigma.isfinite()).all()):
            yield (
                f"{name}: sigma must be positive and finite, but is {sigma.min().item():.3g} to "
                f"{sigma.max().item():.3g}; lower its learning rate (a parameter group of its own) or freeze it"
            )


def check_levels(net: nn.Module) -> None:
    """Refuses noise levels that are not positive and finite."""
    refuse(level_errors(net))


def _active(neurons: Mapping[str, NoisyNeuron]) -> dict[str, NoisyNeuron]:
    return {name: neuron for name, neuron in neurons.items() if neuron.noise is not None and neuron.noise.active}


def noisy(net: nn.Module) -> dict[str, NoisyNeuron]:
    """The noisy neurons of a network, by name.

    Raises:
        ValueError: if there are none.
    """
    neurons = noisy_neurons(net)
    if not neurons:
        refuse(network_errors(net))
    return neurons


def check_network(net: nn.Module) -> dict[str, NoisyNeuron]:
    """The noisy neurons of a network whose noise is on, by name.

    Raises:
        ValueError: see ``network_errors``.
    """
    refuse(network_errors(net))
    return _active(noisy_neurons(net))


def check_parameters(net: nn.Module) -> None:
    """Refuses parameters that are not finite: spikes would hide them from the loss.

    Raises:
        ValueError: if there is one.
    """
    for name in _broken_parameters(net):
        raise ValueError(f"the parameter {name} has values that are not finite; load or initialise it again")


def _broken_parameters(net: nn.Module) -> Iterator[str]:
    return (name for name, parameter in named_parameters(net).items() if not bool(parameter.isfinite().all()))


def check_finite_gradients(net: nn.Module, inputs: Any = None) -> None:
    """Refuses gradients that are not finite: a membrane potential that is NaN never spikes, and losses stay finite.

    Args:
        net: the network; gradients are in ``.grad``.
        inputs: what they were computed from, to be named in the error.

    Raises:
        ValueError: if there is one.
    """
    gradients = {name: p.grad for name, p in named_parameters(net).items() if p.requires_grad and p.grad is not None}
    # A sum takes a tenth of the time of a look at each number, and each device is waited for once. Sparse gradients
    # know neither.
    sums: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients.values():
        sums.setdefault(gradient.device, []).append(gradient.to_dense().sum(dtype=resolved(gradient.dtype)).double())
    if all(math.isfinite(total) for totals in sums.values() for total in torch.stack(totals).tolist()):
        return
    # The sum of finite numbers may overflow.
    broken = [name for name, gradient in gradients.items() if not bool(gradient.to_dense().isfinite().all())]
    if not broken:
        return
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    count, total = sum(int((~x.isfinite()).sum()) for x in tensors), sum(x.numel() for x in tensors)
    cause = ": look for NaN in the inputs, or lower the learning rate"
    if count:
        cause = f". {count} of {total} numbers in the inputs are not finite"
    raise ValueError(f"the new gradient is not finite in {', '.join(broken)}; no weight changed{cause}")


def use_running_statistics(net: nn.Module) -> None:
    """Switches BatchNorm layers to evaluation mode: ``warn_about_batch_norm`` warns of the rows that they couple."""
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
    """The mean of the loss that ``loss_fn`` returned, which must have a derivative; for counterfactual credit.

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
    """The losses ``[copies * batch]`` that ``loss_fn`` returned, one finite number per copy and sample.

    Args:
        losses: returned by ``loss_fn``.
        copies: number of noise copies.
        batch: number of samples.
        net: the network, to name the first layer with numbers that are not finite.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it has another shape, or is not finite.
    """
    rows = copies * batch
    if not rows:
        raise ValueError("there are no samples: the batch is empty, or loss_fn does not run the network")
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a tensor of per-sample losses, not {type(losses).__name__}")
    # A 0-1 loss needs no derivative here: it is a loss like any other.
    checked: Tensor = losses if losses.is_floating_point() else losses.to(torch.get_default_dtype())
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
    for name in _broken_parameters(net):
        return f", nor is the parameter {name}"
    for name, neuron in spiking_neurons(net):
        mem = getattr(neuron, "mem", None)
        if isinstance(mem, Tensor) and not bool(mem.isfinite().all()):
            return f", nor is the membrane potential of {place(name, neuron)}"
    return ""


def check_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Warns of noise levels that an optimizer does not update, as one that was built before ``add_noise``.

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
    levels = {name: noise.log_sigma for name, noise in noises(net).items() if noise.log_sigma.requires_grad}
    missing = [name for name, level in levels.items() if id(level) not in updated]
    if missing:
        warn(
            f"the optimizer does not update the noise levels of {', '.join(missing)}: build it after add_noise(net), "
            "or pass learn=False"
        )


def comes_near(neuron: Any) -> Tensor:
    """Whether some membrane potential of a neuron is above a tenth of its threshold now; else that is out of reach."""
    above: Tensor = neuron.mem.detach() > neuron.threshold.detach() / 10
    return above.any()


class Credits:
    """Counts where the loss has a derivative by the spikes of a neuron; to be watched before the backward pass."""

    def __init__(self) -> None:
        self._steps = 0
        # One count for each time step that a gradient reached, and the number of spikes and silences in a step.
        self._counts: list[Tensor] = []
        self._size = 0

    def watch(self, spikes: Tensor, steps: int = 1) -> None:
        """Counts in the backward pass; ``[batch, ...]``, or ``[steps, batch, ...]``."""
        self._steps += steps
        self._size = spikes.numel() // steps

        def count(gradient: Tensor | None) -> None:
            if gradient is not None:
                self._counts += (gradient != 0).reshape(steps, -1).sum(1).unbind()

        spikes.register_hook(count)  # type: ignore[no-untyped-call]

    @property
    def of_first_spikes(self) -> bool:
        """A loss of first spikes: one time step of each neuron counts, and not the same for all."""
        if self._steps < 4 or not self._counts:
            return False
        counts = torch.stack(self._counts)
        return bool(counts.sum() <= self._size) and int((counts > 0).sum()) > 1


class FirstCall:
    """Context of a first forward pass: watches whether noisy neurons fire, and what noise-free ones feed.

    Spikes of a noise-free neuron are a step function of the weights before it: the likelihood ratio has no score for
    them, and their surrogate gradient is biased.

    Args:
        net: the network.
        noisy: its noisy neurons, by name.
        until: for a loop of the user's own, where no context ends it: the first pass after this is true ends it.
    """

    def __init__(
        self, net: nn.Module, noisy: Mapping[str, NoisyNeuron], until: Callable[[], bool] | None = None
    ) -> None:
        self._until = until
        self._noisy = dict(noisy)
        self._noise_free = {name: neuron for name, neuron in spiking_neurons(net) if neuron not in noisy.values()}
        # By name: some neuron fired in some time step; all of them fired in all.
        self._some: dict[str, Tensor] = {}
        self._all: dict[str, Tensor] = {}
        self._credits: dict[str, Credits] = {}
        self._rows = 0
        # Places of noise-free neurons, by the number of the node that made their output: unique in the graph.
        self._spikes: dict[int, str] = {}
        self._membranes: dict[int, str] = {}
        # By place: a membrane potential without noise came near its threshold; what a backward pass went through.
        self._near: dict[str, Tensor] = {}
        self._read_spikes: set[str] = set()
        self._read_membranes: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> FirstCall:
        for name, neuron in self._noisy.items():
            self._handles.append(neuron.register_forward_hook(Look(self._after, name)))
            self._handles.append(neuron.register_forward_pre_hook(Look(self._before, name)))
        for name, module in self._noise_free.items():
            self._handles.append(module.register_forward_hook(Look(self._emitted, place(name, module))))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Watches no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Watches no longer, and gives the warnings that are due without knowing the loss."""
        if self._handles:
            self.stop()
            self.warn_about_noise_free()
            self.warn_about_silence()
            self._warn_about_first_spikes()

    def _after(self, name: str, neuron: Any, args: Any, output: Any) -> None:
        if not neuron.noise.active:
            if _active(self._noisy):
                self._emitted(place(name, neuron), neuron, args, output)
            return
        spikes = output[0] if isinstance(output, tuple) else output
        if spikes.requires_grad:
            steps = 1 if spikes.shape == neuron.mem.shape else len(spikes)
            self._credits.setdefault(name, Credits()).watch(spikes, steps)
        self._rows = max(self._rows, len(neuron.mem))
        fired = spikes.detach() != 0
        some, every = fired.any(), fired.all()
        self._some[name] = self._some.get(name, some) | some
        self._all[name] = self._all.get(name, every) & every

    def _emitted(self, name: str, neuron: Any, _: Any, output: Any) -> None:
        spikes = output[0] if isinstance(output, tuple) else output
        if isinstance(spikes, Tensor) and spikes.grad_fn is not None:
            self._spikes[spikes.grad_fn._sequence_nr()] = name
            _note_gradient(spikes, name, self._read_spikes)
        mem = getattr(neuron, "mem", None)
        resets = getattr(neuron, "reset_mechanism", "none") != "none" or hasattr(neuron, "recurrent")
        if resets and isinstance(mem, Tensor) and mem.grad_fn is not None:
            self._membranes[mem.grad_fn._sequence_nr()] = name
            _note_gradient(mem, name, self._read_membranes)
            near = comes_near(neuron)
            self._near[name] = self._near.get(name, near) | near

    def _before(self, name: str, neuron: Any, args: Any) -> None:
        if self._until is not None and self._until():
            self.finish()
            return
        current = args[0] if args else None
        if not self._spikes or not isinstance(current, Tensor) or current.grad_fn is None or not neuron.noise.active:
            return
        first = min(self._spikes)
        numbers = {node._sequence_nr() for node in ancestors([current], lambda node: node._sequence_nr() < first)}
        feeding = ", ".join(sorted({self._spikes[number] for number in numbers & self._spikes.keys()}))
        if feeding:
            raise ValueError(
                f"the spikes of {feeding} have no noise, but feed {place(name, neuron)}: the likelihood ratio knows no "
                f"gradient for the weights before {feeding}. Give it noise too (noise=True, or add_noise(net)), or "
                "freeze those weights with requires_grad_(False)"
            )

    def check_losses(self, losses: Tensor, *roots: Tensor) -> None:
        """Warns of a loss that reads spikes or membranes without noise; refuses one that teaches nothing.

        Args:
            losses: with their graph.
            *roots: other tensors that a gradient goes back from.

        Raises:
            ValueError: if no parameter would get a gradient.
        """
        if not any(hasattr(node, "variable") for node in ancestors([losses, *roots])):
            raise ValueError(
                "there is nothing to learn: all parameters that loss_fn uses are frozen, noise levels too; call "
                "requires_grad_() on those to train, or on the inputs"
            )
        self.warn_about_noise_free({node._sequence_nr() for node in ancestors([losses])})

    def warn_about_noise_free(self, read: set[int] | None = None, known: Set[str] = frozenset()) -> set[str]:
        """Warns of noise-free neurons whose spikes or membranes are read.

        Args:
            read: numbers of the nodes behind the loss; None for what backward passes went through since.
            known: places that were warned of already.

        Returns:
            The places that were warned of now.
        """
        if read is None:
            spiking, membranes = self._read_spikes, self._read_membranes
        else:
            spiking = {name for number, name in self._spikes.items() if number in read}
            membranes = {name for number, name in self._membranes.items() if number in read}
        # One that never comes near its threshold is a readout of membrane potentials, which never resets.
        resetting = {name for name in membranes - spiking - known if bool(self._near[name])}
        spiking = spiking - known
        if spiking:
            warn(
                f"the spikes of {', '.join(sorted(spiking))} have no noise: the weights before it get their surrogate "
                "gradient, which is biased. Give it noise too, or read its membrane potential with "
                "reset_mechanism='none'"
            )
        if resetting:
            warn(
                f"the loss reads the membrane potential of {', '.join(sorted(resetting))}, which has no noise and "
                "resets: the gradient ignores that a weight changes when it resets. Use reset_mechanism='none' for a "
                "readout"
            )
        return spiking | resetting

    def _warn_about_first_spikes(self) -> None:
        """Warns of much noise where one spike of a neuron counts; after the backward pass of a user's own loop."""
        for name, credits in self._credits.items():
            neuron = self._noisy[name]
            assert neuron.noise is not None
            sigma, threshold = neuron.noise.sigma.detach().mean(), neuron.threshold.detach().mean()
            if credits.of_first_spikes and bool(sigma > 0.6 * threshold):
                warn(
                    f"the loss reads one spike of each neuron in {place(name, neuron)}, as first-spike codes do, and "
                    f"noise of σ = {sigma:.2g} often fires too early: set the level with add_noise(net, "
                    "sample=(inputs, targets), loss_fn=...), or give a sigma of a third of the threshold"
                )

    def dead(self) -> dict[str, str]:
        """Noisy layers whose spikes tell nothing, and why."""
        reasons = {}
        for name, neuron in self._noisy.items():
            where = place(name, neuron)
            if name not in self._some:
                reasons[name] = f"{where} was not called"
            elif not bool(self._some[name]):
                reasons[name] = f"{where} never fired"
            elif bool(self._all[name]):
                reasons[name] = f"all of {where} fired in every step"
        return reasons

    def warn_about_silence(self, when: str = "in the first call", known: Set[str] = frozenset()) -> set[str]:
        """Warns of layers whose spikes tell nothing, except for readouts that never reset; and of a single sample.

        Args:
            when: the forward pass was.
            known: names that were warned of already.

        Returns:
            The names that were warned of now.
        """
        dead = {
            name: reason
            for name, reason in self.dead().items()
            if self._noisy[name].reset_mechanism != "none" and name not in known
        }
        if dead:
            warn(
                f"{', '.join(dead.values())} {when}: spikes that never change tell nothing, and weights around them "
                "learn nothing or by chance. Change the threshold, the noise level or the weights in front of it; "
                "where only the membrane potential is read, nothing is wrong, but a prediction by spike counts is"
            )
        if self._rows == 1 and when == "in the first call":
            warn(
                "the batch is one sample, with one draw of noise: its gradient varies much. Repeat the sample in the "
                "batch, 16 times or so, and let the noise fall during training (snntorch_lr.anneal)"
            )
        return set(dead)


def _note_gradient(tensor: Tensor, name: str, names: set[str]) -> None:
    """Adds a name once a gradient reaches a tensor."""

    def note(gradient: Tensor | None) -> None:
        if gradient is not None:
            names.add(name)

    tensor.register_hook(note)  # type: ignore[no-untyped-call]


class Look:
    """Hook of a neuron that looks at calls with a graph; in a copy or pickle of the neuron it does nothing."""

    # False while something else runs the network.
    looks = True

    def __init__(self, look: Any = None, name: str = "") -> None:
        self._look = look
        self._name = name

    def __call__(self, neuron: Any, *arguments: Any) -> None:
        """Looks at a call."""
        if self._look is not None and Look.looks and torch.is_grad_enabled():
            self._look(self._name, neuron, *arguments)

    def __reduce__(self) -> tuple[type[Look], tuple[()]]:
        return Look, ()
