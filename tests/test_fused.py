"""Fused time steps against the node that torch computes, step by step and in sequences cut anywhere."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.gradients import CounterfactualCredit, fused
from snntorch_lr.noisy_neuron import NoisyNeuron

from .helpers import RESETS, assert_same, initial_states

pytest.importorskip("numba")

N = 9
NEURONS: dict[str, Callable[..., NoisyNeuron]] = {
    "Leaky": partial(slr.Leaky, torch.linspace(0.5, 0.9, N)),
    "Lapicque": partial(slr.Lapicque, R=1.5, C=2.0, time_step=1),
    "Synaptic": partial(slr.Synaptic, 0.6, torch.linspace(0.5, 0.9, N)),
}
NOISES: dict[str, Callable[[], Any]] = {
    "escape": lambda: slr.EscapeNoise(0.3),
    "membrane": lambda: slr.MembraneNoise(0.3),
}
every_neuron = pytest.mark.parametrize("neuron", NEURONS)
every_reset = pytest.mark.parametrize("reset", RESETS)
every_noise = pytest.mark.parametrize("noise", NOISES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many time steps each call of the forward kernel took."""
    from snntorch_lr.kernels import cpu

    steps: list[int] = []
    forward = cpu.TimeSteps.forward

    def counted(self: Any, rows: int, sets: int, count: int, *rest: Any) -> None:
        steps.append(count)
        forward(self, rows, sets, count, *rest)

    monkeypatch.setattr(cpu.TimeSteps, "forward", counted)
    return steps


def with_credit(lif: NoisyNeuron) -> NoisyNeuron:
    lif.sampler = CounterfactualCredit(control=0.4)
    return lif


def make(neuron: str = "Leaky", reset: str = "subtract", noise: str = "escape", **options: Any) -> Any:
    return with_credit(NEURONS[neuron](threshold=0.5, reset_mechanism=reset, noise=NOISES[noise](), **options).double())


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weighted(outputs: Any, seed: int) -> Tensor:
    """A loss of outputs that depends on each number."""
    parts = [(each * random(*each.shape, seed=seed + i).to(each)).sum() for i, each in enumerate(outputs)]
    return torch.stack(parts).sum()


def gradients(lif: NoisyNeuron, x: Tensor, steps: int = 0, reads: bool = False, fuse: bool = True) -> dict[str, Tensor]:
    """Of a loss of all spikes, and of the states in each step, from ``[time, batch, ...]``, or ``[batch, ...]``."""
    weight = (random(x.shape[-1], x.shape[-1], seed=2) / x.shape[-1] ** 0.5).to(x.dtype).requires_grad_()
    assert lif.noise is not None
    lif.noise.log_sigma.grad = None
    torch.manual_seed(3)
    states, total, current = initial_states(lif), torch.zeros(()), 0.3 + x @ weight
    context = torch.enable_grad() if fuse else kernels.off()
    with context:
        for step in range(steps or len(x)):
            outputs = lif(current if steps else current[step], *states)
            states = outputs[1:]
            total = total + weighted(outputs if reads else outputs[:1], 7 * step)
        total.backward()
    assert weight.grad is not None
    return {"loss": total.detach(), "weight": weight.grad, "sigma": lif.noise.log_sigma.grad}


@every_neuron
@every_reset
@every_noise
def test_fused_time_steps_are_those_of_torch(neuron: str, reset: str, noise: str, calls: list[int]) -> None:
    for reads in (False, True):
        lif, plain = make(neuron, reset, noise), make(neuron, reset, noise)
        found = gradients(lif, random(4, 5, N), reads=reads)
        assert calls == [1] * 4
        assert_same(found, gradients(plain, random(4, 5, N), reads=reads, fuse=False), rtol=1e-9, atol=1e-11)
        assert_same({"": lif.control.pending}, {"": plain.control.pending}, rtol=1e-9, atol=1e-11)
        assert len(calls) == 4
        calls.clear()


