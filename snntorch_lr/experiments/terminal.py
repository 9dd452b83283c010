"""Tables that fit the terminal, and progress: bars in a terminal, lines in a file."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .train import Observer

if TYPE_CHECKING:
    from torch import nn

    from ..robustness.evaluate import Progress as AttackProgress

console = Console()
_FIGURE = 20


def show(header: Sequence[str], lines: Sequence[Sequence[str]], title: str = "", names: int = 1) -> None:
    """Prints a table; where it is too wide, one for as many columns as fit, each with the names of the lines.

    Words wrap, and nothing is cut.
    """
    least = [max(map(_least, column)) for column in zip(header, *lines, strict=True)]
    for columns in _groups(least, names, console.width):
        table = Table(title=Text(title, "bold") if title else None, title_justify="left", box=box.SIMPLE)
        for column in columns:
            table.add_column(Text(header[column]), min_width=least[column], overflow="fold")
        for line in lines:
            table.add_row(*(Text(line[column]) for column in columns))
        console.print(table)


def _groups(least: Sequence[int], names: int, width: int) -> Iterator[list[int]]:
    """Columns that fit beside each other, those of the names always among them."""
    # A space at each end, and three between columns.
    start = 2 + sum(each + 3 for each in least[:names])
    columns, used = [*range(names)], start
    for column in range(names, len(least)):
        need = least[column] + 3
        if used + need > width and len(columns) > names:
            yield columns
            columns, used = [*range(names)], start
        columns, used = [*columns, column], used + need
    yield columns


def _least(cell: str) -> int:
    """Width below which a figure with its interval or unit would wrap, or a word break."""
    return len(cell) if cell[:1].isdigit() and len(cell) < _FIGURE else max(map(len, cell.split()), default=0)


class Watch:
    """Progress of trainings and attacks: a bar for each in a terminal; elsewhere a line for each epoch and attack."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    def training(self, name: str, epochs: int, steps: int) -> Observer:
        """Called before a network is trained, with the number of its epochs and steps."""
        return _Training(self.bars, name, epochs, steps)

    def pieces(self, title: str, apart: float = 0.0) -> AttackProgress:
        """The progress of many pieces, told before each; without a terminal in lines that are so many seconds apart."""
        task = self.bars.add_task(title, start=False, note="", visible=False)
        left, said = _Left(), -math.inf

        def update(what: str, done: int, total: int) -> None:
            nonlocal said
            if left.first is None:
                self.bars.start_task(task)
            now, remaining = time.monotonic(), left.after(done, total)
            if self.bars.disable and done < total and now >= said + apart:
                said = now
                print(f"{title}: {done + 1} of {total}{remaining}: {what}", flush=True)
            self.bars.update(task, completed=done, total=total, note=what, visible=True)

        return update


class _Training(Observer):
    """Tells how far a training is."""

    def __init__(self, bars: Progress, name: str, epochs: int, steps: int) -> None:
        self.bars, self.name, self.epochs, self.steps = bars, name, epochs, steps
        self.task = bars.add_task(name, total=steps, note="")
        self.left, self.done = _Left(), 0
        if bars.disable:
            print(f"training: {name}", flush=True)

    def after_step(self, done: int, loss: float) -> None:
        """Moves the bar."""
        if not self.done:
            # Of a training that goes on, the steps before were another's.
            self.left.after(done - 1, self.steps)
        self.done = done
        self.bars.update(self.task, completed=done, note=f"loss {loss:.3f}")

    def after_epoch(self, entry: dict[str, float], net: nn.Module) -> None:
        """Prints a line where there is no bar."""
        if self.bars.disable:
            said = f"loss {entry['train_loss']:.3f}, accuracy {entry['test_accuracy']:.1%}"
            said += f", with noise {entry['noisy_test_accuracy']:.1%}" if "noisy_test_accuracy" in entry else ""
            left = self.left.after(self.done, self.steps)
            print(f"{self.name}: epoch {entry['epoch']:.3g} of {self.epochs}{left}: {said}", flush=True)


class _Left:
    """The time left, by the pace since the first call."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None

    def after(self, done: int, total: int) -> str:
        """In words, for a line; nothing while it is not known."""
        now = time.monotonic()
        started, before = self.first = self.first or (now, done)
        if done == before:
            return ""
        seconds = (now - started) * (total - done) / (done - before)
        return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"


@contextmanager
def watching() -> Iterator[Watch]:
    """Progress bars until the block ends; in continuous integration lines, whose terminals only look like one."""
    # Names of checkpoints are no markup.
    what, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
    columns = (what, BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal or "CI" in os.environ) as bars:
        yield Watch(bars)
