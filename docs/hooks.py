"""Adds to the site: the tutorials, rendered from their committed outputs, and a search without a server."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

TUTORIALS = Path(__file__).parent.parent / "tutorials"


def render(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts, pictures = [], dict[str, bytes]()
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure {len(pictures)} of this notebook]({file})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts), pictures


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each tutorial."""
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        text, pictures = render(json.loads(path.read_text(encoding="utf-8")), path.stem)
        for name, content in {f"{path.stem}.md": text, **pictures}.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leads to those pages what leads to the notebooks in the repository."""
    return re.sub(r"\]\(\.\./tutorials/([\w-]+)\.ipynb\)", r"](tutorials/\1.md)", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Writes the index of the search as a script too: from file:// a browser runs those, and fetches no JSON."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var searchIndex = {index};", encoding="utf-8")
