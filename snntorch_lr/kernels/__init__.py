"""Fused time steps of neurons, and their noise, on the device that a tensor is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from .._messages import first_line, warn

_enabled = True


@contextmanager
def off() -> Iterator[None]:
    """Context without fused time steps: torch computes the same, with the same noise, in more passes over memory."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def fused_on(device: torch.device, dtype: torch.dtype) -> Any:
    """The module with ``TimeSteps`` for a device and a dtype; None without one, and in ``off``."""
    return noise_on(device, dtype) if _enabled else None


def noise_on(device: torch.device, dtype: torch.dtype) -> Any:
    """The module with ``noise`` for a device and a dtype; None if torch draws it."""
    module = _load(device)
    return module if module is not None and dtype in module.DTYPES else None


@cache
def _load(device: torch.device) -> Any:
    """The module for a device, if it works there; imported here, because Numba and Triton take long."""
    module: Any
    try:
        if device.type == "cpu":
            from . import cpu

            module = cpu
        elif device.type == "cuda":
            from . import triton_steps

            module = triton_steps
        else:
            return None
        # What a compiler lacks is found by the smallest kernel, before there is anything to lose.
        module.noise(torch.empty(1, 4, device=device), 0, 0)
    except ImportError:
        return None
    except Exception as error:
        remedy = "; point NUMBA_CACHE_DIR to a folder that can be written" if device.type == "cpu" else ""
        warn(f"time steps are not fused on {device}, where torch computes them: {first_line(error)}{remedy}")
        return None
    return module
