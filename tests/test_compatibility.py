"""The table of ``docs/compatibility.md`` is what trying gives."""

from __future__ import annotations

import os

import pytest

from snntorch_lr.noisy_neuron import UNSUPPORTED

from . import compatibility, pages

PAGE = pages.ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- computed: make compatibility -->", "<!-- end -->"
REWRITE = "SNNTORCH_LR_REWRITE"


def test_the_table_is_what_trying_gives() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    found = compatibility.table()
    if REWRITE in os.environ:
        PAGE.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{after}", encoding="utf-8")
        return
    assert written.strip() == found, "rewrite it with `make compatibility`, and look at what changed"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_every_unsupported_class_is_listed(name: str) -> None:
    assert f"| `{name}` |" in PAGE.read_text(encoding="utf-8")
