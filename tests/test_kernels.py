"""Fused time steps against those that torch computes, and the memory that they write to."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.estimators.packing import pack, unpack
from snntorch_lr.estimators.recording import Copies, Recording, Step
from snntorch_lr.estimators.shadows import Continuation
from snntorch_lr.estimators.storing import StoringStep
from snntorch_lr.kernels import memory
from snntorch_lr.noise_stream import NoiseStream

from .helpers import assert_same, gradients, initial_states

numba = pytest.importorskip("numba")

NOISES = {
    **{
        f"escape, {each}": lambda each=each: slr.EscapeNoise(0.4, distribution=each)
        for each in ("logistic", "gaussian")
    },
    **{
        f"membrane, {each}": lambda each=each: slr.MembraneNoise(0.4, distribution=each)
        for each in ("gaussian", "laplace", "logistic")
    },
}
SOME_NOISES = ["escape, logistic", "membrane, gaussian"]
ESTIMATORS: dict[str, Callable[[nn.Module], slr.Estimator]] = {
    "vanilla": lambda net: slr.Vanilla(net, 4, seed=3),
    # Without a baseline, against which constants in a score would vanish.
    "replay": lambda net: slr.Vanilla(net, 4, baseline="none", memory="replay", seed=3),
    "chunks, antithetic": lambda net: slr.Vanilla(net, 4, chunk=3, antithetic=True, seed=3),
    "approximate": lambda net: slr.Approximate(net, 4, seed=3),
    "rates": lambda net: slr.Counterfactual(net, 2, shadows=2, seed=3),
}


# Two of each class, the second with numbers of its own for each neuron.
NEURONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Leaky": (partial(slr.Leaky, 0.9), partial(slr.Leaky, torch.linspace(0.5, 0.9, 20))),
    "Lapicque": (partial(slr.Lapicque, R=2.0, C=3, time_step=0.5), partial(slr.Lapicque, 0.8)),
    "Synaptic": (
        partial(slr.Synaptic, 0.8, 0.9),
        partial(slr.Synaptic, torch.linspace(0.3, 0.7, 20), torch.linspace(0.5, 0.9, 20)),
    ),
}


class Net(nn.Module):
    """Two layers of neurons, with a current that is constant or not."""

    def __init__(self, noise: Callable[[], Any], reset: str, changes: bool, neuron: str = "Leaky") -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = NEURONS[neuron]
        self.fc1, self.lif1 = nn.Linear(12, 30), first(reset_mechanism=reset, noise=noise())
        self.fc2, self.lif2 = nn.Linear(30, 20), second(threshold=0.7, reset_mechanism=reset, noise=noise())
        self.readout = nn.Linear(20, 4)
        self.changes = changes
        self.num_steps = 6
        self.reads_states = False

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        states1, states2, total = initial_states(self.lif1), initial_states(self.lif2), torch.zeros(())
        current = self.fc1(x)
        for step in range(self.num_steps):
            # Twice each, so that a current comes again after another one.
            current = self.fc1(x * (1 + 0.3 * step)) if self.changes and step % 2 == 0 else current
            spikes, *states1 = self.lif1(current, *states1)
            spikes, *states2 = self.lif2(2 * self.fc2(spikes), *states2)
            total = total + self.readout(spikes)
        if self.reads_states:
            total = total + sum(states1)[:, :4] + sum(states2)[:, :4]
        return nn.functional.cross_entropy(total, y, reduction="none")


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.rand(7, 12, dtype=dtype, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 4


# What is done with noise is the same for all neurons.
PAIRS = [(neuron, noise) for neuron in NEURONS for noise in (NOISES if neuron == "Leaky" else SOME_NOISES)]


@pytest.mark.parametrize(
    ("dtype", "changes"), [(torch.float32, True), (torch.float64, True), (torch.float64, False)], ids=str
)
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("neuron", "noise"), PAIRS)
def test_a_fused_gradient_is_that_of_torch(
    neuron: str, noise: str, estimator: str, reset: str, changes: bool, dtype: torch.dtype
) -> None:
    def found() -> dict[str, Tensor]:
        net = Net(NOISES[noise], reset, changes, neuron).to(dtype)
        own = ESTIMATORS[estimator](net)
        for _ in range(2):
            loss = own.backward(net.loss, *data(dtype))
        return gradients(net) | {"loss": loss}

    fused = found()
    with kernels.off():
        plain = found()
    # In single precision sums over copies and time cancel.
    allowed = 1e-4 if dtype == torch.float32 else 1e-9
    for name, value in plain.items():
        assert (fused[name] - value).abs().max() <= allowed * value.abs().max(), name


@pytest.mark.parametrize("changes", [False, True], ids=["constant", "changing"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("noise", SOME_NOISES)
@pytest.mark.parametrize("neuron", NEURONS)
def test_a_known_graph_is_the_one_that_snntorch_builds(
    neuron: str, noise: str, estimator: str, reset: str, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> dict[str, Tensor]:
        net = Net(NOISES[noise], reset, changes, neuron).double()
        # Other estimators keep sums of the states at most.
        net.reads_states = isinstance(own := ESTIMATORS[estimator](net), slr.Vanilla)
        own.backward(net.loss, *data(torch.float64))
        return gradients(net)

    known = found()
    monkeypatch.setattr(getattr(slr, neuron), "known_updates", ())
    assert_same(known, found(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["R", "C"])
def test_what_a_known_update_takes_may_be_learned_by_hand(name: str) -> None:
    net = Net(NOISES["escape, logistic"], "subtract", False, "Lapicque").double()
    setattr(net.lif1, name, nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
    slr.Vanilla(net, 4, seed=0).backward(net.loss, *data(torch.float64))
    assert getattr(net.lif1, name).grad.abs() > 0


@pytest.mark.parametrize("neuron", NEURONS)
def test_neurons_are_fused_where_they_can_be(neuron: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from snntorch_lr.kernels import cpu

    calls = []
    step = cpu.step
    monkeypatch.setattr(cpu, "step", lambda *args, **named: (calls.append(1), step(*args, **named)))
    net = Net(NOISES["escape, logistic"], "subtract", False, neuron)
    slr.Vanilla(net, 2, seed=0).backward(net.loss, *data(torch.float32))
    assert len(calls) >= 12
    calls.clear()
    net.lif1 = slr.Leaky(0.9, learn_beta=True, noise=True)
    net.lif2 = slr.Alpha(0.9, 0.8, init_hidden=True, noise=True)
    loss = lambda x, y: net.lif2(net.fc2(net.lif1(net.fc1(x), net.lif1.reset_mem())[0])).sum(1)  # noqa: E731
    slr.Vanilla(net, 2, seed=0).backward(loss, *data(torch.float32))
    assert not calls


@pytest.mark.parametrize("noise", [name for name in NOISES if name.startswith("escape")])
def test_a_current_that_is_no_number_reaches_the_gradient(noise: str) -> None:
    made = NOISES[noise]()
    made.log_sigma.requires_grad_(False)
    lif, readout = slr.Leaky(0.9, noise=made), nn.Linear(3, 2)
    current = torch.rand(4, 3).requires_grad_()
    broken = torch.tensor([[0.0, math.nan, 0.0]])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        mem, total = lif.reset_mem(), torch.zeros(())
        entering = current + broken
        for _ in range(3):
            spikes, mem = lif(entering, mem)
            total = total + readout(spikes)
        return nn.functional.cross_entropy(total, y, reduction="none")

    net = nn.ModuleList([lif, readout])
    estimators = (slr.Vanilla(net, 4), slr.Approximate(net, 4), slr.Counterfactual(net, 2))
    for own in estimators:
        own.backward(loss, torch.rand(4, 3), torch.arange(4) % 2)
        assert current.grad is not None
        assert current.grad[:, 1].isnan().all()
        assert current.grad[:, ::2].isfinite().all()
        current.grad = None


def test_one_neuron_may_serve_layers_of_several_sizes() -> None:
    def found() -> dict[str, Tensor]:
        torch.manual_seed(0)
        lif, small, large, readout = (
            slr.Leaky(0.9, noise=True),
            nn.Linear(12, 3),
            nn.Linear(3, 5000),
            nn.Linear(5000, 2),
        )
        net = nn.ModuleList([lif, small, large, readout]).double()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            first, _ = lif(small(x), lif.reset_mem())
            second, _ = lif(9 * large(first), torch.zeros(()))
            return nn.functional.cross_entropy(readout(second), y % 2, reduction="none")

        slr.Vanilla(net, 4, seed=0).backward(loss, *data(torch.float64))
        return gradients(net)

    fused = found()
    with kernels.off():
        assert_same(fused, found(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_threshold_that_changes_in_the_loop_is_followed(in_place: bool) -> None:
    def found() -> dict[str, Tensor]:
        net = Net(NOISES["escape, logistic"], "subtract", False).double()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            net.lif1.threshold = torch.tensor(1.0, dtype=torch.float64)
            mem, total, current = net.lif1.reset_mem(), torch.zeros(()), net.fc1(x)
            for _ in range(4):
                spikes, mem = net.lif1(current, mem)
                total = total + net.readout(spikes[:, :20])
                if in_place:
                    net.lif1.threshold.mul_(0.5)
                else:
                    net.lif1.threshold = net.lif1.threshold / 2
            return nn.functional.cross_entropy(total, y, reduction="none")

        slr.Vanilla(net, 4, seed=0).backward(loss, *data(torch.float64))
        return gradients(net)

    fused = found()
    with kernels.off():
        assert_same(fused, found(), rtol=1e-9, atol=1e-12)


def test_a_derived_step_that_samples_by_itself_is_not_fused() -> None:
    class Own(StoringStep):
        def sample(self, noise: Any, mean: Tensor) -> Tensor:
            return mean

    class Unchanged(StoringStep):
        pass

    assert not Own.fuses
    assert Unchanged.fuses
    assert Step.fuses


# One njit function for each, because nothing of them can be called from Python.
def mapped(name: str) -> Callable[[np.ndarray], np.ndarray]:
    from snntorch_lr.kernels import numba_numbers

    function = getattr(numba_numbers, name)

    @numba.njit(**numba_numbers.OPTIONS)
    def apply(x: Any) -> Any:
        out = np.empty_like(x)
        for i in range(len(x)):
            out[i] = function(x[i])
        return out

    return apply


def test_errors_of_polynomials_are_as_stated() -> None:
    special = torch.special
    x = np.linspace(-87, 0, 400_001, dtype=np.float32)
    assert np.abs(mapped("exp")(x) / np.exp(x.astype(np.float64)) - 1).max() < 1e-6
    x = np.geomspace(2.0**-25, 2, 400_001).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    assert (np.abs(mapped("_log")(x) - exact) <= 2e-7 * np.maximum(np.abs(exact), 1)).all()
    z = np.linspace(-40, 40, 400_001, dtype=np.float32)
    assert np.abs(mapped("half_tanh")(z) - np.tanh(z.astype(np.float64) / 2)).max() < 3e-7
    ends = np.arange(-(2**23), -(2**23) + 1000)
    k = np.concatenate([ends, np.linspace(-(2**23), 2**23 - 1, 300_001).astype(np.int64)])
    u = ((k + 0.5) / 2.0**23).astype(np.float32)
    exact = special.erfinv(torch.from_numpy(u).double()).numpy() * math.sqrt(2)
    assert np.abs(mapped("_normal_quantile")(u) / exact - 1).max() < 2e-6


def test_compiled_code_is_not_taken_from_the_cache_if_another_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snntorch_lr.kernels import numba_steps

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    hits = [numba_steps.pack(np.float32).cache_hits for _ in range(2)]
    monkeypatch.setattr(numba_steps, "_SOURCES", numba_steps._SOURCES + 1)
    assert [*hits, numba_steps.pack(np.float32).cache_hits] == [0, 1, 0]


def test_errors_of_the_normal_distribution_are_as_stated() -> None:
    from snntorch_lr.kernels import numba_numbers

    @numba.njit(**numba_numbers.OPTIONS)
    def apply(z: Any) -> Any:
        density, tail, mills = np.empty_like(z), np.empty_like(z), np.empty_like(z)
        for i in range(len(z)):
            density[i], tail[i], mills[i] = numba_numbers.normal(z[i])
        return density, tail, mills

    z = np.linspace(-13, 13, 200_001, dtype=np.float32)
    density, tail, mills = apply(z)
    x = torch.from_numpy(z).double().abs()
    exact = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    # The square of a number of single precision is as exact as it is.
    room = 2e-6 + 2**-23 * x.square().numpy()
    assert (np.abs(density / exact.numpy() - 1) < room).all()
    ratio = (math.sqrt(math.pi / 2) * torch.special.erfcx(x / math.sqrt(2))).numpy()
    assert np.abs(mills / ratio - 1).max() < 2e-6
    assert (np.abs(tail / (exact.numpy() * ratio) - 1) < 2 * room).all()


@pytest.mark.parametrize("count", [1, 7, 8, 1000, 70_001])
def test_bits_are_those_of_torch(count: int) -> None:
    spikes = (torch.rand(count) > 0.5).float()
    bits = pack(spikes)
    assert torch.equal(unpack(bits, spikes.shape, torch.float32), spikes)
    with kernels.off():
        assert torch.equal(pack(spikes), bits)
        assert torch.equal(unpack(bits, spikes.shape, torch.float32), spikes)


def test_memory_is_given_out_again_only_when_nobody_holds_it() -> None:
    pool = memory.Pool()
    first = pool.empty((1 << 15,), torch.float32)
    place, view = first.data_ptr(), first[5:9]
    del first
    assert pool.empty((1 << 15,), torch.float32).data_ptr() != place
    saved = (view * torch.ones(4, requires_grad=True)).grad_fn
    del view
    assert pool.empty((1 << 15,), torch.float32).data_ptr() != place
    del saved
    assert place in {each.data_ptr() for each in [pool.empty((1 << 15,), torch.float32) for _ in range(3)]}


def test_a_pool_lets_go_of_what_nobody_asks_for() -> None:
    pool = memory.Pool()
    pool.empty((1 << 15,), torch.float32)
    for _ in range(memory.Pool.patience):
        pool.trim()
    assert pool._free
    pool.trim()
    assert not pool._free
    assert pool.empty((1 << 15,), torch.float32).numel() == 1 << 15


def test_a_pool_keeps_some_blocks_of_each_size() -> None:
    pool = memory.Pool()
    held = [pool.empty((1 << 15,), torch.float32) for _ in range(2 * pool.most)]
    held.clear()
    assert [len(free) for free in pool._free.values()] == [pool.most]


def test_pieces_of_a_slab_do_not_overlap() -> None:
    slab = memory.Slab()
    pieces = [slab.empty(size).fill_(index) for index, size in enumerate((5, 300_000, 800_000, 2_000_000, 7))]
    assert all(bool((piece == index).all()) for index, piece in enumerate(pieces))


def test_states_of_earlier_steps_are_let_go() -> None:
    net = Net(NOISES["escape, logistic"], "subtract", True)
    counts = []
    # Of tests before, which errors hold.
    others = {id(each) for each in gc.get_objects() if type(each) is Continuation}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        counts.append(sum(type(each) is Continuation and id(each) not in others for each in gc.get_objects()))
        return losses

    slr.Counterfactual(net, 1, seed=0).backward(loss, *data(torch.float32))
    assert 0 < counts[-1] <= 4


def test_a_recording_of_some_samples_repeats_these() -> None:
    lif = slr.Leaky(0.9, noise=True)
    copies = Copies({"lif": lif}, NoiseStream(0, 2, 0, 2), 6, first_samples=3)
    with Recording(copies) as recording, torch.no_grad():
        # Three samples in two copies would be as many rows as there are samples.
        assert recording.batch == 2
        x = torch.rand(6, 5)
        spikes, mem = lif(x, torch.arange(30.0).view(6, 5))
        assert spikes.shape == mem.shape == (4, 5)
        assert torch.equal(slr.per_copy(x), x[:2].repeat(2, 1))
        assert lif(spikes, mem)[0].shape == (4, 5)


def test_importing_the_package_does_not_import_numba() -> None:
    code = "import sys, snntorch_lr; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_numba_torch_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, Tensor]:
        net = Net(NOISES["escape, logistic"], "subtract", False)
        slr.Vanilla(net, 4, seed=3).backward(net.loss, *data(torch.float32))
        return gradients(net)

    fused = found()
    monkeypatch.setattr(kernels, "_load", lambda device: None)
    assert_same(found(), fused, rtol=3e-5, atol=1e-6)
