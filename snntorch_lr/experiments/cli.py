"""The command ``snntorch-lr``."""

from __future__ import annotations

import os
import sys
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, NoReturn

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"snntorch-lr: not installed: {error.name}; pip install 'snntorch-lr[experiments,attacks]'"
    ) from error

from .. import __version__
from ..distributed import RankError
from . import benchmark, diagnose, evaluate_checkpoints, reproduce
from .data import DataError
from .options import add_options, from_arguments
from .study import page, run
from .train import first_prints, joined

if TYPE_CHECKING:
    from ..robustness.evaluate import Progress as AttackProgress
    from .train import AfterStep

console = Console()
# Of the extra "experiments", beside what this module imports: some are needed only after hours.
_TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"
_NEEDED = ("matplotlib", "psutil", "scipy", "sklearn", _TOML, "torchvision")


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        _fail(f"{message}; see {self.prog} --help", 2)


@dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
        run: does it with its options; the docstring is its help.
        options: dataclass that its options are made from.
        kept: said after Ctrl-C: the results that are left.
    """

    run: Callable[[Any], None]
    options: type
    kept: str

    def parse(self, name: str, words: Sequence[str]) -> Any:
        """Options from the words of a command line that follow the name of the command."""
        parser = Parser(
            prog=f"snntorch-lr {name}", description=cleandoc(self.run.__doc__ or ""),
            formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        add_options(parser, self.options)
        return from_arguments(self.options, parser.parse_intermixed_args(words))


def _reproduce(options: reproduce.Reproduce) -> None:
    """Train surrogate baselines and the likelihood-ratio network, attack them, print and save a table.

    Example: snntorch-lr reproduce --dataset mnist --data-root data --out runs/mnist

    Under torchrun the processes divide the copies; only the first reads and writes --data-root and --out:
    torchrun --nproc-per-node 4 -m snntorch_lr.experiments.cli reproduce --dataset mnist --copies 64
    """
    with joined(options.torch_device()) as team, _progress() as bars:
        announce = lambda name, steps: _announce(bars, name, steps)  # noqa: E731
        results = reproduce.reproduce(options, announce, _watch(bars), team)
    if results is None:
        return
    header, lines = reproduce.table(results)
    table = Table(*header, title=f"{options.dataset}, {options.model}", caption=reproduce.NOTE)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    written = "results.json, table.md, robustness.md, training.png, attacks.png and other figures"
    print(f"Written: {options.folder}/{written}")


def _benchmark(options: benchmark.Benchmark) -> None:
    """Measure time and memory of a training step by every method, their growth, and the time to an accuracy.

    Example: snntorch-lr benchmark --part steps --part memory --out runs/benchmark
    """
    with console.status("benchmark") as status:
        results = benchmark.benchmark(options, status.update if console.is_terminal else console.print)
    print(benchmark.to_markdown(results))
    print(f"Written: {options.folder}/benchmark.json, benchmark.md and figures")


def _diagnose(options: diagnose.Diagnose) -> None:
    """Measure the gradients of the estimators on one batch: cosine, signal-to-noise, bias, time, memory.

    Example: snntorch-lr diagnose --checkpoint runs/digits/likelihood-ratio.pt --out runs/gradients
    """
    print(diagnose.diagnose(options))
    print(f"Written: {options.folder}/gradients.json, gradients.md, gradients.png")


def _evaluate(options: evaluate_checkpoints.Evaluate) -> None:
    """Attack trained networks: worst case over a suite, transfers between them, and the gates that it has to pass.

    Example: snntorch-lr evaluate runs/mnist/likelihood-ratio.pt runs/mnist/surrogate.pt --data-root data
    """
    with _progress() as bars:
        print(evaluate_checkpoints.evaluate_checkpoints(options, _watch(bars)))
    print(f"Written: {options.folder}/robustness.md, robustness.json, epsilon.png, steps.png, surrogates.png")


def _certify(options: evaluate_checkpoints.Certify) -> None:
    """Certify trained networks by randomized smoothing: l2 radii within which no attack changes a prediction.

    Example: snntorch-lr certify runs/mnist/likelihood-ratio.pt --sigma 0.25 --data-root data
    """
    with _progress() as bars:
        header, lines = evaluate_checkpoints.certify_checkpoints(options, _watch(bars))
    table = Table(*header, title="certified accuracy (%) by l2 radius")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    print(f"Written: {options.out}/certificates.md, certificates.json, certificates.png")


def _study(options: run.Study) -> None:
    """Train and attack all networks of a plan, or those that are not finished yet, and write its page.

    Example: snntorch-lr study mnist --data-root data --jobs 2

    Interrupted, it goes on with the same command. The large ones take hours; the remaining time is printed after each
    network.
    """

    def tell(what: str, done: int, total: int, left: float) -> None:
        print(f"{done} of {total} finished, about {left / 60:.0f} minutes left: {what}", flush=True)

    found = run.study(options, tell)
    print(f"Written: {', '.join(map(str, page.write_page(found, options.folder, options.folder)))}")


def _report(options: page.Report) -> None:
    """Write the tables and figures of a study again, from its results alone.

    Example: snntorch-lr report docs/results/study-mnist --out docs/results/study-mnist
    """
    print(f"Written: {', '.join(map(str, page.write(options.results, options.out or options.results)))}")


_NOTHING = "nothing was written"
COMMANDS = {
    "reproduce": Command(
        _reproduce, reproduce.Reproduce,
        "finished epochs are kept: the same command with --resume goes on from there",
    ),
    "evaluate": Command(
        _evaluate, evaluate_checkpoints.Evaluate,
        "finished attacks are kept: the same command goes on from there",
    ),
    "certify": Command(_certify, evaluate_checkpoints.Certify, _NOTHING),
    "diagnose": Command(_diagnose, diagnose.Diagnose, _NOTHING),
    "benchmark": Command(_benchmark, benchmark.Benchmark, _NOTHING),
    "study": Command(_study, run.Study, "finished networks, epochs and attacks are kept: start again"),
    "report": Command(_report, page.Report, _NOTHING),
}  # fmt: skip


def call(words: Sequence[str]) -> None:
    """Runs a command line; what a user can mend is one line and an exit status, not a traceback."""
    root = Parser(
        prog="snntorch-lr", allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter,
        description="Noise, likelihood-ratio training and robustness evaluation for snnTorch.",
        epilog="\n".join(f"{name:12}{(each.run.__doc__ or '').splitlines()[0]}" for name, each in COMMANDS.items()),
    )  # fmt: skip
    root.add_argument("--version", action="version", version=f"snntorch-lr {__version__}")
    root.add_argument("command", choices=COMMANDS, help="each lists its options with --help")
    root.add_argument("options", nargs=REMAINDER)
    if not words:
        root.print_help()
        sys.exit(2)
    given = root.parse_args(words)
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        _fail(f"not installed: {', '.join(missing)}; pip install 'snntorch-lr[experiments,attacks]'", 1)
    command = COMMANDS[given.command]
    try:
        command.run(command.parse(given.command, given.options))
    except KeyboardInterrupt:
        _fail(f"interrupted; {command.kept}", 130)
    except ValueError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except (DataError, RankError) as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> NoReturn:
    print(f"snntorch-lr: {message}", file=sys.stderr)
    sys.exit(status)


def _progress() -> Progress:
    # Names of checkpoints are no markup.
    what, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
    columns = (what, BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
    quiet = not console.is_terminal or "CI" in os.environ
    return Progress(*columns, console=console, disable=quiet)


def _announce(bars: Progress, name: str, steps: int) -> AfterStep:
    task = bars.add_task(name, total=steps, note="")
    if bars.disable:
        console.print(f"training: {name}")

    def update(done: int, loss: float) -> None:
        bars.update(task, completed=done, note=f"loss {loss:.3f}")

    return update


def _watch(bars: Progress) -> AttackProgress:
    task = bars.add_task("attacks", start=False, note="", visible=False)

    def update(what: str, done: int, total: int) -> None:
        if done == 0:
            bars.start_task(task)
            if bars.disable:
                console.print("attacks")
        bars.update(task, completed=done, total=total, note=what, visible=True)

    return update


def main() -> None:
    """Entry point of ``snntorch-lr`` and ``torchrun -m snntorch_lr.experiments.cli``."""
    with first_prints():
        call(sys.argv[1:])


if __name__ == "__main__":
    main()