@every_neuron
@every_reset
@every_noise
def test_single_precision_is_as_exact_as_what_is_kept_in_two_bytes(neuron: str, reset: str, noise: str) -> None:
    x = random(6, 64, N).float()
    own, exact = (gradients(make(neuron, reset, noise).float(), x, reads=True, fuse=fuse) for fuse in (True, False))
    error = float((own["weight"] - exact["weight"]).norm() / exact["weight"].norm())
    print(f"{neuron}, {reset}, {noise}: {error:.1e}")
    assert 1e-6 < error < 0.02


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 3), (2, 1025), (2, 3, 2, 2)], ids=str)
@every_noise
def test_rows_of_any_size(noise: str, shape: tuple[int, ...]) -> None:
    x = random(2, *shape)

    def lif() -> NoisyNeuron:
        return with_credit(slr.Leaky(0.8, threshold=0.5, reset_mechanism="zero", noise=NOISES[noise]()).double())

    assert_same(gradients(lif(), x, reads=True), gradients(lif(), x, reads=True, fuse=False), rtol=1e-9, atol=1e-11)


@pytest.fixture(params=[True, False], ids=["OpenMP", "own threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, each of which is worth it."""
    from snntorch_lr.kernels import cpu

    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    if not request.param:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_numbers(threads: Callable[[int], None]) -> None:
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(gradients(make("Synaptic", "zero"), random(3, 29, N), reads=True))
    for other in found[1:]:
        # Sums over rows are added in another order.
        assert_same(found[0], other, rtol=1e-12, atol=1e-13)
        assert torch.equal(found[0]["loss"], other["loss"])


def stack(neuron: str, reset: str, noise: str, output: bool) -> nn.Sequential:
    """Two layers, whose neurons have generators of their own, so that the order of layers does not matter."""
    torch.manual_seed(0)
    last = make(neuron, reset, noise, init_hidden=True, output=output)
    made = nn.Sequential(nn.Linear(6, N), make(neuron, reset, noise, init_hidden=True), nn.Linear(N, N), last).double()
    for place in (1, 3):
        made[place].noise.generator = torch.Generator().manual_seed(place)
    return made


@every_neuron
@every_reset
@every_noise
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "changing"])
def test_a_sequence_is_a_loop(neuron: str, reset: str, noise: str, constant: bool, calls: list[int]) -> None:
    def found(loop: bool) -> dict[str, Tensor]:
        output = noise.startswith("escape")
        net = stack(neuron, reset, noise, output)
        x = random(*(() if constant else (5,)), 4, 6).requires_grad_()
        if loop:
            record = [net(x if constant else x[step]) for step in range(5)]
            outputs = tuple(map(torch.stack, zip(*record, strict=True))) if output else (torch.stack(record),)
        else:
            outputs = slr.rollout(net, x, 5 if constant else None)
            outputs = outputs if output else (outputs,)
        weighted(outputs, 5).backward()
        assert x.grad is not None
        numbers = {name: parameter.grad for name, parameter in net.named_parameters()} | {"input": x.grad}
        return numbers | dict(enumerate(each.detach() for each in outputs))  # type: ignore[operator, return-value]

    sequence = found(loop=False)
    assert calls == [5, 5]
    assert_same(sequence, found(loop=True), rtol=1e-10, atol=1e-12)


@every_reset
@every_noise
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "changing"])
@pytest.mark.parametrize("pieces", [(2, 3), (1, 1, 3), (None, 4), (4, None)], ids=str)
def test_a_sequence_may_be_cut_anywhere(reset: str, noise: str, constant: bool, pieces: tuple[Any, ...]) -> None:
    def found(pieces: tuple[int | None, ...]) -> dict[str, Tensor]:
        lif, current = make("Synaptic", reset, noise), random(*(() if constant else (5,)), 3, N).requires_grad_()
        torch.manual_seed(3)
        plan = fused.Plan.of(lif, torch.Size((3, N)), torch.float64, torch.device("cpu"))
        assert plan is not None
        given = {"syn": random(3, N, seed=8), "mem": random(3, N, seed=9)}
        fired = (random(3, N, seed=10) > 0).double()
        state = fused.begin(plan, lif, given, fired, lif.sampler._present(lif))
        record, start = [], 0
        for steps in pieces:
            entering = current if constant else current[start : start + (steps or 1)]
            entering = entering if constant or steps else entering[0]
            state, *outputs = fused.advance(state, lif, entering, steps, all_states=True)
            record.append([output if steps else output.unsqueeze(0) for output in outputs])
            start += steps or 1
        weighted([torch.cat(part) for part in zip(*record, strict=True)], 5).backward()
        assert current.grad is not None
        return {"current": current.grad, "sigma": lif.noise.log_sigma.grad, "mem": state.mem, "shadow": state.shadow}

    assert_same(found(pieces), found((5,)), rtol=1e-11, atol=1e-13)


