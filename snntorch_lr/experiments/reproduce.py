"""Surrogate-gradient baselines beside the likelihood-ratio network, clean and under attack: the main experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._messages import markdown
from ..robustness import (
    SUITES,
    Gate,
    Protocol,
    RobustnessReport,
    Share,
    evaluate,
    score,
    share_of,
    suite,
    verdict,
    wilson,
)
from ..robustness.figures import colors_of, new_figure, percent, with_legend
from . import data, files
from .options import Place, check, command_line, option, recorded
from .recipe import METHODS, Recipe, TrainingOptions, noise_levels
from .study.tables import difference
from .train import Observer, Trained, split, train, validation_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from ..robustness import Row, Scores
    from ..robustness.evaluate import Progress

LIKELIHOOD_RATIO = "likelihood ratio"
STOPPED = "surrogate, stopped"
PASSED = verdict([Gate("", True, "")])
NOT_RUN = {"accuracy": float("nan"), "low": float("nan"), "high": float("nan"), "images": 0}
NOTE = (
    "Accuracy in percent, with the half-width of its 95 % Wilson interval: clean of all test images, the rest of those "
    "attacked. Noise on: majority of 32 draws. 'worst' counts an image as right only if it is right clean and under "
    "every attack of that size, transfers from the other networks included. Unless all gates passed these figures "
    "compare training methods and are no robustness claim."
)
Announce = Callable[[str, int, int], Observer]
"""Called before a network is trained, with its name, epochs and steps; returns what watches its training."""


@dataclass(frozen=True, kw_only=True)
class Reproduce(Place, TrainingOptions):
    """Options of the command ``snntorch-lr reproduce``, which has those of the training."""

    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget, l∞", above=0, most=1, flag="--epsilon")
    attack_images: int = option(1000, "test images to attack", least=1)
    draws: int = option(
        None, "noise draws that attacks average over if noise is on; 4 for digits, 8 otherwise", least=1
    )
    suite: str = option("quick", "attacks", choices=SUITES)
    resume: bool = option(False, "go on from the checkpoints in --out", recorded=False)
    out: Path | None = option(None, "folder for results and checkpoints; runs/DATASET-MODEL-seedSEED", recorded=False)
    log: Path | None = option(
        None, "folder for TensorBoard: loss of each step, accuracy of each epoch, noise levels", recorded=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("draws", 4 if self.dataset == "digits" else 8),):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def folder(self) -> Path:
        """Folder for results and checkpoints."""
        return self.out or Path("runs") / files.run_name(self.dataset, self.model, self.seed)


def check_suite(name: str) -> None:
    """Refuses attacks that would only be missed after hours of training.

    Raises:
        ValueError: if the suite needs torchattacks, and that is not installed.
    """
    try:
        suite(name)
    except ImportError as error:
        raise ValueError(str(error)) from error


class _Log(Observer):
    """Observer that writes TensorBoard events, a run for each network, beside what another one does."""

    def __init__(self, folder: Path, observer: Observer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.observer, self.done = SummaryWriter(str(folder)), observer, 0

    def after_step(self, done: int, loss: float) -> None:
        """Writes the loss."""
        self.done = done
        self._write("loss", loss)
        self.observer.after_step(done, loss)

    def after_epoch(self, entry: dict[str, float], net: nn.Module) -> None:
        """Writes the accuracy without and with noise, and the mean noise level of each layer."""
        self._write("accuracy", entry["test_accuracy"])
        if "noisy_test_accuracy" in entry:
            self._write("accuracy, noise on", entry["noisy_test_accuracy"])
        for name, levels in noise_levels(net).items():
            self._write(f"noise level/{name}", sum(levels) / len(levels))
        self.writer.flush()
        self.observer.after_epoch(entry, net)

    def _write(self, what: str, value: float) -> None:
        self.writer.add_scalar(what, value, self.done)


def reproduce(
    options: Reproduce,
    announce: Announce = lambda name, epochs, steps: Observer(),
    watch: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Trains the networks, attacks them, and writes ``results.json``, ``table.md``, ``robustness.md`` and figures.

    A tenth of the training images is held out. The likelihood-ratio network stands beside surrogate-gradient networks
    without noise, with the same noise, and without noise but stopped at its own accuracy on the held-out images:
    robustness falls while accuracy rises, and is to be compared where accuracy is equal.

    Args:
        options: what to run, and where.
        announce: progress of each training.
        watch: progress of the evaluation.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: if an option is wrong, another process works in the folder, or it has checkpoints and ``resume`` is
            False.
        DataError: if the data cannot be had.
    """
    out, command, device = options.folder, command_line("reproduce", options), options.torch_device()
    checkpoints = {name: out / f"{name.replace(', ', '-').replace(' ', '-')}.pt" for name in (*METHODS, STOPPED)}
    check(options)
    options.check_noise()
    check_suite(options.suite)
    files.check_writable(out)
    if options.log:
        files.check_writable(options.log)
        if find_spec("tensorboard") is None:
            raise ValueError("--log needs tensorboard, which is not installed: pip install tensorboard")
    with files.locked(out, command):
        there = [path.name for path in checkpoints.values() if path.exists()]
        if there and not options.resume:
            raise ValueError(f"{out} holds {', '.join(there)} already: add --resume to go on, or choose another --out")
        images = data.load(options.dataset, options.data_root).to(device)
        # The stopping point of one more is known after the likelihood ratio has been trained.
        batch_size, validation = 32 if options.dataset == "digits" else 128, len(images.train) // 10
        recipes = {
            method: Recipe(method=method, batch_size=batch_size, validation=validation, **options.shared())
            for method in METHODS
        }
        steps = -(-len(split(recipes[LIKELIHOOD_RATIO], images)[0]) // batch_size)

        def run(name: str) -> Trained:
            seen = announce(name, options.epochs, options.epochs * steps)
            if options.log:
                seen = _Log(options.log / checkpoints[name].stem, seen)
            recipe, path = recipes[name], checkpoints[name]
            return train(recipe, images, path, device, options.resume, seen.after_step, seen.after_epoch)

        ratio = run(LIKELIHOOD_RATIO)
        reached = validation_accuracy(ratio.net, recipes[LIKELIHOOD_RATIO], images)
        recipes[STOPPED] = replace(recipes["surrogate"], stop_at=reached)
        trained = {name: ratio if name == LIKELIHOOD_RATIO else run(name) for name in checkpoints}
        evaluation = evaluate(
            ratio.net,
            [(images.test[: options.attack_images], images.test_labels[: options.attack_images])],
            options.epsilons,
            options.suite,
            baselines={name: run.net for name, run in trained.items() if name != LIKELIHOOD_RATIO},
            seed=options.seed,
            name=LIKELIHOOD_RATIO,
            protocol=Protocol(draws=options.draws),
            cache=out / "attacks",
            progress=watch,
        )
        measured = [
            (row, score(row.subject.target, images.test, images.test_labels, seed=options.seed))
            for name in checkpoints
            for row in evaluation.rows
            if row.subject.network == name
        ]
        results = files.origin(command, device) | {
            "settings": recorded(options),
            "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
            "training": {
                name: {"seconds_per_epoch": run.seconds_per_epoch, "history": run.history}
                for name, run in trained.items()
            },
            "rows": [_row(row, scores, options) for row, scores in measured],
            "conclusions": conclusions(measured, options.suite),
            "evaluation": evaluation.to_json(),
        }
        files.write_json(out / "results.json", results)
        files.write_text(out / "table.md", to_markdown(results))
        figures = {"training.png": _training_figure(results), "attacks.png": _attacks_figure(results)}
        shown = "".join(f"\n\n![]({name})" for name in figures)
        head = f"{_said(results)}\n\n{markdown(*table(results))}\n\n{NOTE}{shown}\n\n## Robustness"
        write_evaluation(evaluation, out, files.origin_note(results), _title(results), head, figures)
    return results


def conclusions(measured: Sequence[tuple[Row, Scores]], suite: str) -> list[str]:
    """Three sentences: the more accurate network, the more robust one, and what the gates allow.

    The likelihood ratio is held against the best of the surrogate networks in each, all with their noise off.

    Args:
        measured: rows of the evaluation, with their scores on all test images.
        suite: name of the attacks.
    """
    silent = [(row, scores) for row, scores in measured if row.subject.noise != "on"]
    epsilons = [row.findings.epsilon for row, _ in silent if row.subject.network == LIKELIHOOD_RATIO]
    epsilon = epsilons[0] or min(next(iter(silent[0][0].right.values())))
    clean = {row.subject.network: scores.right for row, scores in silent}
    worst = {row.subject.network: row.worst(epsilon) for row, _ in silent}
    verdicts: dict[str, list[str]] = {}
    for row, _ in measured:
        verdicts.setdefault(verdict(row.findings.gates), []).append(row.subject.label)
    if [*verdicts] == [PASSED]:
        gates = f"All gates passed: worst cases over the suite {suite!r} may be claimed."
    else:
        found = [f"{said} for {', '.join(labels)}" for said, labels in verdicts.items() if said != PASSED]
        found = [*verdicts] if len(verdicts) == 1 else found
        more = "" if suite == "standard" else f" The suite {suite} leaves attacks out; --suite standard has them all."
        gates = f"The gates allow no claim of robustness: {'; '.join(found)}.{more}"
    return [
        compared("On clean images", "accurate", clean),
        compared(f"In the worst case at ε = {epsilon:g}", "robust", worst),
        gates,
    ]


def compared(where: str, what: str, right: Mapping[str, Tensor]) -> str:
    """The likelihood ratio and the best of the other networks on the same images, in a sentence."""
    own = right[LIKELIHOOD_RATIO]
    name = max((name for name in right if name != LIKELIHOOD_RATIO), key=lambda name: int(right[name].sum()))
    apart = difference(own.double().numpy(), right[name].double().numpy())
    shown = {key: f"{key} ({100 * float(right[key].double().mean()):.1f} %)" for key in (LIKELIHOOD_RATIO, name)}
    paired = f"{apart} points, paired over {len(own)} images"
    if apart.low <= 0 <= apart.high:
        first, second = shown.values()
        return f"{where} there is no difference beyond chance between {first} and {second}: {paired}."
    better, worse = (LIKELIHOOD_RATIO, name) if apart.mean > 0 else (name, LIKELIHOOD_RATIO)
    return f"{where} {shown[better]} is more {what} than {shown[worse]}; likelihood ratio minus {name}: {paired}."


def _row(row: Row, scores: Scores, options: Reproduce) -> dict[str, Any]:
    """Figures of one network with its noise off or on; the clean ones are of all test images."""
    names = [attack.name for attack in suite(options.suite) if attack.name in row.right]
    shares = {f"{name} {e:g}": share_of(row.right[name][e]) for e in sorted(options.epsilons) for name in names}
    shares |= {f"worst {e:g}": share_of(row.worst(e)) for e in sorted(options.epsilons)}
    return {
        "network": row.subject.network,
        "noise": row.subject.noise,
        "clean": asdict(share_of(scores.right)),
        "single draw": asdict(share_of(scores.single)),
        "attacks": {name: asdict(share) for name, share in shares.items()},
        "verdict": verdict(row.findings.gates),
    }


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results, as text: one column for each network and each use of its noise."""
    rows = results["rows"]
    header = ["", *(f"{row['network']}{_noise(row)}" for row in rows)]
    seconds = [results["training"][row["network"]]["seconds_per_epoch"] for row in rows]
    epochs = [results["training"][row["network"]]["history"][-1]["epoch"] for row in rows]
    lines = [["epochs", *(f"{value:.3g}" for value in epochs)], ["s/epoch", *(f"{value:.2g}" for value in seconds)]]
    lines += [["clean", *(files.share_text(row["clean"]) for row in rows)]]
    lines.append(["single draw", *(files.share_text(row["single draw"]) for row in rows)])
    attacks = dict.fromkeys(attack for row in rows for attack in row["attacks"])
    lines += [[attack, *(files.share_text(row["attacks"].get(attack)) for row in rows)] for attack in attacks]
    lines.append(["gates", *(row["verdict"] for row in rows)])
    return header, lines


def to_markdown(results: dict[str, Any]) -> str:
    """The table as Markdown, with what is needed to read and repeat it."""
    return (
        f"# {_title(results)}\n\n{_said(results)}\n\n{markdown(*table(results))}\n\n"
        f"{NOTE}\n\n{files.origin_note(results)}"
    )


def short_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results for a terminal: a line for each network and each use of its noise."""
    rows = results["rows"]
    worst = [name for name in rows[0]["attacks"] if name.startswith("worst ")]
    header = ["network", "clean", *(name.replace(" ", " case, ε=") for name in worst)]
    lines = []
    for row in rows:
        sign = {PASSED: ""}.get(row["verdict"], " !" if "SUSPECTED" in row["verdict"] else " ?")
        cells = [f"{files.share_text(row['attacks'][name])}{sign}" for name in worst]
        lines.append([row["network"] + _noise(row), files.share_text(row["clean"]), *cells])
    return header, lines


def write_evaluation(
    evaluation: RobustnessReport,
    out: Path,
    note: str,
    title: str = "Robustness",
    head: str = "",
    figures: Mapping[str, Figure] | None = None,
) -> None:
    """Writes ``robustness.md``, ``robustness.json``, figures, and ``report.html`` with all of it.

    Args:
        evaluation: the report.
        out: directory for the files.
        note: what made it, for the end of the pages.
        title: of ``report.html``.
        head: Markdown for the beginning of ``report.html``.
        figures: further ones, which ``head`` shows by these names.
    """
    files.write_text(out / "robustness.md", f"# Robustness\n\n{evaluation.to_markdown()}\n{note}")
    files.write_json(out / "robustness.json", evaluation.to_json())
    own = {f"{name}.png": figure for name, figure in evaluation.figures().items()}
    for name, figure in {**(figures or {}), **own}.items():
        files.save_figure(out / name, figure)
    evaluation.html(out / "report.html", title, head, note, figures)


def _said(results: dict[str, Any]) -> str:
    return "\n".join(f"- {sentence}" for sentence in results["conclusions"])


def _noise(row: dict[str, Any]) -> str:
    return "" if row["noise"] == "none" else f" (noise {row['noise']} at test)"


def _training_figure(results: dict[str, Any]) -> Figure:
    figure, (left, right) = new_figure(9, 4, 2)
    colors = colors_of(results["training"])
    images = {row["network"]: row["clean"]["images"] for row in results["rows"]}
    for name, run in results["training"].items():
        epochs = [entry["epoch"] for entry in run["history"]]
        look: dict[str, Any] = {"color": colors[name], "marker": "o", "ms": 3, "label": name}
        left.plot(epochs, [entry["train_loss"] for entry in run["history"]], **look)
        shares = [wilson(round(images[name] * each["test_accuracy"]), images[name]) for each in run["history"]]
        middle, bars = percent(shares)
        # A band, and a bar at the end: of one epoch there is no band.
        right.errorbar(
            epochs, middle, bars, elinewidth=0.8, capsize=2, errorevery=(len(epochs) - 1, len(epochs)), **look
        )
        low, high = [100 * share.low for share in shares], [100 * share.high for share in shares]
        right.fill_between(epochs, low, high, color=colors[name], alpha=0.1, lw=0)
    left.set(xlabel="epoch", ylabel="mean training loss of the epoch", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy on all test images, noise off (%)")
    figure.suptitle(f"Training, with 95 % intervals: {_title(results)}", fontsize="medium")
    return with_legend(figure, right, len(colors))


def _attacks_figure(results: dict[str, Any]) -> Figure:
    groups = ["clean", *dict.fromkeys(attack for row in results["rows"] for attack in row["attacks"])]
    figure, (axes,) = new_figure(1.1 * len(groups) + 2, 4.5)
    colors = colors_of(results["training"])
    width = 0.8 / len(results["rows"])
    for index, row in enumerate(results["rows"]):
        shares = [Share(**row["clean"]), *(Share(**row["attacks"].get(attack, NOT_RUN)) for attack in groups[1:])]
        middle, bars = percent(shares)
        places = [place + (index - (len(results["rows"]) - 1) / 2) * width for place in range(len(groups))]
        color = colors[row["network"]]
        look: dict[str, Any] = (
            {"color": "white", "edgecolor": color, "hatch": "////"} if row["noise"] == "on" else {"color": color}
        )
        label = row["network"] + _noise(row)
        axes.bar(places, middle, width, yerr=bars, label=label, error_kw={"lw": 0.8}, **look)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set(ylabel="accuracy (%)", ylim=(0, 105))
    axes.set_title(f"Clean and under attack, with 95 % intervals: {_title(results)}", fontsize="medium")
    return with_legend(figure, axes)


def _title(results: dict[str, Any]) -> str:
    settings = results["settings"]
    return f"{settings['dataset']}, {settings['model']}, seed {settings['seed']}"
