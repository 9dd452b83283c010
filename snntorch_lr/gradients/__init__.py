"""Likelihood-ratio gradients: counterfactual credit, vanilla, approximate; and the registry of their names."""

from __future__ import annotations

from collections.abc import Callable

from .approximate import Approximate
from .base import Estimator, LossFn
from .counterfactual import Counterfactual, CounterfactualCredit
from .vanilla import Vanilla

__all__ = ["ESTIMATORS", "Approximate", "Counterfactual", "CounterfactualCredit", "Estimator", "LossFn", "Vanilla"]

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "counterfactual": Counterfactual,
    "vanilla": Vanilla,
    "approximate": Approximate,
}
"""By name: what ``attach`` and the experiments call them."""
