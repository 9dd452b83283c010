"""The command ``snntorch-lr``."""

from __future__ import annotations

import json
import sys
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .._messages import install

try:
    from .terminal import console, show, watching
except ImportError as error:
    raise SystemExit(f"snntorch-lr: not installed: {error.name}; {install('experiments,attacks')}") from error

from .. import __version__
from . import benchmark, diagnose, evaluate_checkpoints, reproduce
from .data import DataError
from .options import add_options, from_arguments
from .study import page, run

# Of the extra "experiments", beside what this module imports: some are needed only after hours.
_TOML = "tomllib" if sys.version_info >= (3, 11) else "tomli"
_NEEDED = ("matplotlib", "psutil", "scipy", "sklearn", _TOML, "torchvision")


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        _fail(f"{message}; see {self.prog} --help", 2)


class Command(NamedTuple):
    """One of the commands: ``run`` does it with its ``options``, prints, and returns the results for JSON.

    Its docstring is the help; ``kept`` is said after Ctrl-C: the results that are left.
    """

    run: Callable[[Any], Any]
    options: type
    kept: str = "nothing was written"

    def parse(self, name: str, words: Sequence[str]) -> Any:
        """Options from the words of a command line that follow the name of the command."""
        parser = Parser(
            prog=f"snntorch-lr {name}", description=cleandoc(self.run.__doc__ or ""),
            formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        add_options(parser, self.options)
        return from_arguments(self.options, parser.parse_intermixed_args(words))


def _reproduce(options: reproduce.Reproduce) -> Any:
    """Train surrogate baselines and the likelihood-ratio network, attack them, print and save a table.

    Example: snntorch-lr reproduce --dataset digits

    MNIST and Fashion-MNIST are downloaded: --dataset mnist --data-root data.
    """
    with watching() as watch:
        results = reproduce.reproduce(options, watch.training, watch.pieces("attacks"))
    show(*reproduce.table(results), title=f"{options.dataset}, {options.model}, accuracy in percent")
    written = f"Written: {options.folder}/report.html, table.md, robustness.md, results.json and figures"
    _say("\n".join([*results["conclusions"], written]))
    return results


def _benchmark(options: benchmark.Benchmark) -> Any:
    """Measure time and memory of a training step by every method, their growth, and the time to an accuracy.

    Example: snntorch-lr benchmark --part steps --part memory --out runs/benchmark
    """
    with console.status("benchmark") as status:
        results = benchmark.benchmark(options, status.update if console.is_terminal else console.print)
    for title, header, lines in benchmark.tables(results):
        show(header, lines, title)
    _say(f"Written: {options.folder}/benchmark.json, benchmark.md")
    return results


def _diagnose(options: diagnose.Diagnose) -> Any:
    """Measure the gradients of the estimators on one batch: cosine, signal-to-noise, bias, time, memory.

    Example: snntorch-lr diagnose --dataset digits --out runs/gradients

    With --checkpoint of a network that reproduce trained, in place of a fresh one.
    """
    with console.status("measuring gradients"):
        report = diagnose.diagnose(options)
    quality, cost = report.tables()
    show(*quality, names=2)
    show(*cost)
    _say("\n".join([*report.notes(), f"Written: {options.folder}/gradients.json, gradients.md, gradients.png"]))
    return report.to_json()


def _evaluate(options: evaluate_checkpoints.Evaluate) -> Any:
    """Attack trained networks: worst case over a suite, transfers between them, and the gates that it has to pass.

    Example: snntorch-lr evaluate runs/digits-mlp-seed0/likelihood-ratio.pt runs/digits-mlp-seed0/surrogate.pt

    The checkpoints are those of: snntorch-lr reproduce --dataset digits
    """
    with watching() as watch:
        report = evaluate_checkpoints.evaluate_checkpoints(options, watch.pieces("attacks"))
    for title, header, lines in report.tables():
        show(header, lines, title)
    _say(report.summary())
    _say(f"Written: {options.folder}/report.html, robustness.md, robustness.json and figures")
    return report.to_json()


def _certify(options: evaluate_checkpoints.Certify) -> Any:
    """Certify trained networks by randomized smoothing: l2 radii within which no attack changes a prediction.

    Example: snntorch-lr certify runs/digits-mlp-seed0/likelihood-ratio.pt --sigma 0.25

    The checkpoint is one of: snntorch-lr reproduce --dataset digits
    """
    with watching() as watch:
        header, lines = evaluate_checkpoints.certify_checkpoints(options, watch.pieces("images", apart=10))
    show(header, lines, "certified accuracy (%) by l2 radius")
    _say(f"Written: {options.out}/certificates.md, certificates.json, certificates.png")
    return [dict(zip(header, line, strict=True)) for line in lines]


def _study(options: run.Study) -> Any:
    """Train and attack all networks of a plan, or those that are not finished yet, and write its page.

    Example: snntorch-lr study digits --jobs 2

    Interrupted, it goes on with the same command. The large ones, such as mnist, take hours; the remaining time is
    printed after each network.
    """

    def tell(what: str, done: int, total: int, left: float) -> None:
        print(f"{done} of {total} finished, about {left / 60:.0f} minutes left: {what}", flush=True)

    found = run.study(options, tell)
    return _page(page.write_page(found, options.folder, options.folder, html=True))


def _report(options: page.Report) -> Any:
    """Write the tables and figures of a study again, from its results alone.

    Example: snntorch-lr report runs/study/digits --html
    """
    return _page(page.write(options.results, options.out or options.results, options.html))


def _page(written: Sequence[Path]) -> Any:
    _say(f"Written: {', '.join(map(str, written))}")
    return json.loads(next(path for path in written if path.name == page.TOGETHER).read_text(encoding="utf-8"))


def _say(text: str) -> None:
    """Prints words that wrap at the width of the terminal, and are no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


_RESUME = "finished epochs are kept: the same command with --resume goes on from there"
_GO_ON = "finished attacks are kept: the same command goes on from there"
_AGAIN = "finished networks, epochs and attacks are kept: start again"
COMMANDS = {
    "reproduce": Command(_reproduce, reproduce.Reproduce, _RESUME),
    "evaluate": Command(_evaluate, evaluate_checkpoints.Evaluate, _GO_ON),
    "certify": Command(_certify, evaluate_checkpoints.Certify),
    "diagnose": Command(_diagnose, diagnose.Diagnose),
    "benchmark": Command(_benchmark, benchmark.Benchmark),
    "study": Command(_study, run.Study, _AGAIN),
    "report": Command(_report, page.Report),
}


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
        _fail(f"not installed: {', '.join(missing)}; {install('experiments,attacks')}", 1)
    command = COMMANDS[given.command]
    try:
        options = command.parse(given.command, given.options)
        with redirect_stdout(sys.stderr if options.json else sys.stdout):
            results = command.run(options)
        if options.json:
            print(json.dumps(results, ensure_ascii=False, allow_nan=False))
    except KeyboardInterrupt:
        _fail(f"interrupted; {command.kept}", 130)
    except ValueError as error:
        _fail(str(error), 2)
    except (OSError, DataError) as error:
        named = isinstance(error, OSError) and error.filename
        _fail(f"{error.filename}: {error.strerror}" if named else str(error), 1)  # type: ignore[union-attr]


def _fail(message: str, status: int) -> NoReturn:
    print(f"snntorch-lr: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Entry point of ``snntorch-lr``."""
    call(sys.argv[1:])


if __name__ == "__main__":
    main()
