"""Robustness of spiking networks: an attackable view of a network, attacks, corruptions."""

from .attacks import SUITES, Attack, gradient_attack, perturb, suite
from .budget import Budget
from .corruptions import CORRUPTIONS
from .descent import Descent, tune_sharpness
from .input_gradient import likelihood_ratio_input_gradient, surrogate_input_gradient
from .surrogates import SURROGATES
from .target import Target
from .view import AttackableView

__all__ = [
    "CORRUPTIONS",
    "SUITES",
    "SURROGATES",
    "Attack",
    "AttackableView",
    "Budget",
    "Descent",
    "Target",
    "gradient_attack",
    "likelihood_ratio_input_gradient",
    "perturb",
    "suite",
    "surrogate_input_gradient",
    "tune_sharpness",
]
