from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import noise_stream as uniform

from .helpers import CLASSES, Net, build, data, inputs_for

STEPS = 12
KINDS = ["gaussian", "logistic"]


def log_probability(kind: str, z: Tensor, spikes: Tensor) -> Tensor:
    x = (2 * spikes - 1) * z
    return torch.special.log_ndtr(x) if kind == "gaussian" else nn.functional.logsigmoid(x)


@pytest.mark.parametrize("spike", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_derivatives_of_the_log_probability(kind: str, spike: float) -> None:
    z = torch.linspace(-40, 40, 801, dtype=torch.float64, requires_grad=True)
    spikes = torch.full_like(z, spike)
    (expected,) = torch.autograd.grad(log_probability(kind, z, spikes).sum(), z)
    noise = slr.EscapeNoise(distribution=kind)
    location = noise.location_score(z.detach(), spikes)
    torch.testing.assert_close(location, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(noise.location_score(z.detach(), spikes, noise.limit(z.detach())), location)
    torch.testing.assert_close(noise.scale_score(z.detach(), location), -z.detach() * expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("spike", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_safe_in_float32(kind: str, spike: float) -> None:
    z = torch.linspace(-40, 40, 8001)
    spikes = torch.full_like(z, spike)
    noise = slr.EscapeNoise(distribution=kind)
    exact = noise.location_score(z.double(), spikes.double())
    torch.testing.assert_close(noise.location_score(z, spikes).double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_half_precision_are_those_of_float32(kind: str, dtype: torch.dtype) -> None:
    z = torch.linspace(-20, 20, 801, dtype=dtype)
    spikes = (z > 0).to(dtype)
    noise = slr.EscapeNoise(distribution=kind)
    location = noise.location_score(z, spikes, noise.limit(z))
    assert torch.equal(location, noise.location_score(z.float(), spikes.float()))
    assert torch.equal(noise.scale_score(z, location, out=z.clone()), -z.float() * location)


ESTIMATORS: list[Any] = [
    slr.Vanilla,
    partial(slr.Vanilla, memory="replay"),
    slr.Approximate,
    slr.Counterfactual,
    partial(slr.Counterfactual, over_time="exact"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["converted", "autocast"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_precision_has_the_gradient_of_float32(estimator: Any, autocast: bool, dtype: torch.dtype) -> None:
    found = []
    for half in (False, True):
        net = Net(noise="escape").to(dtype if half and not autocast else torch.float32)

        def loss_fn(x: Tensor, y: Tensor, net: Net = net, half: bool = half) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=half and autocast):
                return net.loss(x, y).float()

        x, y = data(net.fc1.weight.dtype)
        estimator(net, copies=300, seed=0).backward(loss_fn, x, y)
        assert net.fc1.weight.grad.dtype == net.fc1.weight.dtype
        found.append(torch.cat([parameter.grad.float().flatten() for parameter in net.parameters()]))
    full, rough = found
    assert (rough - full).norm() < 0.3 * full.norm()


def drawn_uniformly(like: Tensor) -> Tensor:
    return uniform.from_generator(torch.empty_like(like), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_spikes_have_their_probability(kind: str) -> None:
    noise = slr.EscapeNoise(distribution=kind)
    z = torch.tensor([-2.0, -0.5, 0.0, 1.0]).expand(200_000, 4).contiguous()
    fired = noise.fires(noise.limit(z), noise.quantile(drawn_uniformly(z))).double()
    p = log_probability(kind, z[0].double(), torch.ones(4)).exp()
    assert ((fired.mean(0) - p).abs() < 4.5 * (p * (1 - p) / len(z)).sqrt()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_antithetic_noise_fires_with_the_same_probability(kind: str) -> None:
    noise = slr.EscapeNoise(distribution=kind)
    z = torch.full((200_000,), 0.7)
    drawn = noise.quantile(drawn_uniformly(z))
    one, other = (noise.fires(noise.limit(z), part).double() for part in (drawn.clone(), -drawn))
    assert abs(one.mean() - other.mean()) < 0.01
    assert torch.corrcoef(torch.stack((one, other)))[0, 1] < -0.3


@pytest.mark.parametrize("record", [False, True], ids=["surrogate", "recorded"])
@pytest.mark.parametrize("handed", ["hidden", "passed", "detached", "copied"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_spike_that_was_sampled_resets(name: str, handed: str, record: bool) -> None:
    torch.manual_seed(0)
    hidden = handed == "hidden"
    neuron = build(slr, name, noise=slr.EscapeNoise(2.0), init_hidden=hidden, output=True, reset_mechanism="subtract")
    x = inputs_for(name)[0]
    pairs: list[tuple[Tensor, Tensor]] = []

    def run(x: Tensor, *_: Any) -> Tensor:
        slr.reset(neuron)
        states: tuple[Tensor, ...] = ()
        last = None
        for _ in range(STEPS):
            spikes, *after = neuron(x, *states)
            if last is not None:
                pairs.append((neuron.reset.clone(), last))
            last = spikes.detach().clone()
            if not hidden:
                states = tuple({"passed": s, "detached": s.detach(), "copied": s.clone()}[handed] for s in after)
                if name.startswith("R"):
                    states = (spikes.detach(), *states)
        return spikes.flatten(1).sum(1)

    if record:
        slr.Vanilla(neuron, 3).backward(run, x, torch.zeros(len(x)))
    else:
        run(x)
    assert sum(int(spikes.sum()) for _, spikes in pairs) > 0
    for reset, spikes in pairs:
        assert torch.equal(reset, spikes)


def test_a_new_sequence_does_not_begin_with_a_reset() -> None:
    neuron = slr.Leaky(beta=0.9, noise=slr.EscapeNoise(5.0))
    neuron(torch.zeros(50, 20), torch.zeros(50, 20))
    for start in (neuron.reset_mem(), torch.zeros(50, 20) + 0.0):
        neuron(torch.zeros(50, 20), start)
        assert not neuron.reset.any()
        slr.reset(neuron)


def test_membrane_potential_is_free_of_noise() -> None:
    neuron = slr.Leaky(beta=0.9, reset_mechanism="none", noise=slr.EscapeNoise(3.0))
    mem = torch.zeros(4, 5)
    for _ in range(3):
        _, mem = neuron(torch.ones(4, 5), mem)
    torch.testing.assert_close(mem, torch.full((4, 5), 1 + 0.9 + 0.81))


def test_outside_an_estimator_it_trains_by_surrogate_gradient_sigma_included() -> None:
    neuron = slr.Leaky(beta=0.9, noise="escape")
    x = torch.rand(8, 5, requires_grad=True)
    neuron(x, torch.zeros(8, 5))[0].sum().backward()
    assert x.grad.any()
    assert neuron.noise.log_sigma.grad.abs() > 0


def test_off_at_evaluation() -> None:
    neuron = slr.Leaky(beta=0.9, noise=slr.EscapeNoise(5.0)).eval()
    assert not neuron(torch.zeros(50, 20), torch.zeros(50, 20))[0].any()


def test_copies_and_saves_after_reset() -> None:
    neuron = slr.Leaky(beta=0.9, noise="escape", init_hidden=True)
    neuron(torch.rand(3, 4, requires_grad=True))
    slr.reset(neuron)
    clone = copy.deepcopy(neuron)
    clone.load_state_dict(neuron.state_dict())
    assert math.isclose(clone.noise.sigma.item(), 0.5, rel_tol=1e-6)


@pytest.mark.parametrize("make", [
    lambda: slr.Leaky(beta=0.9, inhibition=True, noise="escape"),
    lambda: slr.SConv2dLSTM(1, 1, 3, max_pool=2, noise="escape"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_refused_where_neurons_do_not_decide_alone(make: Any) -> None:
    with pytest.raises(ValueError, match="escape noise decides for each neuron alone"):
        make()
