"""Gradients through firing rates: a neuron as an activation function of its mean input, without its dynamics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..network import spiking_neurons

Gain = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Slope of a neuron's rate from the neuron, its mean input and its mean output over time; element by element."""


def rga(neuron: nn.Module, current: Tensor, rate: Tensor, gamma: float = 0.2) -> Tensor:
    """Slope of the rate gradient approximation.

    With τ the leak and the current x̄ in units of the threshold: γ on [0, 1 − τ), where a constant current never fires;
    (1 − γ + γτ) / (1 + τ) on [1 − τ, 2], so that the integral is 1; 0 elsewhere.

    Args:
        neuron: with ``beta`` and ``threshold``.
        current: mean input current over time.
        rate: mean spikes over time; not used.
        gamma: slope below the current that fires.

    Source: Bu, Ding, Hao & Yu (2023), "Rate Gradient Approximation Attack Threats Deep Spiking Neural Networks", CVPR.
    """
    threshold, beta = (torch.as_tensor(getattr(neuron, name)).detach() for name in ("threshold", "beta"))
    tau = beta.clamp(0, 1)
    drive = current / threshold
    slope = torch.where(drive < 1 - tau, torch.as_tensor(gamma).to(drive), (1 - gamma + gamma * tau) / (1 + tau))
    return slope * ((drive >= 0) & (drive <= 2)) / threshold


def bptr(neuron: nn.Module, current: Tensor, rate: Tensor) -> Tensor:
    """Slope of backpropagation through rate (BPTR): 1 for a neuron that fired, 0 for one that did not.

    Args:
        neuron: not used.
        current: mean input current over time; not used.
        rate: mean spikes over time.

    Source: Ding, Bu, Yu, Huang & Liu (2022), "SNN-RAT: Robustness-enhanced Spiking Neural Network through Regularized
    Adversarial Training", NeurIPS.
    """
    return (rate > 0).to(rate.dtype)


class RateGradient:
    """Surrogate that passes the gradient of spikes at a time step on to the input at that step, times the slope.

    Applies to neurons with a leak ``beta`` whose spikes have the shape of their input; others (LSTM cells, pooling
    inside the neuron) keep their own gradient, and so does a membrane potential that the network reads.

    Args:
        gain: slope of the firing rate, ``rga`` or ``bptr``.
    """

    def __init__(self, gain: Gain) -> None:
        self.gain = gain

    @contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Context for one forward pass."""
        with ExitStack() as stack:
            for _, neuron in spiking_neurons(net):
                if isinstance(getattr(neuron, "beta", None), Tensor):
                    hook = neuron.register_forward_hook(_Rates(self.gain), with_kwargs=True)
                    stack.callback(hook.remove)
            yield


class _Rates:
    """Forward hook of one neuron in one forward pass: keeps its mean input and output for the backward pass."""

    def __init__(self, gain: Gain) -> None:
        self.gain = gain
        self.steps = 0
        self.slope: Tensor | None = None

    def __call__(self, neuron: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        current = args[0] if args else kwargs["input_"]
        spikes = output[0] if isinstance(output, tuple) else output
        if current.shape != spikes.shape or not torch.is_grad_enabled():
            return output
        if self.steps == 0:
            self.neuron, self.current, self.spikes = neuron, torch.zeros_like(current), torch.zeros_like(spikes)
        with torch.no_grad():
            self.steps += 1
            self.current = self.current + current
            self.spikes = self.spikes + spikes
        rated: Tensor = _RateSpike.apply(current, spikes.detach(), self)
        return (rated, *output[1:]) if isinstance(output, tuple) else rated

    def slope_now(self) -> Tensor:
        """Slope of the rates of the whole forward pass; for the backward pass, when it is over."""
        if self.slope is None:
            self.slope = self.gain(self.neuron, self.current / self.steps, self.spikes / self.steps)
        return self.slope


class _RateSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, spikes: Tensor, rates: _Rates) -> Tensor:
        ctx.rates = rates
        return spikes.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.rates.slope_now(), None, None
