from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.distributed import RankError, SingleProcess, share
from snntorch_lr.network import parameters
from snntorch_lr.noise_stream import mix

from .helpers import BATCH, Net, assert_same, data, gradients

RANKS = 2
PATIENCE = 60  # seconds, so that a deadlock fails instead of hanging
METHODS = {
    "store": (slr.Vanilla, {}),
    "replay": (slr.Vanilla, {"memory": "replay"}),
    "chunk": (slr.Vanilla, {"chunk": 2}),
    "replay in chunks": (slr.Vanilla, {"memory": "replay", "chunk": 1}),
    "approximate": (slr.Approximate, {}),
    "counterfactual, rates": (slr.Counterfactual, {}),
    "counterfactual, exact": (slr.Counterfactual, {"over_time": "exact"}),
}
FITTED = [method for method, (made, _) in METHODS.items() if made is slr.Counterfactual]
Result = dict[str, Any]


class Pair:
    """Two processes in a gloo group, which run functions of this module with their rank as first argument."""

    def __init__(self, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, store.as_uri(), there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} does not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=PATIENCE / 2)
    )
    while True:
        function, args = pickle.loads(pipe.recv_bytes())
        try:
            answer = function(rank, *args)
        except Exception as error:
            answer = error
        # Not Connection.send: it would share memory, which ends with this process.
        pipe.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("group") / "store")
    yield made
    made.close()


def failure(function: Callable[[], object]) -> tuple[str, str] | None:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def two_steps(rank: int | None, method: str, noise: str, options: dict[str, Any]) -> Result:
    """Two accumulated gradients on top of ones; alone if there is no rank."""
    net = Net(noise=noise)
    made, settings = METHODS[method]
    estimator = made(net, **{"copies": 5, **settings, **options, "seed": None if rank == 1 else 7})
    if rank is not None:
        if rank == 1:
            nn.init.ones_(net.fc1.weight)
        share(estimator)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    losses = [estimator.backward(net.loss, *data()) for _ in range(2)]
    return {"losses": torch.stack(losses), **gradients(net)}


@pytest.mark.parametrize("noise", ["membrane", "escape"])
@pytest.mark.parametrize("method", METHODS)
def test_split_copies_give_the_gradient_of_one_process(pair: Pair, method: str, noise: str) -> None:
    first, second = pair(two_steps, method, noise, {})
    alone = two_steps(None, method, noise, {})
    assert_same(first, second)
    assert_same(first, alone, rtol=1e-5, atol=1e-6)
    assert all((alone[name] != 1).any() for name in alone)


@pytest.mark.parametrize(
    "options",
    [{"baseline": "batch-mean"}, {"baseline": "none"}, {"antithetic": True, "copies": 6}, {"copies": 2}],
    ids=str,
)
def test_baselines_and_antithetic_pairs_see_all_copies(pair: Pair, options: dict[str, Any]) -> None:
    first, second = pair(two_steps, "store", "membrane", options)
    assert_same(first, second)
    assert_same(first, two_steps(None, "store", "membrane", options), rtol=1e-5, atol=1e-6)


def train(rank: int | None, method: str) -> Result:
    net = Net()
    made, settings = METHODS[method]
    estimator = made(net, copies=4, seed=0, **settings)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    slr.attach(optimizer, net, estimator=estimator if rank is None else share(estimator))
    for _ in range(3):
        optimizer.step(slr.closure(net.loss, *data()))
    return {**net.state_dict(), **getattr(estimator, "control", {})}


@pytest.mark.parametrize("method", ["store", *FITTED])
def test_attached_optimizers_train_alike(pair: Pair, method: str) -> None:
    first, second = pair(train, method)
    assert_same(first, second)
    assert_same(first, train(None, method), rtol=1e-3, atol=1e-4)


def fitted(rank: int | None, method: str, split: str, noise: str) -> dict[str, float]:
    """λ after three steps, of a batch of the rank's own if batches are split."""
    net = Net(noise=noise)
    made, settings = METHODS[method]
    estimator = made(net, copies=3, seed=0, **settings)
    if rank is not None:
        share(estimator, split=split)
    batch = own_batch(rank) if rank is not None and split == "batch" else data()
    for _ in range(3):
        estimator.backward(net.loss, *batch)
    return dict(estimator.control)


@pytest.mark.parametrize("noise", ["membrane", "escape"])
@pytest.mark.parametrize("method", FITTED)
def test_split_copies_fit_the_control_of_one_process(pair: Pair, method: str, noise: str) -> None:
    first, second = pair(fitted, method, "copies", noise)
    assert first == second
    assert first == pytest.approx(fitted(None, method, "copies", noise), rel=1e-4)
    assert set(first.values()) - {0.0, 0.5, 1.0}, "controls at a bound say little"


@pytest.mark.parametrize("method", FITTED)
def test_split_batches_fit_one_control(pair: Pair, method: str) -> None:
    first, second = pair(fitted, method, "batch", "escape")
    assert first == second


class SeedOfRank(SingleProcess):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def seed(self, seed: int) -> int:
        return mix(seed, self.rank)


def own_batch(rank: int) -> tuple[Tensor, Tensor]:
    x, y = data()
    return (x[:2], y[:2]) if rank == 0 else (x[2:], y[2:])


