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
        noise: ``"off"``, ``"on"`` or ``"both"``.
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
        evaluation: how to attack it; None for a source.
        matches: entry at whose accuracy on held-out images the training stops.
    """

    name: str
    family: str
    group: str
    recipe: Recipe
    evaluation: Evaluation | None
    matches: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    @property
    def mark(self) -> str:
        """Hash of everything that decides the result."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def work(self) -> float:
        """About how long it takes, in arbitrary units."""
        recipe = self.recipe
        training = recipe.epochs * (10.0 if recipe.method == "likelihood ratio" else 1.0)
        training *= (8 if recipe.adversary else 1) * (8 if recipe.model == "conv" else 1)
        if self.evaluation is None:
            return training
        attacked = self.evaluation.images * len(self.evaluation.epsilons) * (0.02 if self.evaluation.held_out else 0.03)
        both = self.evaluation.noise == "both" and recipe.method != "surrogate"
        return training + attacked * (5 if both else 1)


SOURCES = ("surrogate", "ann")
GROUPS = ("source", "tune", "usual", "front", "seed")


_TRIED_BY_BOTH: dict[str, dict[str, Any]] = {
    "learning rate 0.001": {"learning_rate": 1e-3},
    "learning rate 0.003": {"learning_rate": 3e-3},
    "decay 5": {"decay": 5.0},
    "decay 20": {"decay": 20.0},
    "true-class": {"objective": "true-class"},
    "clipped-margin": {"objective": "clipped-margin"},
    "input noise 0.2": {"input_noise": 0.2},
    "adversary 0.05": {"adversary": 0.05},
}
_TRIED_BY_LIKELIHOOD_RATIO: dict[str, dict[str, Any]] = {
    "vanilla": {"estimator": "vanilla"},
    "controlled": {"estimator": "controlled"},
    "allocated": {"estimator": "allocated"},
    "sigma 1": {"sigma": 1.0},
    "sigma 1 per neuron": {"sigma": 1.0, "per_neuron": True},
    "sigma fixed": {"learn_sigma": False},
    "true-class, sigma 1, decay 5": {"objective": "true-class", "sigma": 1.0, "decay": 5.0},
    "zero-one": {"objective": "zero-one"},
}


def _entry(group: str, evaluations: dict[str, Evaluation], family: str, recipe: Recipe, change: str = "") -> Entry:
    name = f"{group}: {family}{f', {change}' if change else ''}"
    return Entry(name, family, group, recipe, evaluations.get(group))


