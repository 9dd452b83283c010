"""What others do with a noisy network: save, copy, pickle and export it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import spikegen, surrogate
from torch import Tensor, nn

import snntorch_lr as slr

from .helpers import (
    CLASSES,
    COPIERS,
    FEATURES,
    STEPS,
    Net,
    assert_same,
    backward,
    build,
    data,
    estimate,
    every_estimator,
    inputs_for,
    run,
)

NOISES = [False, True, "escape"]
SURROGATES = {
    "default": None,
    "atan": surrogate.atan(alpha=3.0),
    "fast_sigmoid": surrogate.fast_sigmoid(slope=5),
    "sigmoid": surrogate.sigmoid(slope=5),
    "triangular": surrogate.triangular(),
    "straight_through": surrogate.straight_through_estimator(),
    "spike_rate_escape": surrogate.spike_rate_escape(beta=2, slope=5),
}


def plain(package: Any = snn, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (FEATURES, 4, 2)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        last = fan_out == sizes[-1]
        # NIR takes one leak and threshold per neuron.
        lif = package.Leaky(torch.full((fan_out,), 0.9), torch.ones(fan_out), init_hidden=True, output=last, **options)
        layers += [nn.Linear(fan_in, fan_out), lif]
    return nn.Sequential(*layers)


def test_state_dicts_of_converted_networks() -> None:
    saved = slr.add_noise(plain(), sigma=torch.tensor(0.3))
    with torch.no_grad():
        saved[1].noise.log_sigma.fill_(-2.0)
    loaded = slr.add_noise(plain(), sigma=1.0)
    assert loaded.load_state_dict(saved.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert_same(dict(loaded.state_dict()), dict(saved.state_dict()))
    assert loaded[1].noise.sigma == torch.tensor(-2.0).exp()


def test_state_dicts_with_and_without_noise_differ_by_the_noise_only_and_say_how_to_load_them() -> None:
    without, noisy = plain(), slr.add_noise(plain())
    missing = noisy.load_state_dict(without.state_dict(), strict=False)
    assert missing.missing_keys == ["1.noise.log_sigma", "3.noise.log_sigma"]
    assert not missing.unexpected_keys
    remedy = r"1\.noise\.log_sigma \(the checkpoint has no noise: load it before add_noise\(net\), or with strict=False"
    with pytest.raises(RuntimeError, match=remedy):
        noisy.load_state_dict(without.state_dict())
    with pytest.raises(RuntimeError, match=r"1\.noise\.log_sigma \(this network has no noise: call add_noise\(net\)"):
        plain(slr).load_state_dict(noisy.state_dict())
    without.load_state_dict(slr.remove_noise(noisy).state_dict())


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", CLASSES)
def test_copies_of_neurons_are_independent_and_compute_the_same(name: str, noise: bool | str, copier: str) -> None:
    neuron = build(slr, name, learn=True, noise=noise, init_hidden=True)
    x = inputs_for(name)
    # A state with a graph is there to be copied.
    run(neuron, x.requires_grad_())
    copied = COPIERS[copier](neuron)
    assert type(copied) is type(neuron)
    slr.reset(neuron)
    torch.manual_seed(5)
    outputs = run(copied, x)
    assert copied.mem.any()
    assert not neuron.mem.any()
    torch.manual_seed(5)
    torch.testing.assert_close(outputs, run(neuron, x), rtol=0, atol=0)


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("spike_grad", SURROGATES)
def test_copies_have_the_same_surrogate_gradient(spike_grad: str, copier: str) -> None:
    net = Net(noise="escape", spike_grad=SURROGATES[spike_grad])
    copied = COPIERS[copier](net)
    assert_same(*(backward(one, lambda one=one: one.loss(*data()).mean()) for one in (net, copied)))


@every_estimator
@pytest.mark.parametrize("copier", COPIERS)
def test_copies_are_trained_apart_and_leave_the_contexts_that_they_were_made_in(copier: str, estimator: str) -> None:
    net = Net()
    copies = []
    with slr.noise_off(net):
        copies.append(COPIERS[copier](net))
    with slr.noise_on(net, torch.Generator()):
        copies.append(COPIERS[copier](net))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        losses = net.loss(x, y)
        copies.append(COPIERS[copier](net))
        return losses

    expected = estimate(estimator, net, loss_fn)
    net.zero_grad()
    for copied in copies:
        assert copied.lif1.noise.active
        assert not copied.eval().lif1.noise.active
        copied.train()
        assert copied(data()[0]).shape == (5, 2)
        assert_same(estimate(estimator, copied), expected)
    assert net.fc1.weight.grad is None


def own_surrogate(scale: float) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return scale * (x > 0).float()

    return inner


def at_top_level(x: Tensor) -> Tensor:
    return (x > 0).float()


def test_surrogates_of_ones_own() -> None:
    assert pickle.loads(pickle.dumps(slr.Leaky(0.9, spike_grad=at_top_level))).spike_grad is at_top_level
    closure = slr.Leaky(0.9, spike_grad=own_surrogate(1.0), noise=True)
    assert copy.deepcopy(closure).spike_grad is closure.spike_grad
    with pytest.raises(pickle.PicklingError, match=r"Leaky.spike_grad .* own_surrogate.*state_dict\(\)"):
        pickle.dumps(closure)


@pytest.mark.parametrize("noise", [True, "escape"])
def test_nir_export_leaves_the_noise_out(noise: bool | str) -> None:
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    from snntorch.export_nir import export_to_nir

    noisy = plain(slr, noise=noise)
    x = data()[0][:1, 0]
    expected = export_to_nir(plain(), x, ignore_dims=[0])
    with pytest.warns(UserWarning, match="NIR has no noise: the levels of 1, 3 are left out"):
        graph = slr.export_to_nir(noisy, x, ignore_dims=[0])
    assert list(graph.nodes) == list(expected.nodes)
    assert set(graph.edges) == set(expected.edges)
    assert (graph.nodes["1"].tau == expected.nodes["1"].tau).all()
    assert (graph.nodes["0"].weight == noisy[0].weight.detach().numpy()).all()
    assert isinstance(noisy[1], slr.Leaky)
    assert noisy[1].noise is not None


@pytest.mark.filterwarnings("error:.*noise")
def test_nir_export_without_noise_does_not_warn_of_it() -> None:
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    slr.export_to_nir(plain(), data()[0][:1, 0], ignore_dims=[0])


def test_nir_export_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "snntorch.export_nir", None)
    with pytest.raises(ImportError, match="pip install nir nirtorch"):
        slr.export_to_nir(plain(slr, noise=True), data()[0][:1, 0])


def test_estimators_take_random_spike_codes() -> None:
    net, images = Net(), (torch.rand(5, FEATURES), data()[1])
    found = estimate("vanilla", net, lambda x, y: net.loss(spikegen.rate(x, STEPS).transpose(0, 1), y), images)
    assert found["fc1.weight"].any()
