"""The network under attack, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from .surrogates import Surrogate
from .view import AttackableView, Forward


@dataclass(frozen=True)
class Target:
    """The network under attack and how it is read.

    Attributes:
        net: the network.
        forward: as ``AttackableView``'s.
        noise: whether neurons that have noise draw it at test time.
        draws: noise draws that the gradient of an attack averages over (expectation over transformations, EOT).
        scale: as ``AttackableView``'s.
        sources: other networks, by name, whose adversarial images may be tried on this one.
    """

    net: nn.Module
    forward: Forward | None = None
    noise: bool = True
    draws: int = 8
    scale: float = 10.0
    sources: Mapping[str, Target] = field(default_factory=dict)

    def view(
        self,
        *,
        draws: int | None = None,
        noise: bool | None = None,
        surrogate: str | Surrogate | None = None,
        seed: int = 0,
    ) -> AttackableView:
        """The network as attacks see it; what is not given is as the target says."""
        return AttackableView(
            self.net,
            forward=self.forward,
            draws=self.draws if draws is None else draws,
            noise=self.noise if noise is None else noise,
            seed=seed,
            scale=self.scale,
            surrogate="training" if surrogate is None else surrogate,
        )
