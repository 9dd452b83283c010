"""Noise in snnTorch neurons, likelihood-ratio training without backpropagation through time, robustness evaluation."""

from .calibration import Calibration, anneal, calibrate
from .convert import add_noise, export_to_nir, noise_off, noise_on, remove_noise, update_batch_norm
from .copies import per_copy
from .diagnostics import Finding, Findings, GradientReport, check, gradient_report
from .gradients import Approximate, Counterfactual, Estimator, Vanilla
from .network import reset
from .neurons import SLSTM, Alpha, Lapicque, Leaky, RLeaky, RSynaptic, SConv2dLSTM, Synaptic
from .noise import EscapeNoise, MembraneNoise, NoisyInput
from .noisy_neuron import UNSUPPORTED
from .optim import attach, closure, use_gradient
from .rollout import rollout

__version__ = "0.3.0"

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
    "anneal",
    "attach",
    "calibrate",
    "check",
    "closure",
    "export_to_nir",
    "gradient_report",
    "noise_off",
    "noise_on",
    "per_copy",
    "remove_noise",
    "reset",
    "rollout",
    "update_batch_norm",
    "use_gradient",
]


def __getattr__(name: str) -> object:
    if name in UNSUPPORTED:
        raise AttributeError(f"snntorch_lr has no {name}: {UNSUPPORTED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
