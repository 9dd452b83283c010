"""The command ``snntorch-lr``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"snntorch-lr: not installed: {error.name}; pip install 'snntorch-lr[experiments,attacks]'"
    ) from error

import torch

from .. import __version__
from ..distributed import RankError
from ..robustness.evaluate import Progress as EvaluationProgress
from . import benchmark, diagnose, evaluate, ranks, report, study_cli
from .benchmark_report import to_markdown
from .data import DataError
from .reproduce import Settings, reproduce, run_name
from .train import Progress as StepProgress

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

_DataRoot = Annotated[
    Path | None, typer.Option(help="torchvision root of MNIST and Fashion-MNIST; downloaded there if absent.")
]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
# Of the extra "experiments", beside what this module imports: some are needed only after hours.
_NEEDED = ("matplotlib", "psutil", "scipy", "sklearn", "torchvision")
_EPOCHS = {"digits": 30, "mnist": 4, "fashion-mnist": 4}


def _version(value: bool) -> None:
    if value:
        console.print(f"snntorch-lr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Noise, likelihood-ratio training and robustness evaluation for snnTorch."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        _fail(f"not installed: {', '.join(missing)}; pip install 'snntorch-lr[experiments,attacks]'", 1)


@app.command("reproduce")
def reproduce_command(
    dataset: Annotated[str, typer.Option(help="digits (no download), mnist or fashion-mnist.")] = "digits",
    model: Annotated[str, typer.Option(help="mlp, deep-mlp or conv.")] = "mlp",
    data_root: _DataRoot = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; 30 for digits, 4 otherwise.")] = None,
    copies: Annotated[
        int | None, typer.Option(help="Noise copies of each sample; 2 for counterfactual, else 16.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    estimator: Annotated[str, typer.Option(help="counterfactual, vanilla or approximate.")] = "counterfactual",
    noise: Annotated[str, typer.Option(help="membrane or escape.")] = "membrane",
    distribution: Annotated[str, typer.Option(help="gaussian, logistic; membrane noise also laplace.")] = "gaussian",
    sigma: Annotated[float, typer.Option(help="Initial noise level of the hidden neurons.")] = 0.5,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, for all networks; falls to 0 along a cosine.")] = 1e-3,
    device: _Device = "cpu",
    epsilon: Annotated[list[float] | None, typer.Option(help="Attack budget, l∞; may be given again.")] = None,
    attack_images: Annotated[int, typer.Option(help="Test images to attack.")] = 1000,
    draws: Annotated[int, typer.Option(help="Noise draws that attacks average over where the noise is on.")] = 8,
    suite: Annotated[str, typer.Option(help="Attacks: quick, paper or standard.")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Directory for results and checkpoints; runs/DATASET-MODEL-seedSEED.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")] = False,
) -> None:
    """Train surrogate baselines and the likelihood-ratio network, attack them, print and save a table.

    Example: snntorch-lr reproduce --dataset mnist --data-root data --out runs/mnist

    Under torchrun the processes divide the copies; only the first reads and writes --data-root and --out:
    torchrun --nproc-per-node 4 -m snntorch_lr.experiments.cli reproduce --dataset mnist --copies 64
    """
    with _plain_errors("finished epochs are kept: the same command with --resume goes on from there"):
        _run(
            Settings(
                dataset=dataset,
                model=model,
                epochs=_EPOCHS.get(dataset, 4) if epochs is None else epochs,
                copies=(2 if estimator == "counterfactual" else 16) if copies is None else copies,
                seed=seed,
                estimator=estimator,
                noise=noise,
                distribution=distribution,
                sigma=sigma,
                learning_rate=learning_rate,
                epsilons=tuple(epsilon) if epsilon else Settings.epsilons,
                attack_images=attack_images,
                draws=draws,
                suite=suite,
            ),
            out or Path("runs") / run_name(dataset, model, seed),
            data_root,
            device,
            resume,
        )


@app.command("benchmark")
def benchmark_command(
    part: Annotated[
        list[str] | None, typer.Option(help="steps, memory, growth or accuracy; may be given again. All by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds; the median counts.")] = 7,
    copies: Annotated[list[int] | None, typer.Option(help="Values of K; may be given again. 1, 4, 16, 64.")] = None,
    num_steps: Annotated[int, typer.Option(help="Time steps of the timed steps.")] = 25,
    width: Annotated[int, typer.Option(help="Hidden neurons.")] = 1000,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 128,
    memory_steps: Annotated[
        list[int] | None, typer.Option(help="Time steps at which memory is measured; may be given again. 25, 100, 400.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Of the time to an accuracy: mnist, fashion-mnist or digits.")] = "mnist",
    data_root: _DataRoot = None,
    limit: Annotated[float, typer.Option(help="Seconds of training after which an accuracy is given up.")] = 600.0,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    device: _Device = "cpu",
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("runs/benchmark"),
) -> None:
    """Measure time and memory of a training step by every method, their growth, and the time to an accuracy.

    Example: snntorch-lr benchmark --part steps --part memory --out runs/benchmark
    """
    with _plain_errors("nothing was written"):
        chosen = benchmark.Settings(
            parts=tuple(part) if part else benchmark.PARTS,
            repeats=repeats,
            copies=tuple(copies) if copies else benchmark.Settings.copies,
            num_steps=num_steps,
            width=width,
            batch=batch,
            memory_steps=tuple(memory_steps) if memory_steps else benchmark.Settings.memory_steps,
            dataset=dataset,
            limit=limit,
            threads=threads,
        )
        with console.status("benchmark") as status:
            show = status.update if console.is_terminal else console.print
            results = benchmark.benchmark(chosen, out, data_root, _device(device), show)
    typer.echo(to_markdown(results))
    typer.echo(f"Written: {out}/benchmark.json, benchmark.md and figures")


@app.command("diagnose")
def diagnose_command(
    dataset: Annotated[
        str | None, typer.Option(help="digits, mnist or fashion-mnist; that of the checkpoint, or digits.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="mlp or conv; that of the checkpoint, or mlp.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Network to measure: a checkpoint of reproduce; a fresh network by default.")
    ] = None,
    data_root: _DataRoot = None,
    noise: Annotated[str, typer.Option(help="membrane or escape.")] = "membrane",
    distribution: Annotated[str, typer.Option(help="gaussian, logistic; membrane noise also laplace.")] = "gaussian",
    sigma: Annotated[float, typer.Option(help="Noise level where the checkpoint has none.")] = 0.5,
    copies: Annotated[int, typer.Option(help="Noise copies of each sample.")] = 16,
    batch: Annotated[int, typer.Option(help="Training images.")] = 64,
    repeats: Annotated[int, typer.Option(help="Calls of each estimator.")] = 16,
    reference: Annotated[int, typer.Option(help="Calls that the reference gradient is the mean of.")] = 128,
    seed: Annotated[int, typer.Option(help="Of a fresh network, the batch and the noise.")] = 0,
    device: _Device = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Directory for the results; runs/gradients/DATASET-MODEL-seedSEED.")
    ] = None,
) -> None:
    """Measure the gradients of the estimators on one batch: cosine, signal-to-noise, bias, time, memory.

    Example: snntorch-lr diagnose --checkpoint runs/digits/likelihood-ratio.pt --out runs/gradients
    """
    with _plain_errors("nothing was written"):
        settings = diagnose.Settings(
            dataset, model, checkpoint, noise, distribution, sigma, copies, batch, repeats, reference, seed
        )
        folder = out or Path("runs/gradients") / diagnose.default_name(settings)
        typer.echo(diagnose.diagnose(settings, folder, data_root, _device(device)))
    typer.echo(f"Written: {folder}/gradients.json, gradients.md, gradients.png")


@app.command("evaluate")
def evaluate_command(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoints of reproduce: the network, then its baselines.")
    ],
    suite: Annotated[str, typer.Option(help="Attacks: quick, paper or standard.")] = "standard",
    dataset: Annotated[str | None, typer.Option(help="Whose test images; those of the checkpoints.")] = None,
    data_root: _DataRoot = None,
    images: Annotated[int, typer.Option(help="Test images to attack, from the first.")] = 1000,
    epsilon: Annotated[list[float] | None, typer.Option(help="Attack budget; may be given again.")] = None,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    draws: Annotated[int, typer.Option(help="Noise draws that attacks average over.")] = 8,
    votes: Annotated[int, typer.Option(help="Noise draws for each prediction.")] = 32,
    corruptions: Annotated[bool, typer.Option("--corruptions", help="Score natural corruptions too.")] = False,
    seed: Annotated[int, typer.Option(help="Of attacks and noise.")] = 0,
    device: _Device = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Directory for the results; runs/robustness/DATASET-MODEL-seedSEED.")
    ] = None,
) -> None:
    """Attack trained networks: worst case over a suite, transfers between them, and the gates that it has to pass.

    Example: snntorch-lr evaluate runs/mnist/likelihood-ratio.pt runs/mnist/surrogate.pt --data-root data
    """
    settings = evaluate.Settings(
        tuple(checkpoints), suite, dataset, images, tuple(epsilon) if epsilon else evaluate.Settings.epsilons,
        norm, draws, votes, corruptions, seed,
    )  # fmt: skip
    with _plain_errors("finished attacks are kept: the same command goes on from there"), _progress() as bars:
        folder = out or Path("runs/robustness") / evaluate.default_name(settings)
        found = evaluate.evaluate(settings, folder, data_root, _device(device), _watch(bars))
    typer.echo(found)
    typer.echo(f"Written: {folder}/robustness.md, robustness.json, epsilon.png, steps.png, surrogates.png")


def _run(settings: Settings, out: Path, data_root: Path | None, device: str, resume: bool) -> None:
    place = _device(device)
    with ranks.joined(place) as team, _progress() as bars:
        results = reproduce(
            settings, out, data_root, place, resume, lambda n, s: _announce(bars, n, s), _watch(bars), team
        )
    if results is None:
        return
    header, lines = report.table(results)
    table = Table(*header, title=f"{settings.dataset}, {settings.model}", caption=report.NOTE)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    typer.echo(f"Written: {out}/results.json, table.md, robustness.md, training.png, attacks.png and other figures")


@contextmanager
def _plain_errors(interrupted: str) -> Iterator[None]:
    """What a user can mend is one line and an exit status, not a traceback.

    Args:
        interrupted: what Ctrl-C leaves.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail(f"interrupted; {interrupted}", 130)
    except ValueError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except (DataError, RankError) as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> NoReturn:
    print(f"snntorch-lr: {message}", file=sys.stderr)
    sys.exit(status)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no CUDA device {device.index or 0} was found; use --device cpu")
    return device