def batches(rank: int, shared: bool, same: bool = False, method: str = "store") -> Result:
    net = Net()
    made, settings = METHODS[method]
    estimator = made(net, copies=3, seed=0, **settings)
    if shared:
        share(estimator, split="batch")
    else:
        estimator.division = SeedOfRank(rank)
    loss = estimator.backward(net.loss, *(data() if same else own_batch(rank)))
    return {"loss": loss, **gradients(net)}


@pytest.mark.parametrize("method", ["store", *FITTED])
def test_split_batch_averages_over_samples(pair: Pair, method: str) -> None:
    first, second = pair(batches, True, False, method)
    parts = [batches(rank, False, False, method) for rank in range(RANKS)]
    expected = {name: (2 * parts[0][name] + 3 * parts[1][name]) / BATCH for name in parts[0]}
    assert_same(first, second)
    assert_same(first, expected, rtol=1e-5, atol=1e-7)


def test_ranks_with_batches_of_their_own_have_different_noise() -> None:
    first, second = (batches(rank, False, same=True) for rank in range(RANKS))
    assert not torch.equal(first["fc1.weight"], second["fc1.weight"])


def some_parameters(rank: int) -> dict[str, Tensor]:
    net = Net()
    net.extra, net.unused = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    net.fc2.bias.requires_grad_(False)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        return losses + 5 * net.extra if rank == 1 else losses

    share(slr.Vanilla(net, copies=3, seed=0), split="batch").backward(loss_fn, *own_batch(rank))
    return gradients(net)


def test_parameters_without_gradient_on_some_rank(pair: Pair) -> None:
    first, second = pair(some_parameters)
    assert_same(first, second)
    torch.testing.assert_close(first["extra"], torch.tensor(5 * 3 / BATCH))
    assert "unused" not in first
    assert "fc2.bias" not in first


def failing(rank: int, method: str, split: str, call: int) -> tuple[Any, Result, Result]:
    """Fails on rank 1 at a call of loss_fn; then what came of it, the gradients, and those of a second attempt."""
    net = Net()
    made, settings = METHODS[method]
    estimator = share(made(net, copies=4, seed=0, **settings), split=split)
    calls = 0

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        losses = net.loss(x, y)
        return losses * torch.nan if rank == 1 and calls == call else losses

    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    error = failure(lambda: estimator.backward(loss_fn, *data()))
    left = gradients(net)
    net.zero_grad()
    estimator.backward(loss_fn, *data())
    return error, left, gradients(net)


@pytest.mark.parametrize("split", ["copies", "batch"])
@pytest.mark.parametrize(
    ("method", "call"), [
        # The first two calls look whether rows are apart, and take no notice of errors.
        ("store", 3), ("replay", 3), ("replay", 5), ("approximate", 4),
        ("counterfactual, rates", 3), ("counterfactual, rates", 4), ("counterfactual, exact", 3),
    ],
)  # fmt: skip
def test_an_error_on_one_rank_is_raised_on_all(pair: Pair, method: str, call: int, split: str) -> None:
    (error, *first), (cause, *second) = pair(failing, method, split, call)
    assert cause[0] == "ValueError"
    assert "not finite" in cause[1]
    assert error == ("RankError", f"rank 1 failed with ValueError: {cause[1]}")
    assert all((gradient == 1).all() for gradient in first[0].values())
    assert_same(first[0], second[0])
    assert_same(first[1], second[1])


def refused(rank: int, what: str) -> tuple[str, str] | None:
    net: Any = Net()
    copies, split, x = 4, "copies", data()
    if what == "few":
        copies = 1
    elif what == "copies":
        copies += rank
    elif what == "shapes":
        net.fc1 = nn.Linear(3, 4, bias=rank == 0)
    elif what == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    elif what == "split":
        split = "layers"
    estimator = slr.Vanilla(net, copies=copies, baseline="none")
    if what == "batches":
        x = data() if rank == 0 else own_batch(1)
    return failure(lambda: share(estimator, split).backward(net.module.loss if what == "ddp" else net.loss, *x))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("few", "1 copies cannot be split over 2 ranks"),
        ("copies", "the ranks disagree"),
        ("shapes", "the ranks disagree"),
        ("ddp", "DistributedDataParallel"),
        ("split", "unknown split 'layers'"),
        ("batches", r"same batch on every rank, but they have \[5, 3\] samples"),
    ],
)
def test_refuses_on_every_rank(pair: Pair, what: str, message: str) -> None:
    for error in pair(refused, what):
        assert error is not None
        with pytest.raises(ValueError, match=message):
            raise {"ValueError": ValueError}[error[0]](error[1])


def test_neurons_in_plain_lists_have_their_gradients_summed_too() -> None:
    net: Any = nn.Linear(3, 3)
    net.neurons = [slr.Leaky(0.9, noise=True, learn_beta=True)]
    lif = net.neurons[0]
    assert {id(p) for p in parameters(net)} == {id(p) for p in (*net.parameters(), lif.beta, lif.noise.log_sigma)}


def test_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        share(slr.Vanilla(Net()))


def test_rank_errors_are_runtime_errors() -> None:
    assert issubclass(RankError, RuntimeError)
