"""The house: who may import whom, how long files may be, and that what is public is documented, tested and released."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import combinations
from pathlib import Path

import snntorch_lr
from snntorch_lr import robustness

PACKAGE = Path(snntorch_lr.__file__).parent
TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
# More is a reason to look.
LINES = 600
TOP_MODULES, FILES = 20, 56
FOLDERS = ("kernels", "gradients", "robustness", "experiments")
# Each may know those before it, and none after it.
LAYERS = ("noise", "node", "noisy_neuron", "validate", "gradients.base", "gradients.counterfactual", "optim")
TOUCH_SNNTORCH = {
    "convert", "graph", "network", "neurons", "noisy_neuron", "experiments.benchmark", "experiments.models",
}  # fmt: skip

# What the experiments take from inside the package, beside public names: make it public rather than add to this.
INNER = {
    "_files.load", "_files.replacing", "_files.save", "_messages.aligned", "_messages.first_line", "_messages.install",
    "_messages.listed", "_messages.markdown", "_messages.versions", "_messages.warn", "convert.noise_gap",
    "gradients.ESTIMATORS", "kernels", "network.noises", "network.noisy_neurons", "noise.KINDS", "philox.draw",
    "robustness.figures.colors_of", "robustness.figures.new_figure", "robustness.figures.percent",
    "robustness.figures.with_legend",
}  # fmt: skip


# One idea of its own each, though only one module asks for it.
SINGLE_USE = {
    "kernels.cpu", "kernels.memory", "kernels.numba_numbers",
    "kernels.numba_steps", "kernels.triton_steps", "objectives", "robustness.gates",
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """What a module imports when it runs: dotted names below the package, and "snntorch"."""
    place = [*path.relative_to(PACKAGE).with_suffix("").parts]

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            if not node.level:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            base = place[: len(place) - node.level] + (node.module.split(".") if node.module else [])
            if node.level:
                yield from (".".join(["", *base, alias.name]) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    for name in visit(ast.parse(path.read_text(encoding="utf-8"))):
        inside = name.removeprefix("snntorch_lr")
        if inside.startswith("."):
            yield inside.removeprefix(".")
        elif name.partition(".")[0] == "snntorch":
            yield "snntorch"


def module_of(name: str) -> str:
    """The module that an imported name is, or is in; the package itself is ""."""
    parts = name.split(".")
    while parts and not ((PACKAGE.joinpath(*parts).with_suffix(".py")).exists() or PACKAGE.joinpath(*parts).is_dir()):
        parts.pop()
    return ".".join(parts)


IMPORTS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): set(imports(path))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
IMPORTS_OF_PACKAGE = {module_of(name) for name in imports(PACKAGE / "__init__.py")}
GRAPH = {name: {module_of(part) for part in names} - {"", name} for name, names in IMPORTS.items()}


def reached(start: str) -> set[str]:
    """All modules that importing one runs."""
    modules: set[str] = set()
    waiting = [start]
    while waiting:
        new = GRAPH.get(waiting.pop(), set()) - modules
        modules |= new
        waiting += new
    return modules


def folder_of(name: str) -> str:
    return next((folder for folder in FOLDERS if name.split(".")[0] == folder), "")


def test_imports_are_found() -> None:
    assert {"node", "noisy_neuron"} <= GRAPH["gradients.counterfactual"]
    assert "robustness.attacks" in GRAPH["robustness.evaluate"]
    assert "experiments.files" in GRAPH["experiments.study"]
    assert "matplotlib" not in GRAPH["diagnostics"], "it is imported for types only"


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter(GRAPH).prepare()


def test_robustness_uses_the_core_and_experiments_use_both_and_never_the_other_way_round() -> None:
    core = {"", "gradients", "kernels"}
    allowed = {
        "": core,
        "gradients": core,
        "kernels": {"", "kernels"},
        "robustness": {*core, "robustness"},
        "experiments": {"", *FOLDERS},
    }
    for name, modules in GRAPH.items():
        assert {folder_of(module) for module in modules} <= allowed[folder_of(name)], name


def test_layers_know_only_those_below() -> None:
    for below, above in combinations(LAYERS, 2):
        assert above not in reached(below), below


def test_neurons_know_no_gradient_and_gradients_no_class_of_neurons() -> None:
    assert not {name for name in reached("neurons") if name.startswith("gradients")} | {"optim"} & reached("neurons")
    assert "neurons" not in reached("gradients")


def test_a_module_has_two_importers_or_public_names() -> None:
    packages = {name for name in GRAPH if (PACKAGE / name.replace(".", "/")).is_dir()}
    offered = IMPORTS_OF_PACKAGE | packages | GRAPH["robustness"] | GRAPH["experiments.cli"] | {"experiments.cli"}
    alone = {name for name in GRAPH if name not in offered and sum(name in others for others in GRAPH.values()) < 2}
    assert alone == SINGLE_USE


def test_the_house_stays_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_MODULES
    assert len(list(PACKAGE.rglob("*.py"))) <= FILES


def test_few_modules_touch_snntorch() -> None:
    assert {name for name, names in IMPORTS.items() if "snntorch" in names} == TOUCH_SNNTORCH


def test_experiments_take_what_is_public_and_little_else() -> None:
    public = {*snntorch_lr.__all__, "__version__", "snntorch"}
    taken = {
        name
        for module, names in IMPORTS.items()
        for name in names
        if folder_of(module) == "experiments" != folder_of(name) and name.rpartition(".")[2] not in public
    }
    offered = {name for name in taken if folder_of(name) and name.rpartition(".")[2] in robustness.__all__}
    assert taken - offered <= INNER


def test_files_are_short() -> None:
    paths = [*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]
    assert not [path for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > LINES]


def test_the_version_is_the_one_that_is_released() -> None:
    version = snntorch_lr.__version__
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.search(r"^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert released
    cited = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert released[1] == version
    assert f"\nversion: {version}\n" in cited
    assert f"\ndate-released: {released[2]}\n" in cited
