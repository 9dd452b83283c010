"""The command ``snntorch-lr``: words in; lines of progress, tables that fit the terminal, and JSON out."""

from __future__ import annotations

import json
import sys
from argparse import REMAINDER
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from shutil import get_terminal_size
from typing import NoReturn

from .. import __version__
from .._messages import aligned, install

# Of the extra "experiments": some are needed only after hours.
_TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"
_NEEDED = ("matplotlib", "scipy", "sklearn", _TOML, "torchvision")

try:
    from . import files
    from .benchmark import Benchmark
    from .data import DataError
    from .measure import Evaluate, Reproduce
    from .options import Command, Parser
    from .page import Report
    from .study import Study
except ModuleNotFoundError as error:
    raise SystemExit(f"snntorch-lr: not installed: {error.name}; {install('experiments,attacks')}") from error

COMMANDS: dict[str, type[Command]] = {
    kind.__name__.lower(): kind for kind in (Reproduce, Evaluate, Benchmark, Study, Report)
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
            with files.locked(options.folder):
                outcome = options.run()
            for table in outcome.tables:
                show(*table)
            print(outcome.words)
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
    """Prints a table; where it is too wide, one for as many columns as fit, each with the names of the lines."""
    columns = [*zip(header, *lines, strict=True)]
    # Columns on the left without a figure name the lines.
    figures = [index for index, (_, *cells) in enumerate(columns) if any(cell[:1].isdigit() for cell in cells)]
    names = [*range(max(1, min(figures, default=1)))]
    groups = [names]
    for column in range(len(names), len(header)):
        width = sum(2 + max(map(len, columns[index])) for index in (*groups[-1], column)) - 2
        if groups[-1] != names and width > get_terminal_size().columns:
            groups.append(names)
        groups[-1] = [*groups[-1], column]
    print(title)
    for group in groups:
        table = [[line[index] for index in group] for line in (header, *lines)]
        print(aligned(table[0], table[1:], left=len(names)) + "\n")


def main() -> None:
    """Entry point of ``snntorch-lr``."""
    call(sys.argv[1:])


if __name__ == "__main__":
    main()
