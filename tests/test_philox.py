"""Random numbers from a counter: known answers, uniform, the same for any number of rows, threads and kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.philox import Drawn, draw, mix, new_key, new_keys, philox, resolved

ESCAPE = slr.EscapeNoise()
DTYPES = [torch.float32, torch.float64]


class Unknown:
    """Noise that kernels do not know."""

    kind = None

    def __init__(self, factor: float = 1) -> None:
        self.factor = factor

    def quantile(self, u: Tensor) -> Tensor:
        return u.mul_(self.factor)


# Of 16 bits, and of more.
UNIFORM = [ESCAPE, Unknown()]


def drawn(rows: int, numbers: int, key: int = 0, dtype: torch.dtype = torch.float32, noise: Drawn = ESCAPE) -> Tensor:
    return draw(noise, torch.Size((rows, numbers)), dtype, torch.device("cpu"), key)


# Of the authors' own file of known answers, for ten rounds.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: int, words: tuple[int, int, int, int]
) -> None:
    assert tuple(int(word) for word in philox(counter, key, (1,))) == words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", UNIFORM, ids=["halves", "words"])
def test_numbers_are_uniform_between_the_end_points(noise: Drawn, dtype: torch.dtype) -> None:
    numbers = drawn(1, 300_000, dtype=dtype, noise=noise)[0].double()
    assert numbers.min() > -1
    assert numbers.max() < 1
    expected = torch.full((100,), 3_000.0, dtype=torch.float64)
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
    assert ((torch.histc(numbers, 100, -1, 1) - expected).square() / expected).sum() < 99 + 5 * 14
    correlation = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
    assert correlation.abs() < 5 / len(numbers) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("noise", "words"),
    [(Unknown(), [0x80000000, 0xFFFFFFFF, 0, 0x7FFFFFFF]), (ESCAPE, [0xFFFF8000, 0x7FFF0000, 0, 0])],
    ids=["words", "halves"],
)
def test_end_points_are_never_reached_and_the_middle_is_no_value(
    noise: Drawn, words: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "noise_on", lambda *_: None)
    monkeypatch.setattr("snntorch_lr.philox.philox", lambda *_: [torch.full((1, 1), word) for word in words])
    numbers = drawn(1, 4, dtype=dtype, noise=noise)[0]
    assert -1 < numbers[0] < numbers[1] < 0 < numbers[2] < numbers[3] < 1
    assert torch.equal(numbers, -numbers.flip(0))


@pytest.mark.parametrize("numbers", [1, 3, 1001, 40_000])
def test_more_rows_leave_the_first_ones_as_they_are(numbers: int) -> None:
    whole = drawn(6, numbers)
    for rows in range(6):
        assert torch.equal(drawn(rows, numbers), whole[:rows])


@pytest.mark.parametrize("numbers", [3, 9_000])
@pytest.mark.parametrize("noise", UNIFORM, ids=["halves", "words"])
def test_keys_rows_and_places_are_independent(noise: Drawn, numbers: int) -> None:
    one = drawn(12, numbers, noise=noise)
    others = [drawn(12, numbers, key, noise=noise) for key in (1, 2**40)] + [one.roll(1, 0), one.roll(1, 1)]
    for other in [*others, one.roll(-(-numbers // 4), 1), one.roll(-(-numbers // 8), 1)]:
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert correlation.abs() < 5 / one.numel() ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [ESCAPE, Unknown(2)])
def test_numba_and_torch_draw_the_same(noise: Drawn, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    fused = drawn(4, 1003, 2**61 + 5, dtype, noise)
    monkeypatch.setattr(kernels, "_load", lambda device: None)
    assert torch.equal(drawn(4, 1003, 2**61 + 5, dtype, noise), fused)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_draw_the_same(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    threads(2)
    two = drawn(6, 40_000, dtype=dtype)
    threads(1)
    assert torch.equal(drawn(6, 40_000, dtype=dtype), two)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own(threads: Callable[[int], None]) -> None:
    threads(2)
    numbers = drawn(6, 40_000).tolist()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Torch's own threads are gone: nothing of torch that takes them.
            os.write(writer, b"same" if drawn(6, 40_000).tolist() == numbers else b"other")
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 5) == b"same"
    os.waitpid(child, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_drawn_with_more_digits(dtype: torch.dtype) -> None:
    assert resolved(dtype) == torch.float32
    assert torch.equal(drawn(2, 5, dtype=dtype), drawn(2, 5).to(dtype))


def test_keys_come_from_a_generator_and_repeat_with_its_seed() -> None:
    torch.manual_seed(0)
    keys = [new_key(), new_key(), new_key(torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert len(set(keys)) == 2
    assert keys[0] == keys[2] == new_key(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert [new_key(), new_key()] == keys[:2]
    assert all(0 <= key < 2**63 for key in keys)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_keys_of_several_time_steps_are_those_of_one_after_the_other() -> None:
    torch.manual_seed(0)
    together = new_keys(20, None, CPU).tolist()
    torch.manual_seed(0)
    assert together == [new_key() for _ in range(20)]
    assert min(together) >= 0


def test_ranks_draw_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    keys = {}
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        keys[rank] = new_keys(3, None, CPU).tolist()
    assert len({key for drawn in keys.values() for key in drawn}) == 12
    assert all(0 <= key < 2**63 for drawn in keys.values() for key in drawn)


def test_keys_of_a_captured_graph_come_from_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    asked, empty = [], torch.empty

    def asked_for(*size: int, device: torch.device, **options: Any) -> Tensor:
        asked.append(device)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", asked_for)
    new_keys(2, None, CUDA)
    assert asked == [CUDA]
    with pytest.raises(RuntimeError, match="leave out seed="):
        new_keys(2, torch.Generator(), CUDA)


def test_seeds_of_several_numbers_differ_by_each_and_by_their_order() -> None:
    seeds = [mix(1, 2), mix(2, 1), mix(1), mix(2), mix(1, 2, 0), mix(0, 1, 2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
