"""What others do with a noisy network: save, copy, pickle, export, compile and plot it."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import spikegen, surrogate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snntorch_lr as slr

from .helpers import CLASSES, FEATURES, STEPS, Net, assert_same, build, data, gradients, has_option, inputs_for, run

NOISES = [False, True, "escape"]
COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}
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


def estimate(net: nn.Module, estimator: type = slr.Vanilla, loss_fn: Any = None, **options: Any) -> dict[str, Tensor]:
    net.zero_grad()
    estimator(net, copies=4, seed=0, **options).backward(loss_fn or net.loss, *data())
    return gradients(net)


def test_state_dicts_of_converted_networks() -> None:
    saved = slr.add_noise(plain(), sigma=torch.tensor(0.3))
    with torch.no_grad():
        saved[1].noise.log_sigma.fill_(-2.0)
    loaded = slr.add_noise(plain(), sigma=1.0)
    assert loaded.load_state_dict(saved.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert_same(dict(loaded.state_dict()), dict(saved.state_dict()))
    assert loaded[1].noise.sigma == torch.tensor(-2.0).exp()


def test_state_dicts_with_and_without_noise_differ_by_the_noise_only() -> None:
    without, noisy = plain(), slr.add_noise(plain())
    missing = noisy.load_state_dict(without.state_dict(), strict=False)
    assert missing.missing_keys == ["1.noise.log_sigma", "3.noise.log_sigma"]
    assert not missing.unexpected_keys
    without.load_state_dict(slr.remove_noise(noisy).state_dict())


def test_state_dicts_that_do_not_fit_say_how_to_load_them() -> None:
    remedy = r"1\.noise\.log_sigma \(the checkpoint has no noise: load it before add_noise\(net\), or with strict=False"
    with pytest.raises(RuntimeError, match=remedy):
        slr.add_noise(plain()).load_state_dict(plain().state_dict())
    with pytest.raises(RuntimeError, match=r"1\.noise\.log_sigma \(this network has no noise: call add_noise\(net\)"):
        plain(slr).load_state_dict(slr.add_noise(plain()).state_dict())


@pytest.mark.parametrize("estimator", [slr.Vanilla, slr.Approximate, slr.Counterfactual])
def test_gradient_checkpointing_of_blocks_works_and_of_noisy_neurons_is_refused(estimator: type) -> None:
    net = Net()

    def block(x: Tensor, y: Tensor) -> Tensor:
        fc2, net.fc2.forward = net.fc2.forward, partial(checkpoint, net.fc2.forward, use_reentrant=False)
        try:
            return net.loss(x, y)
        finally:
            net.fc2.forward = fc2

    def deep(x: Tensor, y: Tensor) -> Tensor:
        slr.reset(net)
        spikes = net.lif1(net.fc1(x[:, 0]))
        return checkpoint(lambda s: net.readout(net.lif2(net.fc2(s))), spikes, use_reentrant=False).square().sum(1)

    assert_same(estimate(net, estimator), estimate(net, estimator, block))
    with pytest.raises(RuntimeError, match=r"Leaky: gradient checkpointing runs a noisy neuron again.*blocks without"):
        estimate(net, estimator, deep)
    # The network is as it was.
    assert_same(estimate(net, estimator), estimate(net, estimator, block))


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="no scaler for a CPU")
def test_grad_scaler_needs_a_loop_and_the_hook_says_so() -> None:
    net = Net()
    expected = estimate(net)
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    estimate(net, loss_fn=lambda x, y: scaler.scale(net.loss(x, y)))
    scaler.unscale_(optimizer)
    assert_same(expected, gradients(net), rtol=1e-4, atol=1e-6)
    hook = slr.attach(optimizer, net)
    with pytest.raises(RuntimeError, match=r"without a closure.*A GradScaler.*scaler.scale\(losses\)"):
        scaler.step(optimizer)
    hook.remove()


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="no scaler for a CPU")
@pytest.mark.parametrize("estimator", [slr.Vanilla, slr.Approximate, slr.Counterfactual])
def test_a_grad_scaler_keeps_the_gradients_of_small_losses_in_float16(estimator: type) -> None:
    net, small = Net(), 2.0**-17
    expected = estimate(net, estimator)
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=1.0), torch.amp.GradScaler("cpu")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return scaler.scale(small * net.loss(x, y))

    estimate(net, estimator, loss)
    scaler.unscale_(optimizer)
    found = gradients(net)
    for name in ("fc1.weight", "fc2.weight"):
        assert (found[name] / small - expected[name]).norm() < 0.03 * expected[name].norm()


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", CLASSES)
def test_copies_of_neurons_compute_the_same(name: str, noise: bool | str, copier: str) -> None:
    hidden = {"init_hidden": True} if has_option(name, "init_hidden") else {}
    neuron = build(slr, name, noise=noise, **hidden)
    x = inputs_for(name)
    # A state with a graph is there to be copied.
    run(neuron, x.requires_grad_())
    copied = COPIERS[copier](neuron)
    assert type(copied) is type(neuron)
    outputs = []
    for each in (neuron, copied):
        torch.manual_seed(5)
        outputs.append(run(each, x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("spike_grad", SURROGATES)
def test_copies_have_the_same_surrogate_gradient(spike_grad: str, noise: bool | str, copier: str) -> None:
    net = Net(noise=noise, spike_grad=SURROGATES[spike_grad])
    copied = COPIERS[copier](net)
    for each in (net, copied):
        torch.manual_seed(5)
        each.loss(*data()).mean().backward()
    assert_same(gradients(copied), gradients(net))


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("noise", NOISES[1:])
def test_copies_are_trained_apart(noise: str, copier: str) -> None:
    net = Net(noise=noise)
    expected = estimate(net)
    copied = COPIERS[copier](net)
    net.zero_grad()
    copied.zero_grad()
    assert_same(estimate(copied), expected)
    assert not gradients(net)


def test_converted_networks_are_copied_after_a_reset() -> None:
    net = slr.add_noise(plain(), only=["1"])
    net(data()[0][:, 0])
    slr.reset(net)
    copied = copy.deepcopy(net)
    assert copied[1].noise is not net[1].noise
    assert_same(dict(copied.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize("estimator", [slr.Vanilla, slr.Counterfactual])
@pytest.mark.parametrize("copier", COPIERS)
def test_copies_leave_the_contexts_that_they_were_made_in(copier: str, estimator: type) -> None:
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

    expected = estimate(net, estimator, loss_fn)
    for copied in copies:
        assert copied.lif1.noise.active
        assert not copied.eval().lif1.noise.active
        copied.train()
        assert copied(data()[0]).shape == (5, 2)
        assert_same(estimate(copied, estimator), expected)


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


def test_nir_export_without_noise_does_not_warn_of_it() -> None:
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        slr.export_to_nir(plain(), data()[0][:1, 0], ignore_dims=[0])
    assert not [warning for warning in caught if "noise" in str(warning.message)]


def test_nir_export_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "snntorch.export_nir", None)
    with pytest.raises(ImportError, match="pip install nir nirtorch"):
        slr.export_to_nir(plain(slr, noise=True), data()[0][:1, 0])


@pytest.mark.parametrize(
    ("estimator", "noise", "options"),
    [
        (slr.Vanilla, "membrane", {}),
        # With escape noise, and with rates, behind a pooling layer below.
        (slr.Counterfactual, "membrane", {"over_time": "exact"}),
    ],
)
def test_compiled_forward_passes_lose_no_score(estimator: type, noise: str, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    net = Net(noise=noise)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        # Each time step is compiled on its own.
        return net.loss(x[:, :2], y)

    compiled = torch.compile(loss_fn, backend="eager")
    expected = estimate(net, estimator, loss_fn, **options)
    # Compiled code of an ordinary pass is known before, and must not be used while sampling.
    compiled(*data())
    assert_same(estimate(net, estimator, compiled, **options), expected)
    net.zero_grad()
    compiled(*data()).mean().backward()
    assert gradients(net)["lif1.noise.log_sigma"].any()


class Pooled(nn.Module):
    """Convolution, noisy neuron, max-pooling of its spikes, readout; each time step can be compiled on its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.lif = nn.Conv2d(1, 2, 3), slr.Leaky(beta=0.9, threshold=0.3, init_hidden=True, noise="escape")
        self.pool, self.readout = nn.MaxPool2d(2), nn.Linear(2 * 3 * 3, 2)

    def step(self, x: Tensor) -> Tensor:
        return self.readout(self.pool(self.lif(self.conv(x))).flatten(1))

    def loss(self, x: Tensor, y: Tensor, step: Any = None) -> Tensor:
        slr.reset(self)
        out = sum((step or self.step)(x) for _ in range(STEPS))
        return nn.functional.cross_entropy(out, y, reduction="none")


