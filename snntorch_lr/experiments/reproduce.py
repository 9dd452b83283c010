"""Surrogate-gradient baselines beside the likelihood-ratio network, clean and under attack: the main experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._messages import markdown
from ..robustness import SUITES, Gate, Protocol, RobustnessReport, evaluate, score, share_of, suite, verdict
from . import data, files
from .options import Place, check, command_line, option, recorded
from .recipe import METHODS, Recipe, TrainingOptions
from .study.tables import difference
from .train import Observer, Trained, split, train, validation_accuracy

if TYPE_CHECKING:
    from torch import Tensor

    from ..robustness import Row, Scores
    from ..robustness.evaluate import Progress

LIKELIHOOD_RATIO = "likelihood ratio"
STOPPED = "surrogate, stopped"
PASSED = verdict([Gate("", True, "")])
NOTE = (
    "Accuracy in percent, with the half-width of its 95 % Wilson interval: clean of all test images, the worst case of "
    "those attacked. Noise on: majority of 32 draws. The worst case counts an image as right only if it is right clean "
    "and under every attack of that size, transfers from the other networks included. Unless all gates passed these "
    "figures compare training methods and are no robustness claim."
)
Announce = Callable[[str, int, int], Observer]
"""Called before a network is trained, with its name, epochs and steps; returns what watches its training."""


@dataclass(frozen=True, kw_only=True)
class Reproduce(Place, TrainingOptions):
    """Options of the command ``snntorch-lr reproduce``, which has those of the training."""

    epsilons: tuple[float, ...] = option((0.05, 0.1, 0.2), "attack budget, l∞", above=0, most=1, flag="--epsilon")
    attack_images: int = option(1000, "test images to attack", least=1)
    draws: int = option(8, "noise draws that attacks average over if noise is on", least=1)
    suite: str = option("quick", "attacks", choices=SUITES)
    resume: bool = option(False, "go on from the checkpoints in --out", recorded=False)
    out: Path | None = option(None, "folder for results and checkpoints; runs/DATASET-MODEL-seedSEED", recorded=False)

    @property
    def folder(self) -> Path:
        """Folder for results and checkpoints."""
        return self.out or Path("runs") / files.run_name(self.dataset, self.model, self.seed)


def check_suite(name: str) -> None:
    """Refuses attacks that would only be missed after hours of training."""
    try:
        suite(name)
    except ImportError as error:
        raise ValueError(str(error)) from error


def reproduce(
    options: Reproduce,
    announce: Announce = lambda name, epochs, steps: Observer(),
    watch: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Trains the networks, attacks them, and writes ``results.json``, ``table.md``, ``robustness.md`` and figures.

    A tenth of the training images is held out. The likelihood-ratio network stands beside surrogate-gradient networks
    without noise, with the same noise, and without noise but stopped at its own accuracy on the held-out images:
    robustness falls while accuracy rises, and is to be compared where accuracy is equal.
    """
    out, command, device = options.folder, command_line("reproduce", options), options.torch_device()
    checkpoints = {name: out / f"{name.replace(', ', '-').replace(' ', '-')}.pt" for name in (*METHODS, STOPPED)}
    check(options)
    options.check_noise()
    check_suite(options.suite)
    files.check_writable(out)
    with files.locked(out, command):
        there = [path.name for path in checkpoints.values() if path.exists()]
        if there and not options.resume:
            raise ValueError(f"{out} holds {', '.join(there)} already: add --resume to go on, or choose another --out")
        images = data.load(options.dataset, options.data_root).to(device)
        # The stopping point of one more is known after the likelihood ratio has been trained.
        batch_size, validation = 32 if options.dataset == "digits" else 128, len(images.train) // 10
        recipes = {
            method: Recipe.of(asdict(options) | {"method": method, "batch_size": batch_size, "validation": validation})
            for method in METHODS
        }
        steps = -(-len(split(recipes[LIKELIHOOD_RATIO], images)[0]) // batch_size)

        def run(name: str) -> Trained:
            seen = announce(name, options.epochs, options.epochs * steps)
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
            "rows": [
                {
                    "network": row.subject.network,
                    "noise": row.subject.noise,
                    "clean": asdict(share_of(scores.right)),
                    "single draw": asdict(share_of(scores.single)),
                    "worst case": {f"{e:g}": asdict(share_of(row.worst(e))) for e in sorted(options.epsilons)},
                    "verdict": verdict(row.findings.gates),
                }
                for row, scores in measured
            ],
            "conclusions": conclusions(measured, options.suite),
            "evaluation": evaluation.to_json(),
        }
        files.write_json(out / "results.json", results)
        title, note = f"{options.dataset}, {options.model}, seed {options.seed}", files.origin_note(results)
        sentences = "\n".join(f"- {sentence}" for sentence in results["conclusions"])
        head = f"{sentences}\n\n{markdown(*table(results))}\n\n{NOTE}"
        files.write_text(out / "table.md", f"# {title}\n\n{head}\n\n{note}")
        write_evaluation(evaluation, out, note, title, f"{head}\n\n## Robustness")
    return results


def conclusions(measured: Sequence[tuple[Row, Scores]], suite: str) -> list[str]:
    """Three sentences: the more accurate network, the more robust one, and what the gates allow.

    The likelihood ratio is held against the best of the surrogate networks in each, all with their noise off.
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


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the results, as text: a line for each network and each use of its noise."""
    lines = []
    for row in results["rows"]:
        training = results["training"][row["network"]]
        noise = "" if row["noise"] == "none" else f" (noise {row['noise']} at test)"
        cells = [f"{training['history'][-1]['epoch']:.3g}", f"{training['seconds_per_epoch']:.2g}"]
        shares = row["clean"], row["single draw"], *row["worst case"].values()
        lines.append([row["network"] + noise, *cells, *map(files.share_text, shares), row["verdict"]])
    worst = [f"worst, ε = {epsilon}" for epsilon in results["rows"][0]["worst case"]]
    return ["network", "epochs", "s/epoch", "clean", "single draw", *worst, "gates"], lines


def write_evaluation(
    evaluation: RobustnessReport,
    out: Path,
    note: str,
    title: str = "Robustness",
    head: str = "",
) -> None:
    """Writes ``robustness.md``, ``robustness.json``, figures, and ``report.html`` with all of it."""
    files.write_text(out / "robustness.md", f"# Robustness\n\n{evaluation.to_markdown()}\n{note}")
    files.write_json(out / "robustness.json", evaluation.to_json())
    for name, figure in evaluation.figures().items():
        files.save_figure(out / f"{name}.png", figure)
    evaluation.html(out / "report.html", title, head, note)
