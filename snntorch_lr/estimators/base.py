"""Base class of the estimators: copies, seeds, forward passes, and what the first call looks at."""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.hooks import RemovableHandle

from .._messages import place, places, positive_integer, warn
from ..baselines import BASELINES, Baseline
from ..distributed import SingleProcess
from ..graph import leaves
from ..kernels import memory
from ..left_as_found import Buffers, left_as_found
from ..network import looking_once, noisy_inputs, spiking_neurons
from ..noise import EscapeNoise, MembraneNoise
from ..noise_stream import NoiseStream
from ..noisy_neuron import NoisyNeuron
from ..validate import (
    Checks,
    NoiseFreeNeurons,
    check_gradients,
    check_levels,
    check_losses,
    check_network,
    check_parameters,
    noisy,
    warn_about_batch_norm,
)
from .recording import Copies, Recording, Step, explain


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
        """Layers whose spikes tell nothing, and why."""
        found = {}
        for name, neuron in self._neurons.items():
            where = place(name, neuron)
            if name not in self._most:
                found[name] = f"{where} was not called"
            elif not bool(self._most[name]):
                found[name] = f"{where} never fired"
            elif bool(self._least[name]):
                found[name] = f"all of {where} fired in every step"
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


LossFn = Callable[[Any, Any], Tensor]
R = TypeVar("R", bound=Recording)


@dataclass(frozen=True)
class Call:
    """One call of ``Estimator.backward``.

    Attributes:
        neurons: those that draw noise now, by name.
        loss_fn: forward pass and loss.
        inputs: of ``loss_fn``, as they are.
        targets: of ``loss_fn``, before they are repeated for the copies.
    """

    neurons: Mapping[str, NoisyNeuron]
    loss_fn: LossFn
    inputs: Any
    targets: Any

    @classmethod
    def of(cls, net: nn.Module, loss_fn: LossFn, inputs: Any, targets: Any) -> Call:
        """A call for a network.

        Raises:
            ValueError: if the network cannot be trained.
        """
        return cls(check_network(net), loss_fn, inputs, targets)

    @property
    def batch(self) -> int | None:
        """Number of samples, from the first tensor among the targets; None if there is none."""
        sizes = [len(leaf) for leaf in tree_flatten(self.targets)[0] if isinstance(leaf, Tensor) and leaf.dim()]
        return sizes[0] if sizes else None


