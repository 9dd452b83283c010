"""Tables and figures of ``reproduce``, made from its results alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .._messages import listed, markdown
from ..robustness import RobustnessReport
from . import files

NOT_RUN = {"accuracy": float("nan"), "low": float("nan"), "high": float("nan")}
NOTE = (
    "Accuracy in percent, with the half-width of its 95 % Wilson interval: clean of all test images, the rest of those "
    "attacked. Noise on: majority of 32 draws. 'worst' counts an image as right only if it is right clean and under "
    "every attack of that size, transfers from the other networks included. Unless all gates passed these figures "
    "compare training methods and are no robustness claim."
)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results, as text: one column for each network and each use of its noise."""
    rows = results["rows"]
    header = ["", *(f"{row['network']}{_noise(row)}" for row in rows)]
    seconds = [results["training"][row["network"]]["seconds_per_epoch"] for row in rows]
    epochs = [results["training"][row["network"]]["history"][-1]["epoch"] for row in rows]
    lines = [["epochs", *(f"{value:.3g}" for value in epochs)], ["s/epoch", *(f"{value:.2g}" for value in seconds)]]
    lines += [["clean", *(_percent(row["clean"]) for row in rows)]]
    lines.append(["single draw", *(_percent(row["single draw"]) for row in rows)])
    attacks = dict.fromkeys(attack for row in rows for attack in row["attacks"])
    lines += [[attack, *(_percent(row["attacks"].get(attack)) for row in rows)] for attack in attacks]
    lines.append(["gates", *(row["verdict"] for row in rows)])
    return header, lines


def to_markdown(results: dict[str, Any]) -> str:
    """The table as Markdown, with what is needed to read and repeat it."""
    header, lines = table(results)
    settings = results["settings"]
    text = [
        f"# {settings['dataset']}, {settings['model']}, seed {settings['seed']}",
        "",
        markdown(header, lines),
        "",
        NOTE,
        "",
        f"Command: `{results['command']}`",
        "",
        f"Versions: {listed(results['versions'])}. Machine: {results['machine']}. Ranks: {results['ranks']}.",
        "",
    ]
    return "\n".join(text)


def write(results: dict[str, Any], evaluation: RobustnessReport, out: Path) -> None:
    """Writes ``table.md``, ``robustness.md`` and figures."""
    files.write_text(out / "table.md", to_markdown(results))
    write_evaluation(evaluation, out, f"Command: `{results['command']}`\n")
    files.save_figure(out / "training.png", lambda path: _draw_training(results, path))
    files.save_figure(out / "attacks.png", lambda path: _draw_attacks(results, path))


def write_evaluation(evaluation: RobustnessReport, out: Path, note: str) -> None:
    """Writes ``robustness.md``, ``robustness.json`` and figures of an evaluation.

    Args:
        evaluation: the report.
        out: directory for the files.
        note: what made it, for the end of the Markdown file.
    """
    files.write_text(out / "robustness.md", f"# Robustness\n\n{evaluation.to_markdown()}\n{note}")
    files.write_json(out / "robustness.json", evaluation.to_json())
    for name, figure in (
        ("epsilon", evaluation.plot_epsilon()),
        ("steps", evaluation.plot_steps()),
        ("surrogates", evaluation.plot_surrogates()),
    ):
        files.save_figure(out / f"{name}.png", partial(figure.savefig, dpi=150))


def _noise(row: dict[str, Any]) -> str:
    return "" if row["noise"] == "none" else f" (noise {row['noise']} at test)"


def _percent(share: dict[str, float] | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share['accuracy']:.1f} ± {50 * (share['high'] - share['low']):.1f}"


def _draw_training(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, run in results["training"].items():
        epochs = [entry["epoch"] for entry in run["history"]]
        left.plot(epochs, [entry["train_loss"] for entry in run["history"]], label=method)
        right.plot(epochs, [100 * entry["test_accuracy"] for entry in run["history"]], label=method)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy, noise off (%)")
    right.legend()
    figure.suptitle(_title(results))
    figure.savefig(path, dpi=150)


def _draw_attacks(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    groups = ["clean", *dict.fromkeys(attack for row in results["rows"] for attack in row["attacks"])]
    figure = Figure(figsize=(1.1 * len(groups) + 2, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results["rows"])
    for index, row in enumerate(results["rows"]):
        shares = [row["clean"], *(row["attacks"].get(attack, NOT_RUN) for attack in groups[1:])]
        heights = [100 * share["accuracy"] for share in shares]
        below = [max(0.0, 100 * (share["accuracy"] - share["low"])) for share in shares]
        above = [max(0.0, 100 * (share["high"] - share["accuracy"])) for share in shares]
        places = [place + (index - (len(results["rows"]) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(places, heights, width, yerr=[below, above], label=row["network"] + _noise(row), error_kw={"lw": 0.8})
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set(ylabel="accuracy (%)", ylim=(0, 105))
    axes.set_title(_title(results))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def _title(results: dict[str, Any]) -> str:
    settings = results["settings"]
    return f"{settings['dataset']}, {settings['model']}, {settings['epochs']} epochs, K = {settings['copies']}"
