"""The Markdown pages of this repository: their code blocks, their commands, and where their links lead."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GRADIENTS = ROOT / "snntorch_lr" / "gradients" / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
LANGUAGES = {"python", "console", "text", "toml"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", flags=re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and where it stands."""

    page: Path
    line: int
    language: str
    code: str


def text_of(page: Path) -> str:
    """A page as Markdown; of a notebook its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or those in one language."""
    text = text_of(page)
    found = [
        Block(page, text.count("\n", 0, match.start(2)), match.group(1), match.group(2))
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def run(block: Block, names: dict[str, Any]) -> None:
    """Runs a block; a traceback names the page and the line in it."""
    exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)


def first_block(page: Path, anchor: str) -> Block:
    """The first block of Python below a heading, which links name by its anchor."""
    text = text_of(page)
    for heading in re.finditer(r"^#+ (.*)$", text, flags=re.MULTILINE):
        if re.sub(r"[^\w -]", "", heading[1].lower()).replace(" ", "-") == anchor:
            line = text.count("\n", 0, heading.start())
            return next(block for block in blocks(page, "python") if block.line > line)
    raise LookupError(f"{page.name} has no heading #{anchor}")


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page, outside its code."""
    prose = _CODE.sub("", _FENCE.sub("", text_of(page)))
    return [match.group(1) for match in _LINK.finditer(prose)]


def is_relative(link: str) -> bool:
    """Whether a link leads to a file, and not to a site or to a heading of the same page."""
    return not link.startswith("#") and not re.match(r"[a-z][a-z+.-]*:", link)


def leads_to(page: Path, link: str) -> Path:
    """The file that a relative link means, whether it is there or not."""
    return (page.parent / link.partition("#")[0]).resolve()
