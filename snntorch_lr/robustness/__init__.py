"""Robustness of spiking networks: an attackable view, attacks, and an evaluation that checks itself."""

from .attacks import Attack, Budget, Descent, Procedure, gradient_attack, perturb, worst_of
from .certify import Certificate, certify
from .evaluate import evaluate
from .input_gradient import likelihood_ratio_input_gradient
from .report import Gate, Headline, Protocol, RobustnessReport, Row, verdict
from .scoring import McNemar, Scores, Share, clopper_pearson, mcnemar, score, share_of, wilson
from .suites import SUITES, suite
from .surrogates import SURROGATES
from .view import AttackableView, Target

__all__ = [
    "SUITES",
    "SURROGATES",
    "Attack",
    "AttackableView",
    "Budget",
    "Certificate",
    "Descent",
    "Gate",
    "Headline",
    "McNemar",
    "Procedure",
    "Protocol",
    "RobustnessReport",
    "Row",
    "Scores",
    "Share",
    "Target",
    "certify",
    "clopper_pearson",
    "evaluate",
    "gradient_attack",
    "likelihood_ratio_input_gradient",
    "mcnemar",
    "perturb",
    "score",
    "share_of",
    "suite",
    "verdict",
    "wilson",
    "worst_of",
]