def test_the_last_states_alone_may_be_handed_out() -> None:
    def found(all_states: bool) -> Tensor:
        lif, current = make(), random(4, 3, N).requires_grad_()
        torch.manual_seed(3)
        plan = fused.Plan.of(lif, torch.Size((3, N)), torch.float64, torch.device("cpu"))
        assert plan is not None
        state = fused.begin(plan, lif, {"mem": torch.zeros(3, N).double()}, None, lif.sampler._present(lif))
        _, spikes, mem, _ = fused.advance(state, lif, current, 4, all_states)
        weighted((spikes, mem[-1] if all_states else mem), 5).backward()
        assert current.grad is not None
        return current.grad

    assert torch.equal(found(True), found(False))


@pytest.mark.parametrize("steps", [0, 3], ids=["changing", "constant"])
def test_currents_need_not_be_contiguous(steps: int) -> None:
    x = random(N, 5, 3).permute(2, 1, 0) if not steps else random(N, 5).t()

    def found(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        lif, total, mem = make(), torch.zeros(()), torch.zeros(())
        torch.manual_seed(3)
        for step in range(3):
            spikes, mem = lif(x if steps else x[step], mem)
            total = total + weighted([spikes], step)
        total.backward()
        assert x.grad is not None
        return x.grad

    assert not x.is_contiguous()
    assert torch.equal(found(x), found(x.contiguous()))


@pytest.mark.parametrize(
    "make_neuron",
    [
        lambda: slr.Leaky(0.8, learn_beta=True, noise=True),
        lambda: slr.Leaky(0.8, learn_threshold=True, noise=True),
        lambda: slr.Leaky(0.8, reset_delay=False, noise=True),
        lambda: slr.Leaky(0.8, state_quant=lambda mem: mem.mul(8).round().div(8), noise=True),
        lambda: slr.Alpha(0.9, 0.8, noise=True),
        lambda: slr.Leaky(0.8, noise=slr.EscapeNoise(distribution="gaussian")),
    ],
    ids=["learned beta", "learned threshold", "reset at once", "quantised", "Alpha", "another noise"],
)
def test_what_is_not_known_is_computed_by_torch(make_neuron: Callable[[], Any], calls: list[int]) -> None:
    found = [gradients(with_credit(make_neuron().double()), random(3, 4, N), fuse=fuse) for fuse in (True, False)]
    assert not calls
    assert_same(*found)


def test_half_precision_is_computed_by_torch(calls: list[int]) -> None:
    lif, x = with_credit(slr.Leaky(0.8, noise=True)).half(), (2 * random(4, N)).half().requires_grad_()
    lif(x, lif.reset_mem())[0].sum().backward()
    assert not calls
    assert x.grad is not None
    assert x.grad.any()


@every_noise
def test_a_learned_first_state_gets_its_gradient(noise: str) -> None:
    def found(fuse: bool) -> tuple[Tensor, Tensor]:
        lif, mem, x = make("Leaky", "zero", noise), nn.Parameter(random(4, N)), random(4, N).requires_grad_()
        torch.manual_seed(3)
        state: Tensor = mem
        with torch.enable_grad() if fuse else kernels.off():
            outputs = []
            for _ in range(3):
                spikes, state = lif(x, state)
                outputs.append(spikes)
            weighted(outputs, 5).backward()
        assert mem.grad is not None
        assert x.grad is not None
        return mem.grad, x.grad

    own, plain = found(True), found(False)
    assert own[0].abs().max() > 0
    torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-11)


