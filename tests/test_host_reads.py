"""A training step waits for the device a few times, however many time steps there are."""

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

from .helpers import MAKERS, Net, data, every_noise

ANSWERS = {"_local_scalar_dense", "equal", "allclose"}
READS = ANSWERS | {"nonzero", "masked_select"}


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device: numbers of it that the host reads, and copies from it.

    Numbers of a tensor of "meta" are nowhere: it stands for any device but the host's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        read = next((value for value in args if isinstance(value, Tensor)), None)
        if read is None or not read.is_meta:
            return func(*args, **(kwargs or {}))
        if name in READS:
            self.names.append(name)
        if name in ANSWERS:
            return True
        device = torch.device((kwargs or {}).get("device") or "meta")
        if device.type != "meta":
            self.names.append(f"{name} to {device}")
            return torch.ones(read.shape, dtype=read.dtype, device=device)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Philox of nothing takes long."""
    draw = lambda noise, shape, dtype, device, key: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    monkeypatch.setattr("snntorch_lr.noise.draw", draw)


def plain_step(net: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    def step() -> None:
        optimizer.zero_grad()
        net.loss(x, y).mean().backward()
        optimizer.step()

    return step


@every_noise
@pytest.mark.parametrize(
    # Are all gradients finite? An estimator also looks at two noise levels and the losses, and at what weights them.
    ("way", "expected"),
    [("plain loop", 1), ("counterfactual", 4), ("vanilla", 5)],
)
@pytest.mark.usefixtures("no_numbers")
def test_a_training_step_waits_no_more_often_for_more_time_steps(way: str, expected: int, noise: str) -> None:
    reads = []
    for steps in (2, 4):
        net = Net(noise=noise).to("meta")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        slr.attach(optimizer, net, "counterfactual" if way == "plain loop" else MAKERS[way](net))
        x, y = (value.to("meta") for value in data())
        step = plain_step(net, optimizer, x[:, :steps], y)
        if way != "plain loop":
            closure = slr.closure(net.loss, x[:, :steps], y)
            step = lambda optimizer=optimizer, closure=closure: optimizer.step(closure)  # noqa: E731
        with warnings.catch_warnings(), HostReads():
            warnings.simplefilter("ignore")
            for _ in range(2):
                step()
        with HostReads() as counted:
            step()
        reads.append(counted.names)
    assert [len(names) for names in reads] == [expected] * 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_waited_for_once_in_a_plain_loop() -> None:
    net = Net().cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    slr.attach(optimizer, net)
    step = plain_step(net, optimizer, *(value.cuda() for value in data()))
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in said) == 1


@pytest.mark.usefixtures("no_numbers")
def test_constant_currents_wait_no_more_often_either() -> None:
    lif = slr.Leaky(beta=0.9, noise="escape", init_hidden=True)
    net = nn.Sequential(nn.Linear(3, 4), lif, nn.Linear(4, 2)).to("meta")
    slr.use_gradient(net)
    x, y = torch.rand(5, 3, device="meta"), torch.zeros(5, dtype=torch.long, device="meta")
    with warnings.catch_warnings(), HostReads():
        warnings.simplefilter("ignore")
        for _ in range(2):
            F.cross_entropy(slr.rollout(net, x, num_steps=3).sum(0), y).backward()
    with HostReads() as counted:
        F.cross_entropy(slr.rollout(net, x, num_steps=3).sum(0), y).backward()
    assert not counted.names
