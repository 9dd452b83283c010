"""Trains networks as snnTorch's users write them, by surrogate gradients and by the likelihood ratio.

``python docs/networks.py --data-root data`` writes ``docs/results/networks.md`` and ``networks.json``, after each
network; those that the file has already are left out, so that a run goes on after an interruption. MNIST is downloaded
if it is not there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import snntorch as snn
import torch
from snntorch import functional as SF
from snntorch import spikegen, surrogate, utils
from snntorch.functional import quant
from torch import Tensor, nn
from torch.nn import functional as F

import snntorch_lr as slr
from snntorch_lr._messages import listed, markdown, versions
from snntorch_lr.experiments import data
from snntorch_lr.experiments.files import write_json, write_text

OUT = Path(__file__).parent / "results"
METHODS = PLAIN, OURS, ANNEALED = "surrogate", "likelihood ratio", "annealed"
TEST = 1000


class Tutorial5(nn.Module):
    """784-1000-10 with a loss on the membrane potentials of every time step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(784, 1000), snn.Leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(1000, 10), snn.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and membrane potentials of the output, ``[time, batch, 10]``."""
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        record = []
        for _ in range(25):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            record.append((spk2, mem2))
        spikes, potentials = zip(*record, strict=True)
        return torch.stack(spikes), torch.stack(potentials)


class OverTime(nn.Module):
    """Layers that keep their states, over time: ``snntorch.utils.reset``, then one step after the other."""

    def __init__(self, *layers: nn.Module, steps: int = 10, events: bool = False) -> None:
        super().__init__()
        self.layers, self.steps, self.events = nn.Sequential(*layers), steps, events

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and membrane potentials of the last neurons, ``[time, batch, ...]``."""
        utils.reset(self.layers)
        outputs = [self.layers(x[:, step] if self.events else x) for step in range(self.steps)]
        return torch.stack([output[0] for output in outputs]), torch.stack([output[-1] for output in outputs])


