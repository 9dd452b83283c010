"""Spoken digits as log-mel frames: a network for sound, by surrogate gradients and by the likelihood ratio.

``python docs/spoken_digits.py recordings`` trains on a folder of ``<digit>_<speaker>_<index>.wav``, such as that of the
Free Spoken Digit Dataset (3,000 recordings by six speakers, 8 kHz): index 0 to 4 is for testing, as its authors ask.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import snntorch as snn
import torch
from scipy import signal
from scipy.io import wavfile
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr

BANDS, STEPS, WINDOW, HOP = 40, 39, 256, 128
EPOCHS, BATCH, RATE = 24, 64, 5e-3


def log_mel(path: Path) -> Tensor:
    """A recording as logarithms of its energy in 40 mel bands, ``[time, bands]``: at 8 kHz windows of 32 ms."""
    rate, samples = wavfile.read(path)
    length = (STEPS - 1) * HOP + WINDOW
    samples = samples[:length] / np.abs(samples).max()
    samples = np.pad(samples, (0, length - len(samples)))
    frequencies, _, spectrum = signal.stft(
        samples, rate, "hann", WINDOW, WINDOW - HOP, boundary=None, padded=False, scaling="psd"
    )
    # A mel is a step of pitch; each band is a triangle that reaches the middle of its neighbours.
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, BANDS + 2) / 2595) - 1)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    energies = np.minimum(rising, falling).clip(0) @ np.abs(spectrum) ** 2
    return torch.as_tensor(np.log(energies + 1e-9).T, dtype=torch.float32)


def load(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames ``[n, time, bands]`` and digits ``[n]``, for training then for testing; each band is standardised."""
    paths = sorted(folder.glob("*_*_*.wav"))
    if not paths:
        raise SystemExit(f"{folder} holds no <digit>_<speaker>_<index>.wav")
    frames = torch.stack([log_mel(path) for path in paths])
    digit, _, index = zip(*(path.stem.split("_") for path in paths), strict=True)
    labels, tested = torch.tensor([*map(int, digit)]), torch.tensor([*map(int, index)]) < 5
    frames = (frames - frames[~tested].mean((0, 1))) / frames[~tested].std((0, 1))
    return frames[~tested], labels[~tested], frames[tested], labels[tested]


class Listener(nn.Module):
    """Two hidden layers of leaky neurons, and a linear readout of their rates."""

    def __init__(self, hidden: int = 200, beta: float = 0.95) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(BANDS, hidden), snn.Leaky(beta=beta, init_hidden=True),
            nn.Linear(hidden, hidden), snn.Leaky(beta=beta, init_hidden=True),
        )  # fmt: skip
        self.head = nn.Linear(hidden, 10)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` from frames ``[batch, time, bands]``."""
        rates = slr.rollout(self.hidden, frames.transpose(0, 1)).mean(0)
        logits: Tensor = 10 * self.head(rates)
        return logits


def accuracy(net: nn.Module, frames: Tensor, labels: Tensor) -> float:
    """Fraction of recordings that are right."""
    with torch.no_grad():
        return float((net(frames).argmax(1) == labels).double().mean())


def train(
    sound: tuple[Tensor, Tensor, Tensor, Tensor], by_ratio: bool, seed: int, epochs: int = EPOCHS
) -> dict[str, float]:
    """Trains a network; its accuracy on the test recordings without and with its noise."""
    frames, labels, *test = sound
    torch.manual_seed(seed)
    net = Listener()
    steps = epochs * -(-len(frames) // BATCH)
    if by_ratio:
        slr.add_noise(net, sigma=0.3, kind="escape", learn=False)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]
    if by_ratio:
        slr.attach(optimizer, net)
        schedulers.append(slr.anneal(net, steps, to=1 / 3))
    for _ in range(epochs):
        for rows in torch.randperm(len(frames)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(frames[rows]), labels[rows]).backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    net.eval()
    results = {"off": accuracy(net, *test)}
    if by_ratio:
        with slr.noise_on(net):
            results["on"] = accuracy(net, *test)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    recordings = load(parser.parse_args().folder)
    for gradient in ("surrogate", "likelihood ratio"):
        print(gradient, train(recordings, gradient == "likelihood ratio", seed=0))