def _images(dataset: str, model: str) -> list[Entry]:
    """The whole study of a data set: settings tried on held-out images, table A, table B, and other seeds for A."""
    evaluations = {
        "tune": Evaluation(REDUCED, 500, (0.05, 0.1), held_out=True),
        "usual": Evaluation("standard", 1000, (0.02, 0.05, 0.1, 0.2), "both", corruptions=True),
        "front": Evaluation("standard", 1000, (0.05, 0.1)),
        "seed": Evaluation(REDUCED, 1000, (0.05, 0.1)),
    }
    surrogate = Recipe("surrogate", dataset, model, 8, 16, 0, validation=6000)
    ann = replace(surrogate, model="ann", epochs=4)
    membrane = replace(surrogate, method="likelihood ratio")
    escape = replace(membrane, noise="escape", distribution="logistic", sigma=0.3)
    # The likelihood ratio's own best learning rate and estimator, of those tried on held-out images.
    best = replace(escape, estimator="allocated-controlled", learning_rate=3e-3)

    def entry(group: str, family: str, recipe: Recipe, change: str = "") -> Entry:
        return _entry(group, evaluations, family, recipe, change)

    found = [Entry("surrogate", "surrogate", "source", surrogate, None), Entry("ann", "ann", "source", ann, None)]
    found += [
        entry("tune", "surrogate", replace(surrogate, epochs=4, **change), label)
        for label, change in _TRIED_BY_BOTH.items()
    ]
    found += [
        entry("tune", "likelihood ratio", replace(best, epochs=4, **change), label)
        for label, change in (_TRIED_BY_BOTH | _TRIED_BY_LIKELIHOOD_RATIO).items()
    ]
    usual = {
        "surrogate": surrogate,
        "surrogate, membrane noise": replace(membrane, method="surrogate, noise"),
        "likelihood ratio, membrane, vanilla": membrane,
        "likelihood ratio, membrane, approximate": replace(membrane, estimator="approximate"),
        "likelihood ratio, escape, vanilla": escape,
    }
    found += [entry("usual", family, recipe) for family, recipe in usual.items()]
    found += [
        entry("seed", family, replace(recipe, seed=seed), f"seed {seed}")
        for seed in (1, 2)
        for family, recipe in usual.items()
    ]
    decays = (0.0, 2.0, 5.0, 20.0, 60.0)
    found += [entry("front", "surrogate", replace(surrogate, decay=d), f"decay {d:g}") for d in decays]
    found += [entry("front", "surrogate", replace(surrogate, epochs=e), f"{e} epochs") for e in (1, 2, 4)]
    found += [
        entry("front", "surrogate, input noise", replace(surrogate, input_noise=s), f"{s:g}") for s in (0.1, 0.2, 0.3)
    ]
    found += [
        entry("front", "surrogate, true-class", replace(surrogate, objective="true-class", decay=d), f"decay {d:g}")
        for d in (0.0, 5.0, 20.0)
    ]
    found += [entry("front", "surrogate, PGD-trained", replace(surrogate, adversary=e), f"{e:g}") for e in (0.05, 0.1)]
    found += [entry("front", "likelihood ratio", replace(best, decay=d), f"decay {d:g}") for d in decays[:4]]
    true_class = replace(best, objective="true-class")
    found += [
        entry(
            "front", "likelihood ratio, true-class", replace(true_class, decay=d, sigma=s), f"sigma {s:g}, decay {d:g}"
        )
        for s, d in ((0.3, 0.0), (0.3, 2.0), (0.3, 5.0), (1.0, 2.0), (1.0, 5.0))
    ]
    longer = entry("front", "likelihood ratio", replace(best, epochs=15), "15 epochs")
    stopped = entry("front", "surrogate, stopped", surrogate, "at the accuracy of the likelihood ratio")
    return [*found, longer, replace(stopped, matches="usual: likelihood ratio, escape, vanilla")]


def _digits() -> list[Entry]:
    """The same in small, in minutes and without a download."""
    evaluations = {
        "usual": Evaluation(REDUCED, 200, (0.05, 0.1), "both"),
        "front": Evaluation(REDUCED, 200, (0.05, 0.1)),
    }
    surrogate = Recipe("surrogate", "digits", "mlp", 20, 8, 0, batch_size=32, validation=200, learning_rate=3e-3)
    ratio = replace(surrogate, method="likelihood ratio", noise="escape", distribution="logistic", sigma=0.3)

    def entry(group: str, family: str, recipe: Recipe, change: str = "") -> Entry:
        return _entry(group, evaluations, family, recipe, change)

    stopped = entry("front", "surrogate, stopped", surrogate, "at the accuracy of the likelihood ratio")
    return [
        Entry("surrogate", "surrogate", "source", surrogate, None),
        Entry("ann", "ann", "source", replace(surrogate, model="ann"), None),
        entry("usual", "surrogate", surrogate),
        entry("usual", "likelihood ratio, escape, vanilla", ratio),
        entry("front", "surrogate", replace(surrogate, decay=5.0), "decay 5"),
        entry("front", "likelihood ratio", replace(ratio, decay=5.0), "decay 5"),
        replace(stopped, matches="usual: likelihood ratio, escape, vanilla"),
    ]


PLANS: dict[str, Callable[[], list[Entry]]] = {
    "digits": _digits,
    "mnist": lambda: _images("mnist", "mlp"),
    "fashion-mnist": lambda: _images("fashion-mnist", "mlp"),
    "mnist-conv": lambda: _conv("mnist"),
    "fashion-mnist-conv": lambda: _conv("fashion-mnist"),
}


def _conv(dataset: str) -> list[Entry]:
    """Table A of the convolutional network: its training takes ten times as long, and is not swept."""
    chosen = {"source": (), "usual": ("surrogate", "likelihood ratio, escape, vanilla")}
    return [
        replace(entry, recipe=replace(entry.recipe, epochs=4, estimator="allocated", learning_rate=3e-3))
        for entry in _images(dataset, "conv")
        if entry.group in chosen and (not chosen[entry.group] or entry.family in chosen[entry.group])
    ]


def plan(name: str) -> list[Entry]:
    """The entries of a preset, what others depend on first.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in PLANS:
        raise ValueError(f"unknown study {name!r}; choose one of {', '.join(PLANS)}")
    return PLANS[name]()
