"""Which feature works with which class of snnTorch's neurons, found out by trying."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import CLASSES, FEATURES, RESETS, STEPS, build, has_option, inputs_for, run

YES, NO, ABSENT = "yes", "no", "·"
SYMBOLS = {
    "learn_alpha": "α",
    "learn_beta": "β",
    "learn_threshold": "ϑ",
    "learn_recurrent": "V",
    "learn_graded_spikes_factor": "g",
}
NOISES: dict[str, Any] = {
    "membrane": lambda: slr.MembraneNoise(0.3),
    "escape": lambda: slr.EscapeNoise(0.3, distribution="logistic"),
}


class Behind(nn.Module):
    """A noisy Leaky with a constant input, a block, and the neuron that is tried, which spikes of the Leaky feed."""

    def __init__(self, neuron: Any, name: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = slr.Leaky(beta=0.8, threshold=0.3, init_hidden=True, noise=True)
        self.block = nn.Conv2d(1, 1, 1) if name == "SConv2dLSTM" else nn.Linear(FEATURES, FEATURES)
        self.neuron = neuron

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slr.reset(self)
        out = torch.zeros(())
        for _ in range(STEPS):
            spikes = self.neuron(self.block(self.first(x)))
            out = out + spikes.flatten(1).sum(1)
        return out - y


def behind(name: str, **options: Any) -> tuple[Behind, Tensor, Tensor]:
    """A network with a neuron of a class, with its images and labels."""
    net = Behind(build(slr, name, init_hidden=True, **options), name)
    x = inputs_for(name)[0] + 1
    return net, x, torch.zeros(len(x))


def trains(name: str, estimator: str, **options: Any) -> str:
    """Whether every parameter gets a gradient, and it is finite."""
    net, x, y = behind(name, **options)
    torch.manual_seed(0)
    slr.attach(torch.optim.SGD(net.parameters(), lr=0.0), net, estimator, copies=4).estimator.backward(net.loss, x, y)
    given = [parameter.grad for parameter in net.neuron.parameters()]
    found = all(gradient is not None and bool(gradient.isfinite().all()) for gradient in given)
    return YES if found and net.block.weight.grad is not None and net.block.weight.grad.any() else NO


def learned(name: str) -> str:
    """Options ``learn_...`` whose parameter gets a gradient by the likelihood ratio."""
    symbols = []
    for option, symbol in SYMBOLS.items():
        if not has_option(name, option):
            continue
        try:
            works = trains(name, "vanilla", noise=True, **{option: True})
        except (ValueError, RuntimeError):
            continue
        if works == YES:
            symbols.append(symbol)
    weights = ["W"] if name in ("SLSTM", "SConv2dLSTM") else []
    return " ".join([*weights, *symbols])


def fuses(name: str) -> str:
    """Whether time steps run in a kernel, where there is one for the device."""
    return YES if build(slr, name, noise=True).fused_update() is not None else NO


def same_without_noise(name: str) -> str:
    """Whether ``noise=False`` gives snnTorch's outputs bit for bit."""
    ours, theirs = (run(build(package, name), inputs_for(name)) for package in (slr, snn))
    pairs = [pair for steps in zip(ours, theirs, strict=True) for pair in zip(*steps, strict=True)]
    return YES if all(torch.equal(*pair) for pair in pairs) else NO


def draws(name: str, noises: list[slr.MembraneNoise] | list[slr.EscapeNoise]) -> str:
    """Whether a neuron draws from all of these, and surrogate training can learn their level; else those that work."""
    works = []
    for noise in noises:
        neuron = build(slr, name, noise=noise)
        outputs = [torch.stack([out[0] for out in run(neuron, inputs_for(name))]) for _ in range(2)]
        outputs[0].sum().backward()
        if not torch.equal(*outputs) and noise.log_sigma.grad is not None and bool(noise.log_sigma.grad.any()):
            works.append(noise.distribution)
    return YES if len(works) == len(noises) else ", ".join(works) or NO


def carries_noise(name: str) -> str:
    """Whether the membrane potential after a step depends on the noise of the step before."""
    neuron = build(slr, name, noise=True, init_hidden=True, reset_mechanism="none")
    x, membranes = inputs_for(name), []
    for seed in (0, 1):
        neuron.reset_mem()
        torch.manual_seed(seed)
        neuron(x[0])
        with slr.noise_off(neuron):
            neuron(x[1])
        membranes.append(neuron.mem.detach())
    return NO if torch.equal(*membranes) else YES


def resets(name: str) -> str:
    """Whether the network trains with every reset mechanism; else those with which it does."""
    works = [each for each in RESETS if trains(name, "vanilla", noise=True, reset_mechanism=each) == YES]
    return YES if works == RESETS else ", ".join(works) or NO


