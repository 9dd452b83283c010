"""The rate-factorised likelihood ratio: less memory, less work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._messages import place
from ..graph import ancestors, same_numbers
from ..left_as_found import Buffers, RandomState
from ..noisy_neuron import NoisyNeuron
from .base import Call, Estimator
from .sums import RatePass, RatesCaptured, Summing, check_calls, roots
from .vanilla import look


class Approximate(Estimator):
    """The likelihood ratio with scores and presynaptic rates averaged over time separately.

    Where ``Vanilla`` sums Σ_t score_t · ∂block(x_t)/∂θ, this estimator computes (Σ_t score_t) · ∂block(x̄)/∂θ with the
    mean rate x̄ = 1/T Σ_t x_t of each copy: the temporal covariance between score and presynaptic activity is dropped.
    It needs running sums only, and one evaluation and one backward pass of each block in place of T.

    Nothing is dropped where the input of a block does not change over time, such as an image as constant current, and
    in the gradients of noise levels, leaks, thresholds and other element-wise parameters, which are summed exactly.
    Elsewhere there is a bias: measure yours with ``gradient_report``.

    ``loss_fn`` is called twice; the second call ends with its first time step. Each noisy neuron must be called once
    in each time step, and what enters a deeper block besides spikes must be constant in time. LSTM cells are evaluated
    at the means of all their states. That both calls compute the same is not checked: the second has no losses. Draw
    random numbers from the global generators of torch, NumPy or Python, which are put back.

    Args:
        net: the network; at least one neuron must have noise.
        copies: K, noise copies of each sample. Only what comes after the first noisy neuron is computed K times.
        baseline: ``"leave-one-out"``, ``"batch-mean"``, ``"none"``, or a function of the losses ``[copies, batch]``
            and of whether they come in antithetic pairs.
        antithetic: the second half of the copies gets the negated noise of the first half.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        ValueError: if the network has no noisy neuron, or arguments do not go together.

    Examples:
        >>> estimator = slr.Approximate(net, copies=16)
        >>> loss = estimator.backward(loss_fn, images, labels)

    Source: arXiv 2302.10802 announces an approximation that "reduces memory and improves computational efficiency",
    whose formula we do not have. This construction is ours and is not claimed to be theirs.
    """

    _internal: Collection[NoisyNeuron] = ()

    def _look_ahead(self, call: Call) -> None:
        """A trial run that finds which neurons feed which, and refuses losses of membrane potentials."""
        neurons = call.neurons
        membranes: dict[Node, str] = {}
        left: dict[str, Tensor] = {}

        def watch(name: str) -> Any:
            def keep(neuron: Any, *_: Any) -> None:
                left[name] = neuron.mem
                if neuron.mem.grad_fn is not None:
                    membranes[neuron.mem.grad_fn] = place(name, neuron)

            return keep

        def compare(name: str) -> Any:
            def check(neuron: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
                mem = args[-1] if len(args) > 1 else named.get("mem", neuron.mem)
                if name in left and isinstance(mem, Tensor) and not same_numbers(mem, left[name]):
                    raise ValueError(
                        f"{place(name, neuron)} did not go on from the state that it had returned; sums over "
                        "time need one presentation in each call of loss_fn, and a neuron for each layer. Use the "
                        "vanilla estimator"
                    )

            return check

        handles = [neuron.register_forward_hook(watch(name)) for name, neuron in neurons.items()]
        handles += [
            neuron.register_forward_pre_hook(compare(name), with_kwargs=True) for name, neuron in neurons.items()
        ]
        try:
            losses, recording = look(self, call)
        finally:
            for handle in handles:
                handle.remove()
        read = sorted({membranes[node] for node in ancestors([losses]) if node in membranes})
        if read:
            raise ValueError(
                f"the loss reads the membrane potential of {', '.join(read)}, whose gradient through time is not "
                "kept here: read a neuron without noise and with reset_mechanism='none', or use the vanilla estimator"
            )
        self._internal = recording.fed_by_copies

    def estimate(self, call: Call) -> Tensor:
        """Adds the gradient of this process into ``.grad``."""
        if not self.inspected:
            self._look_ahead(call)
        copies = self.make_copies(call, self.next_seed())
        before = RandomState.capture()
        sampling = Summing(copies, self._internal)
        with sampling.spikes:
            losses = self.run(sampling, call, grad=True)
        check_calls(sampling.sums, call.neurons, "use the vanilla estimator")
        everyone, own = self.weigh(losses)
        weights = own.reshape(-1)

        currents: Mapping[NoisyNeuron, Tensor] = {}
        if any(sums.internal for sums in sampling.sums.values()):
            after, statistics = RandomState.capture(), Buffers(self.net, statistics_only=True)
            before.restore()
            through_rates = RatePass(replace(copies, batch=sampling.batch), sampling.sums)
            try:
                with suppress(RatesCaptured):
                    self.run(through_rates, call, grad=True)
            finally:
                after.restore()
                statistics.restore()
            currents = through_rates.currents

        tensors, gradients = [], []
        if losses.requires_grad:
            tensors.append(losses)
            gradients.append(torch.full_like(losses, 1 / everyone.numel()))
        for neuron, sums in sampling.sums.items():
            for tensor, gradient in roots(neuron, sums, currents.get(neuron), weights, sampling.copies):
                if tensor.requires_grad:
                    tensors.append(tensor)
                    gradients.append(gradient)
        if tensors:
            torch.autograd.backward(tensors, gradients)
        return everyone.mean()
