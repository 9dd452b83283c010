"""What the study trains and how it evaluates that: the presets of ``snntorch-lr study``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .recipe import Recipe

REDUCED = ("EOT-PGD training", "EOT-PGD gaussian", "margin EOT-PGD-40x8", "targeted EOT-PGD", "transfer")
"""The attacks that find the most on these networks, where all of ``"standard"`` would take too long."""


@dataclass(frozen=True)
class Evaluation:
    """How networks of a group are attacked.

    Attributes:
        attacks: name of a suite, or names of attacks.
        images: number of images, from the first.
        epsilons: budgets, l∞.
        noise: ``"off"`` or ``"on"``.
        corruptions: whether natural corruptions are scored too.
        held_out: on training images that were held out, and so never trained on, in place of test images.
    """

    attacks: str | tuple[str, ...]
    images: int
    epsilons: tuple[float, ...]
    noise: str = "off"
    corruptions: bool = False
    held_out: bool = False


@dataclass(frozen=True)
class Entry:
    """One network of a study.

    Attributes:
        name: unique in its plan.
        family: networks that differ only in how far they are regularised have the same; the fronts are drawn by it.
        group: ``"source"`` (transferred from, not attacked), ``"tune"`` (on held-out images), ``"usual"`` (table A),
            ``"front"`` (table B) or ``"seed"`` (table A, other seeds).
        recipe: what to train.
        evaluations: how to attack it; none for a source. Each has its own row of results, in this order.
        matches: entry at whose accuracy on held-out images the training stops.
    """

    name: str
    family: str
    group: str
    recipe: Recipe
    evaluations: tuple[Evaluation, ...]
    matches: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    @property
    def mark(self) -> str:
        """Hash of the entry: another mark, another result. The networks that it depends on have marks of their own."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def work(self) -> float:
        """About how long it takes, in arbitrary units."""
        recipe = self.recipe
        training = recipe.epochs * (10.0 if recipe.method == "likelihood ratio" else 1.0)
        training *= (8 if recipe.adversary else 1) * (8 if recipe.model == "conv" else 1)
        for each in self.evaluations:
            attacked = each.images * len(each.epsilons) * (0.04 if each.attacks == "standard" else 0.01)
            training += attacked * (5 if each.noise == "on" else 1)
        return training


SOURCES = ("surrogate", "ann")
GROUPS = ("source", "tune", "usual", "front", "seed")


_TRIED_BY_BOTH: dict[str, dict[str, Any]] = {
    "learning rate 0.001": {"learning_rate": 1e-3},
    "learning rate 0.003": {"learning_rate": 3e-3},
    "decay 5": {"decay": 5.0},
    "true-class": {"objective": "true-class"},
    "clipped-margin": {"objective": "clipped-margin"},
    "input noise 0.3": {"input_noise": 0.3},
    "input noise 0.3, decay 5": {"input_noise": 0.3, "decay": 5.0},
    "adversary 0.05": {"adversary": 0.05},
}
_WIDER: dict[str, dict[str, Any]] = {"1000 neurons": {"model": "wide-mlp"}}
_TRIED_BY_LIKELIHOOD_RATIO: dict[str, dict[str, Any]] = {
    "4, then 32 copies": {"copies": 4, "late_copies": 32},
    "sigma 1": {"sigma": 1.0},
    "sigma 1 per neuron": {"sigma": 1.0, "per_neuron": True},
    "sigma fixed": {"learn_sigma": False},
    "zero-one": {"objective": "zero-one", "estimator": "vanilla", "copies": 8},
    "vote of 3": {"objective": "vote", "votes": 3, "copies": 4, "estimator": "vanilla"},
}
_SWEPT: dict[str, dict[str, Any]] = {
    "4 copies": {"copies": 4},
    "sigma 0.6": {"sigma": 0.6},
}
_TRIED_BY_CONVOLUTION: dict[str, dict[str, Any]] = {
    "sigma 0.2, learning rate 0.006": {},
    "sigma 0.3": {"sigma": 0.3},
    "sigma 0.15": {"sigma": 0.15},
    "learning rate 0.003": {"learning_rate": 3e-3},
    "learning rate 0.01": {"learning_rate": 1e-2},
}
Make = Callable[..., Entry]


def _maker(evaluations: dict[str, tuple[Evaluation, ...]]) -> Make:
    """Makes entries whose group decides how they are attacked."""

    def make(group: str, family: str, recipe: Recipe, change: str = "") -> Entry:
        name = f"{group}: {family}{f', {change}' if change else ''}"
        # Networks without noise have no second row, with their noise on.
        chosen = evaluations[group][: 1 if recipe.method == "surrogate" else None]
        return Entry(name, family, group, recipe, chosen)

    return make