@every_reset
@every_noise
def test_two_futures_of_one_state_both_get_credit(reset: str, noise: str) -> None:
    def found(fuse: bool) -> Tensor:
        lif, x = make("Synaptic", reset, noise), random(2, 4, N).requires_grad_()
        torch.manual_seed(3)
        with torch.enable_grad() if fuse else kernels.off():
            first, *states = lif(x[0], *lif.reset_mem())
            one, *_ = lif(x[1], *states)
            other, *later = lif(2 * x[1], *states)
            last, *_ = lif(x[1], *later)
            weighted([first, one, other, last], 5).backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(found(True), found(False), rtol=1e-9, atol=1e-11)


@every_noise
def test_a_second_backward_pass_gives_the_same_gradient(noise: str) -> None:
    lif, x = make("Leaky", "zero", noise), random(5, 4, N).requires_grad_()
    mem, outputs = lif.reset_mem(), []
    for current in x:
        spikes, mem = lif(current, mem)
        outputs.append(spikes)
    loss = weighted([*outputs, mem], 5)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    loss.backward()
    assert torch.equal(first, second)
    assert torch.equal(first, x.grad)


def test_a_current_that_is_no_number_reaches_the_gradient() -> None:
    current = random(4, N).requires_grad_()
    broken = torch.zeros(N, dtype=torch.float64)
    broken[1] = math.nan
    lif = make()
    spikes, mem = lif(current + broken, lif.reset_mem())
    weighted([spikes, *lif(current + broken, mem)], 5).backward()
    assert current.grad is not None
    assert current.grad[:, 1].isnan().all()
    assert current.grad[:, 2:].isfinite().all()


