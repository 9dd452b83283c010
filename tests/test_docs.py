"""What the documentation says is so: examples run, commands exist, links lead somewhere, figures are in their files."""

from __future__ import annotations

import re
import shlex
from contextlib import ExitStack
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import snntorch as snn
import torch

import snntorch_lr as slr
from snntorch_lr import gradients, neurons, noise, robustness
from snntorch_lr.experiments import cli
from snntorch_lr.experiments.page import write

from . import pages

WITH_CODE = [page for page in pages.DOCS if pages.blocks(page, "python")]
LINKED = [pages.README, pages.GRADIENTS, *pages.DOCS, *sorted((pages.ROOT / "tutorials").rglob("*.md"))]
LINKED += sorted((pages.ROOT / "tutorials").rglob("*.ipynb"))
FIGURE = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def name_of(page: Path) -> str:
    return page.relative_to(pages.ROOT).as_posix()


# The last three are of Lightning itself.
@pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning:lightning", "ignore:.*num_workers", "ignore:.*LeafSpec"
)
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other and from nothing, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    with ExitStack() as stack:
        # A page may enter what it adds under a name.
        registers = noise.DISTRIBUTIONS, neurons.NOISY, gradients.ESTIMATORS, robustness.SUITES, robustness.SURROGATES
        for register in registers:
            stack.enter_context(mock.patch.dict(register))
        # snnTorch's utils.reset resets all neurons that were ever made, those of other tests too.
        stack.enter_context(mock.patch.object(snn.SpikingNeuron, "instances", []))
        for block in pages.blocks(page, "python"):
            if "import lightning" not in block.code or find_spec("lightning") is not None:
                pages.run(block, names)


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_no_block_escapes_these_tests(page: Path) -> None:
    text = pages.text_of(page)
    assert text.count("```") == 2 * len(pages.blocks(page)), "a fence is indented, or never closed"
    assert {block.language for block in pages.blocks(page)} <= pages.LANGUAGES


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_relative_links_lead_to_files(page: Path) -> None:
    lost = [link for link in pages.links(page) if pages.is_relative(link) and not pages.leads_to(page, link).exists()]
    assert not lost


def commands() -> list[tuple[str, str]]:
    """Every line that a reader is told to type, with its page."""
    found = []
    for page in LINKED:
        lines = [
            line for block in pages.blocks(page, "console") for line in block.code.replace("\\\n", " ").split("\n")
        ]
        inline = re.findall(r"`((?:snntorch-lr|make|pip install) [^`]+)`", pages.text_of(page))
        found += [(name_of(page), " ".join(line.split())) for line in (*lines, *inline) if line.strip()]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page: str, line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "snntorch-lr":
        # Pages of an earlier version's benchmark name its options.
        if not arguments[0].startswith("-") and "--copies" not in arguments:
            cli.COMMANDS[arguments[0]].parse(arguments[1:])
    elif program == "make":
        makefile = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in arguments)
    elif program == "pip":
        assert arguments[0] == "install"
        wanted = [each for argument in arguments for each in re.findall(r"^(?:\.|snntorch-lr)\[(.*)\]$", argument)]
        extras = metadata("snntorch-lr").get_all("Provides-Extra") or []
        assert {extra for each in wanted for extra in each.split(",")} <= set(extras)
    else:
        known = {"git", "cd", "python", "python3", "source", "jupyter"}
        assert program in known, f"nothing checks {program}"


@pytest.mark.parametrize("page", [pages.README, *pages.DOCS], ids=name_of)
def test_figures_of_a_table_are_in_the_files_that_its_rows_name(page: Path) -> None:
    for line in pages.text_of(page).splitlines():
        files = [pages.leads_to(page, link) for link in re.findall(r"\]\(([^)]*results/[^)]+\.md)\)", line)]
        if line.startswith("|") and files:
            given = {each for file in files for each in FIGURE.findall(file.read_text(encoding="utf-8"))}
            # Settings stand behind "=": a default is not in the command.
            assert set(FIGURE.findall(re.sub(r"\]\([^)]*\)|= \S+", "", line))) <= given, line


@pytest.mark.parametrize(
    "folder", sorted((pages.ROOT / "docs" / "results").glob("study-*")), ids=lambda path: path.name
)
def test_the_page_of_a_study_is_what_its_results_say(folder: Path, tmp_path: Path) -> None:
    write([folder / "results.json"], folder, tmp_path, html=False)
    # Pixels depend on the version of matplotlib.
    for name in ("index.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), f"run snntorch-lr report {folder.name}"


def test_every_result_is_in_the_index() -> None:
    index = pages.ROOT / "docs" / "results" / "index.md"
    listed = {pages.leads_to(index, link) for link in pages.links(index) if pages.is_relative(link)}
    lost = {page for page in index.parent.rglob("*.md") if page != index} - listed
    assert not lost, "add a line to docs/results/index.md"


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(pages.text_of(page) for page in (pages.ROOT / "docs" / "api").glob("*.md"))
    # A function may stand in a module of the same name.
    documented = {path.split(".")[-1] for path in re.findall(r"^::: snntorch_lr\.([\w.]+)$", text, flags=re.MULTILINE)}
    assert documented >= {*slr.__all__, *robustness.__all__}