def _sources(surrogate: Recipe) -> list[Entry]:
    ann = replace(surrogate, model="ann")
    return [Entry("surrogate", "surrogate", "source", surrogate, ()), Entry("ann", "ann", "source", ann, ())]


def _usual(surrogate: Recipe) -> dict[str, Recipe]:
    """Table A: the same in all but the method."""
    membrane = replace(surrogate, method="likelihood ratio", estimator="vanilla")
    escape = replace(membrane, noise="escape", distribution="logistic", sigma=0.3)
    return {
        "surrogate": surrogate,
        "surrogate, membrane noise": replace(membrane, method="surrogate, noise"),
        "likelihood ratio, membrane, vanilla": membrane,
        "likelihood ratio, membrane, approximate": replace(membrane, estimator="approximate"),
        "likelihood ratio, escape, vanilla": escape,
    }


ESCAPE = "likelihood ratio, escape, vanilla"
SEEDED = ("surrogate", ESCAPE)
"""Trained with other seeds too."""
_BEST_RATE = {"mnist": 3e-3, "fashion-mnist": 1e-3}
"""Learning rates of the likelihood ratio, best on held-out images; those of Fashion-MNIST in an earlier run."""


def _images(dataset: str) -> list[Entry]:
    """The whole study of a data set: settings tried on held-out images, table A, table B, and other seeds for A."""
    make = _maker(
        {
            "tune": (Evaluation(REDUCED, 500, (0.05, 0.1), held_out=True),),
            "usual": (
                Evaluation("standard", 1000, (0.02, 0.05, 0.1, 0.2), corruptions=True),
                Evaluation("standard", 100, (0.05, 0.1), "on", corruptions=True),
            ),
            "front": (Evaluation(REDUCED, 1000, (0.05, 0.1)),),
            "seed": (Evaluation(REDUCED, 1000, (0.05, 0.1)),),
        }
    )
    surrogate = Recipe("surrogate", dataset, "mlp", 4, 16, 0, validation=6000)
    usual = _usual(surrogate)
    best = replace(usual[ESCAPE], estimator="counterfactual", copies=2, learning_rate=_BEST_RATE[dataset])
    found = _sources(surrogate)
    found += [make("usual", family, recipe) for family, recipe in usual.items()]
    found += [
        make("seed", family, replace(recipe, seed=seed), f"seed {seed}")
        for seed in (1, 2)
        for family, recipe in usual.items()
        if family in SEEDED
    ]
    found += _fronts(make, surrogate, best)
    # What is tried on one data set is not tried again on the other.
    return found + (_tried(make, surrogate, best) if dataset == "mnist" else [])


def _tried(make: Make, surrogate: Recipe, best: Recipe) -> list[Entry]:
    tried = {
        "surrogate": (replace(surrogate, epochs=2), _TRIED_BY_BOTH | _WIDER),
        "likelihood ratio": (
            replace(best, epochs=2),
            _TRIED_BY_BOTH | _TRIED_BY_LIKELIHOOD_RATIO | _WIDER,
        ),
    }
    return [
        make("tune", family, replace(recipe, **change), label)
        for family, (recipe, changes) in tried.items()
        for label, change in changes.items()
    ]


