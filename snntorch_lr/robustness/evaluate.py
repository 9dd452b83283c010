"""From networks and images to a report: clean accuracy, attacks, their worst case, transfers, and the gates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..network import noisy_neurons, not_finite, reset
from .attacks import Attack, suite
from .cache import Cache
from .corruptions import CORRUPTIONS
from .measure import Measurement, Progress, Protocol, Subject
from .report import RobustnessReport
from .scoring import ROWS, is_random, score
from .target import Target
from .untouched import untouched
from .view import Forward


def evaluate(
    net: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    epsilons: float | Sequence[float],
    attacks: str | Sequence[str | Attack] = "standard",
    forward: Forward | None = None,
    baselines: Mapping[str, nn.Module | Target] | None = None,
    seed: int = 0,
    *,
    sources: Mapping[str, nn.Module | Target] | None = None,
    noise: str = "both",
    name: str = "network",
    norm: str = "linf",
    draws: int = 8,
    votes: int = 32,
    scale: float = 10.0,
    corruptions: Sequence[str] = (),
    gate_images: int = 128,
    rows: int = ROWS,
    cache: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> RobustnessReport:
    """Attacks a network and its baselines, and reports the per-example worst case beside the gates that it has to pass.

    1. Every network is scored clean with its noise off and on: by the majority of ``votes`` fresh noise draws, and by a
       single draw.
    2. Every attack runs at every budget, from the smallest, and is scored with noise draws that it has not seen. It
       attacks only what is right clean and under the same attack at smaller budgets: what is wrong within a budget is
       wrong within a larger one. An accuracy under attack is thus a fraction of all images.
    3. Adversarial images of every other network, and of the same network with its noise switched over, are tried too.
    4. An image counts as right in the worst case if it is right clean and under all of these. With noise, every attack
       has a fresh chance at an image near the decision boundary: the worst case errs on the attacker's side.
    5. The gates G0 to G9 look for signs of masked gradients. An attack that fails does not count, and fails G9.

    Example: ``print(evaluate(net, test_loader, epsilons=[0.05, 0.1], baselines={"surrogate": other}))``

    The result is a function of the seed. Modes, states, gradients and torch's global random state are left as found.

    Args:
        net: any snnTorch network, with noise or without.
        loader: batches of images ``[batch, channels, height, width]`` in [0, 1] and labels ``[batch]``, in the same
            order each time if a cache is used.
        epsilons: budgets, positive; one, or several.
        attacks: ``"quick"``, ``"paper"``, ``"standard"``, or names and ``Attack`` objects.
        forward: as ``AttackableView``'s, for the network and the baselines.
        baselines: other networks by name; a ``Target`` for one that needs another ``forward``.
        seed: of attacks and noise.
        sources: networks by name that adversarial images are transferred from, and that are not evaluated themselves.
        noise: ``"off"``, ``"on"`` or ``"both"``: how networks with noise are evaluated. With ``"on"``, adversarial
            images of the network without noise are tried too; with ``"off"`` none of the network with noise.
        name: of the network in the report.
        norm: ``"linf"`` or ``"l2"``.
        draws: noise draws that the gradient of an attack averages over.
        votes: noise draws for each prediction.
        scale: as ``AttackableView``'s.
        corruptions: names of natural corruptions to score too, see ``CORRUPTIONS``.
        gate_images: images that are right, for the gates that run attacks of their own.
        rows: images times draws that a network sees at once; bounds the memory.
        cache: folder for finished pieces; the same call goes on from there. An attack of yours is known by its name and
            settings, so change these with its code.
        progress: called with what is done next, the number of pieces done, and their total.

    Raises:
        ValueError: if an argument, the data or a network cannot be used, said before any attack.
        ImportError: if an attack needs a package that is not installed.
    """
    chosen = suite(attacks)
    protocol = Protocol(
        _budgets(epsilons, norm), norm, votes, seed, rows, _at_least_one("gate_images", gate_images), tuple(corruptions)
    )  # fmt: skip
    _check(protocol, draws, chosen, noise)
    others = {**(baselines or {}), **(sources or {})}
    if len(others) < len(baselines or {}) + len(sources or {}):
        raise ValueError("a source is called like a baseline; rename it")
    models = _models(net, name, others, forward, draws, scale)
    images, labels = _collect(loader)
    kept = Cache(None if cache is None else Path(cache))
    with untouched([model.net for model in models.values()]):
        for key, model in models.items():
            _check_network(key, model, images, labels, protocol)
        uses = {key: _subjects(key, model, images) for key, model in models.items()}
        attacked = {
            key: [s for s in found if s.noise in (noise, "none") or noise == "both"] for key, found in uses.items()
        }
        subjects = [subject for key in models if key not in (sources or {}) for subject in attacked[key]]
        lent = [use for key in sources or {} for use in uses[key]]
        if noise == "on":
            # What is found without noise sees through it.
            lent += [
                use for key, found in uses.items() if key not in (sources or {}) for use in found if use.noise == "off"
            ]
        measurement = Measurement(protocol, chosen, subjects, images, labels, kept, progress, lent)
        measured = [measurement.measure(subject) for subject in subjects]
    return RobustnessReport(protocol, chosen, tuple(measured))


def _budgets(epsilons: float | Sequence[float], norm: str) -> tuple[float, ...]:
    given = list(epsilons) if isinstance(epsilons, Iterable) else [epsilons]
    try:
        budgets = tuple(sorted({float(epsilon) for epsilon in given}))
    except (TypeError, ValueError):
        budgets = ()
    if not budgets or any(not 0 < epsilon < math.inf for epsilon in budgets):
        raise ValueError(f"epsilons must be positive numbers and there must be one, got {given}")
    if norm == "linf" and budgets[-1] > 1:
        raise ValueError(f"epsilons of linf are in units of pixels in [0, 1], as 8 / 255; got {budgets[-1]:g}")
    return budgets


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _check(protocol: Protocol, draws: int, attacks: Sequence[Attack], noise: str) -> None:
    if noise not in ("off", "on", "both"):
        raise ValueError(f"noise must be 'off', 'on' or 'both', got {noise!r}")
    for name, value in ("draws", draws), ("votes", protocol.votes), ("rows", protocol.rows):
        _at_least_one(name, value)
    if protocol.norm not in ("linf", "l2"):
        raise ValueError(f"unknown norm {protocol.norm!r}; choose one of linf, l2")
    unknown = [name for name in protocol.corruptions if name not in CORRUPTIONS]
    if unknown:
        raise ValueError(f"unknown corruption {', '.join(unknown)}; choose from {', '.join(CORRUPTIONS)}")
    if not any(protocol.norm in attack.norms for attack in attacks):
        raise ValueError(f"none of the attacks {', '.join(a.name for a in attacks)} has the norm {protocol.norm}")


def _models(
    net: nn.Module,
    name: str,
    baselines: Mapping[str, nn.Module | Target],
    forward: Forward | None,
    draws: int,
    scale: float,
) -> dict[str, Target]:
    """The networks by name, the first one first."""
    if name in baselines:
        raise ValueError(f"a baseline or source is called {name!r}, like the network itself; rename it")
    models = {}
    for key, value in {name: net, **baselines}.items():
        if not isinstance(value, (nn.Module, Target)):
            raise ValueError(f"{key} must be a network or a Target, got {type(value).__name__}")
        models[key] = value if isinstance(value, Target) else Target(value, forward, draws=draws, scale=scale)
    return models


def _check_network(name: str, target: Target, images: Tensor, labels: Tensor, protocol: Protocol) -> None:
    """Refuses a network whose answers are none, and would count as wrong ones."""
    reset(target.net)
    broken = not_finite(target.net)
    if broken:
        # Logits do not show it: a membrane potential that is NaN never spikes.
        raise ValueError(
            f"{name}: NaN or infinite values in {', '.join(broken)}; training diverged, or the file is damaged: load "
            "earlier weights, or train again with a lower learning rate"
        )
    try:
        score(replace(target, noise=False), images, labels, 1, protocol.seed, protocol.rows)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _subjects(name: str, model: Target, images: Tensor) -> list[Subject]:
    """A network with its noise off and, if it has any, on."""
    silent = replace(model, noise=False)
    if noisy_neurons(model.net):
        return [Subject(name, "off", silent), Subject(name, "on", replace(model, noise=True))]
    # Attacks average over the draws of a target with noise: also where a network draws its own, as rate codes do.
    return [Subject(name, "none", replace(model, noise=is_random(silent, images)))]


def _collect(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All images and labels, on the CPU."""
    pairs = list(loader)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError("loader must give pairs of images and labels: a DataLoader, or [(images, labels)]")
    batches = [(images.detach().cpu().float(), torch.as_tensor(labels).cpu()) for images, labels in pairs]
    if not batches:
        raise ValueError("the loader gives no images")
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    if images.dim() != 4 or labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"images [n, channels, height, width] and integer labels [n] are needed, got {tuple(images.shape)} and "
            f"{tuple(labels.shape)} ({labels.dtype})"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"images must be in [0, 1], got {images.min():.3g} to {images.max():.3g}; normalise inside forward="
        )
    return images, labels.long()
