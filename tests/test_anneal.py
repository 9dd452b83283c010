"""Noise levels that fall during training, and BatchNorm statistics of the network without noise."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.convert import noise_gap
from snntorch_lr.robustness import mcnemar

from .helpers import FEATURES, Net, assert_same, data

NOISES = ["membrane", "escape"]


def levels(net: nn.Module) -> list[float]:
    return [float(net.lif1.noise.sigma), float(net.lif2.noise.sigma)]  # type: ignore[union-attr]


@pytest.mark.parametrize("noise", NOISES)
def test_levels_fall_geometrically_and_stay_at_the_end(noise: str) -> None:
    net = Net(noise=noise)
    before = levels(net)
    schedule = slr.anneal(net, steps=4, to=1 / 16)
    seen = [levels(net)]
    for _ in range(6):
        schedule.step()
        seen.append(levels(net))
    for sigma, factor in zip(seen, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16, 1 / 16], strict=True):
        assert sigma == pytest.approx([factor * level for level in before])


@pytest.mark.parametrize("noise", NOISES)
def test_levels_that_are_learned_go_on_to_be_learned(noise: str) -> None:
    net = Net(noise=noise)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    slr.attach(optimizer, net)
    schedule = slr.anneal(net, steps=2, to=0.25)
    schedule.step()
    learned = net.lif1.noise.log_sigma.detach().clone()
    net.loss(*data()).mean().backward()
    assert net.lif1.noise.log_sigma.grad.any()
    optimizer.step()
    assert not torch.equal(net.lif1.noise.log_sigma, learned)
    expected = 0.5 * float(net.lif1.noise.log_sigma.exp())
    assert levels(net)[0] == pytest.approx(expected)
    schedule.step()
    assert levels(net)[0] == pytest.approx(expected / 2)


@pytest.mark.parametrize("noise", NOISES)
def test_the_level_of_a_step_is_the_one_that_was_annealed(noise: str) -> None:
    """Of the surrogate gradient, and of counterfactual credit, whose constants are remembered from step to step."""
    net, x = Net(noise=noise), data()[0].repeat(200, 1, 1)
    for gradient in ("surrogate", "counterfactual"):
        slr.use_gradient(net, gradient)
        gaps = []
        for to in (1.0, 0.3, 0.03):
            schedule = slr.anneal(net, steps=1, to=to)
            schedule.step()
            torch.manual_seed(0)
            on = net(x)
            with slr.noise_off(net):
                gaps.append(float((on - net(x)).abs().mean()))
        assert gaps[0] > 2 * gaps[2] > 0
        assert gaps[0] > gaps[1] > gaps[2]


def test_a_schedule_goes_on_from_its_state() -> None:
    net, again = Net(), Net()
    schedule = slr.anneal(net, steps=4, to=0.1)
    schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    loaded = slr.anneal(again, steps=9, to=0.5)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert levels(again) == pytest.approx(levels(net))
    schedule.step()
    loaded.step()
    assert levels(again) == pytest.approx(levels(net))
    assert levels(again)[0] == pytest.approx(0.5 * math.sqrt(0.1))


def test_a_network_that_is_loaded_or_tested_has_the_level_it_was_left_with() -> None:
    net, loaded = Net(), Net()
    schedule = slr.anneal(net, steps=1, to=0.2)
    schedule.step()
    loaded.load_state_dict(net.state_dict())
    assert levels(loaded) == pytest.approx([0.1, 0.1])
    assert re.search(r"sigma=0\.1\b", repr(loaded.lif1))
    # A checkpoint of 0.2 knows of no annealing.
    old = {name: value for name, value in net.state_dict().items() if "annealed" not in name and "control" not in name}
    fresh = Net()
    fresh.load_state_dict(old)
    assert levels(fresh) == pytest.approx([0.5, 0.5])


def test_noise_of_the_input_falls_too() -> None:
    net = nn.Sequential(slr.NoisyInput(sigma=0.4), nn.Linear(FEATURES, 2), slr.Leaky(0.9, init_hidden=True, noise=True))
    slr.anneal(net, steps=1, to=0.5).step()
    assert float(net[0].sigma) == pytest.approx(0.2)
    assert float(net[2].noise.sigma) == pytest.approx(0.25)


class Normed(nn.Sequential):
    """BatchNorm behind the first noisy layer, whose statistics follow its noise."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        lif = [slr.Leaky(beta=0.9, init_hidden=True, noise=slr.EscapeNoise(1.0)) for _ in range(2)]
        super().__init__(nn.Linear(FEATURES, 6), lif[0], nn.Linear(6, 5), nn.BatchNorm1d(5), lif[1])

    def run(self, x: Tensor) -> Tensor:
        slr.reset(self)
        return torch.stack([self(x) for _ in range(3)])


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.rand(8, FEATURES, generator=generator), torch.zeros(8)) for _ in range(4)]


def statistics(net: Normed) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net[3].named_buffers()}


def test_batch_norm_statistics_are_those_of_the_network_without_noise() -> None:
    net, expected = Normed(), Normed()
    for x, _ in batches():
        net.run(x)
    noisy = statistics(net)
    slr.remove_noise(expected)
    expected[3].momentum = None
    for x, _ in batches():
        expected.run(x)
    net.eval()
    net[3].train()
    random = torch.get_rng_state()
    slr.update_batch_norm(net, batches(), net.run)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(statistics(net)[name], statistics(expected)[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(statistics(net)["running_mean"], noisy["running_mean"], rtol=0.1)
    # All else is as it was.
    assert [module.training for module in net.modules()] == [module is net[3] for module in net.modules()]
    assert net[3].momentum == 0.1
    assert net[1].noise.forced is None
    assert not net[1].mem.any()
    assert torch.equal(torch.get_rng_state(), random)


def test_batch_norm_statistics_of_a_network_that_is_its_own_forward_pass() -> None:
    net, again = Normed(), Normed()
    slr.update_batch_norm(net, [x for x, _ in batches()])
    slr.update_batch_norm(again, batches(), lambda x: again(x))
    assert_same(statistics(net), statistics(again))


def samples(both: int, only_off: int, only_on: int, neither: int) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([both, only_off, only_on, neither])
    off, on = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    return off.repeat_interleave(counts), on.repeat_interleave(counts)


def test_both_accuracies_and_the_remedies_are_said() -> None:
    message = noise_gap(*samples(60, 10, 29, 1))
    assert message is not None
    for part in ("70.0 % without", "89.0 % with", "snntorch_lr.anneal", "noise_on", "update_batch_norm"):
        assert part in message


@pytest.mark.parametrize("only_off", [0, 1, 5, 40, 3000])
def test_the_limit_is_that_of_an_exact_mcnemar_test(only_off: int) -> None:
    said = []
    for only_on in range(only_off, only_off + 12 + 4 * int(only_off**0.5)):
        off, on = samples(50, only_off, only_on, 50)
        said.append(noise_gap(off, on) is not None)
        assert said[-1] == (mcnemar(off, on).p_value < 0.01)
        assert (noise_gap(on, off) is not None) == said[-1]
    assert not said[0]
    assert said[-1]


def test_few_samples_tell_nothing() -> None:
    assert noise_gap(*samples(0, 0, 7, 0)) is None
    assert noise_gap(*samples(0, 0, 8, 0)) is not None
    assert noise_gap(torch.zeros(0).bool(), torch.zeros(0).bool()) is None


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same samples .* got \(2,\), \(3,\)"):
        noise_gap(torch.ones(2).bool(), torch.ones(3).bool())
