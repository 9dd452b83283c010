"""Export of noisy networks to other tools, which know no noise."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .convert import remove_noise, reset
from .network import noisy_neurons
from .warn import warn


def export_to_nir(net: nn.Module, sample_data: Tensor, **options: Any) -> Any:
    """A network in the Neuromorphic Intermediate Representation, without its noise: NIR has no place for σ.

    ``snntorch.export_nir.export_to_nir`` of a copy of the network after ``remove_noise``. snnTorch's function accepts a
    noisy network too, but says nothing of the noise, and what the network computes is random.

    Args:
        net: the network; its states are reset, and nothing else is changed.
        sample_data: an input, as its forward pass takes it.
        **options: of snnTorch's function; with a batch dimension in the sample pass ``ignore_dims=[0]``.

    Returns:
        The ``nir.NIRGraph``.

    Raises:
        ImportError: if ``nir`` and ``nirtorch`` are not installed.
    """
    try:
        from snntorch.export_nir import export_to_nir as export
    except ImportError as error:
        raise ImportError("NIR export needs more packages: pip install nir nirtorch") from error
    noisy = noisy_neurons(net)
    if noisy:
        warn(f"NIR has no noise: the levels of {', '.join(noisy)} are left out of the export")
    reset(net)
    return export(remove_noise(copy.deepcopy(net)), sample_data, **options)
