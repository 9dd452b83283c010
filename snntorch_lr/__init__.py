"""Noise in snnTorch neurons, likelihood-ratio training without backpropagation through time, robustness evaluation."""

import sys

from ._messages import MovedModules
from .calibration import Calibration, calibrate
from .convert import add_noise, export_to_nir, noise_off, noise_on, remove_noise
from .diagnostics import GradientReport, gradient_report
from .estimators import Approximate, Counterfactual, Estimator, Vanilla
from .estimators.check import Finding, Findings, check
from .estimators.input_gradient import input_gradient
from .estimators.recording import per_copy
from .network import reset, rollout
from .neurons import SLSTM, Alpha, Lapicque, Leaky, RLeaky, RSynaptic, SConv2dLSTM, Synaptic
from .noise import EscapeNoise, MembraneNoise, NoisyInput
from .noisy_neuron import UNSUPPORTED
from .optim import attach, closure

__version__ = "0.2.0"

__all__ = [
    "SLSTM",
    "Alpha",
    "Approximate",
    "Calibration",
    "Counterfactual",
    "EscapeNoise",
    "Estimator",
    "Finding",
    "Findings",
    "GradientReport",
    "Lapicque",
    "Leaky",
    "MembraneNoise",
    "NoisyInput",
    "RLeaky",
    "RSynaptic",
    "SConv2dLSTM",
    "Synaptic",
    "Vanilla",
    "add_noise",
    "attach",
    "calibrate",
    "check",
    "closure",
    "export_to_nir",
    "gradient_report",
    "input_gradient",
    "noise_off",
    "noise_on",
    "per_copy",
    "remove_noise",
    "reset",
    "rollout",
]


sys.meta_path.append(
    MovedModules(
        {
            "snntorch_lr.storing": "snntorch_lr.estimators.storing",
            "snntorch_lr.quality": "snntorch_lr.diagnostics",
            "snntorch_lr.experiments.models": "snntorch_lr.experiments.recipe",
        }
    )
)


def __getattr__(name: str) -> object:
    if name in UNSUPPORTED:
        raise AttributeError(f"snntorch_lr has no {name}: {UNSUPPORTED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
