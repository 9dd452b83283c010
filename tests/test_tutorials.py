"""The tutorials run from top to bottom, also on MNIST, and show what they printed and drew."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import snntorch as snn
from matplotlib import pyplot
from sklearn.datasets import load_digits

from snntorch_lr.experiments import data

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FLAG = "RUN_ON_MNIST = False"
# Two or more names after a slash, at the beginning of a word, or a drive.
MACHINE_PATH = re.compile(r"(?<![\w./])(?:/[\w.+-]+){2,}|\b[A-Z]:\\|~/")
# In tests the cells compute less: numbers that a notebook shows come from `make tutorials`.
SLOW = ("EOT-PGD gaussian", "RGA", "ASSG margin-100x1", "margin EOT-PGD-40x8")
SMALLER = {
    "1": [("epochs=7", "epochs=1")],
    "2": [
        ("range(100):\n    weight", "range(3):\n    weight"), ("for _ in range(100)]", "for _ in range(3)]"),
        ("range(20)", "range(1)"), ("repeats=12, reference=48", "repeats=2, reference=4"), ("epochs=2", "epochs=1"),
        ("epochs=4", "epochs=1"),
    ],
    "3": [
        ("epochs=4", "epochs=1"), ("epochs=6", "epochs=1"), ("digits.test[:64]", "digits.test[:8]"),
        ("labels[:64]", "labels[:8]"), ("votes=8, gate_images=24", "votes=2, gate_images=4"),
        ("draws=4, votes=8, gate_images=16", "draws=1, votes=2, gates=False"),
        ("\n".join(f'    "{name}",' for name in SLOW), ""),
    ],
    "4": [("epochs=4", "epochs=1")],
    "5": [("[100, 300, 1000]", "[4]"), ("updates=30", "updates=1"), ("num_steps: int = 1000", "num_steps: int = 20")],
    "6": [
        ("epochs=16", "epochs=2"), ("attack(nets, digits.test[:128], digits.test_labels[:128]",
                                    "attack(nets, digits.test[:4], digits.test_labels[:4]"),
        ("digits.test[:128], digits.test_labels[:128], SIGMA, draws=1000",
         "digits.test[:4], digits.test_labels[:4], SIGMA, draws=9"),
    ],
}  # fmt: skip

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(path: Path) -> list[Any]:
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]


def text_of(output: Any) -> str:
    if output.output_type == "stream":
        return str(output.text)
    return "\n".join(str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def write_stand_in_for_mnist(root: Path) -> None:
    """Digits of scikit-learn enlarged to 28 × 28 pixels, as the files that torchvision would download."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = load_digits()
    images = np.pad(np.kron(digits.images * 15.9, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    for part, rows in ("train", slice(0, 256)), ("t10k", slice(256, 264)):
        for name, values in ("images-idx3", images[rows]), ("labels-idx1", digits.target[rows].astype(np.uint8)):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())


# In one process, which has imported what they need.
@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning", "ignore:FigureCanvasAgg")
@every_notebook
def test_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = data.load

    def fewer(*args: Any, **options: Any) -> Any:
        images = load(*args, **options)
        return replace(images, train=images.train[:128], train_labels=images.train_labels[:128])

    monkeypatch.setattr(data, "load", fewer)
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])
    monkeypatch.chdir(tmp_path)
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for words, replacement in SMALLER[path.name[0]]:
        (place,) = (i for i, source in enumerate(cells) if words in source)
        cells[place] = cells[place].replace(words, replacement)
    write_stand_in_for_mnist(tmp_path / "data")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells):
        if source.startswith(FLAG):
            # The cell before has run all attacks.
            source = "ATTACKS, EPSILONS = ['FGSM'], [0.1, 0.2]\n" + source.replace(FLAG, "RUN_ON_MNIST = True")
        exec(compile(re.sub(r"^%.*", "", source, flags=re.MULTILINE), f"{path.name}, cell {number}", "exec"), names)
    pyplot.close("all")
    assert [made.name for made in tmp_path.iterdir()] == ["data"], "a cell writes into the working directory"
    assert capsys.readouterr().err == ""


def test_make_tutorials_writes_what_cells_printed_and_leaves_out_what_differs_from_machine_to_machine(
    tmp_path: Path,
) -> None:
    script = runpy.run_path(str(FOLDER / "execute.py"))
    sources = "print(6 * 7)", f"import sys; print({script['COMPILING']!r}, file=sys.stderr)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    script["execute"](notebook, tmp_path)
    printed, compiling = notebook.cells
    assert [output.text for output in printed.outputs] == ["42\n"]
    assert printed.execution_count == 1
    assert not compiling.outputs
    assert not printed.metadata


@every_notebook
def test_shows_what_it_printed_and_drew_without_an_error_and_nothing_of_the_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make tutorials`"
    shown = outputs(path)
    kinds = {output.output_type for output in shown}
    assert "stream" in kinds
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert all(map(MACHINE_PATH.search, ("File /home/me/net.py", "C:\\net", "~/net.py")))
    for output in shown:
        assert output.get("name") != "stderr"
        assert not MACHINE_PATH.search(text_of(output)), text_of(output)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)


@every_notebook
def test_is_a_page_of_the_site(path: Path) -> None:
    render = runpy.run_path(str(FOLDER.parent / "docs" / "hooks.py"))["render"]
    text, pictures = render(json.loads(path.read_text(encoding="utf-8")), path.stem)
    assert len(pictures) == sum("image/png" in output.get("data", {}) for output in outputs(path))
    assert all(f"]({name})" in text and content.startswith(b"\x89PNG") for name, content in pictures.items())
    for output in outputs(path):
        assert "".join(output.get("text", "")).rstrip() in text
    assert "](../docs/" not in text
