"""Measures and draws the figures of the documentation into ``docs/img``: ``python docs/figures.py``, some minutes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

FOLDER = Path(__file__).parent / "img"
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "black"
NEURONS = 8


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of the angle between two vectors."""
    return float(first @ second / (first.norm() * second.norm()))


@dataclass(frozen=True)
class Gradients:
    """Gradients of the first weights of one small network, and the numbers that weight its neurons."""

    mean: Tensor
    vanilla: Tensor
    counterfactual: Tensor
    loss: float
    differences: list[float]


def measure_gradients(calls: int = 600) -> Gradients:
    """Trains 64-100-10 on the digits a little, and asks both estimators for the gradient of one batch."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    neuron = slr.Leaky(beta=0.9, init_hidden=True, noise=slr.EscapeNoise(sigma=0.3, distribution="logistic"))
    net = nn.Sequential(nn.Linear(64, 100), neuron, nn.Linear(100, 10))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(slr.rollout(net, x, num_steps=8).mean(0), y, reduction="none")

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    slr.attach(optimizer, net, discount=1)
    for rows in torch.randint(1500, (60, 64)):
        optimizer.zero_grad()
        loss_fn(images[rows], labels[rows]).mean().backward()
        optimizer.step()

    def gradient(estimator: slr.Estimator) -> Tensor:
        net.zero_grad()
        estimator.backward(loss_fn, images[:64], labels[:64])
        return net[0].weight.grad.flatten().clone()

    many = slr.Vanilla(net, copies=64, seed=1)
    found = torch.stack([gradient(many) for _ in range(calls)])
    mean = found.mean(0)
    noise = float(found.var(0).sum() / calls / mean.square().sum())
    print(f"the mean of {calls} calls has a cosine of {(1 - noise) ** 0.5:.3f} to its expectation")

    with torch.no_grad():
        row = int(loss_fn(images[:64], labels[:64]).argmax())
        # The same currents, and other noise.
        train, shadow = (slr.rollout(net[:2], images[row : row + 1], num_steps=8) for _ in range(2))

    def loss(spikes: Tensor) -> float:
        return F.cross_entropy(net[2](spikes).mean(0), labels[row : row + 1]).item()

    differences = []
    for index in range(train.shape[-1]):
        other = train.clone()
        other[..., index] = shadow[..., index]
        differences.append(loss(train) - loss(other))
    differences = sorted(sorted(differences, key=abs)[-NEURONS:])
    vanilla, counterfactual = slr.Vanilla(net, copies=16, seed=2), slr.Counterfactual(net, discount=1, seed=2)
    return Gradients(mean, gradient(vanilla), gradient(counterfactual), loss(train), differences)


def one_number_for_each(gradients: Gradients, dark: bool) -> Figure:
    """The numbers that weight single neurons, above one gradient against the mean of many, component by component."""
    ink = "#e6edf3" if dark else "#1f2328"
    colors = ("#f0883e", "#58a6ff") if dark else (ORANGE, BLUE)
    settings = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with rc_context({**settings, "font.size": 11}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        above, below = figure.subplots(2, 2, sharex="row", sharey="row", height_ratios=(1, 3))
        many, few = "vanilla, 16 copies", "counterfactual, 1 copy"
        shown = [
            ("One number for every neuron:\nthe loss", many, [gradients.loss] * NEURONS, gradients.vanilla),
            ("A number for each neuron:\nits counterfactual", few, gradients.differences, gradients.counterfactual),
        ]
        most = max(map(abs, gradients.differences))
        for column, (title, name, numbers, found) in enumerate(shown):
            axes, color = above[column], colors[column]
            axes.set_title(title, fontsize=12, fontweight="bold")
            axes.set(xlim=(-0.6, NEURONS - 0.4), ylim=(-0.6, 0.6), aspect="equal")
            axes.axis("off")
            for place, number in enumerate(numbers):
                strength = 0.5 if column == 0 else 0.15 + 0.6 * abs(number) / most
                axes.add_patch(Circle((place, 0), 0.44, facecolor=(*to_rgb(color), strength), edgecolor=color))
                axes.text(place, 0, f"{number:.2f}" if column == 0 else f"{number:+.2f}", ha="center", va="center",
                          fontsize=8.5)  # fmt: skip
            axes = below[column]
            axes.scatter(
                gradients.mean * 1000, found * 1000, s=3, alpha=0.4, color=color, linewidths=0, rasterized=True
            )
            axes.axline((0, 0), slope=1, color=ink, lw=1)
            axes.text(
                0.04, 0.93, f"{name}\ncosine {cosine(found, gradients.mean):.2f}", transform=axes.transAxes, va="top"
            )
            axes.set_xlabel("expected gradient: mean of many (· 10⁻³)")
            axes.set_facecolor("none")
        below[0].set_ylabel("one gradient (· 10⁻³)")
    return figure


STEPS, SIGMA = 12, 0.3


def spikes_by_drive(drives: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Derivative of the expected number of spikes by the drive: exact, and by the surrogate gradient.

    All spike trains are enumerated, for both. The surrogate's derivative is that of the firing probability, and its
    reset is detached, as snnTorch's is.
    """
    drives = drives.double().requires_grad_()
    trains = torch.tensor(list(itertools.product((0.0, 1.0), repeat=STEPS)), dtype=torch.float64).T
    log_probability = torch.zeros(len(drives), trains.shape[1], dtype=torch.float64)
    number = torch.zeros_like(log_probability)
    mem = reset = torch.zeros_like(log_probability)
    for spikes in trains:
        mem = beta * mem + drives[:, None] - reset
        z = (mem - 1) / SIGMA
        log_probability = log_probability + F.logsigmoid((2 * spikes - 1) * z)
        p = torch.sigmoid(z)
        number = number + spikes + p - p.detach()
        reset = spikes
    probability = log_probability.exp()
    (exact,) = torch.autograd.grad((probability * number.detach()).sum(), drives, retain_graph=True)
    (surrogate,) = torch.autograd.grad((probability.detach() * number).sum(), drives)
    return exact, surrogate


