"""Tables and figures of the benchmark, made from its results alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .._messages import listed, markdown
from . import files

_WHAT = {
    "steps": "Training step",
    "memory": "Peak memory of a training step, K = 1",
    "growth": "Growth of the time of a training step",
    "accuracy": "Training time to an accuracy",
}


def to_markdown(results: dict[str, Any]) -> str:
    """All tables as Markdown, with what is needed to read and repeat them."""
    settings = results["settings"]
    tables = {"steps": _steps, "memory": _memory, "growth": _growth, "accuracy": _accuracy}
    sections = [
        f"## {_WHAT[part]}\n\n{markdown(*draw(results[part], settings))}"
        for part, draw in tables.items()
        if part in results
    ]
    size = f"784-{settings['width']}-10, batch {settings['batch']}"
    return (
        f"# Benchmark: {size}\n\n"
        + "\n\n".join(sections)
        + f"\n\nCommand: `{results['command']}`\n\n"
        + f"Versions: {listed(results['versions'])}. Machine: {results['machine']}.\n"
    )


def write_figures(results: dict[str, Any], out: Path) -> None:
    """Writes ``steps.png`` and ``memory.png`` for the parts that were run."""
    for part, draw in (("steps", _draw_steps), ("memory", _draw_memory)):
        if part in results:
            files.save_figure(out / f"{part}.png", partial(draw, results[part]))


def _steps(rows: list[dict[str, Any]], settings: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One line for each method, one column for each K."""
    header = ["median of turns; ms (ratio)", *(f"K = {copies}" for copies in settings["copies"])]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        by_copies = {row["copies"]: row for row in rows if row["method"] == method}
        cells = [by_copies.get(copies) for copies in settings["copies"]]
        lines.append([method, *(f"{c['milliseconds']:.1f} ({c['ratio']:.2f} ×)" if c else "" for c in cells)])
    return header, lines


def _memory(rows: list[dict[str, Any]], settings: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["MB above the start", *(f"T = {steps}" for steps in settings["memory_steps"])]
    return header, [
        [method, *(f"{row['megabytes']:.1f}" for row in rows if row["method"] == method)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]


def _growth(rows: list[dict[str, Any]], settings: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "over", "ms at 1 ×, 2 ×, 4 ×", "exponent"]
    return header, [
        [row["method"], row["axis"], ", ".join(f"{t:.1f}" for t in row["milliseconds"]), f"{row['exponent']:.2f}"]
        for row in rows
    ]


def _accuracy(rows: list[dict[str, Any]], settings: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [f"{settings['dataset']}, test accuracy", "target", "seconds", "steps", "best seen"]
    return header, [
        [
            row["method"], f"{row['target']:.0%}", "not reached" if row["seconds"] is None else f"{row['seconds']:.1f}",
            str(row["steps"]), f"{row['best']:.1%}",
        ]
        for row in rows
    ]  # fmt: skip


def _draw_steps(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row["copies"], row["ratio"]) for row in rows if row["method"] == method]
        if method.startswith("surrogate"):
            axes.axhline(points[0][1], color="black", linestyle="-" if method == "surrogate" else ":", label=method)
        else:
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xscale="log", yscale="log", xlabel="noise copies K", ylabel="time of a step / surrogate's")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_memory(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row["num_steps"], row["megabytes"]) for row in rows if row["method"] == method]
        axes.plot(
            *zip(*points, strict=True), marker="o", color="black" if method == "surrogate" else None, label=method
        )
    axes.set(xscale="log", yscale="log", xlabel="time steps T", ylabel="peak memory of a step (MB)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
