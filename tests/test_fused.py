"""Fused time steps against the node that torch computes, step by step and in sequences cut anywhere."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.gradients import CounterfactualCredit, fused
from snntorch_lr.noisy_neuron import NoisyNeuron

from .helpers import RESETS, assert_same, every_noise, initial_states

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
every_input = pytest.mark.parametrize("constant", [True, False], ids=["constant", "changing"])


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


def weighted(outputs: Any, seed: int = 5) -> Tensor:
    """A loss of outputs that depends on each number."""
    parts = [(output * random(*output.shape, seed=seed + i).to(output)).sum() for i, output in enumerate(outputs)]
    return torch.stack(parts).sum()


def both_ways(give: Callable[[], Any]) -> tuple[Any, Any]:
    """What a function gives by fused time steps, and by those of torch, with the same noise."""
    results = []
    for fuse in (True, False):
        torch.manual_seed(3)
        with nullcontext() if fuse else kernels.off():
            results.append(give())
    return results[0], results[1]


def assert_alike(give: Callable[[], Any]) -> None:
    torch.testing.assert_close(*both_ways(give), rtol=1e-9, atol=1e-11)


def gradients(lif: NoisyNeuron, x: Tensor, steps: int = 0, reads: bool = False) -> dict[str, Tensor]:
    """Of a loss of all spikes, and of the states in each step, from ``[time, batch, ...]``, or ``[batch, ...]``."""
    weight = (random(x.shape[-1], x.shape[-1], seed=2) / x.shape[-1] ** 0.5).to(x.dtype).requires_grad_()
    assert lif.noise is not None
    lif.noise.log_sigma.grad = None
    states, total, current = initial_states(lif), torch.zeros(()), 0.3 + x @ weight
    for step in range(steps or len(x)):
        outputs = lif(current if steps else current[step], *states)
        states = outputs[1:]
        total = total + weighted(outputs if reads else outputs[:1], 7 * step)
    total.backward()
    assert weight.grad is not None
    return {"loss": total.detach(), "weight": weight.grad, "sigma": lif.noise.log_sigma.grad}


@pytest.mark.parametrize("reads", [False, True], ids=["spikes", "spikes and states"])
@every_neuron
@every_reset
@every_noise
def test_fused_time_steps_are_those_of_torch(
    neuron: str, reset: str, noise: str, reads: bool, calls: list[int]
) -> None:
    def give() -> dict[str, Tensor]:
        lif = make(neuron, reset, noise)
        return gradients(lif, random(4, 5, N), reads=reads) | {"fitted": lif.control.pending}

    assert_alike(give)
    assert calls == [1] * 4


@every_neuron
@every_reset
@every_noise
def test_single_precision_is_as_exact_as_what_is_kept_in_two_bytes(neuron: str, reset: str, noise: str) -> None:
    x = random(6, 64, N).float()
    own, exact = both_ways(lambda: gradients(make(neuron, reset, noise).float(), x, reads=True)["weight"])
    assert 1e-6 < (own - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 3), (2, 1025), (2, 3, 2, 2)], ids=str)
@every_noise
def test_rows_of_any_size(noise: str, shape: tuple[int, ...]) -> None:
    assert_alike(lambda: gradients(make("Lapicque", "zero", noise), random(2, *shape), reads=True))


def test_any_number_of_threads_gives_the_same_numbers(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(3)
        results.append(gradients(make("Synaptic", "zero"), random(3, 29, N), reads=True))
    for other in results[1:]:
        # Sums over rows are added in another order.
        assert_same(results[0], other, rtol=1e-12, atol=1e-13)
        assert torch.equal(results[0]["loss"], other["loss"])


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
@every_input
def test_a_sequence_is_a_loop(neuron: str, reset: str, noise: str, constant: bool, calls: list[int]) -> None:
    def numbers(loop: bool) -> dict[str, Any]:
        output = noise == "escape"
        net = stack(neuron, reset, noise, output)
        x = random(*(() if constant else (5,)), 4, 6).requires_grad_()
        if loop:
            record = [net(x if constant else x[step]) for step in range(5)]
            outputs = tuple(map(torch.stack, zip(*record, strict=True))) if output else (torch.stack(record),)
        else:
            outputs = slr.rollout(net, x, 5 if constant else None)
            outputs = outputs if output else (outputs,)
        weighted(outputs).backward()
        return {"input": x.grad, "outputs": [part.detach() for part in outputs]} | {
            name: parameter.grad for name, parameter in net.named_parameters()
        }

    sequence = numbers(loop=False)
    assert calls == [5, 5]
    torch.testing.assert_close(sequence, numbers(loop=True), rtol=1e-10, atol=1e-12)


def begin(lif: NoisyNeuron, states: dict[str, Tensor], fired: Tensor | None = None) -> fused.State:
    torch.manual_seed(3)
    plan = fused.Plan.of(lif, torch.Size((3, N)), torch.float64, torch.device("cpu"))
    assert plan is not None
    return fused.begin(plan, lif, states, fired, lif.sampler._present(lif))  # type: ignore[union-attr]


@every_reset
@every_noise
@every_input
@pytest.mark.parametrize("pieces", [(2, 3), (1, 1, 3), (None, 4), (4, None)], ids=str)
def test_a_sequence_may_be_cut_anywhere(reset: str, noise: str, constant: bool, pieces: tuple[Any, ...]) -> None:
    def numbers(pieces: tuple[int | None, ...]) -> dict[str, Tensor]:
        lif, current = make("Synaptic", reset, noise), random(*(() if constant else (5,)), 3, N).requires_grad_()
        states = {"syn": random(3, N, seed=8), "mem": random(3, N, seed=9)}
        state = begin(lif, states, (random(3, N, seed=10) > 0).double())
        record, start = [], 0
        for steps in pieces:
            entering = current if constant else current[start : start + (steps or 1)]
            entering = entering if constant or steps else entering[0]
            state, *outputs = fused.advance(state, lif, entering, steps, all_states=True)
            record.append([output if steps else output.unsqueeze(0) for output in outputs])
            start += steps or 1
        weighted([torch.cat(part) for part in zip(*record, strict=True)]).backward()
        assert current.grad is not None
        return {"current": current.grad, "sigma": lif.noise.log_sigma.grad, "mem": state.mem, "shadow": state.shadow}

    assert_same(numbers(pieces), numbers((5,)), rtol=1e-11, atol=1e-13)


def test_the_last_states_alone_may_be_handed_out() -> None:
    def gradient(all_states: bool) -> Tensor:
        lif, current = make(), random(4, 3, N).requires_grad_()
        state = begin(lif, {"mem": torch.zeros(3, N).double()})
        _, spikes, mem, _ = fused.advance(state, lif, current, 4, all_states)
        return torch.autograd.grad(weighted((spikes, mem[-1] if all_states else mem)), current)[0]

    assert torch.equal(gradient(True), gradient(False))


@every_input
def test_currents_need_not_be_contiguous(constant: bool) -> None:
    x = random(N, 5).t() if constant else random(N, 5, 3).permute(2, 1, 0)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        lif, outputs, mem = make(), [], torch.zeros(())
        torch.manual_seed(3)
        for step in range(3):
            spikes, mem = lif(x if constant else x[step], mem)
            outputs.append(spikes)
        return torch.autograd.grad(weighted(outputs), x)[0]

    assert not x.is_contiguous()
    assert torch.equal(gradient(x), gradient(x.contiguous()))


def own(name: str, method: Callable[..., Tensor]) -> NoisyNeuron:
    """A neuron of a user's class, which overrides a method or has another one."""
    neuron: NoisyNeuron = type("Own", (slr.Leaky,), {name: method})(0.8, noise=True)
    return neuron