def test_one_neuron_may_serve_layers_of_several_sizes(calls: list[int]) -> None:
    lif, x = with_credit(slr.Leaky(0.9, noise=True).double()), random(4, 3).requires_grad_()

    def found() -> Tensor:
        torch.manual_seed(3)
        small, _ = lif(x, lif.reset_mem())
        large, _ = lif(small.repeat(1, 500) * x.repeat(1, 500), torch.zeros(()))
        return torch.autograd.grad(weighted([small, large], 5), x)[0]

    own = found()
    assert calls == [1, 1]
    with kernels.off():
        torch.testing.assert_close(own, found(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["threshold", "beta"])
def test_constants_that_change_between_presentations_are_followed(in_place: bool, name: str, calls: list[int]) -> None:
    def found(fuse: bool) -> list[dict[str, Tensor]]:
        lif, record = with_credit(slr.Leaky(0.9, noise=True).double()), []
        for _ in range(2):
            record.append(gradients(lif, random(3, 4, N), fuse=fuse))
            if in_place:
                getattr(lif, name).mul_(0.5)
            else:
                setattr(lif, name, getattr(lif, name) / 2)
        return record

    own, plain = found(True), found(False)
    assert len(calls) == 6
    for first, second in zip(own, plain, strict=True):
        assert_same(first, second, rtol=1e-9, atol=1e-11)
    assert not torch.equal(own[0]["weight"], own[1]["weight"])


@every_noise
@pytest.mark.parametrize("name", ["threshold", "beta", "sigma"])
@pytest.mark.parametrize("in_place", [False, True])
def test_constants_that_change_between_time_steps_are_followed(name: str, in_place: bool, noise: str) -> None:
    def found(fuse: bool) -> tuple[Tensor, Tensor]:
        lif, x, outputs = with_credit(slr.Leaky(0.9, noise=NOISES[noise]()).double()), random(4, 4, N), []
        x.requires_grad_()
        torch.manual_seed(3)
        mem = lif.reset_mem()
        with torch.enable_grad() if fuse else kernels.off():
            for current in x:
                spikes, mem = lif(current, mem)
                outputs.append(spikes)
                if name == "sigma":
                    lif.noise.annealed = lif.noise.annealed / 2
                elif in_place:
                    getattr(lif, name).mul_(0.5)
                else:
                    setattr(lif, name, getattr(lif, name) / 2)
            weighted([*outputs, mem], 5).backward()
        assert x.grad is not None
        return torch.stack(outputs).detach(), x.grad

    own, plain = found(True), found(False)
    assert torch.equal(own[0], plain[0])
    # Where leaks change, torch takes over, and the credit of resets begins anew.
    if name != "beta":
        torch.testing.assert_close(own[1], plain[1], rtol=1e-9, atol=1e-11)


def test_another_constant_is_not_taken_for_one_that_is_gone() -> None:
    lif = slr.Leaky(0.9, noise=True)
    for _ in range(50):
        levels = []
        lif.threshold = torch.tensor(1.0)
        for value in (1.0, 2.0, 3.0):
            lif.threshold = torch.tensor(value)
            if value != 2:
                plan = fused.Plan.of(lif, torch.Size((2, 3)), torch.float32, torch.device("cpu"))
                assert plan is not None
                levels.append(float(plan.steps._kept[3][0]))
        assert levels == [1.0, 3.0]


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device, were the tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "nonzero", "masked_select"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@every_noise
@pytest.mark.parametrize("sequence", [False, True], ids=["loop", "rollout"])
def test_the_host_reads_nothing_on_the_way_there_and_back(
    noise: str, sequence: bool, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    # Keys come from a generator of the host.
    monkeypatch.setattr(fused, "new_keys", lambda count, generator, device: torch.arange(count))
    net, x = stack("Leaky", "zero", noise, output=False), random(3, 4, 6)

    def step() -> HostReads:
        with HostReads() as reads:
            # They read the memory of a CPU, and the dispatcher never hears of it.
            for name in ("tolist", "numpy"):
                monkeypatch.setattr(Tensor, name, lambda self, name=name: reads.names.append(name))
            slr.reset(net)
            outputs = slr.rollout(net, x) if sequence else torch.stack([net(current) for current in x])
            weighted([outputs], 5).backward()
        return reads

    # A factor of spikes is looked at once.
    assert step().names
    assert not step().names
    assert calls == ([3, 3] if sequence else [1] * 6) * 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_not_waited_for() -> None:
    net = stack("Leaky", "zero", "escape", output=False).float().cuda()
    x = random(3, 4, 6).float().cuda()
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            slr.rollout(net, x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_states_of_earlier_steps_are_let_go() -> None:
    lif, x = make(), random(4, N).requires_grad_()
    # Of tests before, which errors hold.
    before = {id(each) for each in gc.get_objects() if type(each) is fused.State}
    mem, total = lif.reset_mem(), torch.zeros(())
    for _ in range(9):
        spikes, mem = lif(x, mem)
        total = total + spikes.sum()
    held = [each for each in gc.get_objects() if type(each) is fused.State and id(each) not in before]
    assert 0 < len(held) <= 2


def test_a_threshold_that_begins_to_be_learned_gets_its_gradient() -> None:
    neuron = slr.Leaky(beta=0.9, threshold=0.5, learn_threshold=True, init_hidden=True, noise="escape")
    neuron.threshold.requires_grad_(False)
    slr.use_gradient(neuron)
    for learned in (False, True):
        neuron.threshold.requires_grad_(learned)
        slr.reset(neuron)
        sum(neuron(torch.rand(4, 3)).sum() for _ in range(3)).backward()
        assert (neuron.threshold.grad is not None) == learned


@every_neuron
@every_reset
@every_noise
def test_scores_of_fused_time_steps_are_those_of_torch(neuron: str, reset: str, noise: str, calls: list[int]) -> None:
    def found(fuse: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, N), make(neuron, reset, noise), nn.Linear(N, 3)).double()

        def losses(x: Tensor, y: Tensor) -> Tensor:
            states, total = initial_states(net[1]), torch.zeros(()).double()
            for step in range(4):
                spikes, *states = net[1](net[0](x[:, step]), *states)
                # What membrane potentials say beside their spikes has an ordinary gradient.
                total = total + net[2](spikes).sin() + sum(state[:, :3] for state in states)
            return (total - y).square().mean(1)

        with torch.enable_grad() if fuse else kernels.off():
            slr.Vanilla(net, copies=3, seed=4).backward(losses, random(6, 4, 5), random(6, 3, seed=2))
        return {name: parameter.grad for name, parameter in net.named_parameters()}  # type: ignore[misc]

    assert_same(found(True), found(False), rtol=1e-9, atol=1e-11)
    # The first call looks at what enters the loss before.
    assert calls.count(1) == len(calls) >= 4


@every_neuron
@every_reset
@every_noise
def test_noise_without_a_graph_is_that_of_torch(neuron: str, reset: str, noise: str, calls: list[int]) -> None:
    @torch.no_grad()
    def found(fuse: bool) -> list[Tensor]:
        lif, outputs = make(neuron, reset, noise), []
        states = initial_states(lif)
        torch.manual_seed(3)
        with torch.no_grad() if fuse else kernels.off():
            for current in random(4, 5, N):
                spikes, *states = lif(current, *states)
                outputs += [spikes, *states]
        return outputs

    fused_outputs = found(True)
    assert calls == [1] * 4
    assert_same(dict(enumerate(fused_outputs)), dict(enumerate(found(False))), rtol=1e-9, atol=1e-11)


METHODS: dict[str, Callable[..., Tensor]] = {
    "_base_state_function": lambda self, x: 0.5 * slr.Leaky._base_state_function(self, x),
    "fire": lambda self, mem: slr.Leaky.fire(self, mem - 0.3),
    "mem_reset": lambda self, mem: 0.5 * slr.Leaky.mem_reset(self, mem),
    "of_no_time_step": lambda self: torch.zeros(()),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_class_of_the_users_own_runs_its_own_time_step(name: str, calls: list[int]) -> None:
    neuron = type("Own", (slr.Leaky,), {name: METHODS[name]})

    def lif() -> NoisyNeuron:
        return with_credit(neuron(beta=0.8, noise=slr.MembraneNoise(0.3)).double())

    assert_same(gradients(lif(), random(4, 5, N)), gradients(lif(), random(4, 5, N), fuse=False), rtol=1e-9, atol=1e-11)
    assert bool(calls) == (name == "of_no_time_step")


def test_a_method_that_was_put_into_a_neuron_is_called(calls: list[int]) -> None:
    lif = make()
    fire = lif.fire
    lif.fire = lambda mem: fire(mem - 5)
    assert not lif(torch.zeros(2, N).double(), torch.zeros(2, N).double())[0].any()
    assert not calls


def test_levels_that_were_changed_without_a_trace_go_for_the_next_presentation() -> None:
    def spikes(lif: NoisyNeuron) -> Tensor:
        torch.manual_seed(3)
        found: Tensor = lif(random(4, N), lif.reset_mem())[0]
        return found

    lif = make()
    before = spikes(lif)
    assert lif.noise is not None
    # As libraries for moving averages do; no version counts it.
    lif.noise.log_sigma.data.fill_(3.0)
    with kernels.off():
        expected = spikes(lif)
    assert not torch.equal(before, expected)
    assert torch.equal(spikes(lif), expected)


def test_a_state_of_another_neuron_does_not_bring_its_constants_along() -> None:
    def found(fuse: bool) -> list[Tensor]:
        first, second = make(), make("Lapicque")
        second.sampler = first.sampler
        torch.manual_seed(3)
        with torch.enable_grad() if fuse else kernels.off():
            _, mem = first(random(4, N), first.reset_mem())
            spikes, mem = second(random(4, N, seed=2), mem)
        return [spikes.detach(), mem.detach()]

    assert_same(dict(enumerate(found(True))), dict(enumerate(found(False))), rtol=1e-9, atol=1e-11)
