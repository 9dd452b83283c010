"""A run in a loop of one's own, saved between two steps, goes on with the same numbers in another process."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from .helpers import COUNTERFACTUAL, MAKERS, Net, assert_same, data

COPIES = 4


class Run:
    """A network, its optimizer and its estimator, which train together."""

    def __init__(self, estimator: str, seed: int | None, noise: str) -> None:
        self.net = Net(noise=noise)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.estimator = MAKERS[estimator](self.net, COPIES, seed=seed)

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.estimator.backward(self.net.loss, *data())
        self.optimizer.step()
        return loss

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = {"net": self.net, "optimizer": self.optimizer, "estimator": self.estimator}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in {"net": self.net, "optimizer": self.optimizer, "estimator": self.estimator}.items():
            part.load_state_dict(state[name])

    def numbers(self, losses: list[Tensor]) -> dict[str, Any]:
        return {"losses": torch.stack(losses), **self.net.state_dict(), **getattr(self.estimator, "control", {})}


@pytest.mark.parametrize("noise", ["membrane", "escape"])
@pytest.mark.parametrize("estimator", MAKERS)
def test_a_resumed_run_goes_on_with_the_same_numbers(estimator: str, noise: str) -> None:
    whole, resumed = Run(estimator, 7, noise), Run(estimator, 7, noise)
    for _ in range(3):
        whole.step()
    saved = whole.save()
    resumed.load(saved)
    runs = []
    for run in (whole, resumed):
        torch.rand(len(runs) + 1)  # whatever else uses the global generator
        runs.append(run.numbers([run.step() for _ in range(3)]))
    assert_same(*runs)


@pytest.mark.parametrize("estimator", MAKERS)
def test_a_run_without_a_seed_goes_on_from_the_global_generator(estimator: str) -> None:
    torch.manual_seed(0)
    whole, resumed = Run(estimator, None, "membrane"), Run(estimator, None, "membrane")
    whole.step()
    random = torch.get_rng_state()
    resumed.load(whole.save())
    runs = []
    for run in (whole, resumed):
        torch.set_rng_state(random)
        runs.append(run.numbers([run.step() for _ in range(2)]))
    assert_same(*runs)


@pytest.mark.parametrize("estimator", MAKERS)
def test_what_was_saved_does_not_change_afterwards(estimator: str) -> None:
    run = Run(estimator, 7, "membrane")
    run.step()
    state = run.estimator.state_dict()
    before = pickle.dumps(state)
    run.step()
    assert pickle.dumps(state) == before
    assert pickle.dumps(run.estimator.state_dict()) != before


@pytest.mark.parametrize("seeds", [(None, 7), (7, None)])
@pytest.mark.parametrize("estimator", MAKERS)
def test_a_seed_on_one_side_only_is_refused(estimator: str, seeds: tuple[int | None, int | None]) -> None:
    first, second = (Run(estimator, seed, "membrane") for seed in seeds)
    first.step()
    with pytest.raises(ValueError, match="with a seed and the other without"):
        second.estimator.load_state_dict(first.estimator.state_dict())


@pytest.mark.parametrize("estimator", COUNTERFACTUAL)
def test_a_fixed_control_is_not_replaced_by_one_that_was_fitted(estimator: str) -> None:
    fitted = Run(estimator, 7, "membrane")
    fitted.step()
    net = Net()
    fixed = MAKERS[estimator](net, COPIES, control=0.25, seed=7)
    fixed.load_state_dict(fitted.estimator.state_dict())
    fixed.backward(net.loss, *data())
    assert set(fixed.control.values()) == {0.25}


def test_a_state_from_before_the_first_step_is_one_too() -> None:
    fresh, loaded = Run("rates", 7, "membrane"), Run("rates", 7, "membrane")
    loaded.load(fresh.save())
    assert_same(fresh.numbers([fresh.step()]), loaded.numbers([loaded.step()]))
