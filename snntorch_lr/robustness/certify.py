"""Certified robustness by randomized smoothing: radii within which no perturbation changes a prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import markdown, positive_integer
from ..convert import noise_off, noise_on
from ..left_as_found import left_as_found
from ..network import noisy_neurons, reset
from ..neurons import Leaky, RLeaky
from ..noise import MembraneNoise
from ..noisy_neuron import NoisyNeuron
from ..philox import mix
from .scoring import ROWS, Share, clopper_pearson, logits_of, seeded, share_of
from .view import Forward, Target, device_of, evaluating

ABSTAINED = -1
"""In place of a class, where the draws do not tell."""
Progress = Callable[[int, int], None]
"""Called with the number of images done, and of all."""
_UNIT_GAIN = {Leaky: ("subtract", "zero", "none"), RLeaky: ("subtract", "none")}
"""Neurons whose current adds to the membrane potential as it is, with these resets."""


@dataclass(frozen=True)
class Certificate:
    """Certified predictions of a smoothed network.

    Attributes:
        sigma: level of the noise on the input; None for the noise of the first layer.
        unit: l2 radius of one standard deviation: ``sigma``, or 1 / (√T ‖D⁻¹W‖₂) of the first layer.
        draws: noise draws that each radius is estimated from.
        selection: further draws that choose the class.
        alpha: probability that a certificate is wrong, for each image.
        predictions: classes, ``ABSTAINED`` (−1) where the draws do not tell, ``[images]``.
        radii: l2 radii within which the prediction is constant, 0 where it abstains, ``[images]``.
        right: the predictions that are right, Boolean, ``[images]``.

    Examples:
        >>> found = Certificate(0.5, 0.5, 100, 10, 0.001, torch.tensor([3, -1]), torch.tensor([0.4, 0.0]),
        ...                     torch.tensor([True, False]))
        >>> print(found.accuracy(0.25))
        50.0 ± 40.5
    """

    sigma: float | None
    unit: float
    draws: int
    selection: int
    alpha: float
    predictions: Tensor
    radii: Tensor
    right: Tensor

    def accuracy(self, radius: float = 0.0) -> Share:
        """Certified accuracy: the fraction of images that are right within an l2 radius, with its interval."""
        return share_of(self.right & (self.radii >= radius) & (self.predictions != ABSTAINED))

    def table(self, radii: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> str:
        """Certified accuracy by radius, as Markdown."""
        lines = [[f"{radius:g}", str(self.accuracy(radius))] for radius in radii]
        return markdown(["l2 radius", "certified accuracy, %"], lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """Settings and results as plain numbers, ready for ``json.dump``."""
        names = ("sigma", "unit", "draws", "selection", "alpha")
        tensors = {name: getattr(self, name).tolist() for name in ("predictions", "radii", "right")}
        return {name: getattr(self, name) for name in names} | tensors


def certify(
    net: nn.Module | Target,
    loader: Iterable[tuple[Tensor, Tensor]],
    sigma: float | None,
    draws: int = 10_000,
    selection: int = 100,
    alpha: float = 0.001,
    forward: Forward | None = None,
    seed: int = 0,
    rows: int = ROWS,
    progress: Progress = lambda done, total: None,
) -> Certificate:
    """Certified l2 radii by randomized smoothing, which no masked gradient can fake.

    What is certified is the smoothed network: the class that most noise draws choose. No attack within the radius
    changes it, whatever it knows, except with probability ``alpha``.

    1. ``selection`` draws choose the class of each image.
    2. ``draws`` others bound its probability p from below (Clopper-Pearson).
    3. If the bound is above one half, the radius is Φ⁻¹(p) · σ; otherwise the network abstains.

    With ``sigma=None`` the noise is that of the first layer's membrane potentials. The current is c = W x + b + D ε in
    each of T time steps, and the radius is Φ⁻¹(p) / (√T ‖D⁻¹W‖₂).

    Args:
        net: any network; its neurons' noise is off if the input has noise. A ``Target`` for other ways to read it.
        loader: batches of images ``[batch, channels, height, width]`` in [0, 1] and labels ``[batch]``.
        sigma: standard deviation of Gaussian noise on the input; None for the noise of the first layer.
        draws: noise draws that bound the probability; 10,000 allow radii up to 3.2 σ, 1,000 up to 2.5 σ.
        selection: draws that choose the class.
        alpha: probability that a certificate is wrong, for each image.
        forward: as ``AttackableView``'s. It must take images outside [0, 1], which noise makes.
        seed: of the noise.
        rows: images times draws that the network sees at once.
        progress: called after each image.

    Raises:
        ValueError: if an argument is out of range, or the first layer has no certificate: its noise is not Gaussian
            membrane noise, its current is not an affine function of the image or changes over time, or the image
            reaches later layers on another path.

    Examples:
        >>> images = torch.tensor([[[[0.9, 0.2]]], [[[0.1, 0.8]]]])  # of two pixels, which are the logits
        >>> found = certify(nn.Flatten(), [(images, torch.tensor([0, 1]))], sigma=0.25, draws=1000)
        >>> found.accuracy(0.25).accuracy
        1.0

    Source: Cohen, Rosenfeld & Kolter (2019), "Certified Adversarial Robustness via Randomized Smoothing"; the
    certificate of the first layer is their bound for the noise of all its time steps.
    """
    positive_integer("draws", draws)
    positive_integer("selection", selection)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be in (0, 0.5), got {alpha}")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, or None for the noise of the first layer, got {sigma}")
    target = replace(net, noise=True) if isinstance(net, Target) else Target(net, forward)
    batches = [(x.float(), torch.as_tensor(y)) for x, y in loader]
    if not batches:
        raise ValueError("the loader gives no images")
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with left_as_found(target.net, modes=True, states=True, random=True):
        unit = sigma if sigma is not None else _first_layer_unit(target, images[:4], rows)
        predictions, radii = torch.full((len(images),), ABSTAINED), torch.zeros(len(images))
        for index, image in enumerate(images):
            own = mix(seed, index)
            chosen = int(_votes(target, image, sigma, selection, mix(own, 0), rows).argmax())
            count = int(_votes(target, image, sigma, draws, mix(own, 1), rows)[chosen])
            # Of a two-sided interval of 1 - 2 alpha, the lower end.
            low = clopper_pearson(count, draws, 1 - 2 * alpha).low
            if low > 0.5:
                predictions[index], radii[index] = chosen, unit * float(torch.special.ndtri(torch.tensor(low).double()))
            progress(index + 1, len(images))
    return Certificate(sigma, unit, draws, selection, alpha, predictions, radii, predictions == labels)


@torch.no_grad()
def _votes(target: Target, image: Tensor, sigma: float | None, draws: int, seed: int, rows: int) -> Tensor:
    """Number of draws that choose each class, ``[classes]``."""
    device = device_of(target.net)
    generator = torch.Generator(device).manual_seed(seed)
    x = image.to(device)
    view, total = target.view(draws=1), torch.zeros((), device=device)
    switch = noise_off(target.net) if sigma is not None else noise_on(target.net, generator)
    with evaluating(target.net), switch, seeded(seed):
        for done in range(0, draws, rows):
            batch = x.expand(min(rows, draws - done), *x.shape)
            if sigma is not None:
                noise = torch.empty(batch.shape, device=device).normal_(0, sigma, generator=generator)
                batch = batch + noise
            reset(target.net)
            logits = view.read(view.net_forward(target.net, batch))
            total = total + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
        reset(target.net)
    return total


def _first_layer_unit(target: Target, images: Tensor, rows: int) -> float:
    """l2 radius of one standard deviation of the first layer's noise: 1 / (√T ‖D⁻¹W‖₂)."""
    net = target.net
    random = torch.rand(16, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    x = torch.cat([images, random]).to(device_of(net))
    currents: list[tuple[str, Tensor]] = []
    names = {neuron: name for name, neuron in noisy_neurons(net).items()}

    def note(neuron: nn.Module, inputs: tuple[Any, ...]) -> None:
        currents.append((names[neuron], inputs[0].detach()))  # type: ignore[index]

    def run(batch: Tensor) -> list[tuple[str, Tensor]]:
        currents.clear()
        handles = [neuron.register_forward_pre_hook(note) for neuron in names]
        try:
            logits_of(target, batch, 0)
        finally:
            for handle in handles:
                handle.remove()
        return list(currents)

    found = run(x)
    if not found:
        raise ValueError("no neuron has noise: give sigma, the level of noise on the input")
    name, current = found[0]
    neuron = noisy_neurons(net)[name]
    own = [each for at, each in found if at == name]
    _check_noise(name, neuron)
    if any(not torch.equal(each, current) for each in own):
        raise ValueError(f"{name}: its current changes over time, where the certificate needs a constant one")
    if not _is_only_path(target, neuron, x, current):
        raise ValueError(f"{name}: the image reaches the output on another path too, which has no certificate")
    zero = run(torch.zeros_like(x[:1]))[0][1]
    pixels = torch.eye(x[0].numel(), device=x.device).view(-1, *x.shape[1:])
    weight = torch.cat([run(part)[0][1] - zero for part in torch.split(pixels, rows)])
    predicted = zero + (x.flatten(1) @ weight.flatten(1)).view_as(current)
    if not torch.allclose(predicted, current, rtol=1e-3, atol=1e-4 * float(current.abs().max())):
        raise ValueError(f"{name}: its current is not an affine function of the image, which has no certificate")
    assert neuron.noise is not None
    scaled = (weight / neuron.noise.sigma.detach()).flatten(1).double()
    return float(1 / (math.sqrt(len(own)) * torch.linalg.matrix_norm(scaled, 2)))


def _check_noise(name: str, neuron: NoisyNeuron) -> None:
    """Refuses a first layer whose current does not get Gaussian noise of its own in each time step."""
    noise = neuron.noise
    if not isinstance(noise, MembraneNoise) or noise.distribution != "gaussian":
        raise ValueError(f"{name}: the certificate of the first layer needs Gaussian membrane noise, not {noise}")
    resets = next((resets for cls, resets in _UNIT_GAIN.items() if isinstance(neuron, cls)), ())
    if neuron.reset_mechanism not in resets:
        raise ValueError(
            f"{name} ({type(neuron).__name__}, reset {neuron.reset_mechanism!r}): the certificate of the first layer "
            "needs a current that adds to the membrane potential as it is, as that of Leaky does"
        )


def _is_only_path(target: Target, neuron: NoisyNeuron, x: Tensor, current: Tensor) -> bool:
    """True if other images give the same logits with the same current of the first layer."""
    handle = neuron.register_forward_pre_hook(lambda neuron, inputs: (current, *inputs[1:]))
    try:
        return torch.equal(logits_of(target, x, 0), logits_of(target, 1 - x, 0))
    finally:
        handle.remove()
