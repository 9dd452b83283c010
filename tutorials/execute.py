"""Runs the tutorials from top to bottom, and writes what they printed and drew into them: ``make tutorials``."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
LIMIT = 600
"""Seconds that a cell may take."""
COMPILING = "snntorch_lr compiles its time steps"
"""What a slow machine says on standard error, when it needs more than a second for that."""


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Runs all cells in a fresh kernel, whose outputs then stand in the notebook.

    Args:
        notebook: changed in place.
        folder: where the kernel runs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        nbclient.exceptions.CellTimeoutError: if one takes too long.
    """
    NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    # What differs from machine to machine is not worth a diff.
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if not each.get("text", "").startswith(COMPILING)]
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}


def main() -> None:
    """Runs the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="all by default")
    for path in parser.parse_args().notebooks:
        notebook = nbformat.read(path, as_version=4)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