class Encoder(nn.Module):
    """Two convolutions, each normalised, and a linear readout of spikes, whose mean over time is the answer."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1, self.lif1 = nn.Conv2d(1, 12, 5, stride=2), norm(12), snn.Leaky(beta=0.5)
        self.conv2, self.norm2, self.lif2 = nn.Conv2d(12, 32, 5, stride=2), norm(32), snn.Leaky(beta=0.5)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        logits = []
        for _ in range(6):
            spk1, mem1 = self.lif1(self.norm1(self.conv1(x)), mem1)
            spk2, mem2 = self.lif2(self.norm2(self.conv2(spk1)), mem2)
            logits.append(self.head(spk2.flatten(1)))
        return torch.stack(logits).mean(0)


class Policy(nn.Module):
    """A recurrent layer that reads an image row by row, with states that the user makes; a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(28, 128), snn.RLeaky(beta=0.9, linear_features=128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        spk, mem = torch.zeros(len(x), 128), torch.zeros(len(x), 128)
        total = torch.zeros(())
        for row in x.squeeze(1).unbind(1):
            spk, mem = self.lif(self.fc(row), spk, mem)
            total = total + self.head(spk)
        return total / 28


class Autoencoder(nn.Module):
    """Convolutions to 32 spiking latent neurons and back; the image is a membrane with a threshold out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), leaky(0.5),
            nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), leaky(0.5),
            nn.Flatten(), nn.Linear(1176, 32), leaky(0.5),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(32, 1176), leaky(0.5), nn.Unflatten(1, (24, 7, 7)),
            nn.ConvTranspose2d(24, 12, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(12), leaky(0.5),
            nn.ConvTranspose2d(12, 1, 3, stride=2, padding=1, output_padding=1),
            leaky(0.5, threshold=20000.0, output=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The image again, ``[batch, 1, 28, 28]``: the last membrane potential."""
        utils.reset(self.encoder)
        utils.reset(self.decoder)
        codes = [self.encoder(x) for _ in range(5)]
        output: Tensor = [self.decoder(code)[1] for code in codes][-1]
        return output


class Regression(nn.Module):
    """Two layers with learned leaks, and the membrane potential of a readout as a function of time."""

    def __init__(self, reset: str) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(1, 64), snn.Leaky(beta=torch.rand(64), learn_beta=True)
        self.fc2, self.lif2 = nn.Linear(64, 64), snn.Leaky(beta=torch.rand(64), learn_beta=True)
        self.fc3, self.out = nn.Linear(64, 1), snn.Leaky(beta=0.8, learn_beta=True, reset_mechanism=reset)

    def forward(self, x: Tensor) -> Tensor:
        """Membrane potentials, ``[batch, time, 1]``."""
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.out.init_leaky()
        record = []
        for current in x.unbind(1):
            spk, mem1 = self.lif1(self.fc1(current), mem1)
            spk, mem2 = self.lif2(self.fc2(spk), mem2)
            _, mem3 = self.out(self.fc3(spk), mem3)
            record.append(mem3)
        return torch.stack(record, 1)


class Attention(nn.Module):
    """Spiking self-attention over 49 patches, as in spiking transformers, and a linear readout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(1, 32, 4, stride=4), nn.Linear(32, 10)
        self.q, self.k, self.v, self.o = (nn.Conv1d(32, 32, 1) for _ in range(4))
        self.up, self.down = nn.Conv1d(32, 64, 1), nn.Conv1d(64, 32, 1)
        slope = surrogate.fast_sigmoid(slope=25)
        self.lif_q, self.lif_k, self.lif_v, self.lif_up = (snn.Leaky(beta=0.9, spike_grad=slope) for _ in range(4))
        self.lif_o = snn.Leaky(beta=0.9, threshold=0.5, spike_grad=slope)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        q, k, v, o, up = (n.init_leaky() for n in (self.lif_q, self.lif_k, self.lif_v, self.lif_o, self.lif_up))
        total = torch.zeros(())
        for _ in range(4):
            tokens = self.embed(x).flatten(2)
            spk_q, q = self.lif_q(self.q(tokens), q)
            spk_k, k = self.lif_k(self.k(tokens), k)
            spk_v, v = self.lif_v(self.v(tokens), v)
            heads = [spikes.unflatten(1, (4, 8)).transpose(2, 3) for spikes in (spk_q, spk_k, spk_v)]
            mixed = heads[0] @ (heads[1].transpose(2, 3) @ heads[2]) / 8
            spk_o, o = self.lif_o(self.o(mixed.transpose(2, 3).flatten(1, 2)), o)
            tokens = tokens + spk_o
            spk_up, up = self.lif_up(self.up(tokens), up)
            total = total + self.head((tokens + self.down(spk_up)).mean(2))
        return total / 4


class Rows(nn.Module):
    """A spiking LSTM that reads an image row by row, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = snn.SLSTM(28, 28), nn.Linear(28, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[batch, 10]``."""
        syn, mem = self.lstm.init_slstm()
        total = torch.zeros(())
        for row in x.squeeze(1).unbind(1):
            spk, syn, mem = self.lstm(row, syn, mem)
            total = total + self.head(spk)
        return total / 28


def grouped(channels: int) -> nn.GroupNorm:
    """Four groups of channels."""
    return nn.GroupNorm(4, channels)


def leaky(beta: float, **options: Any) -> snn.Leaky:
    """A neuron that keeps its state."""
    return snn.Leaky(beta=beta, init_hidden=True, **options)


def convolutional(channels: int, second: int, **options: Any) -> OverTime:
    """The network of tutorials 6 and 7."""
    return OverTime(
        nn.Conv2d(channels, 12, 5), nn.MaxPool2d(2), leaky(0.5),
        nn.Conv2d(12, second, 5), nn.MaxPool2d(2), leaky(0.5),
        nn.Flatten(), nn.Linear(second * 16, 10), leaky(0.5, output=True),
        **options,
    )  # fmt: skip


def recurrent() -> OverTime:
    """A recurrent layer, and a readout that never resets, of which the last membrane potential is the answer."""
    hidden = snn.RLeaky(beta=0.9, linear_features=200, init_hidden=True)
    return OverTime(
        nn.Flatten(), nn.Linear(784, 200), hidden, nn.Linear(200, 10), leaky(0.9, reset_mechanism="none", output=True)
    )


def synaptic() -> OverTime:
    """Neurons with a synaptic current."""
    first, last = (snn.Synaptic(alpha=0.8, beta=0.9, init_hidden=True, output=output) for output in (False, True))
    return OverTime(nn.Flatten(), nn.Linear(784, 200), first, nn.Linear(200, 10), last, steps=15)


def dense(classes: int = 10, steps: int = 10, **options: Any) -> OverTime:
    """Two layers; ``classes`` of output neurons."""
    last = leaky(0.9, output=True, **options)
    return OverTime(
        nn.Flatten(), nn.Linear(784, 200), leaky(0.9, **options), nn.Linear(200, classes), last, steps=steps
    )


def moving(images: Tensor) -> Tensor:
    """Events of a digit that moves by three pixels in each of ten steps: ``[batch, time, on and off, 28, 28]``."""
    path = [(3, 0), (3, 3), (0, 3), (-3, 3), (-3, 0), (-3, -3), (0, -3), (3, -3), (3, 0), (0, 0)]
    frames = torch.stack([images.squeeze(1).roll(shift, (1, 2)) for shift in path])
    changes = spikegen.delta(frames, threshold=0.3, off_spike=True)
    return torch.stack([changes > 0, changes < 0], 2).float().transpose(0, 1)


def waves(images: Tensor) -> Tensor:
    """Sine waves of a phase and a frequency for each image, ``[batch, time, 1]``."""
    phase, rate = images.flatten(1).sum(1, keepdim=True), images[:, :, 14].sum((1, 2)).unsqueeze(1)
    return torch.sin(torch.linspace(0, 6.28, 30) * (0.5 + rate.remainder(1)) + phase).unsqueeze(2)


def membranes_over_time(output: Any, _: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the membrane potentials of every time step, summed: tutorial 5."""
    return sum(F.cross_entropy(step, labels) for step in output[1])


def last_membrane(output: Any, _: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the last membrane potential."""
    return F.cross_entropy(output[1][-1], labels)


def logits(output: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits."""
    return F.cross_entropy(output, labels)


def logits_of_samples(output: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """The same, one loss for each sample."""
    return F.cross_entropy(output, labels, reduction="none")


def integral_error(output: Tensor, inputs: Tensor, _: Tensor) -> Tensor:
    """Mean squared error of the integral of the input over time."""
    return F.mse_loss(output, inputs.cumsum(1) / 8)


def image_error(output: Tensor, inputs: Tensor, _: Tensor) -> Tensor:
    """Mean squared error of the image."""
    return F.mse_loss(output, inputs)


def of_spikes(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """A loss of snnTorch on the recorded spikes; losses of spike times change their labels."""
    return lambda output, _, labels: loss(output[0], labels.clone())


@dataclass(frozen=True)
class Case:
    """One network and how it is trained.

    Attributes:
        name: in the table.
        make: builds it.
        loss: of its output, inputs and labels.
        scores: of its output, ``[batch, 10]``: what the loss reads, as the prediction; None for an error.
        batch: samples in a step.
        rate: learning rate of Adam, for both methods.
        encode: what the images become.
        reads_membranes: whether the loss reads membrane potentials of spiking outputs.
        kind: of the noise.
        estimator: of the likelihood ratio.
        scale: with an error, what it is divided by: the variance of the target.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    scores: Callable[[Any], Tensor] | None
    batch: int
    rate: float
    encode: Callable[[Tensor], Tensor] = lambda images: images
    reads_membranes: bool = False
    kind: str = "escape"
    estimator: str = "counterfactual"
    scale: Callable[[Tensor], Tensor] = lambda inputs: inputs.var()

    def score(self, output: Any, inputs: Tensor, labels: Tensor) -> float:
        """Accuracy, or error as a fraction of the variance."""
        if self.scores is None:
            return float(self.loss(output, inputs, labels) / self.scale(inputs))
        return float((self.scores(output).argmax(1) == labels).double().mean())


def counts(output: Any) -> Tensor:
    """Spike counts."""
    return output[0].sum(0)


def crowds(output: Any) -> Tensor:
    """Spike counts of the twenty neurons of each class together."""
    return counts(output).unflatten(1, (10, 20)).sum(2)


def earliest(output: Any) -> Tensor:
    """Minus the time of the first spike."""
    spikes = output[0]
    times = torch.arange(len(spikes)).view(-1, 1, 1).expand_as(spikes)
    return -times.where(spikes > 0, len(spikes)).amin(0)


def itself(output: Tensor) -> Tensor:
    """Logits are scores as they are."""
    return output


def levels(bits: int) -> Any:
    """Membrane potentials of so many bits."""
    return quant.state_quant(num_bits=bits, uniform=True, threshold=1.0)


def integral(inputs: Tensor) -> Tensor:
    """Variance of what a regression is to find."""
    return (inputs.cumsum(1) / 8).var()


MSE = SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2)
RATE, COUNT = SF.ce_rate_loss(), SF.ce_count_loss()
CROWD = SF.ce_count_loss(population_code=True, num_classes=10)
CASES = [
    Case(
        "tutorial 5: 784-1000-10, loss on membranes",
        Tutorial5, membranes_over_time, lambda out: out[1].sum(0), 128, 5e-4, reads_membranes=True,
    ),
    Case("tutorial 6: convolutions, `ce_rate_loss`", lambda: convolutional(1, 64), of_spikes(RATE), counts, 32, 2e-3),
    Case(
        "tutorial 7: convolutions on events, `mse_count_loss`",
        lambda: convolutional(2, 32, events=True), of_spikes(MSE), counts, 32, 2e-3, moving,
    ),
    Case("`RLeaky`, loss on the last membrane", recurrent, last_membrane, lambda out: out[1][-1], 64, 1e-3),
    Case("`Synaptic`, `ce_count_loss`", synaptic, of_spikes(COUNT), counts, 64, 1e-3),
    Case("population code, `ce_count_loss`", lambda: dense(200, 15), of_spikes(CROWD), crowds, 64, 1e-3),
    Case("population code, four time steps", lambda: dense(200, 4), of_spikes(CROWD), crowds, 64, 1e-3),
    Case("recurrent policy, states of zeros, image row by row", Policy, logits, itself, 64, 2e-3),
    Case("convolutions with BatchNorm, linear readout", lambda: Encoder(nn.BatchNorm2d), logits, itself, 32, 2e-3),
    Case("convolutions with GroupNorm, linear readout", lambda: Encoder(grouped), logits, itself, 32, 2e-3),
    Case("spiking self-attention, linear readout", Attention, logits, itself, 64, 5e-3),
    Case("first spike, `ce_temporal_loss`", dense, of_spikes(SF.ce_temporal_loss()), earliest, 64, 1e-3),
    Case(
        "membranes of 4 bits, `ce_count_loss`, membrane noise",
        lambda: dense(state_quant=levels(4)), of_spikes(COUNT), counts, 64, 2e-3, kind="membrane",
    ),
    Case(
        "membranes of 2 bits, `ce_count_loss`, membrane noise",
        lambda: dense(state_quant=levels(2)), of_spikes(COUNT), counts, 64, 2e-3, kind="membrane",
    ),
    Case("`SLSTM`, image row by row, by `vanilla`", Rows, logits_of_samples, itself, 64, 2e-3, estimator="vanilla"),
    Case("error: autoencoder, threshold of the readout 20000", Autoencoder, image_error, None, 48, 5e-3),
    Case(
        "error: integral of a wave, readout without reset",
        lambda: Regression("none"), integral_error, None, 32, 5e-3, waves, scale=integral,
    ),
    Case(
        "error: integral of a wave, readout that resets",
        lambda: Regression("subtract"), integral_error, None, 32, 5e-3, waves, scale=integral,
    ),
]  # fmt: skip


def train(case: Case, images: data.Dataset, steps: int, seed: int, method: str) -> dict[str, Any]:
    """The score on test images without noise, seconds of training, what ``calibrate`` did, and warnings."""
    torch.manual_seed(seed)
    net = case.make()
    rows = torch.randint(len(images.train), (steps, case.batch))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return case.loss(net(x), x, y)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        return case.encode(images.train[rows[number]]), images.train_labels[rows[number]]

    result: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        if method != PLAIN:
            slr.add_noise(net, kind=case.kind)
            result["calibration"] = str(slr.calibrate(net, batch(0), loss_fn=loss_fn))
        optimizer = torch.optim.Adam(net.parameters(), lr=case.rate)
        if method != PLAIN:
            slr.attach(optimizer, net, case.estimator)
        levels = slr.anneal(net, steps) if method == ANNEALED else None
        for number in range(steps):
            if method != PLAIN and case.estimator == "vanilla":
                optimizer.step(slr.closure(loss_fn, *batch(number)))
            else:
                loss = loss_fn(*batch(number)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if levels is not None:
                levels.step()
        result["seconds"] = time.perf_counter() - start
    result["warnings"] = sorted({str(warning.message) for warning in caught if warning.category is UserWarning})
    net.eval()
    inputs, labels = case.encode(images.test[:TEST]), images.test_labels[:TEST]
    with torch.no_grad():
        output = net(inputs)
    result["score"] = case.score(output, inputs, labels)
    if case.reads_membranes:
        result["by spike counts"] = float((counts(output).argmax(1) == labels).double().mean())
    return result


def to_markdown(results: dict[str, Any]) -> str:
    """The page."""
    lines, notes, calibrations = [], [], []
    for name, runs in results["networks"].items():
        scores = {method: [run["score"] for run in runs[method]] for method in METHODS}
        is_error = name.startswith("error")
        shown = [" ".join(f"{score:.3f}" if is_error else f"{100 * score:.1f}" for score in scores[m]) for m in METHODS]
        seconds = [f"{median(run['seconds'] for run in runs[method]):.0f}" for method in METHODS]
        ratios = [f"{mean(scores[method]) / mean(scores[PLAIN]):.2f}" for method in (OURS, ANNEALED)]
        lines.append([name, runs["rate"], *shown, *ratios, *seconds])
        first = runs[OURS][0]
        if "by spike counts" in first:
            parts = [f"{m} {100 * mean(run['by spike counts'] for run in runs[m]):.1f} %" for m in METHODS]
            notes.append(f"- {name}: {', '.join(parts)}")
        said = "".join(f"\n\nWarned: {message}." for message in first["warnings"])
        calibrations.append(f"### {name}\n\n```text\n{first['calibration']}\n```{said}")
    header = ["network, loss", "learning rate", *METHODS, "ratio", "ratio, annealed", *["s"] * len(METHODS)]
    return f"""# Networks of snnTorch's users

Accuracy in percent on {TEST} test images of MNIST after {results["steps"]} steps from fresh weights, seed by seed;
chance is 10 %. Of the last ones, the squared error as a fraction of the variance.

- **{PLAIN}**: the network as it is written, by `loss.backward()`.
- **{OURS}**: the same after `slr.add_noise(net, kind="escape", sample=(images, labels), loss_fn=loss_fn)`, by
  `slr.attach(optimizer, net)`, with the noise off at test. One setting for all, the defaults of `calibrate`, some of
  which were chosen by such figures, which favours them: σ, 0.25 times the spread and not 0.5; the rate that noise must
  bring about at least, 0.02, among 0.02, 0.05 and 0.15; and for readouts the threshold, among 0.35, 0.5, 0.7 and 1
  times the threshold.
- **{ANNEALED}**: the same, and the levels fall to a third over all steps, by `slr.anneal(net, steps)`.

A ratio is that of two means, the second by surrogate gradients. Learning rates and batches are the same for all, and
were not tuned; seconds are of training, medians, on a machine that did other things too.

{markdown(header, lines)}

A loss on membrane potentials does not care for spikes. Predicted by spike counts all the same, the accuracy is

{chr(10).join(notes)}

## What the calibration did, first seed

{(chr(10) * 2).join(calibrations)}

Command: `{results["command"]}`

Versions: {listed(results["versions"])}. Machine: {results["machine"]}. Seeds {", ".join(map(str, results["seeds"]))}.
"""


def main() -> None:
    """Trains all that are not trained yet, one after the other, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="torchvision root of MNIST")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    images = data.load("mnist", chosen.data_root)
    seeds = " ".join(map(str, chosen.seeds))
    results: dict[str, Any] = {
        "command": f"python docs/networks.py --data-root data --steps {chosen.steps} --seeds {seeds}",
        "versions": versions("snntorch-lr", "snntorch", "torch"),
        "machine": f"{platform.machine()}, 1 thread, cpu",
        "seeds": chosen.seeds,
        "steps": chosen.steps,
        "networks": {},
    }
    path = OUT / "networks.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    done = before["networks"] if all(before.get(key) == results[key] for key in ("command", "versions")) else {}
    for case in CASES:
        if case.name not in done:
            runs: dict[str, Any] = {"rate": f"{case.rate:g}", "batch": case.batch}
            for method in METHODS:
                runs[method] = [train(case, images, chosen.steps, seed, method) for seed in chosen.seeds]
                scores = ", ".join(f"{run['score']:.3f}" for run in runs[method])
                print(f"{case.name}, {method}: {scores} in {runs[method][0]['seconds']:.0f} s", flush=True)
            done[case.name] = runs
        results["networks"] = {other.name: done[other.name] for other in CASES if other.name in done}
        write_json(path, results)
    write_text(OUT / "networks.md", to_markdown(results))


if __name__ == "__main__":
    main()
