"""What several test modules share: every neuron class with small settings, a small noisy network, comparisons."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.distributions import Laplace, Normal

import snntorch_lr as slr
from snntorch_lr.gradients.vanilla import Scores

STEPS, BATCH, FEATURES = 4, 5, 3
MAKERS: dict[str, Callable[..., Any]] = {
    "counterfactual": slr.Counterfactual,
    "vanilla": slr.Vanilla,
    "approximate": slr.Approximate,
}
every_estimator = pytest.mark.parametrize("estimator", MAKERS)
NOISES = ["membrane", "escape"]
every_noise = pytest.mark.parametrize("noise", NOISES)
# A leak that is learned keeps time steps from being fused.
every_path = pytest.mark.parametrize("noise", [*NOISES, "membrane, not fused", "escape, not fused"])
RESETS = ["subtract", "zero", "none"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
# Of u given its mean and scale parameter.
LOG_DENSITY = {
    "gaussian": lambda u, mean, sigma: Normal(mean, sigma).log_prob(u),
    "laplace": lambda u, mean, sigma: Laplace(mean, sigma).log_prob(u),
    "logistic": lambda u, mean, sigma: (
        -(u - mean) / sigma - sigma.log() - 2 * nn.functional.softplus(-(u - mean) / sigma)
    ),
}
COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}

POSITIONAL: dict[str, tuple[Any, ...]] = {
    "Leaky": (0.8,),
    "Lapicque": (0.8,),
    "Synaptic": (0.7, 0.6),
    "Alpha": (0.8, 0.5),
    "RLeaky": (0.8, 1.0, True, FEATURES),
    "RSynaptic": (0.7, 0.6, 1.0, True, FEATURES),
    "SLSTM": (FEATURES, FEATURES),
    "SConv2dLSTM": (1, 2, 3),
}
CLASSES = list(POSITIONAL)
LEARNED = {
    "Leaky": ["beta", "threshold", "graded_spikes_factor"],
    "Lapicque": ["threshold"],
    "Synaptic": ["alpha", "beta", "threshold"],
    "Alpha": ["beta", "threshold"],
    "RLeaky": ["beta", "threshold"],
    "RSynaptic": ["alpha", "beta", "threshold"],
    "SLSTM": ["threshold"],
    "SConv2dLSTM": ["threshold"],
}


def build(package: ModuleType, name: str, learn: bool = False, **options: Any) -> Any:
    """A neuron of a class of snntorch or snntorch_lr, the same for the same arguments."""
    torch.manual_seed(0)
    options.setdefault("threshold", 0.1)
    if learn:
        options.update({f"learn_{parameter}": True for parameter in LEARNED[name]})
    return getattr(package, name)(*POSITIONAL[name], **options)


def sampled(neuron: Any) -> Any:
    """The neuron with sampled spikes: by counterfactual credit, and LSTM cells by the plain likelihood ratio."""
    if neuron.is_elementwise:
        slr.use_gradient(neuron)
    else:
        neuron.sampler = Scores()
    return neuron


def has_option(name: str, option: str) -> bool:
    return option in inspect.signature(getattr(snn, name)).parameters


# RSynaptic fails without a delay.
WITH_DELAY = [name for name in CLASSES if has_option(name, "reset_delay") and name != "RSynaptic"]


def inputs_for(name: str, dtype: torch.dtype = torch.float32, batch: int = BATCH) -> Tensor:
    """Input current of a neuron of this class, ``[time, batch, ...]``, that makes it fire now and then."""
    shape = (1, 4, 4) if name == "SConv2dLSTM" else (FEATURES,)
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.rand(STEPS, batch, *shape, dtype=dtype, generator=generator) - 0.5


def initial_states(neuron: Any) -> tuple[Tensor, ...]:
    states = neuron.reset_mem()
    return states if isinstance(states, tuple) else (states,)


def run(neuron: Any, x: Tensor) -> list[tuple[Tensor, ...]]:
    """All outputs over time, with states held by the neuron or handed over by the caller."""
    states = initial_states(neuron)
    outputs = []
    for step in x:
        output = neuron(step) if neuron.init_hidden else neuron(step, *states)
        output = output if isinstance(output, tuple) else (output,)
        if not neuron.init_hidden:
            # Recurrent neurons take their last spike as a state.
            states = output[-len(states) :]
        outputs.append(output)
    return outputs


class Net(nn.Module):
    """Linear, Leaky, Linear, Leaky, Linear readout; two classes from ``[batch, time, features]``."""

    def __init__(
        self, init_hidden: bool = True, features: int = FEATURES, hidden: int = 4, last: int = 4, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        options.setdefault("noise", True)
        if isinstance(options["noise"], str):
            options["noise"], _, apart = options["noise"].partition(", ")
            options["learn_beta"] = bool(apart)
        self.fc1 = nn.Linear(features, hidden)
        self.lif1 = slr.Leaky(beta=0.8, threshold=0.5, init_hidden=init_hidden, **options)
        self.fc2 = nn.Linear(hidden, last)
        self.lif2 = slr.Leaky(beta=0.8, threshold=0.5, init_hidden=init_hidden, **options)
        self.readout = nn.Linear(last, 2)
        self.init_hidden = init_hidden

    def fresh(self) -> tuple[Tensor, ...]:
        """States to begin with; none are handed over where the neurons hold them."""
        states = self.lif1.reset_mem(), self.lif2.reset_mem()
        return () if self.init_hidden else states

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """What a time step adds to the output, and the new states."""
        if self.init_hidden:
            return (self.readout(self.lif2(self.fc2(self.lif1(self.fc1(x))))),)
        spikes, mem1 = self.lif1(self.fc1(x), states[0])
        spikes, mem2 = self.lif2(self.fc2(spikes), states[1])
        return self.readout(spikes), mem1, mem2

    def forward(self, x: Tensor) -> Tensor:
        slr.reset(self)
        states, out = self.fresh(), torch.zeros((), device=x.device)
        for now in x.unbind(1):
            added, *states = self.step(now, *states)
            out = out + added
        return out

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(x), y, reduction="none")


def credited(noise: Any = "escape", init_hidden: bool = True, control: float | None = 0.4, **options: Any) -> Net:
    """A network with counterfactual credit; with a fixed λ calls differ by nothing but their noise."""
    net = Net(init_hidden, noise=noise)
    slr.use_gradient(net, "counterfactual", control=control, **options)
    return net


def data(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.rand(BATCH, STEPS, FEATURES, generator=generator, dtype=dtype)
    return x.to(device), torch.tensor([0, 1, 0, 1, 1], device=device)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def backward(net: nn.Module, *losses: Callable[[], Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Gradients of losses, one after the other, and of nothing before."""
    net.zero_grad()
    torch.manual_seed(seed)
    for loss in losses:
        loss().backward()
    return gradients(net)


def estimate(estimator: str, net: Any, loss_fn: Any = None, arguments: Any = None, **options: Any) -> dict[str, Tensor]:
    """Gradients of one call of an estimator, and of nothing before."""
    net.zero_grad()
    made = MAKERS[estimator](net, **{"copies": 4, "seed": 0, **options})
    made.backward(loss_fn or net.loss, *(arguments or data()))
    return gradients(net)


def assert_filled(net: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Every parameter has a gradient, which is finite and not zero."""
    for name, parameter in net.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
        assert gradient.dtype == dtype, name


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    """Same names; bit-identical values unless a tolerance is given."""
    torch.testing.assert_close(first, second, **(tolerance or {"rtol": 0, "atol": 0}))


@contextmanager
def nothing_changes(net: nn.Module) -> Iterator[None]:
    """Weights and gradients are the same after the block; gradients are filled before, so that loss shows too."""
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = weights(net), gradients(net)
    try:
        yield
    finally:
        # Also, and above all, after an error.
        assert_same(before[0], weights(net))
        assert_same(before[1], gradients(net))
