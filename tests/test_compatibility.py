"""The table of ``docs/compatibility.md``, which feature works with which class of neurons, is what trying gives."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr

from . import pages
from .helpers import CLASSES, COPIERS, FEATURES, MAKERS, NOISES, RESETS, STEPS, build, has_option, inputs_for, run

PAGE = pages.ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- computed: make compatibility -->", "<!-- end -->"
REWRITE = "SNNTORCH_LR_REWRITE"
CELLS: dict[bool | str | None, str] = {True: "yes", False: "no", None: "·"}
SYMBOLS = {
    "learn_alpha": "α",
    "learn_beta": "β",
    "learn_threshold": "ϑ",
    "learn_recurrent": "V",
    "learn_graded_spikes_factor": "g",
}
# What a cell holds; None where snnTorch has no such option.
Cell = bool | str | None


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
        return sum(self.neuron(self.block(self.first(x))).flatten(1).sum(1) for _ in range(STEPS)) - y


def trains(name: str, estimator: str, **options: Any) -> bool:
    """Whether every parameter gets a gradient, and it is finite."""
    net = Behind(build(slr, name, init_hidden=True, **options), name)
    x = inputs_for(name)[0] + 1
    torch.manual_seed(0)
    MAKERS[estimator](net, copies=4).backward(net.loss, x, torch.zeros(len(x)))
    gradients = [parameter.grad for parameter in net.neuron.parameters()]
    finite = all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    return finite and net.block.weight.grad is not None and bool(net.block.weight.grad.any())


def learned(name: str) -> str:
    """Options ``learn_...`` whose parameter gets a gradient by the likelihood ratio."""
    symbols = ["W"] if name in ("SLSTM", "SConv2dLSTM") else []
    for option, symbol in SYMBOLS.items():
        if has_option(name, option):
            try:
                symbols += [symbol] * trains(name, "vanilla", noise=True, **{option: True})
            except (ValueError, RuntimeError):
                continue
    return " ".join(symbols)


def same_without_noise(name: str) -> bool:
    """Whether ``noise=False`` gives snnTorch's outputs bit for bit."""
    ours, theirs = (run(build(package, name), inputs_for(name)) for package in (slr, snn))
    return all(torch.equal(*pair) for steps in zip(ours, theirs, strict=True) for pair in zip(*steps, strict=True))


def draws(name: str, make: Callable[..., Any], offered: tuple[str, ...]) -> Cell:
    """Whether a neuron draws from all of these, and surrogate training can learn their level; else those that work."""
    works = []
    for distribution in offered:
        noise = make(0.3, distribution=distribution)
        neuron = build(slr, name, noise=noise)
        outputs = [torch.stack([out[0] for out in run(neuron, inputs_for(name))]) for _ in range(2)]
        outputs[0].sum().backward()
        if not torch.equal(*outputs) and noise.log_sigma.grad is not None and bool(noise.log_sigma.grad.any()):
            works.append(distribution)
    return len(works) == len(offered) or ", ".join(works) or False


def carries_noise(name: str) -> bool:
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
    return not torch.equal(*membranes)


def resets(name: str) -> Cell:
    """Whether the network trains with every reset mechanism; else those with which it does."""
    works = [reset for reset in RESETS if trains(name, "vanilla", noise=True, reset_mechanism=reset)]
    return works == RESETS or ", ".join(works) or False


def option(name: str, setting: str, value: Any, noise: str = "membrane") -> Cell:
    """Whether the network trains with an option, where snnTorch has it."""
    return trains(name, "vanilla", noise=noise, **{setting: value}) if has_option(name, setting) else None


def converts(name: str) -> bool:
    """Whether ``add_noise`` and ``remove_noise`` lead to the noisy class and back."""
    neuron = build(snn, name)
    there = type(slr.add_noise(neuron)) is getattr(slr, name)
    return there and type(slr.remove_noise(neuron)) is getattr(snn, name)


def copies(name: str) -> bool:
    """Whether a neuron can be pickled and deep-copied after it ran."""
    neuron = build(slr, name, noise=True, init_hidden=True)
    run(neuron, inputs_for(name))
    return all(type(copier(neuron)) is type(neuron) for copier in COPIERS.values())


def exports(name: str) -> bool:
    """Whether snnTorch can export the neuron to NIR, which takes one leak and one threshold per neuron."""
    torch.manual_seed(0)
    leaks = {"Leaky": [0.8], "Synaptic": [0.7, 0.6]}.get(name)
    if leaks is None:
        neuron = build(slr, name, noise=True, init_hidden=True)
    else:
        vectors = [torch.full((FEATURES,), leak) for leak in leaks]
        neuron = getattr(slr, name)(*vectors, threshold=torch.ones(FEATURES), noise=True, init_hidden=True)
    first: nn.Module = nn.Conv2d(1, 1, 1) if name == "SConv2dLSTM" else nn.Linear(FEATURES, FEATURES)
    try:
        slr.export_to_nir(nn.Sequential(first, neuron), inputs_for(name)[0], ignore_dims=[0])
    except Exception:
        # snnTorch's export fails in many ways on what it does not know.
        return False
    return True


TABLE: dict[str, Callable[[str], Cell]] = {
    "`noise=False` is snnTorch's neuron, bit for bit": same_without_noise,
    "`add_noise`, `remove_noise`": converts,
    "membrane noise: Gaussian, Laplace, logistic": lambda name: draws(
        name, slr.MembraneNoise, slr.MembraneNoise.offered
    ),
    "… carried on to the next time step": carries_noise,
    "escape noise: Gaussian, logistic": lambda name: draws(name, slr.EscapeNoise, slr.EscapeNoise.offered),
    **{
        f"`{estimator}`, {noise} noise": lambda name, estimator=estimator, noise=noise: trains(
            name, estimator, noise=noise
        )
        for estimator in MAKERS
        for noise in NOISES
    },
    "learned besides block and σ": learned,
    "`reset_mechanism`: subtract, zero, none": resets,
    "`reset_delay=False`": lambda name: option(name, "reset_delay", False),
    "`inhibition=True`, membrane noise": lambda name: option(name, "inhibition", True),
    "`inhibition=True`, escape noise": lambda name: option(name, "inhibition", True, "escape"),
    "time steps in one kernel: `counterfactual`": lambda name: build(slr, name, noise=True).fused_update() is not None,
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
            try:
                result = attempt(name)
                cells.append(CELLS.get(result, str(result)))
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


def test_the_table_is_what_trying_gives() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = table()
    if REWRITE in os.environ:
        PAGE.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{after}", encoding="utf-8")
        return
    assert written.strip() == found, "rewrite it with `make compatibility`, and look at what changed"
