"""What snnTorch's neurons cannot do, by themselves or with noise, and what to use instead."""

from __future__ import annotations

import snntorch as snn
from torch import nn

from .noise import EscapeNoise, Noise
from .warn import warn

UNSUPPORTED = {
    "LeakyParallel": "it computes all time steps at once, without a reset; use Leaky in a loop over time",
    "DeltaLeaky": "it fires on changes of the membrane; use Leaky on the differences of the input",
    "StateLeaky": "it computes all time steps at once; use Leaky with reset_mechanism='none' in a loop over time",
    "LinearLeaky": "it computes all time steps at once; use torch.nn.Linear and Leaky in a loop over time",
    "AssociativeLeaky": "it computes all time steps at once; use RLeaky in a loop over time",
}

ALPHA_DEFECT = "snnTorch's Alpha cannot be built with learn_alpha=True; use learn_beta, or Synaptic with learn_alpha"


def check_defects(neuron: nn.Module, noise: Noise | None, name: str = "") -> None:
    """Says which options of a neuron do not work in snnTorch itself, or not with its noise.

    Raises:
        ValueError: if the neuron is to have noise and the option would make its gradient or its reset wrong. Without
            noise it is a warning, because then the neuron behaves exactly as snnTorch's.
    """
    defect = None
    pooling = vars(neuron).get("max_pool") or vars(neuron).get("avg_pool")
    if isinstance(noise, EscapeNoise) and (neuron.inhibition or pooling):
        raise ValueError(
            f"{name or type(neuron).__name__}: escape noise decides for each neuron alone; with inhibition or pooling "
            "inside the neuron use membrane noise"
        )
    if isinstance(neuron, snn.RSynaptic) and not neuron.reset_delay:
        defect = "snnTorch ignores reset_delay=False there, or fails on it; use reset_delay=True, or Synaptic"
    elif isinstance(neuron, snn.Lapicque) and isinstance(neuron.beta, nn.Parameter):
        defect = "snnTorch derives C from beta once, so that learn_beta=True fails at the second backward; use Leaky"
    elif isinstance(neuron, snn.SLSTM) and neuron.input_size != neuron.hidden_size:
        warn(
            f"{name or 'SLSTM'}: snnTorch zeroes the state of an SLSTM at each step unless input_size == hidden_size; "
            "put a torch.nn.Linear in front of it to make them equal"
        )
    if defect is None:
        return
    message = f"{name or type(neuron).__name__}: {defect}"
    if noise is not None:
        raise ValueError(message)
    warn(message)