def _progress() -> Progress:
    # Names of checkpoints are no markup.
    what, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
    columns = (what, BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
    quiet = not console.is_terminal or "CI" in os.environ
    return Progress(*columns, console=console, disable=quiet)


def _announce(bars: Progress, name: str, steps: int) -> StepProgress:
    task = bars.add_task(name, total=steps, note="")
    if bars.disable:
        console.print(f"training: {name}")

    def update(done: int, loss: float) -> None:
        bars.update(task, completed=done, note=f"loss {loss:.3f}")

    return update


def _watch(bars: Progress) -> EvaluationProgress:
    task = bars.add_task("attacks", start=False, note="", visible=False)

    def update(what: str, done: int, total: int) -> None:
        if done == 0:
            bars.start_task(task)
            if bars.disable:
                console.print("attacks")
        bars.update(task, completed=done, total=total, note=what, visible=True)

    return update


app.command("study")(
    _plain_errors("finished networks, epochs and attacks are kept: start again")(study_cli.study_command)
)
app.command("report")(_plain_errors("nothing was written")(study_cli.report_command))


def main() -> None:
    """What ``snntorch-lr`` and ``torchrun -m snntorch_lr.experiments.cli`` run."""
    with ranks.first_prints():
        app()


if __name__ == "__main__":
    main()
