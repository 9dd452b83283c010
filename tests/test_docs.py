"""What the documentation says is so: examples run, commands exist, links lead somewhere, studies are their results."""

from __future__ import annotations

import doctest
import pkgutil
import re
import shlex
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import snntorch as snn
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import gradients, network, neurons, noise, robustness
from snntorch_lr.experiments import cli
from snntorch_lr.experiments.page import write

from . import pages

WITH_CODE = [page for page in pages.DOCS if pages.blocks(page, "python")]
LINKED = [pages.README, pages.GRADIENTS, *pages.DOCS, *sorted((pages.ROOT / "tutorials").rglob("*.md"))]
LINKED += sorted((pages.ROOT / "tutorials").rglob("*.ipynb"))
FIGURE = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")
README = pages.blocks(pages.README, "python")
MODULES = [
    f"{package.__name__}.{found.name}"
    for package in (slr, gradients)
    for found in pkgutil.iter_modules(package.__path__)
    if not found.ispkg
]


def name_of(page: Path) -> str:
    return page.relative_to(pages.ROOT).as_posix()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would paste it: with nothing of the repository, nor of other tests."""
    monkeypatch.chdir(tmp_path)
    # snnTorch's utils.reset resets all neurons that were ever made.
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])
    torch.manual_seed(0)


# The last three are of Lightning itself.
@pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning:lightning", "ignore:.*num_workers", "ignore:.*LeafSpec"
)
@pytest.mark.parametrize("page", [*WITH_CODE, pages.README], ids=name_of)
def test_every_block_of_a_page_runs_after_those_before_it(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with ExitStack() as stack:
        # A page may enter what it adds under a name.
        registers = noise.DISTRIBUTIONS, neurons.NOISY, gradients.ESTIMATORS, robustness.SUITES, robustness.SURROGATES
        for register in registers:
            stack.enter_context(mock.patch.dict(register))
        for block in pages.blocks(page, "python"):
            if "import lightning" not in block.code or find_spec("lightning") is not None:
                pages.run(block, names)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("block", README, ids=lambda block: f"line {block.line}")
def test_every_block_of_the_readme_runs_alone_and_the_first_one_learns(
    block: pages.Block, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    pages.run(block, names)
    assert re.fullmatch(r"loss \d\.\d\d\n", capsys.readouterr().out)
    net: nn.Module = names["net"]
    assert network.noisy_neurons(net)
    if block is README[0]:
        images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        logits = slr.rollout(net.eval(), images.float() / 16, num_steps=8).mean(0)
        assert (logits.argmax(1) == labels).float().mean() > 0.8


def names_of_the_reference() -> dict[str, Any]:
    """What the reference says that ``net``, ``images``, ``labels`` and ``loss_fn`` are."""
    lif = slr.Leaky(beta=0.9, init_hidden=True, noise="escape")
    net = nn.Sequential(nn.Linear(784, 20), lif, nn.Linear(20, 10))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(slr.rollout(net, x, num_steps=5).mean(0), y, reduction="none")

    layers = {"lif": slr.Leaky(beta=0.9, init_hidden=True), "fc1": nn.Linear(784, 5), "fc2": nn.Linear(789, 5)}
    data = {"images": torch.rand(4, 784), "labels": torch.tensor([3, 1, 4, 1])}
    return {"torch": torch, "nn": nn, "snn": snn, "slr": slr, "net": net, "loss_fn": loss_fn, **data, **layers}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_what_they_say(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(import_module(name)):
        torch.manual_seed(0)
        test.globs |= names_of_the_reference()
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_relative_links_lead_to_files_and_no_block_escapes_these_tests(page: Path) -> None:
    lost = [link for link in pages.links(page) if pages.is_relative(link) and not pages.leads_to(page, link).exists()]
    assert not lost
    assert pages.text_of(page).count("```") == 2 * len(pages.blocks(page)), "a fence is indented, or never closed"
    assert {block.language for block in pages.blocks(page)} <= pages.LANGUAGES


def commands() -> list[tuple[str, str]]:
    """Every line that a reader is told to type, with its page."""
    told = set()
    for page in LINKED:
        code = "\n".join(block.code for block in pages.blocks(page, "console")).replace("\\\n", " ")
        inline = re.findall(r"`((?:snntorch-lr|make|pip install) [^`]+)`", pages.text_of(page))
        told |= {(name_of(page), " ".join(line.split())) for line in (*code.split("\n"), *inline) if line.strip()}
    return sorted(told)


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page: str, line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "snntorch-lr":
        # Pages of results name the commands and options of the version that wrote them.
        earlier = page.startswith("docs/results/") and {"certify", "diagnose", "--copies"} & {*arguments}
        if not arguments[0].startswith("-") and not earlier:
            cli.COMMANDS[arguments[0]].parse(arguments[1:])
    elif program == "make":
        makefile = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in arguments)
    elif program == "pip":
        assert arguments[0] == "install"
        wanted = re.findall(r"(?:^| )(?:\.|snntorch-lr)\[(.*?)\]", " ".join(arguments))
        extras = metadata("snntorch-lr").get_all("Provides-Extra") or []
        assert {extra for extras_of_one in wanted for extra in extras_of_one.split(",")} <= set(extras)
    else:
        assert program in {"git", "cd", "python", "python3", "source", "jupyter"}, f"nothing checks {program}"


@pytest.mark.parametrize("page", [pages.README, *pages.DOCS], ids=name_of)
def test_figures_of_a_table_are_in_the_files_that_its_rows_name(page: Path) -> None:
    for line in pages.text_of(page).splitlines():
        files = [pages.leads_to(page, link) for link in re.findall(r"\]\(([^)]*results/[^)]+\.md)\)", line)]
        if line.startswith("|") and files:
            measured = {figure for file in files for figure in FIGURE.findall(file.read_text(encoding="utf-8"))}
            # Settings stand behind "=": a default is not in the command.
            assert set(FIGURE.findall(re.sub(r"\]\([^)]*\)|= \S+", "", line))) <= measured, line


@pytest.mark.parametrize(
    "folder", sorted((pages.ROOT / "docs" / "results").glob("study-*")), ids=lambda path: path.name
)
def test_the_page_of_a_study_is_what_its_results_say(folder: Path, tmp_path: Path) -> None:
    write([folder / "results.json"], folder, tmp_path)
    # Pixels depend on the version of matplotlib.
    for name in ("index.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), f"run snntorch-lr report {folder.name}"