class Estimator(ABC):
    """Base class of the estimators: copies, baseline, seed, and forward passes of noise copies.

    A new estimator implements ``estimate``; see docs/contributing-estimator.md.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample. Only what comes after the first noisy neuron is computed K times.
        baseline: ``"leave-one-out"``, ``"batch-mean"``, ``"none"``, or a function of the losses ``[copies, batch]``
            and of whether they come in antithetic pairs.
        antithetic: the second half of the copies gets the negated noise of the first half.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, or copies, baseline and antithetic do not go together.

    Examples:
        >>> estimator: slr.Estimator = slr.Counterfactual(net, copies=2)
        >>> loss = estimator.backward(loss_fn, images, labels)
    """

    # The gradient holds what one sample does to the loss of others.
    takes_batch_norm = False

    def __init__(
        self,
        net: nn.Module,
        copies: int = 16,
        baseline: str | Baseline = "leave-one-out",
        antithetic: bool = False,
        seed: int | None = None,
    ) -> None:
        copies = positive_integer("copies", copies)
        if not callable(baseline) and (not isinstance(baseline, str) or baseline not in BASELINES):
            raise ValueError(f"unknown baseline {baseline!r}; choose one of {', '.join(BASELINES)}, or a function")
        if seed is not None and not hasattr(seed, "__index__"):
            raise ValueError(f"seed must be an integer, or None for torch's global generator, got {seed!r}")
        if antithetic and copies % 2:
            raise ValueError(f"antithetic pairs need an even number of copies, got {copies}")
        least = 4 if antithetic else 2
        if baseline == "leave-one-out" and copies < least:
            raise ValueError(
                f"{copies} {'copies leave' if copies > 1 else 'copy leaves'} nothing to compare with: baseline="
                f"'leave-one-out'{' with antithetic pairs' if antithetic else ''} needs copies >= {least}; "
                "otherwise use baseline='batch-mean' or 'none'"
            )
        noisy(net)
        self.net = net
        self.copies = copies
        self.baseline: Baseline = BASELINES[baseline] if isinstance(baseline, str) else baseline
        self.antithetic = antithetic
        self.seed = seed
        self.division = SingleProcess()
        self._seeds = torch.Generator() if seed is not None else None
        if self._seeds is not None and seed is not None:
            self._seeds.manual_seed(operator.index(seed))
        self.checks = Checks()
        self.inspected = self.half = False
        # That a pass draws for each sample and copy.
        self.numbers = 0
        self._warned: set[str] = set()

    def backward(self, loss_fn: LossFn, inputs: Any, targets: Any) -> Tensor:
        """Adds the estimated gradient into ``.grad`` of the parameters, as ``loss.backward()`` does.

        Args:
            loss_fn: forward pass and loss, called as ``loss_fn(inputs, targets)``; returns one loss per row of the
                targets that it is given. It must start from fresh states (``reset(net)``, or ``reset_mem()``). It may
                be called more than once, always with the same random numbers of torch, NumPy and Python; the first call
                of all adds passes of two copies, which look for layers that never fire, and for losses of rows that
                change with the spikes of other rows.
            inputs: passed on as they are.
            targets: tensor, or nested lists, tuples and dicts of tensors, batch first; passed on repeated for the
                copies. None if there are none.

        Returns:
            Mean loss over samples and copies, detached.

        Raises:
            ValueError: if the network or the losses would make the gradient wrong, there is nothing to learn, loss_fn
                does not run the network, losses of two passes differ, or the gradient is not finite. ``.grad`` of
                the network's parameters is untouched then, as after any other error, and so are running statistics.
        """

        def own_part() -> Tensor:
            call = Call.of(self.net, loss_fn, inputs, targets)
            if not self.inspected:
                with self.checking():
                    check_levels(self.net, self.checks)
                check_parameters(self.net)
            if not self.takes_batch_norm:
                self._warned |= warn_about_batch_norm(self.net, self._warned)
            if not self.inspected:
                self.check_rows(call)
            statistics = Buffers(self.net, statistics_only=True)
            try:
                loss = self.checked_estimate(call)
            except BaseException:
                statistics.restore()
                raise
            self.inspected = True
            return loss

        with looking_once():
            return self.division.run(self.net, own_part)

    def checked_estimate(self, call: Call) -> Tensor:
        """``estimate``, whose gradients are finite, and which runs no neuron in a backward pass."""
        for neuron in call.neurons.values():
            neuron.estimating = True
        try:
            with self.checking():
                check_levels(self.net, self.checks)
                loss = self.estimate(call)
                check_gradients(self.net, call.inputs, self.half, self.checks)
        finally:
            memory.end_call(first=not self.inspected)
            for neuron in call.neurons.values():
                del neuron.estimating
        return loss

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Context at whose end ``checks`` are read: once, since all that is computed meanwhile is waited for."""
        outer, self.checks = self.checks, Checks()
        try:
            yield
            self.checks.read()
        except Exception:
            # An error may follow from what does not hold, which is the one to be told.
            self.checks.read()
            raise
        finally:
            self.checks = outer

    def state_dict(self) -> dict[str, Any]:
        """State of the estimator, to resume a training loop of one's own with the same numbers.

        With ``seed=None`` the noise comes from torch's global generator: save ``torch.get_rng_state()`` too.
        """
        return {"seeds": None if self._seeds is None else self._seeds.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned, of an estimator that was made with the same arguments.

        Raises:
            ValueError: if one of the two was made with a seed and the other without.
        """
        if (state["seeds"] is None) != (self._seeds is None):
            raise ValueError("one estimator was made with a seed and the other without: make both alike")
        if self._seeds is not None:
            self._seeds.set_state(state["seeds"])

    def reseed(self, seed: int) -> None:
        """Starts the noise of an estimator that was made with a seed again, with another one."""
        assert self._seeds is not None
        self._seeds.manual_seed(seed)

    @abstractmethod
    def estimate(self, call: Call) -> Tensor:
        """Adds the gradient of this process into ``.grad``, as ``loss.backward()`` does.

        Returns:
            The mean loss, detached.
        """

    def next_seed(self) -> int:
        """Seed of the noise of this call; to be asked for once."""
        return self.division.seed(int(torch.randint(2**62, (), generator=self._seeds)))

    def make_copies(self, call: Call, seed: int, span: tuple[int, int] | None = None) -> Copies:
        """Noise copies for a recording.

        Args:
            call: the call.
            seed: from ``next_seed``.
            span: first copy, and the end of their range; by default all that this process runs.
        """
        first, last = self.division.own_copies(self.copies) if span is None else span
        return self._make(call, NoiseStream(seed, self.copies, first, last, self.antithetic))

    def _make(self, call: Call, stream: NoiseStream) -> Copies:
        others = [neuron for name, neuron in spiking_neurons(self.net) if name not in call.neurons]
        return Copies(call.neurons, stream, call.batch, others)

    def run(self, recording: Recording, call: Call, *, grad: bool) -> Tensor:
        """Losses of the copies of a recording, ``[copies * batch]``."""

        def repeat(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            return recording.own(value).repeat(recording.copies, *[1] * (value.dim() - 1))

        for noise in noisy_inputs(self.net).values():
            noise.reset()
        with torch.set_grad_enabled(grad), recording:
            try:
                losses = call.loss_fn(call.inputs, tree_map(repeat, call.targets))
            except (RuntimeError, ValueError, IndexError) as error:
                explain(error, recording)
                raise
            finally:
                self.checks.take(recording.checks)
        self.half |= recording.half
        if not recording.emits_bits:
            raise ValueError(
                f"loss_fn ran none of {places(recording.neurons)}, the noisy neurons of {type(self.net).__name__}: "
                "call in it the very network that the estimator was made for, and no copy"
            )
        return check_losses(losses, recording.copies, recording.batch or 0, self.net, self.checks)

    def run_watched(self, recording: Recording, call: Call) -> Tensor:
        """A run with a graph; the first of all looks for whatever would bias the gradient."""
        if self.inspected:
            with recording.spikes:
                return self.run(recording, call, grad=True)
        watch, firing = NoiseFreeNeurons(self.net, call.neurons), Firing(call.neurons)
        with recording.spikes, watch, firing:
            losses = self.run(recording, call, grad=True)
        if not leaves([losses, *recording.roots()]):
            raise ValueError(
                f"there is nothing to learn: all parameters of {type(self.net).__name__} that loss_fn uses are frozen, "
                "noise levels too; call requires_grad_() on those to train, or on the inputs"
            )
        watch.check(recording.roots(), losses)
        firing.warn()
        return losses

    @contextmanager
    def trial(self, **more: bool) -> Iterator[None]:
        """Context of forward passes that leave no trace, and are checked by themselves."""
        with left_as_found(self.net, buffers=True, states=True, random=True, **more), self.checking():
            yield

    def check_rows(self, call: Call) -> None:
        """Refuses losses of one copy that depend on the other, by passes of two copies without a graph."""

        def losses(fires: bool) -> Tensor | None:
            recording = Forced(self._make(call, NoiseStream(0, 2, 0, 2)), fires)
            # Whatever is to be said about the forward pass is said by that of the call.
            with warnings.catch_warnings(), suppress(Exception), self.trial(modes=True):
                warnings.simplefilter("ignore")
                use_running_statistics(self.net)
                try:
                    return self.run(recording, call, grad=False).view(2, -1)[0]
                finally:
                    self.numbers = recording.numbers
            return None

        check_rows_are_apart(losses)

    def trial_run(self, recording_type: Callable[[Copies], R], call: Call) -> tuple[Tensor, R]:
        """A run of two copies that leaves no trace, and looks for whatever would bias the gradient."""
        recording = recording_type(self._make(call, NoiseStream(0, 2, 0, 2)))
        with self.trial():
            return self.run_watched(recording, call), recording

    def gather(self, losses: Tensor) -> Tensor:
        """The losses of all copies, ``[copies, batch]``, from those that were run here, without their graph."""
        if not self.division.alone:
            # Ranks meet on the host, and one that failed is to say so before the others get its losses.
            self.checks.read()
        return self.division.gather(losses.detach())

    def weigh(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of all copies, ``[copies, batch]``, and weights of the scores of the copies that were run here.

        Args:
            losses: of the copies that were run here, in any shape.
        """
        first, last = self.division.own_copies(self.copies)
        everyone = self.gather(losses.view(last - first, -1))
        if not self.inspected and len(everyone) > 1 and bool((everyone == everyone[0]).all()):
            warn(
                "all copies of a sample have the same loss in the first call: the noise decides nothing, and what is "
                "before a noisy neuron learns nothing. Do its spikes reach the loss? Raise the noise level or the "
                "scale of the weights, or take a loss that tells more"
            )
        advantages = self.baseline(everyone, self.antithetic)
        finite = advantages.isfinite()

        def error() -> str:
            return (
                f"the baseline must return a finite number for each loss, {tuple(everyone.shape)}, but returned "
                f"{tuple(finite.shape)}, {int((~finite).sum())} of them not finite"
            )

        if advantages.shape != everyone.shape:
            raise ValueError(error())
        self.checks.file(finite.all(), error)
        return everyone, advantages[first:last] / everyone.numel()