def _fronts(make: Make, surrogate: Recipe, best: Recipe) -> list[Entry]:
    """Table B: how far each method is regularised, from accurate to robust."""
    longer = replace(surrogate, epochs=8)
    first = surrogate.dataset == "mnist"
    # It comes close to the accuracy of backpropagation sooner on the one than on the other.
    found = [
        make("front", "likelihood ratio", replace(best, epochs=e), f"{e} epochs") for e in ((8,) if first else (8, 16))
    ]
    found += [make("front", "surrogate", replace(longer, epochs=e), f"{e} epochs") for e in (2, 8, 16)]
    found += [make("front", "surrogate", replace(longer, decay=d), f"decay {d:g}") for d in (5.0, 20.0)]
    found += [
        make("front", "surrogate, input noise", replace(longer, input_noise=s, decay=d), f"{s:g}, decay {d:g}")
        for s, d in ((0.2, 0.0), (0.3, 0.0), (0.5, 0.0), (0.3, 5.0), (0.5, 5.0))
    ]
    found += [
        make("front", "likelihood ratio, input noise", replace(best, input_noise=0.3, decay=d), f"0.3, decay {d:g}")
        for d in (0.0, 2.0)
    ]
    # With decay, what noisy gradients leave in the weights grows with the learning rate; what they teach does not.
    slower = replace(best, epochs=8, learning_rate=1e-3, decay=2.0)
    if not first:
        slower = replace(slower, epochs=16, learning_rate=3e-4, copies=8)
    calm = f"decay 2, {slower.epochs} epochs"
    found += [
        make("front", "likelihood ratio, input noise", replace(slower, input_noise=s), f"{s:g}, {calm}")
        for s in (0.3, 0.5)
    ]
    found += [
        make("front", "likelihood ratio", replace(best, epochs=8, **change), f"{label}, 8 epochs")
        for label, change in _SWEPT.items()
    ]
    if first:
        wide = replace(longer, input_noise=0.5, model="wide-mlp")
        found += [
            make("front", "surrogate, input noise", replace(wide, decay=d), f"1000 neurons, 0.5, decay {d:g}")
            for d in (0.0, 5.0)
        ]
        calm_and_wide = replace(slower, input_noise=0.5, copies=8, model="wide-mlp")
        found.append(make("front", "likelihood ratio, input noise", calm_and_wide, f"1000 neurons, 0.5, {calm}"))
    true_class = replace(best, objective="true-class", sigma=1.0, decay=5.0)
    found.append(make("front", "likelihood ratio, true-class", true_class, "sigma 1, decay 5"))
    stopped = make("front", "surrogate, stopped", surrogate, "at the accuracy of the likelihood ratio")
    found.append(replace(stopped, matches=f"usual: {ESCAPE}"))
    found.append(make("front", "surrogate, PGD-trained", replace(longer, adversary=0.05), "0.05"))
    return found


def _digits() -> list[Entry]:
    """The same in small, in minutes and without a download."""
    make = _maker(
        {
            "usual": (Evaluation(REDUCED, 200, (0.05, 0.1)), Evaluation(REDUCED, 200, (0.05, 0.1), "on")),
            "front": (Evaluation(REDUCED, 200, (0.05, 0.1)),),
        }
    )
    surrogate = Recipe("surrogate", "digits", "mlp", 20, 8, 0, batch_size=32, validation=200, learning_rate=3e-3)
    usual = _usual(surrogate)
    stopped = make("front", "surrogate, stopped", surrogate, "at the accuracy of the likelihood ratio")
    return [
        *_sources(surrogate),
        *(make("usual", family, recipe) for family, recipe in usual.items()),
        make("front", "surrogate", replace(surrogate, decay=5.0), "decay 5"),
        make("front", "likelihood ratio", replace(usual[ESCAPE], decay=5.0), "decay 5"),
        replace(stopped, matches=f"usual: {ESCAPE}"),
    ]


def _conv(dataset: str) -> list[Entry]:
    """Table A of the convolutional network, which takes several times as long and is not swept."""
    make = _maker(
        {
            "tune": (Evaluation(REDUCED, 100, (0.05, 0.1), held_out=True),),
            "usual": (Evaluation(REDUCED, 250, (0.05, 0.1)), Evaluation(REDUCED, 100, (0.05, 0.1), "on")),
        }
    )
    surrogate = Recipe("surrogate", dataset, "conv", 2, 8, 0, learning_rate=3e-3, validation=6000)
    rate = 6e-3
    # A kernel sees few pixels and drives its neurons less than a whole image does: the noise is lower, too.
    ratio = replace(_usual(surrogate)[ESCAPE], estimator="counterfactual", copies=2, sigma=0.2, learning_rate=rate)
    found = _sources(surrogate)
    found += [
        make("usual", "surrogate", replace(surrogate, epochs=16, learning_rate=rate)),
        make("usual", "likelihood ratio, escape, counterfactual", replace(ratio, epochs=16)),
        # Trained to the end before those above were settled on: shown, so that nobody takes these for a first try.
        make("usual", "surrogate, learning rate 0.003", replace(surrogate, epochs=16)),
    ]
    found += [
        make("tune", "surrogate", replace(surrogate, epochs=1, learning_rate=tried), f"learning rate {tried:g}")
        for tried in (1e-3, 3e-3, 6e-3, 1e-2)
    ]
    found += [
        make("tune", "likelihood ratio", replace(ratio, epochs=1, **change), label)
        for label, change in _TRIED_BY_CONVOLUTION.items()
    ]
    return found


PLANS: dict[str, Callable[[], list[Entry]]] = {
    "digits": _digits,
    "mnist": lambda: _images("mnist"),
    "fashion-mnist": lambda: _images("fashion-mnist"),
    "mnist-conv": lambda: _conv("mnist"),
}


def plan(name: str) -> list[Entry]:
    """The entries of a preset, what others depend on first.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in PLANS:
        raise ValueError(f"unknown study {name!r}; choose one of {', '.join(PLANS)}")
    return PLANS[name]()
