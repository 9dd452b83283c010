"""Noise with a learnable level, and the scores of its distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .graph import Portable
from .kernels import kinds
from .philox import draw, new_key


@dataclass(frozen=True)
class Distribution:
    """A symmetric density f of standard noise ε (location 0, scale 1).

    Attributes:
        quantile: makes ε of uniform numbers u in (−1, 1), in place: the quantile function at (1 + u) / 2.
        location_score: −d log f(ε) / dε. The score of the mean is this over σ; because the family is a
            location-scale one, the score of log σ is ε · location_score(ε) − 1.
        cdf_and_pdf: P(ε < z), which is P(ε > −z), and its derivative f(z).
    """

    quantile: Callable[[Tensor], Tensor]
    location_score: Callable[[Tensor], Tensor]
    cdf_and_pdf: Callable[[Tensor], tuple[Tensor, Tensor]]


def _gaussian(u: Tensor) -> Tensor:
    return u.erfinv_().mul_(math.sqrt(2))


def _laplace(u: Tensor) -> Tensor:
    return torch.log1p(u.abs().neg_(), out=torch.empty_like(u)).neg_().copysign_(u)


def _logistic(u: Tensor) -> Tensor:
    return u.atanh_().mul_(2)


def _gaussian_cdf_and_pdf(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.special.ndtr(z), z.square().mul_(-0.5).exp_().div_(math.sqrt(2 * math.pi))


def _laplace_cdf_and_pdf(z: Tensor) -> tuple[Tensor, Tensor]:
    density = z.abs().neg_().exp_().div_(2)
    return torch.where(z > 0, 1 - density, density), density


def _logistic_cdf_and_pdf(z: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.sigmoid(z)
    return p, torch.addcmul(p, p, p, value=-1)


DISTRIBUTIONS = {
    "gaussian": Distribution(_gaussian, lambda epsilon: epsilon, _gaussian_cdf_and_pdf),
    "laplace": Distribution(_laplace, torch.sign, _laplace_cdf_and_pdf),
    "logistic": Distribution(_logistic, lambda epsilon: torch.tanh(epsilon / 2), _logistic_cdf_and_pdf),
}


class Noise(Portable, nn.Module):
    """Base class of noise: a learnable level σ, and a switch. Arguments as of ``MembraneNoise``.

    Attributes:
        offered: names of the distributions, the default first.
    """

    offered: tuple[str, ...] = ()
    transient: tuple[str, ...] = ("forced", "generator")
    _kinds: ClassVar[dict[str, int]] = {}
    log_sigma: Tensor
    annealed: Tensor
    control: Tensor
    # Set for a while by noise_on / noise_off; never saved.
    forced: bool | None = None
    generator: torch.Generator | None = None

    def __init__(
        self,
        sigma: float | Tensor = 0.5,
        learn: bool = True,
        distribution: str | None = None,
        at_eval: bool = False,
    ) -> None:
        super().__init__()
        distribution = self.offered[0] if distribution is None else distribution
        if distribution not in self.offered:
            raise ValueError(f"unknown noise distribution {distribution!r}; choose one of {', '.join(self.offered)}")
        try:
            level = torch.as_tensor(sigma).detach().clone()
        except (RuntimeError, TypeError, ValueError):
            level = torch.zeros((), dtype=torch.bool)
        if level.is_complex() or level.dtype == torch.bool:
            raise TypeError(f"sigma must be a number or a tensor of numbers, got {sigma!r}")
        if not level.is_floating_point():
            level = level.to(torch.get_default_dtype())
        if level.numel() == 0 or not bool(((level > 0) & level.isfinite()).all()):
            raise ValueError(f"sigma must be positive and finite, got {sigma}; for a neuron without noise: noise=False")
        if learn:
            self.log_sigma = nn.Parameter(level.log())
        else:
            self.register_buffer("log_sigma", level.log())
        self.register_buffer("annealed", torch.ones((), dtype=level.dtype))
        # Sums that the control variate of counterfactual credit is fitted by.
        self.register_buffer("control", torch.zeros(2, dtype=level.dtype))
        self.distribution = distribution
        self.at_eval = at_eval

    @property
    def sigma(self) -> Tensor:
        """Noise level σ > 0, in the shape of the argument: the learned level, times the factor of ``anneal``."""
        return self.log_sigma.exp() * self.annealed

    @property
    def kind(self) -> int | None:
        """Number of this noise in ``kernels``; None if they lack it, as for a derived class."""
        return self._kinds.get(self.distribution) if type(self) in KINDS.values() else None

    @property
    def active(self) -> bool:
        """Whether the neuron draws noise now."""
        return (self.training or self.at_eval) if self.forced is None else self.forced

    def sample(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Standard noise ε ``[rows, ...]``, or what a subclass decides by, in the dtype and on the device of ``like``.

        The first rows do not depend on the number of rows.
        """
        return draw(self, shape, like.dtype, like.device, new_key(self.generator))

    def quantile(self, u: Tensor) -> Tensor:
        """Standard noise ε from uniform numbers in (−1, 1), in place."""
        return DISTRIBUTIONS[self.distribution].quantile(u)

    def cdf_and_pdf(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of a spike at a distance z to the threshold, in units of σ, and its derivative by z."""
        return DISTRIBUTIONS[self.distribution].cdf_and_pdf(z)

    def check_fits(self, shape: tuple[int, ...], neuron: str) -> None:
        """Refuses a σ that does not broadcast against the membrane potential of a neuron.

        Raises:
            ValueError: if it does not, or would make more of the membrane potential than it is.
        """
        if not self._broadcasts(shape):
            raise ValueError(
                f"the noise level sigma of {neuron} has the shape {tuple(self.log_sigma.shape)}, which does not "
                f"broadcast against its membrane potential, {shape}: give one number, or one for each neuron or "
                "channel ([features], [channels, 1, 1])"
            )

    def _broadcasts(self, shape: tuple[int, ...]) -> bool:
        sizes = self.log_sigma.shape[::-1]
        return len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(sizes, shape[::-1], strict=False))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing = args[2]
        # Networks that 0.2 saved have neither: their noise was never annealed, and no control variate was fitted.
        missing[:] = [key for key in missing if key not in {f"{prefix}annealed", f"{prefix}control"}]
        hint(
            missing,
            f"{prefix}log_sigma",
            "the checkpoint has no noise: load it before add_noise(net), or with strict=False, which keeps sigma",
        )

    def extra_repr(self) -> str:
        """Level (mean over neurons) and distribution, for ``print(net)``."""
        level = self.sigma.detach()
        mean, learn = "" if level.numel() == 1 else "mean ", isinstance(self.log_sigma, nn.Parameter)
        return f"sigma={mean}{level.mean().item():.3g}, learn={learn}, distribution={self.distribution!r}"


class MembraneNoise(Noise):
    """Additive noise on the membrane potential, u = μ + σ ε, with a learnable level σ > 0.

    The neuron carries the noisy potential on to the next time step. σ is learned as log σ, so that no optimizer step
    can make it negative. It is the standard deviation for ``"gaussian"``, and the scale parameter for ``"laplace"`` and
    ``"logistic"`` (standard deviations √2 σ and π/√3 σ).

    Args:
        sigma: noise level, in units of the membrane potential: a float, or a tensor that broadcasts against the
            membrane as snnTorch's ``beta`` does (``[features]``, ``[channels, 1, 1]``).
        learn: whether σ is a parameter; otherwise it is a buffer.
        distribution: ``"gaussian"``, the default, ``"laplace"`` or ``"logistic"``.
        at_eval: keep the noise when the network is in evaluation mode. By default it is off there, like dropout.

    Raises:
        TypeError: if sigma is neither a number nor a tensor.
        ValueError: if sigma is not positive and finite, or the distribution is unknown.

    Examples:
        >>> lif = slr.Leaky(beta=0.9, noise=slr.MembraneNoise(sigma=0.5, distribution="laplace"))
        >>> lif.noise
        MembraneNoise(sigma=0.5, learn=True, distribution='laplace')

    Source: the scheme of arXiv 2302.10802, which learns synaptic weights and noise levels; the scores are those of
    any location-scale family.
    """

    offered = ("gaussian", "laplace", "logistic")
    _kinds: ClassVar[dict[str, int]] = {"gaussian": kinds.GAUSSIAN}

    def location_score(self, epsilon: Tensor) -> Tensor:
        """Score of the mean times σ, from standard noise ε of any shape; the same shape."""
        return DISTRIBUTIONS[self.distribution].location_score(epsilon)

    def scale_score(self, epsilon: Tensor, location: Tensor) -> Tensor:
        """Score of log σ, from standard noise ε and its ``location_score``; the same shape."""
        return epsilon * location - 1


class EscapeNoise(Noise):
    """Noise in the decision to fire: a spike with probability sigmoid(z) or Φ(z), z = (membrane − threshold) / σ.

    The membrane potential stays free of noise, and the sampled spike resets it. The score needs only the probability of
    the spike: it is the conditional mean, given the spike, of the score of ``MembraneNoise`` of the same distribution,
    and varies less (Rao-Blackwell).

    Args:
        sigma: noise level, in units of the membrane potential: a float, or a tensor as of ``MembraneNoise``.
        learn: whether σ is a parameter; otherwise it is a buffer.
        distribution: ``"logistic"`` for the sigmoid, the default, or ``"gaussian"`` for Φ, which takes longer.
        at_eval: keep the noise when the network is in evaluation mode. By default it is off there, like dropout.

    Raises:
        TypeError: if sigma is neither a number nor a tensor.
        ValueError: if sigma is not positive and finite, or the distribution is unknown.

    Examples:
        >>> lif = slr.Leaky(beta=0.9, noise=slr.EscapeNoise(sigma=0.3, distribution="logistic"))
        >>> round(float(lif.noise.sigma), 3)
        0.3

    Source: escape noise, Gerstner & Kistler (2002), "Spiking Neuron Models", chapter 5.
    """

    offered = ("logistic", "gaussian")
    _kinds: ClassVar[dict[str, int]] = {"logistic": kinds.LOGISTIC_ESCAPE}

    def quantile(self, u: Tensor) -> Tensor:
        """The uniform numbers in (−1, 1) themselves: ``fires`` decides by them."""
        return u

    def fires(self, p: Tensor, u: Tensor) -> Tensor:
        """Spikes, zeros and ones, of probability p, from the uniform numbers of ``sample``."""
        return (u > 1 - 2 * p).to(p.dtype)

    def location_score(self, z: Tensor, p: Tensor, spikes: Tensor) -> Tensor:
        """Derivative of the log-probability of the spikes with respect to z; finite for any finite z.

        Args:
            z: distance to the threshold, in units of σ; float32 or float64.
            p: probability of a spike there.
            spikes: zeros and ones.
        """
        if self.distribution == "logistic":
            return spikes - p
        sign = 2 * spikes - 1
        # φ/Φ at sign·z is 1 over this; erfcx neither cancels nor underflows there, and its overflow gives 0.
        inverse: Tensor = torch.special.erfcx(-sign * z / math.sqrt(2)) * math.sqrt(math.pi / 2)
        return sign / inverse

    def scale_score(self, z: Tensor, location: Tensor) -> Tensor:
        """Derivative of the log-probability of the spikes with respect to log σ, from ``location_score``."""
        return -z * location


class NoisyInput(Noise):
    """Gaussian noise on the input of a network, with a learnable level: the first layer of noise injection.

    A module in front of any model, x + σ ε. It trains by whatever trains the model: the likelihood ratio of the neurons
    behind it, or surrogate gradients. A clean loss is lower without noise, so a learned level falls; ``floor`` bounds
    it. Noise is on in training mode and under ``noise_on(net)``, as that of neurons is, and all copies of a sample
    share it.

    Args:
        sigma: noise level, in units of the input: a float, or a tensor that broadcasts against one sample, such as
            ``torch.full((1, 28, 28), 0.3)`` for a level of each pixel.
        learn: whether σ is a parameter; otherwise it is a buffer.
        frozen: one draw for each presentation, in place of one for each call: the next draw is made after
            ``slr.reset(net)``. With one draw for each call, call the module in each time step.
        floor: the least level that learning may reach, as a fraction of ``sigma``, in [0, 1).
        distribution: ``"gaussian"``, the default, ``"laplace"`` or ``"logistic"``.
        at_eval: keep the noise when the network is in evaluation mode.

    Raises:
        TypeError: if sigma is neither a number nor a tensor.
        ValueError: if sigma is not positive and finite, or another argument is wrong; in a call, if σ does not fit the
            input.
        RuntimeError: in a call, if σ was updated after a frozen draw, and ``reset(net)`` was not called since.

    Examples:
        >>> net = torch.nn.Sequential(slr.NoisyInput(sigma=0.3), torch.nn.Linear(784, 10), slr.Leaky(beta=0.9))
        >>> net[0](torch.zeros(2, 784)).std() > 0.2
        tensor(True)
        >>> net.eval()[0](torch.zeros(1, 3))
        tensor([[0., 0., 0.]])

    Source: noise injection in the network, arXiv 2302.10802; on the input, Bishop (1995), "Training with Noise is
    Equivalent to Tikhonov Regularization".
    """

    offered = MembraneNoise.offered
    transient = (*Noise.transient, "_drawn")
    # A frozen draw, and the version of σ then.
    _drawn: tuple[Tensor, int] | None = None
    lowest: Tensor

    def __init__(
        self,
        sigma: float | Tensor = 0.3,
        learn: bool = True,
        frozen: bool = False,
        floor: float = 0.5,
        distribution: str | None = None,
        at_eval: bool = False,
    ) -> None:
        super().__init__(sigma, learn, distribution, at_eval)
        if not 0 <= floor < 1:
            raise ValueError(f"floor must be in [0, 1), as a fraction of sigma, got {floor}")
        self.register_buffer("lowest", floor * self.log_sigma.detach().exp())
        with torch.no_grad():
            self.log_sigma.add_(math.log1p(-floor))
        self.frozen = frozen

    @property
    def sigma(self) -> Tensor:
        """Noise level σ, above the floor, times the factor of ``anneal``."""
        return (self.lowest + self.log_sigma.exp()) * self.annealed

    def forward(self, x: Tensor) -> Tensor:
        """The input with noise, ``[batch, ...]``; the same tensor where the noise is off."""
        if not self._broadcasts(x.shape[1:]):
            raise ValueError(
                f"NoisyInput: the noise level has the shape {tuple(self.log_sigma.shape)}, which does not fit samples "
                f"of the shape {tuple(x.shape[1:])}: give one number, or a level for each element of a sample"
            )
        return torch.addcmul(x, self.sigma.to(x.dtype), self._draw(x)) if self.active else x

    def reset(self) -> None:
        """Drops a frozen draw: the next call draws anew."""
        self._drawn = None

    def _draw(self, x: Tensor) -> Tensor:
        if not self.frozen:
            return self.sample(x.shape, x)
        if self._drawn is None or self._drawn[0].shape != x.shape:
            self._drawn = self.sample(x.shape, x), self.log_sigma._version
        noise, version = self._drawn
        if self.log_sigma._version != version:
            raise RuntimeError(
                "NoisyInput: the same frozen noise would be used after an update of sigma: call "
                "snntorch_lr.reset(net), which begins a presentation, at the start of each forward pass"
            )
        return noise.to(x.dtype)

    def extra_repr(self) -> str:
        """Level, distribution and draws, for ``print(net)``."""
        return f"{super().extra_repr()}, frozen={self.frozen}"


class _Hinted(str):
    """A key of a state_dict that torch's error shows with a remedy behind it."""

    remedy: str

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)} ({self.remedy})"


def hint(keys: list[str], key: str, remedy: str) -> None:
    """Adds a remedy to one of the missing or unexpected keys of ``load_state_dict``, if it is among them."""
    if key in keys:
        keys[keys.index(key)] = hinted = _Hinted(key)
        hinted.remedy = remedy


KINDS: dict[str, type[Noise]] = {"membrane": MembraneNoise, "escape": EscapeNoise}


def make_noise(noise: bool | str | Noise | None) -> Noise | None:
    """The noise of a neuron's ``noise=`` argument; None for a neuron without noise.

    Raises:
        ValueError: if the argument names no noise.
    """
    if noise is None or noise is False:
        return None
    if isinstance(noise, Noise):
        return noise
    if noise is True or (isinstance(noise, str) and noise in KINDS):
        return KINDS["membrane" if noise is True else noise]()
    raise ValueError(
        f'noise={noise!r} is not a noise; use True, False, "membrane", "escape", or a MembraneNoise or EscapeNoise'
    )
