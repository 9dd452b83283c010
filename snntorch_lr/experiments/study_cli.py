"""The commands ``snntorch-lr study`` and ``snntorch-lr report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import study_report
from .plans import GROUPS, PLANS
from .plans import plan as entries
from .study import finished, result_file, study


def study_command(
    plan: Annotated[str, typer.Argument(help=f"{', '.join(PLANS)}.")],
    data_root: Annotated[
        Path | None, typer.Option(help="torchvision root of MNIST and Fashion-MNIST; downloaded there if absent.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(GROUPS)}; may be given again. All by default.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Networks at a time, each with one thread.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of results and checkpoints; runs/study/PLAN.")] = None,
) -> None:
    """Train and attack all networks of a study, or those that are not finished yet, and write its page.

    Example: snntorch-lr study mnist --data-root data --jobs 2

    Interrupted, it goes on with the same command. The large ones take hours; the remaining time is printed after each
    network.
    """
    folder = out or Path("runs") / "study" / plan

    def tell(what: str, done: int, total: int, left: float) -> None:
        typer.echo(f"{done} of {total} finished, about {left / 60:.0f} minutes left: {what}")

    study(plan, folder, data_root, tuple(group or ()), jobs, tell)
    paths = sorted(result_file(entry, folder) for entry in entries(plan) if finished(entry, folder))
    typer.echo(f"Written: {', '.join(str(path) for path in study_report.write_page(paths, folder, folder))}")


def report_command(
    results: Annotated[Path, typer.Argument(help="Folder of results of a study.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the page and its figures; that of the results.")] = None,
) -> None:
    """Write the tables and figures of a study again, from its results alone.

    Example: snntorch-lr report docs/results/mnist --out docs/results/mnist
    """
    typer.echo(f"Written: {', '.join(str(path) for path in study_report.write(results, out or results))}")
