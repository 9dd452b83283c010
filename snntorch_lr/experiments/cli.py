"""The command ``snntorch-lr``: words in; progress, tables that fit the terminal, and JSON out."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from argparse import REMAINDER
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from .. import __version__
from .._messages import install

try:
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text

    from . import files
    from .benchmark import Benchmark
    from .data import DataError
    from .measure import Certify, Diagnose, Evaluate
    from .options import Command, Parser
    from .page import Report
    from .study import Reproduce, Study
except ModuleNotFoundError as error:
    raise SystemExit(f"snntorch-lr: not installed: {error.name}; {install('experiments,attacks')}") from error

if TYPE_CHECKING:
    from torch import nn

# Of the extra "experiments", beside what this module imports: some are needed only after hours.
_TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"
_NEEDED = ("matplotlib", "psutil", "scipy", "sklearn", _TOML, "torchvision")
_FIGURE = 20
console = Console()


COMMANDS: dict[str, type[Command]] = {
    kind.__name__.lower(): kind for kind in (Reproduce, Evaluate, Certify, Diagnose, Benchmark, Study, Report)
}


def call(words: Sequence[str]) -> None:
    """Runs a command line; what a user can mend is one line and an exit status, not a traceback."""
    root = Parser(
        "snntorch-lr",
        description="Noise, likelihood-ratio training and robustness evaluation for snnTorch.",
        epilog="\n".join(f"{name:12}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in COMMANDS.items()),
    )
    root.add_argument("--version", action="version", version=f"snntorch-lr {__version__}")
    root.add_argument("command", choices=COMMANDS, help="each lists its options with --help")
    root.add_argument("options", nargs=REMAINDER)
    if not words:
        root.print_help()
        sys.exit(2)
    kept = ""
    try:
        chosen = root.parse_args(words)
        if missing := [name for name in _NEEDED if find_spec(name) is None]:
            raise DataError(f"not installed: {', '.join(missing)}; {install('experiments,attacks')}")
        kind = COMMANDS[chosen.command]
        kept, options = kind.kept, kind.parse(chosen.options)
        with redirect_stdout(sys.stderr if options.json else sys.stdout):
            with files.locked(options.folder, options.command_line()), watching() as watch:
                outcome = options.run(watch)
            for table in outcome.tables:
                show(*table)
            # Words wrap at the width of the terminal, and are no markup.
            console.print(outcome.words, markup=False, highlight=False, soft_wrap=not console.is_terminal)
        if options.json:
            print(json.dumps(outcome.results, ensure_ascii=False, allow_nan=False))
    except KeyboardInterrupt:
        _fail(f"interrupted; {kept}", 130)
    except (ValueError, ImportError) as error:
        _fail(str(error), 2)
    except (OSError, DataError) as error:
        named = isinstance(error, OSError) and error.filename
        _fail(f"{error.filename}: {error.strerror}" if named else str(error), 1)  # type: ignore[union-attr]


def _fail(message: str, status: int) -> NoReturn:
    print(f"snntorch-lr: {message}", file=sys.stderr)
    sys.exit(status)


def show(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table; where it is too wide, one for as many columns as fit, each with the names of the lines.

    Words wrap, and nothing is cut.
    """
    columns = [*zip(header, *lines, strict=True)]
    least = [max(map(_least, column)) for column in columns]
    # Columns on the left without a figure name the lines. A space at each end, and three between columns.
    numbers = [any(cell[:1].isdigit() for cell in cells) for _, *cells in columns]
    names = [*range(max(1, (*numbers[:-1], True).index(True)))]
    start = 2 + sum(least[column] + 3 for column in names)
    groups, used = [names], start
    for column in range(len(names), len(header)):
        need = least[column] + 3
        if used + need > console.width and len(groups[-1]) > len(names):
            groups, used = [*groups, names], start
        groups[-1], used = [*groups[-1], column], used + need
    for group in groups:
        table = Table(title=Text(title, "bold") if title else None, title_justify="left", box=box.SIMPLE)
        for column in group:
            table.add_column(Text(header[column]), min_width=least[column], overflow="fold")
        for line in lines:
            table.add_row(*(Text(line[column]) for column in group))
        console.print(table)


def _least(cell: str) -> int:
    """Width below which a figure with its interval or unit would wrap, or a word break."""
    return len(cell) if cell[:1].isdigit() and len(cell) < _FIGURE else max(map(len, cell.split()), default=0)


class Watch:
    """Progress of a command: bars in a terminal, elsewhere lines."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.task: TaskID | None = None

    def say(self, what: str) -> None:
        """Tells what is done next, of an unknown number of things."""
        if self.bars.disable:
            print(what, flush=True)
        elif self.task is None:
            self.task = self.bars.add_task(what, total=None, note="")
        else:
            self.bars.update(self.task, description=what)

    def pieces(self, title: str, apart: float = 0.0) -> Callable[[str, int, int], None]:
        """The progress of many pieces, told before each; without a terminal in lines that are so many seconds apart."""
        bar, said = _Bar(self.bars, title), -math.inf

        def update(what: str, done: int, total: int) -> None:
            nonlocal said
            left = bar.move(what, done, total)
            if self.bars.disable and done < total and time.monotonic() >= said + apart:
                said = time.monotonic()
                print(f"{title}: {done + 1} of {total}{left}: {what}", flush=True)

        return update

    def training(self, name: str, epochs: int, steps: int) -> dict[str, Callable[..., None]]:
        """Callbacks of ``train`` for a network, by the number of its epochs and steps: a line for each epoch."""
        bar, done = _Bar(self.bars, name), 0
        if self.bars.disable:
            print(f"training: {name}", flush=True)

        def after_step(number: int, loss: float) -> None:
            nonlocal done
            if not done:
                # Of a training that goes on, the steps before were another's.
                bar.move("", number - 1, steps)
            done = number
            bar.move(f"loss {loss:.3f}", done, steps)

        def after_epoch(entry: dict[str, float], net: nn.Module) -> None:
            if self.bars.disable:
                said = f"loss {entry['train_loss']:.3f}, accuracy {entry['test_accuracy']:.1%}"
                said += f", with noise {entry['noisy_test_accuracy']:.1%}" if "noisy_test_accuracy" in entry else ""
                left = bar.move("", done, steps)
                print(f"{name}: epoch {entry['epoch']:.3g} of {epochs}{left}: {said}", flush=True)

        return {"after_step": after_step, "after_epoch": after_epoch}


class _Bar:
    """A bar, and the time left by the pace since its first move."""

    def __init__(self, bars: Progress, title: str) -> None:
        self.bars, self.first = bars, (-1.0, 0)
        self.task = bars.add_task(title, start=False, note="", visible=False)

    def move(self, what: str, done: int, total: int) -> str:
        """The time left in words, for a line; nothing while it is not known."""
        if self.first[0] < 0:
            self.bars.start_task(self.task)
            self.first = time.monotonic(), done
        self.bars.update(self.task, completed=done, total=total, note=what, visible=True)
        started, before = self.first
        if done == before:
            return ""
        seconds = (time.monotonic() - started) * (total - done) / (done - before)
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"


@contextmanager
def watching() -> Iterator[Watch]:
    """Progress bars until the block ends; in continuous integration lines, whose terminals only look like one."""
    # Names of checkpoints are no markup.
    what, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
    columns = (what, BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal or "CI" in os.environ) as bars:
        yield Watch(bars)


def main() -> None:
    """Entry point of ``snntorch-lr``."""
    call(sys.argv[1:])


if __name__ == "__main__":
    main()
