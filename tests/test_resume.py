"""A run that is saved between two steps goes on with the same numbers in another process."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr

from .helpers import COPIERS, Net, assert_same, backward, data, every_estimator, every_noise, weights

STEPS_IN_ALL = 10


class Run:
    """A network, its optimizer and the schedule of its noise, trained by a plain loop, or by closures."""

    def __init__(self, estimator: str = "counterfactual", noise: str = "escape") -> None:
        self.net = Net(noise=noise)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.schedule = slr.anneal(self.net, STEPS_IN_ALL)
        self.closures = estimator != "counterfactual"
        self.hook = slr.attach(self.optimizer, self.net, estimator, **({"copies": 4} if self.closures else {}))

    def step(self) -> Tensor:
        if self.closures:
            loss: Tensor = self.optimizer.step(slr.closure(self.net.loss, *data()))  # type: ignore[assignment]
        else:
            self.optimizer.zero_grad()
            loss = self.net.loss(*data()).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    @property
    def parts(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}

    def save(self) -> bytes:
        file = io.BytesIO()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"random": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])

    def go_on(self, steps: int = 3) -> dict[str, Any]:
        """Losses and weights of some more steps."""
        losses = torch.stack([self.step() for _ in range(steps)])
        return {"losses": losses, **{name: value.clone() for name, value in self.net.state_dict().items()}}


@every_noise
@every_estimator
def test_a_resumed_run_goes_on_with_the_same_numbers(estimator: str, noise: str) -> None:
    torch.manual_seed(0)
    whole = Run(estimator, noise)
    for _ in range(3):
        whole.step()
        saved = whole.save()
    # To save a run changes nothing.
    torch.manual_seed(0)
    unsaved = Run(estimator, noise)
    for _ in range(3):
        unsaved.step()
    expected = unsaved.go_on()
    torch.manual_seed(1)
    resumed = Run(estimator, noise)
    # Whatever it did before.
    resumed.step()
    resumed.load(saved)
    assert_same(resumed.go_on(), expected)
    if estimator == "counterfactual":
        assert expected["lif1.noise.control"].any()
    assert expected["lif1.noise.annealed"] < 1


def _saved(net: torch.nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copier", [*COPIERS.values(), _saved])
@every_noise
def test_a_network_that_is_copied_between_two_steps_has_the_gradient_that_was_chosen(noise: str, copier: Any) -> None:
    torch.manual_seed(0)
    run = Run(noise=noise)
    run.step()
    run.net.loss(*data()).mean().backward()
    copied = copier(run.net)
    losses = [[lambda net=net: net.loss(*data()).mean()] * 2 for net in (run.net, copied)]
    found = [backward(net, *twice) for net, twice in zip((run.net, copied), losses, strict=True)]
    assert_same(*found)
    assert found[1]["fc1.weight"].any()
    slr.use_gradient(run.net, "surrogate")
    assert copied.lif1.sampler is not None


@every_noise
@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_moving_average_of_weights_follows_training(noise: str, use_buffers: bool) -> None:
    run = Run(noise=noise)
    # States are buffers: as in snnTorch, it is made after a forward pass, and batches keep their size.
    run.step()
    average = torch.optim.swa_utils.AveragedModel(
        run.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
    )
    expected = weights(run.net)
    for step in range(3):
        run.step()
        average.update_parameters(run.net)
        for name, value in weights(run.net).items():
            expected[name] = 0.5 * (expected[name] + value) if step else value
    assert_same(weights(average.module), expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert average.eval()(data()[0]).shape == (5, 2)
