"""A training step waits for the device once: after the work is queued, and before any weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import snntorch_lr as slr
from snntorch_lr.estimators import counterfactual

from .helpers import Net, data, nothing_changes
from .test_silence import ESTIMATORS, every_estimator

ALL = ESTIMATORS | {"fixed": lambda net: slr.Counterfactual(net, control=0.5)}
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select"}


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device: numbers that the host reads, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = [each for each in args if isinstance(each, Tensor)]
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask or len({each.device for each in given if each.dim()}) > 1:
            self.found.append(name)
        if name == "_local_scalar_dense" and given[0].is_meta:
            return True
        result = func(*args, **(kwargs or {}))
        if name == "_to_copy" and result.device != given[0].device:
            self.found.append(f"{name} to {result.device}")
        return result


def attached(net: nn.Module, make: Any, device: str) -> tuple[torch.optim.Optimizer, slr.Estimator]:
    estimator = make(net.to(device))
    # That of the noise is drawn on the host.
    estimator.next_seed = lambda: 7
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    slr.attach(optimizer, net, estimator)
    return optimizer, estimator


def constant(net: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        current = net.fc1(x[:, 0])
        out = sum(net.lif2(net.fc2(net.lif1(current))) for _ in range(2))
        return F.cross_entropy(net.readout(out), y, reduction="none")

    return loss


# Numbers of a tensor of "meta" are nowhere: it stands for any device but the host's.
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("device", "noise", "changes"),
    [
        *(("cpu", noise, changes) for noise in ("membrane", "escape") for changes in (False, True)),
        ("meta", "membrane", False),
        ("meta", "escape", True),
    ],
)
def test_a_training_step_waits_for_the_device_once(
    make: Any, device: str, noise: str, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "meta":
        monkeypatch.setattr(counterfactual, "profiles_over_time", lambda _, steps, copies: [[1.0] for _ in steps])
    net = Net(noise=noise)
    optimizer, _ = attached(net, make, device)
    x, y = (each.to(device) for each in data())
    step = slr.closure(net.loss if changes else constant(net), x[:, :2], y)
    with warnings.catch_warnings(), HostReads():
        warnings.simplefilter("ignore")
        optimizer.step(step)
    with HostReads() as reads:
        optimizer.step(step)
    assert reads.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("over_time", ["rates", "exact"])
def test_max_pooling_of_spikes_and_currents_waits_no_more_than_that(over_time: str) -> None:
    net = Net(noise="escape")
    optimizer, estimator = attached(net, lambda net: slr.Counterfactual(net, over_time=over_time), "cpu")
    pooled = "spikes"

    def loss(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        out = torch.zeros(())
        for t in range(x.shape[1]):
            current = net.fc1(x[:, t])
            spikes = net.lif1(F.max_pool1d(current, 1))
            out = out + net.lif2(net.fc2(F.max_pool1d(spikes if pooled == "spikes" else spikes.sigmoid(), 1)))
        return F.cross_entropy(net.readout(out), y, reduction="none")

    step = slr.closure(loss, *data())
    # In some time step all neurons may have been silent.
    for _ in range(3):
        optimizer.step(step)
    with HostReads() as reads:
        optimizer.step(step)
    assert len(reads.found) == 1
    pooled = "something else"
    with nothing_changes(net), pytest.raises(ValueError, match="pools something other than spikes now"):
        estimator.backward(loss, *data())


@every_estimator
def test_what_does_not_hold_is_said_and_nothing_changes(make: Any) -> None:
    net = Net()
    estimator = make(net)
    estimator.backward(net.loss, *data())

    def infinite(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(x, y) / 0

    def another_error(x: Tensor, y: Tensor) -> Tensor:
        net.lif1(net.fc1(x[:, 0]))
        raise KeyError("follows from it")

    with nothing_changes(net), pytest.raises(ValueError, match="losses are not finite"):
        estimator.backward(infinite, *data())
    with torch.no_grad():
        net.lif2.noise.log_sigma.fill_(-torch.inf)
    for loss in (net.loss, infinite, another_error):
        with nothing_changes(net), pytest.raises(ValueError, match=r"lif2.noise: sigma must be positive"):
            estimator.backward(loss, *data())
    with torch.no_grad():
        net.lif2.noise.log_sigma.zero_()
    estimator.backward(net.loss, *data())


def test_a_state_that_does_not_fit_is_refused_in_a_later_call_too() -> None:
    fc, lif = nn.Linear(3, 4), slr.Leaky(beta=0.9, noise=True)
    net = nn.ModuleList([fc, lif])
    state = torch.zeros(2, 4)
    estimator = slr.Vanilla(net, 4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return lif(fc(x), state)[0].sum(1)

    x, y = torch.rand(5, 3), torch.zeros(5)
    estimator.backward(loss, x, y)
    state = torch.ones(2, 4)
    with (
        nothing_changes(net),
        pytest.raises(ValueError, match=r"Leaky\) got a state of shape \(2, 4\), which does not"),
    ):
        estimator.backward(loss, x, y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_gpu_is_waited_for_once(make: Any) -> None:
    net = Net()
    optimizer, _ = attached(net, make, "cuda")
    step = slr.closure(net.loss, *(each.cuda() for each in data()))
    for _ in range(2):
        optimizer.step(step)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(each.message) for each in said) == 1
