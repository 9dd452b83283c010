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
from snntorch_lr.gradients import fused

from .helpers import MAKERS, Net, data

ANSWERS = {"_local_scalar_dense", "equal", "allclose"}
READS = ANSWERS | {"nonzero", "masked_select"}


class HostReads(TorchDispatchMode):
    """Counts what waits for a device, or would if tensors of a CPU were there: what the host reads of its tensors.

    Numbers of a tensor of "meta" are nowhere: it stands for any device but the host's.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        read = next((value for value in args if isinstance(value, Tensor)), None)
        if read is not None and read.device.type == self.device and name in READS:
            self.names.append(name)
        if read is None or not read.is_meta:
            return func(*args, **(kwargs or {}))
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


def plain_step(net: Any, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    def step() -> None:
        optimizer.zero_grad()
        net.loss(x, y).mean().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(
    # Are all gradients finite? An estimator also looks at two noise levels and the losses, and at what weights them.
    ("way", "noise", "expected"),
    [
        ("plain loop", "membrane", 1),
        ("plain loop", "escape", 1),
        ("counterfactual", "membrane", 4),
        ("vanilla", "escape", 5),
    ],
)
@pytest.mark.usefixtures("no_numbers")
def test_a_training_step_waits_no_more_often_for_more_time_steps(way: str, noise: str, expected: int) -> None:
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


def fused_stack() -> nn.Sequential:
    lifs = [slr.Leaky(beta=0.9, threshold=0.5, noise="escape", init_hidden=True) for _ in range(2)]
    net = nn.Sequential(nn.Linear(3, 4), lifs[0], nn.Linear(4, 4), lifs[1])
    slr.use_gradient(net)
    return net


@pytest.mark.parametrize("in_sequence", [False, True], ids=["loop", "rollout"])
def test_fused_time_steps_read_nothing_on_the_way_there_and_back(
    in_sequence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    # Keys come from a generator of the host.
    monkeypatch.setattr(fused, "new_keys", lambda count, generator, device: torch.arange(count))
    net, x = fused_stack(), torch.rand(3, 5, 3)

    def step() -> list[str]:
        with HostReads("cpu") as reads, monkeypatch.context() as patch:
            # They read the memory of a CPU, and the dispatcher never hears of it.
            for name in ("tolist", "numpy"):
                patch.setattr(Tensor, name, lambda self, name=name: reads.names.append(name))
            slr.reset(net)
            outputs = slr.rollout(net, x) if in_sequence else torch.stack([net(current) for current in x])
            outputs.square().sum().backward()
        return reads.names

    # A factor of spikes is looked at once, and the first presentations are watched.
    first, _, third = step(), step(), step()
    assert first
    assert not third


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("in_sequence", "expected"), [(True, 0), (False, 1)], ids=["rollout", "attached loop"])
def test_a_gpu_is_waited_for_by_the_look_at_gradients_alone(in_sequence: bool, expected: int) -> None:
    if in_sequence:
        net, x = fused_stack().cuda(), torch.rand(3, 5, 3).cuda()
        step = lambda: slr.rollout(net, x).sum().backward()  # noqa: E731
    else:
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
    assert sum("synchroniz" in str(warning.message) for warning in said) == expected
