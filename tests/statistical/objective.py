"""Finite differences of a stochastic objective, and the estimator's gradient of the same, both with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr

Net = nn.Module
LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Measured:
    mean: float
    error: float

    @classmethod
    def of(cls, values: list[float] | Tensor) -> Measured:
        v = torch.as_tensor(values, dtype=torch.float64)
        return cls(v.mean().item(), v.std().item() / math.sqrt(len(v)))

    def distance(self, other: Measured) -> float:
        """Difference in standard errors."""
        return abs(self.mean - other.mean) / math.hypot(self.error, other.error)


def directions(net: Net, groups: dict[str, list[str]]) -> dict[str, dict[str, Tensor]]:
    """One unit direction in parameter space for each group; all components positive, so that few effects cancel."""
    generator = torch.Generator().manual_seed(5)
    parameters = dict(net.named_parameters())
    result = {}
    for group, names in groups.items():
        vectors = {n: torch.rand(parameters[n].shape, generator=generator, dtype=torch.float64) for n in names}
        norm = math.sqrt(sum(float((v**2).sum()) for v in vectors.values()))
        result[group] = {n: v / norm for n, v in vectors.items()}
    return result


def mutate(patch: pytest.MonkeyPatch, place: Any, name: str, change: Callable[..., Any]) -> None:
    """Calls something else in place of a function or method, with the original one first."""
    original = getattr(place, name)
    patch.setattr(place, name, lambda *arguments, **more: change(original, *arguments, **more))


def single(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values


def finite_difference(
    net: Net,
    loss_fn: LossFn,
    inputs: Tensor,
    targets: Tensor,
    direction: dict[str, Tensor],
    *,
    draws: int = 32_000,
    step: float = 0.1,
) -> Measured:
    """Derivative of the expected loss along a direction, by a central difference with common random numbers.

    Runs outside any estimator, so that it shares no code with one beyond the neuron's own forward pass. In single
    precision, which takes half the time: its rounding is far below the standard error. With common random numbers the
    variance falls as the step grows; the error of a step of 0.1 is below one standard error.
    """
    parameters = dict(net.named_parameters())
    start = {n: value.clone() for n, value in net.state_dict().items()}
    x, y = (single(v).repeat(draws, *[1] * (v.dim() - 1)) for v in (inputs, targets))

    def losses(shift: float) -> Tensor:
        """Of each draw of the noise, the mean over the samples."""
        for n, v in direction.items():
            parameters[n].copy_(start[n] + shift * v)
        torch.manual_seed(100)
        return loss_fn(x, y).double().view(draws, -1).mean(1)

    net.float()
    with torch.no_grad():
        values = (losses(step) - losses(-step)) / (2 * step)
    net.double().load_state_dict(start)
    return Measured.of(values)


def estimates(
    estimator: slr.Vanilla | slr.Counterfactual, loss_fn: LossFn, inputs: Tensor, targets: Tensor, repeats: int = 24
) -> list[dict[str, Tensor]]:
    """Gradients of independent calls of an estimator, by parameter name; in single precision, which is faster."""
    results = []
    estimator.net.float()
    for r in range(repeats):
        estimator.net.zero_grad()
        torch.manual_seed(10_000 + r)
        estimator.backward(loss_fn, single(inputs), single(targets))
        results.append({n: p.grad.double() for n, p in estimator.net.named_parameters() if p.grad is not None})
    estimator.net.zero_grad()
    estimator.net.double()
    return results


def along(gradients: list[dict[str, Tensor]], direction: dict[str, Tensor]) -> Measured:
    """Projections of gradients on a direction."""
    return Measured.of([sum(float((g[n] * v).sum()) for n, v in direction.items() if n in g) for g in gradients])