def spikes_by_counterfactual(drive: float, beta: float, copies: int = 4000, calls: int = 40) -> tuple[float, float]:
    """The same derivative by ``slr.Counterfactual``, and its standard error."""
    noise = slr.EscapeNoise(sigma=SIGMA, distribution="logistic", learn=False)
    neuron = slr.Leaky(beta=beta, init_hidden=True, noise=noise)
    net = nn.Sequential(nn.Linear(1, 1, bias=False), neuron)
    nn.init.constant_(net[0].weight, drive)
    # Any γ below 1 would show as a bias here.
    estimator = slr.Counterfactual(net, copies=copies, discount=1, seed=0)
    found = []
    for _ in range(calls):
        net.zero_grad()
        estimator.backward(
            lambda x, y: slr.rollout(net, x, num_steps=STEPS).sum((0, 2)), torch.ones(1, 1), torch.zeros(1)
        )
        found.append(float(net[0].weight.grad))
    values = torch.tensor(found)
    return float(values.mean()), float(values.std() / calls**0.5)


def ignored_resets() -> Figure:
    """What surrogate gradients make of a neuron that resets."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    drives = torch.linspace(0, 1, 61)
    exact, surrogate = spikes_by_drive(drives, 0.9)
    left.plot(drives, exact, color=BLACK, lw=2, label="exact")
    left.plot(drives, surrogate, color=ORANGE, lw=2, ls="--", label="surrogate gradient")
    some = drives[5::10].tolist()
    means, errors = zip(*(spikes_by_counterfactual(drive, 0.9) for drive in some), strict=True)
    print("standard errors", [round(error, 3) for error in errors])
    left.errorbar(some, means, [2 * e for e in errors], fmt="o", color=BLUE, ms=6, label="counterfactual")
    left.set(xlabel="drive (threshold 1)", ylabel="d E[number of spikes] / d drive", ylim=0)
    left.set_title("one neuron, leak β = 0.9", fontsize=11)
    left.legend(frameon=False)

    leaks = torch.linspace(0, 1, 101)
    some = torch.tensor([0.3, 0.5, 0.8])
    found = [spikes_by_drive(some, beta) for beta in leaks.tolist()]
    ratios = torch.stack([surrogate / exact for exact, surrogate in found])
    for drive, ratio, style in zip(some.tolist(), ratios.T, (":", "--", "-"), strict=True):
        right.plot(leaks, ratio, color=ORANGE, lw=2, ls=style, label=f"drive {drive:.1f}")
    right.axhline(1, color=BLACK, lw=2)
    right.annotate("exact", (0.02, 1), (0, -4), textcoords="offset points", va="top")
    right.set(xlabel="leak β", ylabel="surrogate gradient / exact", ylim=0)
    right.set_title("too long by what factor", fontsize=11)
    right.legend(frameon=False, loc="upper left")
    return figure


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    ignored_resets().savefig(FOLDER / "ignored-resets.png", dpi=150)
    measured = measure_gradients()
    for dark in (False, True):
        name = "one-number-for-each" + "-dark" * dark
        one_number_for_each(measured, dark).savefig(FOLDER / f"{name}.png", dpi=150, transparent=True)
