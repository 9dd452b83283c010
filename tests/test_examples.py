"""The examples in docstrings run and give what they say, and every public name has one."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import baselines, gradients, objectives

MODULES = [
    f"{package.__name__}.{found.name}"
    for package in (slr, gradients)
    for found in pkgutil.iter_modules(package.__path__)
    if not found.ispkg
]


def names() -> dict[str, Any]:
    """What the reference says that ``net``, ``images``, ``labels`` and ``loss_fn`` are."""
    torch.manual_seed(0)
    lif = slr.Leaky(beta=0.9, init_hidden=True, noise="escape")
    net = nn.Sequential(nn.Linear(784, 20), lif, nn.Linear(20, 10))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(slr.rollout(net, x, num_steps=5).mean(0), y, reduction="none")

    layers = {"lif": slr.Leaky(beta=0.9, init_hidden=True), "fc1": nn.Linear(784, 5), "fc2": nn.Linear(789, 5)}
    data = {"images": torch.rand(4, 784), "labels": torch.tensor([3, 1, 4, 1])}
    return {"torch": torch, "nn": nn, "snn": snn, "slr": slr, "net": net, "loss_fn": loss_fn, **data, **layers}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module = import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in finder.find(module):
        test.globs |= names()
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("module", [slr, baselines, objectives], ids=lambda module: module.__name__)
def test_every_public_name_has_an_example(module: Any) -> None:
    here = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    for name in getattr(module, "__all__", here):
        if not name.startswith("_"):
            assert ">>> " in getattr(module, name).__doc__, name