@pytest.mark.parametrize("over_time", ["rates", "exact"])
def test_compiled_max_pooling_of_spikes_has_the_same_gradient(over_time: str) -> None:
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        net = Pooled()
        step = torch.compile(net.step, backend="eager") if compiled else net.step
        if compiled:
            # Code that was compiled outside must not be used where pooling has another derivative.
            step(torch.rand(3, 1, 8, 8))
            slr.reset(net)
        made = slr.Counterfactual(net, copies=2, seed=0, over_time=over_time)
        for _ in range(2):
            made.backward(
                lambda x, y, net=net, step=step: net.loss(x, y, step),
                torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
                torch.tensor([0, 1, 1]),
            )
        found.append(gradients(net))
    assert_same(*found)


def test_a_network_that_must_be_one_graph_is_refused() -> None:
    torch.compiler.reset()
    net = Net()
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        estimate(net, loss_fn=torch.compile(net.loss, backend="eager", fullgraph=True))
    assert not gradients(net)


@pytest.mark.parametrize("noise", NOISES)
def test_spikegen_feeds_noisy_networks(noise: bool | str) -> None:
    net = Net(noise=noise)
    torch.manual_seed(0)
    images = torch.rand(5, FEATURES)
    for coded in (spikegen.rate(images, STEPS), spikegen.latency(images, STEPS), spikegen.delta(images)[None]):
        assert net(coded.transpose(0, 1)).shape == (5, 2)


def test_estimators_take_random_spike_codes() -> None:
    net, labels = Net(), data()[1]
    images = torch.rand(5, FEATURES)

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return net.loss(spikegen.rate(x, STEPS).transpose(0, 1), y)

    slr.Vanilla(net, copies=4).backward(loss_fn, images, labels)
    assert gradients(net)["fc1.weight"].any()


@pytest.mark.parametrize("noise", NOISES)
def test_spikeplot_draws_noisy_spikes_and_membranes(noise: bool | str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("pandas", reason="snntorch.spikeplot imports it")
    from snntorch import spikeplot

    plt.switch_backend("Agg")
    neuron = slr.Leaky(0.9, noise=noise)
    outputs = run(neuron, inputs_for("Leaky"))
    spikes, mem = (torch.stack(values).detach() for values in zip(*outputs, strict=True))
    figure, axes = plt.subplots(2)
    spikeplot.raster(spikes[:, 0], axes[0], s=4, c="black")
    spikeplot.traces(mem[:, 0], spk=spikes[:, 0], dim=(1, FEATURES))
    figure.canvas.draw()
    plt.close("all")
