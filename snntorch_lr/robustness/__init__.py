"""Robustness of spiking networks: an attackable view, attacks, corruptions, and an evaluation that checks itself."""

from .attacks import SUITES, Attack, gradient_attack, perturb, suite
from .budget import Budget
from .corruptions import CORRUPTIONS
from .descent import Descent, tune_sharpness
from .evaluate import evaluate
from .gates import Gate, verdict
from .input_gradient import likelihood_ratio_input_gradient, surrogate_input_gradient
from .report import Headline, RobustnessReport
from .scoring import Scores, score
from .statistics import McNemar, Share, clopper_pearson, mcnemar, share_of, wilson
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
    "Gate",
    "Headline",
    "McNemar",
    "RobustnessReport",
    "Scores",
    "Share",
    "Target",
    "clopper_pearson",
    "evaluate",
    "gradient_attack",
    "likelihood_ratio_input_gradient",
    "mcnemar",
    "perturb",
    "score",
    "share_of",
    "suite",
    "surrogate_input_gradient",
    "tune_sharpness",
    "verdict",
    "wilson",
]
