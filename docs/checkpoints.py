"""Copies the networks of table A of a study into the package, for ``snntorch_lr.experiments.load``.

Run ``snntorch-lr study mnist`` first, then ``python docs/checkpoints.py runs/study/mnist``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from snntorch_lr import _files
from snntorch_lr.experiments.study import checkpoint_file, read_plan

NAMES = {
    "surrogate": "surrogate",
    "surrogate, same noise": "surrogate-same-noise",
    "surrogate, noisy input": "surrogate-noisy-input",
    "surrogate, adversarial training": "surrogate-adversarial",
    "likelihood ratio": "lr",
    "likelihood ratio, noisy input": "lr-noisy-input",
    "likelihood ratio, adversarial training": "lr-adversarial",
}


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a study that is finished")
    folder = parser.parse_args().study
    marks = {each["mark"] for each in json.loads((folder / "results.json").read_text(encoding="utf-8"))}
    networks = Path(__file__).parents[1] / "snntorch_lr" / "experiments" / "networks"
    for entry in read_plan(folder.name):
        if entry.group == "usual" and entry.family in NAMES:
            if entry.mark not in marks:
                parser.error(f"{folder} has no result of {entry.name!r}: finish the study first")
            state = _files.load(checkpoint_file(entry, folder))
            path = networks / entry.recipe.dataset / f"{NAMES[entry.family]}.pt"
            # Without what only goes on with training: the optimizer's state, three times as large as the network.
            _files.save(path, {name: state[name] for name in ("recipe", "shape", "net")})
            print(f"Written: {path}")


if __name__ == "__main__":
    main()