def option(name: str, setting: str, value: Any, noise: str) -> str:
    """Whether the network trains with an option, where snnTorch has it."""
    if not has_option(name, setting):
        return ABSENT
    return trains(name, "vanilla", noise=NOISES[noise](), **{setting: value})


def converts(name: str) -> str:
    """Whether ``add_noise`` and ``remove_noise`` lead to the noisy class and back."""
    neuron = build(snn, name)
    there = type(slr.add_noise(neuron)) is getattr(slr, name)
    return YES if there and type(slr.remove_noise(neuron)) is getattr(snn, name) else NO


def copies(name: str) -> str:
    """Whether a neuron can be pickled and deep-copied after it ran."""
    neuron = build(slr, name, noise=True, init_hidden=True)
    run(neuron, inputs_for(name))
    return (
        YES
        if all(type(made) is type(neuron) for made in (copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))))
        else NO
    )


def exports(name: str) -> str:
    """Whether snnTorch can export the neuron to NIR, which takes one leak and one threshold per neuron."""
    torch.manual_seed(0)
    leaks = {"Leaky": [0.8], "Synaptic": [0.7, 0.6]}.get(name)
    if leaks is None:
        neuron = build(slr, name, noise=True, init_hidden=True)
    else:
        each = [torch.full((FEATURES,), leak) for leak in leaks]
        neuron = getattr(slr, name)(*each, threshold=torch.ones(FEATURES), noise=True, init_hidden=True)
    first: nn.Module = nn.Conv2d(1, 1, 1) if name == "SConv2dLSTM" else nn.Linear(FEATURES, FEATURES)
    try:
        slr.export_to_nir(nn.Sequential(first, neuron), inputs_for(name)[0], ignore_dims=[0])
    except Exception:
        # snnTorch's export fails in many ways on what it does not know.
        return NO
    return YES


TABLE: dict[str, Callable[[str], str]] = {
    "`noise=False` is snnTorch's neuron, bit for bit": same_without_noise,
    "`add_noise`, `remove_noise`": converts,
    "membrane noise: Gaussian, Laplace, logistic": lambda name: draws(
        name, [slr.MembraneNoise(0.3, distribution=d) for d in slr.MembraneNoise.offered]
    ),
    "… carried on to the next time step": carries_noise,
    "escape noise: Gaussian, logistic": lambda name: draws(
        name, [slr.EscapeNoise(0.3, distribution=d) for d in slr.EscapeNoise.offered]
    ),
    "`counterfactual`, membrane noise": lambda name: trains(name, "counterfactual", noise="membrane"),
    "`counterfactual`, escape noise": lambda name: trains(name, "counterfactual", noise="escape"),
    "`vanilla`, membrane noise": lambda name: trains(name, "vanilla", noise="membrane"),
    "`vanilla`, escape noise": lambda name: trains(name, "vanilla", noise="escape"),
    "`approximate`, membrane noise": lambda name: trains(name, "approximate", noise="membrane"),
    "`approximate`, escape noise": lambda name: trains(name, "approximate", noise="escape"),
    "learned besides block and σ": learned,
    "`reset_mechanism`: subtract, zero, none": resets,
    "`reset_delay=False`": lambda name: option(name, "reset_delay", False, "membrane"),
    "`inhibition=True`, membrane noise": lambda name: option(name, "inhibition", True, "membrane"),
    "`inhibition=True`, escape noise": lambda name: option(name, "inhibition", True, "escape"),
    "time steps in one kernel: `counterfactual`": fuses,
    "pickle, `copy.deepcopy`": copies,
    "`export_to_nir`": exports,
}


def table() -> str:
    """The table of features and classes, and what the errors of the refused combinations say, as Markdown."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in CLASSES) + " |", "|---" * (len(CLASSES) + 1) + "|"]
    refused: dict[tuple[str, str], list[str]] = {}
    for feature, attempt in TABLE.items():
        cells = []
        for name in CLASSES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    cells.append(attempt(name))
                except ValueError as error:
                    cells.append("refused")
                    said = re.sub(rf"^(neuron \({name}\)|{name}): ", "", str(error))
                    refused.setdefault((feature, said), []).append(name)
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    lines += ["", "The errors:", ""]
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (feature, message), names in refused.items():
        alike.setdefault((message, tuple(names)), []).append(feature)
    for (message, names), features in alike.items():
        whose = "all" if list(names) == CLASSES else ", ".join(names)
        lines.append(f"- {'; '.join(features)}; {whose}: “{message}”")
    return "\n".join(lines)
