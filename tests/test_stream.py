"""Noise from a counter: known answers, any part of it, and the same by Numba and by torch."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import snntorch_lr as slr
from snntorch_lr import kernels
from snntorch_lr.noise_stream import Drawn, NoiseStream, philox, resolved

COPIES = 6
UNIFORM = slr.EscapeNoise()
DTYPES = [torch.float32, torch.float64]


class Unknown:
    """Noise that kernels do not know."""

    kind = None

    def quantile(self, u: Tensor) -> Tensor:
        return u.mul_(2)


def draw(
    first: int, last: int, features: int, antithetic: bool = False, seed: int = 0, index: int = 1, *,
    noise: Drawn = UNIFORM, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    like = torch.empty((last - first) * 2, features, dtype=dtype)
    return NoiseStream(seed, COPIES, first, last, antithetic).draw(index, like, noise).view(last - first, 2, features)


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


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("features", [1, 3, 1001])
def test_any_range_of_copies_is_the_same_noise(features: int, antithetic: bool) -> None:
    whole = draw(0, COPIES, features, antithetic)
    for first in range(COPIES):
        for last in range(first + 1, COPIES + 1):
            assert torch.equal(draw(first, last, features, antithetic), whole[first:last])


@pytest.mark.parametrize("features", [3, 9_000])
def test_antithetic_copies_are_negated(features: int) -> None:
    whole = draw(0, COPIES, features, antithetic=True)
    assert torch.equal(whole[COPIES // 2 :], -whole[: COPIES // 2])
    assert whole[: COPIES // 2].unique().numel() > 0.9 * whole[: COPIES // 2].numel()


@pytest.mark.parametrize("features", [3, 9_000])
def test_seeds_draws_copies_and_samples_are_independent(features: int) -> None:
    one = draw(0, COPIES, features)
    others = [
        draw(0, COPIES, features, seed=1), draw(0, COPIES, features, seed=2**40), draw(0, COPIES, features, index=2),
        one.roll(1, 0), one.roll(1, 1), one.roll(1, 2), one.roll(-(-features // 4), 2),
    ]  # fmt: skip
    for other in others:
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert correlation.abs() < 5 / one.numel() ** 0.5


def test_many_draws_have_no_common_numbers() -> None:
    first = torch.stack([draw(0, COPIES, 1, seed=s, index=i)[0, 0] for s in range(40) for i in range(40)])
    assert first.unique().numel() == 1600


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("noise", [UNIFORM, Unknown()])
def test_numba_and_torch_draw_the_same(noise: Drawn, antithetic: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    fused = draw(1, 5, 1003, antithetic, 2**61 + 5, noise=noise, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_load", lambda device: None)
        assert torch.equal(draw(1, 5, 1003, antithetic, 2**61 + 5, noise=noise, dtype=dtype), fused)


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_draw_the_same(dtype: torch.dtype, openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from snntorch_lr.kernels import cpu

    if not openmp:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    one = draw(0, COPIES, 40_000, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = draw(0, COPIES, 40_000, dtype=dtype)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from snntorch_lr.kernels import cpu

    if not openmp:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        drawn = draw(0, COPIES, 40_000)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, b"same" if draw(0, COPIES, 40_000).tolist() == drawn.tolist() else b"other")
            finally:
                os._exit(0)
    finally:
        torch.set_num_threads(before)
    os.close(writer)
    assert os.read(reader, 5) == b"same"
    os.waitpid(child, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_drawn_with_more_digits(dtype: torch.dtype) -> None:
    assert resolved(dtype) == torch.float32
    assert torch.equal(draw(0, 2, 5, dtype=dtype), draw(0, 2, 5).to(dtype))


def test_nothing_is_drawn_for_nobody() -> None:
    assert NoiseStream(0, 2, 0, 2).draw(1, torch.empty(0, 3), UNIFORM).shape == (0, 3)
