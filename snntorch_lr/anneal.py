"""Noise levels that fall during training, and networks that are used without their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._messages import positive_integer
from .convert import noise_off
from .network import left_as_found, noises, reset


class Anneal:
    """Scheduler of noise levels; made by ``anneal``.

    Args:
        net: the network.
        steps: number of calls of ``step`` in which the levels fall.
        to: what is left at their end, as a fraction of what was learned.
    """

    def __init__(self, net: nn.Module, steps: int, to: float) -> None:
        self.steps = positive_integer("steps", steps)
        if not isinstance(to, (int, float)) or not 0 < to <= 1:
            raise ValueError(f"to must be in (0, 1], as a fraction of the noise level, got {to!r}")
        self.to = float(to)
        self.done = 0
        self._noises = noises(net)
        if not self._noises:
            raise ValueError(
                f"{type(net).__name__} has no noise to anneal: build neurons with noise=True, or call "
                "snntorch_lr.add_noise(net)"
            )
        self._set()

    @property
    def factor(self) -> float:
        """What the levels are multiplied with now."""
        return float(self.to ** (min(self.done, self.steps) / self.steps))

    def step(self) -> None:
        """Lets the levels fall; after as many steps as were announced they stay."""
        self.done += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """How far it came; the levels themselves are in the ``state_dict`` of the network."""
        return {"steps": self.steps, "to": self.to, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state_dict()``."""
        self.steps, self.to, self.done = int(state["steps"]), float(state["to"]), int(state["done"])
        self._set()

    def _set(self) -> None:
        with torch.no_grad():
            for noise in self._noises.values():
                noise.annealed.fill_(self.factor)


def anneal(net: nn.Module, steps: int, to: float = 1 / 3) -> Anneal:
    """Lets the noise levels of a network fall during training: a scheduler as those of ``torch.optim.lr_scheduler``.

    ``net.eval()`` turns the noise off, and a network without its noise is another one: on spoken digits its accuracy
    fell from .89 to .70. With levels that fall geometrically the two come together. Learned levels go on to be learned:
    ``step`` sets a factor on them.

    Args:
        net: a network with noisy neurons or inputs.
        steps: number of calls of ``step`` until the end, as many as optimizer steps, or epochs.
        to: what is left of the levels at the end, in (0, 1].

    Returns:
        A scheduler with ``step()``, ``state_dict()`` and ``load_state_dict()``.

    Raises:
        ValueError: if the network has no noise, or an argument is wrong.

    Examples:
        >>> scheduler = slr.anneal(net, steps=2, to=0.25)
        >>> scheduler.step()
        >>> round(float(net[1].noise.sigma), 3)  # 0.5 before
        0.25
    """
    return Anneal(net, steps, to)


def update_batch_norm(net: nn.Module, batches: Iterable[Any], forward: Any = None) -> None:
    """Computes the running statistics of BatchNorm again without noise, for a network that is to be used without.

    In training they follow the currents of the noisy network. ``torch.optim.swa_utils.update_bn`` within
    ``noise_off``, from fresh states for each batch.

    Args:
        net: the network, left in the mode it was in.
        batches: training inputs; of tuples and lists the first item is taken, as of a data loader's.
        forward: called as ``forward(inputs)``; by default ``net(inputs)``.

    Examples:
        >>> slr.update_batch_norm(net, [images], lambda x: slr.rollout(net, x, num_steps=5))
    """

    class _Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Any) -> Any:
            reset(net)
            return net(inputs) if forward is None else forward(inputs)

    with noise_off(net), left_as_found(net, modes=True):
        torch.optim.swa_utils.update_bn(batches, _Run())
    reset(net)


def noise_gap(off: Tensor, on: Tensor) -> str | None:
    """What to say of a network whose accuracy without its noise is another one than with it.

    The two are compared by an exact McNemar test, on the samples that only one of them has right.

    Args:
        off: samples that the network has right without its noise, Boolean, ``[samples]``.
        on: those that it has right with it, by one draw or by the majority of several.

    Returns:
        Both accuracies, and what helps; None where they differ by no more than chance (p ≥ .01).

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> off, on = torch.arange(100) < 70, torch.arange(100) < 89
        >>> print(noise_gap(off, on))
        accuracy is 70.0 % without the noise, as after net.eval(), and 89.0 % with it: ...
        >>> noise_gap(off, off) is None
        True
    """
    if off.shape != on.shape:
        raise ValueError(
            f"the same samples are needed without and with noise; got {tuple(off.shape)}, {tuple(on.shape)}"
        )
    only_off, only_on = int((off & ~on).sum()), int((on & ~off).sum())
    differ = only_off + only_on
    if not differ:
        return None
    # Twice the tail of a binomial distribution with probability one half; by logarithms, for there may be thousands.
    k = torch.arange(min(only_off, only_on) + 1, dtype=torch.float64)
    chances = math.lgamma(differ + 1) - torch.lgamma(k + 1) - torch.lgamma(differ - k + 1) - differ * math.log(2)
    if 2 * float(chances.exp().sum()) >= 0.01:
        return None
    return (
        f"accuracy is {100 * float(off.double().mean()):.1f} % without the noise, as after net.eval(), and "
        f"{100 * float(on.double().mean()):.1f} % with it: a network without its noise is another one. Let the noise "
        "levels fall during training (snntorch_lr.anneal), or test with the noise on and let several draws vote "
        "(snntorch_lr.noise_on), or compute the statistics of BatchNorm again without noise "
        "(snntorch_lr.update_batch_norm)"
    )
