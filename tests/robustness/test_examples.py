"""The examples in docstrings run and give what they say."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

from snntorch_lr import robustness

MODULES = [f"robustness.{found.name}" for found in pkgutil.iter_modules(robustness.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module = import_module(f"snntorch_lr.{name}")
    assert doctest.testmod(module, raise_on_error=False).failed == 0


def test_every_public_name_has_an_example() -> None:
    made_by_others = {"McNemar", "RobustnessReport", "Row", "Scores", "Share"}
    for name in set(robustness.__all__) - made_by_others:
        value = getattr(robustness, name)
        assert isinstance(value, (dict, tuple)) or ">>> " in value.__doc__, name