TORCHS: dict[str, Callable[[], NoisyNeuron]] = {
    "learned beta": lambda: slr.Leaky(0.8, learn_beta=True, noise=True),
    "learned threshold": lambda: slr.Leaky(0.8, learn_threshold=True, noise=True),
    "reset at once": lambda: slr.Leaky(0.8, reset_delay=False, noise=True),
    "quantised": lambda: slr.Leaky(0.8, state_quant=lambda mem: mem.mul(8).round().div(8), noise=True),
    "Alpha": lambda: slr.Alpha(0.9, 0.8, noise=True),
    "another noise": lambda: slr.Leaky(0.8, noise=slr.EscapeNoise(distribution="gaussian")),
    "own update": lambda: own("_base_state_function", lambda self, x: 0.5 * slr.Leaky._base_state_function(self, x)),
    "own spikes": lambda: own("fire", lambda self, mem: slr.Leaky.fire(self, mem - 0.3)),
    "own reset": lambda: own("mem_reset", lambda self, mem: 0.5 * slr.Leaky.mem_reset(self, mem)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", [*TORCHS, "one more method"])
def test_what_kernels_do_not_know_is_computed_by_torch(name: str, dtype: torch.dtype, calls: list[int]) -> None:
    is_known = name not in TORCHS and dtype == torch.float64
    make_neuron = TORCHS.get(name, lambda: own("of_no_time_step", lambda self: torch.zeros(())))
    results = both_ways(lambda: gradients(with_credit(make_neuron().to(dtype)), random(3, 4, N).to(dtype)))
    assert_same(*results, **({"rtol": 1e-9, "atol": 1e-11} if is_known else {}))
    assert bool(calls) == is_known


def test_a_method_that_was_put_into_a_neuron_is_called(calls: list[int]) -> None:
    lif = make()
    fire = lif.fire
    lif.fire = lambda mem: fire(mem - 5)
    assert not lif(torch.zeros(2, N).double(), torch.zeros(2, N).double())[0].any()
    assert not calls


def numbers_of(outputs: list[Tensor], learned: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradient of what was learned."""
    by_learned = torch.autograd.grad(weighted(outputs), learned) if learned else ()
    return [*(output.detach() for output in outputs), *by_learned]


def learned_first_state(noise: str, reset: str) -> tuple[list[Tensor], list[Tensor]]:
    lif, mem, x = make("Leaky", reset, noise), random(4, N, seed=2).requires_grad_(), random(4, N).requires_grad_()
    spikes, state = lif(x, mem)
    return [spikes, *lif(x, state)], [mem, x]


def two_futures(noise: str, reset: str) -> tuple[list[Tensor], list[Tensor]]:
    lif, x = make("Synaptic", reset, noise), random(2, 4, N).requires_grad_()
    first, *states = lif(x[0], *lif.reset_mem())
    one, *_ = lif(x[1], *states)
    other, *later = lif(2 * x[1], *states)
    last, *_ = lif(x[1], *later)
    return [first, one, other, last], [x]


def layers_of_two_sizes(noise: str, reset: str) -> tuple[list[Tensor], list[Tensor]]:
    lif, x = make("Lapicque", reset, noise), random(4, 3).requires_grad_()
    small, _ = lif(x, lif.reset_mem())
    large, _ = lif(small.repeat(1, 500) * x.repeat(1, 500), torch.zeros(()))
    return [small, large], [x]


def state_of_another_neuron(noise: str, reset: str) -> tuple[list[Tensor], list[Tensor]]:
    first, second, x = make("Leaky", reset, noise), make("Lapicque", reset, noise), random(4, N).requires_grad_()
    second.sampler = first.sampler
    _, mem = first(x, first.reset_mem())
    spikes, mem = second(random(4, N, seed=2), mem)
    # Outputs alone: credit of a state of another neuron ends in one of both, and goes on in the other one.
    return [spikes, mem], []


@pytest.mark.parametrize(
    "present", [learned_first_state, two_futures, layers_of_two_sizes, state_of_another_neuron],
    ids=lambda present: present.__name__,
)  # fmt: skip
@every_reset
@every_noise
def test_presentations_of_another_kind_are_those_of_torch(
    present: Callable[[str, str], tuple[list[Tensor], list[Tensor]]], reset: str, noise: str, calls: list[int]
) -> None:
    assert_alike(lambda: numbers_of(*present(noise, reset)))
    # What is learned is not known to kernels.
    assert bool(calls) == (present is not learned_first_state)


@pytest.mark.parametrize("between", ["time steps", "presentations"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("name", "in_place"),
    [("threshold", True), ("threshold", False), ("beta", True), ("beta", False), ("sigma", False)],
)
def test_constants_that_change_are_followed(
    name: str, in_place: bool, noise: str, between: str, calls: list[int]
) -> None:
    def change(lif: Any) -> None:
        if name == "sigma":
            lif.noise.annealed = lif.noise.annealed / 2
        elif in_place:
            getattr(lif, name).mul_(0.5)
        else:
            setattr(lif, name, getattr(lif, name) / 2)

    def give() -> list[Tensor]:
        lif, x, outputs = with_credit(slr.Leaky(0.9, noise=NOISES[noise]()).double()), random(6, 4, N), []
        x.requires_grad_()
        mem = lif.reset_mem()
        for step, current in enumerate(x):
            spikes, mem = lif(current, mem)
            outputs += [spikes, mem]
            if between == "time steps" or step == 2:
                change(lif)
            if between == "presentations" and step == 2:
                mem = lif.reset_mem()
        # Where leaks change on the way, torch takes over, and the credit of resets begins anew.
        return numbers_of(outputs, [x] if (name, between) != ("beta", "time steps") else [])

    assert_alike(give)
    assert len(calls) == 6 or between == "time steps"


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


def test_levels_that_were_changed_without_a_trace_go_for_the_next_presentation() -> None:
    def spikes(lif: NoisyNeuron) -> Tensor:
        torch.manual_seed(3)
        fired: Tensor = lif(random(4, N), lif.reset_mem())[0]
        return fired

    lif = make()
    before = spikes(lif)
    # As libraries for moving averages do; no version counts it.
    lif.noise.log_sigma.data.fill_(3.0)
    with kernels.off():
        expected = spikes(lif)
    assert not torch.equal(before, expected)
    assert torch.equal(spikes(lif), expected)


def test_states_of_earlier_steps_are_let_go() -> None:
    lif, x = make(), random(4, N).requires_grad_()
    # Of tests before, which errors hold.
    before = {id(thing) for thing in gc.get_objects() if type(thing) is fused.State}
    mem, total = lif.reset_mem(), torch.zeros(())
    for _ in range(9):
        spikes, mem = lif(x, mem)
        total = total + spikes.sum()
    held = [thing for thing in gc.get_objects() if type(thing) is fused.State and id(thing) not in before]
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
    def give() -> dict[str, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, N), make(neuron, reset, noise), nn.Linear(N, 3)).double()

        def losses(x: Tensor, y: Tensor) -> Tensor:
            states, total = initial_states(net[1]), torch.zeros(()).double()
            for step in range(4):
                spikes, *states = net[1](net[0](x[:, step]), *states)
                # What membrane potentials say beside their spikes has an ordinary gradient.
                total = total + net[2](spikes).sin() + sum(state[:, :3] for state in states)
            return (total - y).square().mean(1)

        slr.Vanilla(net, copies=3, seed=4).backward(losses, random(6, 4, 5), random(6, 3, seed=2))
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    assert_alike(give)
    # The first call looks at what enters the loss before.
    assert calls.count(1) == len(calls) >= 4


@every_neuron
@every_reset
@every_noise
def test_noise_without_a_graph_is_that_of_torch(neuron: str, reset: str, noise: str, calls: list[int]) -> None:
    @torch.no_grad()
    def give() -> list[Tensor]:
        lif, outputs = make(neuron, reset, noise), []
        states = initial_states(lif)
        for current in random(4, 5, N):
            spikes, *states = lif(current, *states)
            outputs += [spikes, *states]
        return outputs

    assert_alike(give)
    assert calls == [1] * 4
