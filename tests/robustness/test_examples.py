"""The examples in docstrings run and give what they say."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

from snntorch_lr import robustness


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(robustness.__path__)])
def test_examples_in_docstrings(name: str) -> None:
    module = import_module(f"snntorch_lr.robustness.{name}")
    assert doctest.testmod(module, raise_on_error=False).failed == 0


def test_every_public_name_has_an_example() -> None:
    for name in {*robustness.__all__} - {"McNemar", "RobustnessReport", "Row", "Scores", "Share"}:
        value = getattr(robustness, name)
        assert isinstance(value, (dict, tuple)) or ">>> " in value.__doc__, name
