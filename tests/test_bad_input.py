"""Bad input to what is public: the error names the argument or the layer and what to do, and nothing has changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch.functional.quant import state_quant
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr import objectives, robustness
from snntorch_lr.baselines import BASELINES, batch_mean, leave_one_out
from snntorch_lr.network import noisy_neurons
from snntorch_lr.noisy_neuron import UNSUPPORTED

from .helpers import FEATURES, Net, data, nothing_changes

Call = Callable[[Net], object]
X, Y = data()
IMAGES, LABELS = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 4), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(4, 2))


def attach(net: Any, *args: Any, **options: Any) -> slr.optim.Hook:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    try:
        return slr.attach(optimizer, net, *args, **options)
    except (TypeError, ValueError):
        # Nothing is attached: gradients in which no neuron had a part would be refused.
        optimizer.step()
        raise


def readout(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 2), slr.Leaky(beta=0.9, **options))


def single_loss(net: Net) -> Tensor:
    return slr.Vanilla(net, 1, baseline="none").backward(lambda x, y: net.loss(x, y).mean(), X[:1], Y[:1])


def estimate(make: Any, x: Any = X, y: Any = Y, loss_fn: Any = None, **options: Any) -> Call:
    return lambda net: make(net, seed=0, **options).backward(loss_fn or net.loss, x, y)


def with_baseline(baseline: Any) -> Call:
    return estimate(slr.Vanilla, copies=4, baseline=baseline)


def zero_one(net: Net) -> Tensor:
    return slr.Counterfactual(net).backward(lambda x, y: objectives.zero_one(net(x), y), X, Y)


def with_sigma(shape: tuple[int, ...], kind: type = slr.MembraneNoise) -> Call:
    def call(_: Net) -> Tensor:
        net = Net(noise=kind(torch.full(shape, 0.5)))
        with nothing_changes(net):
            return slr.Vanilla(net, 4).backward(net.loss, X, Y)

    return call


def evaluate(loader: Any = ((IMAGES, LABELS),), epsilons: Any = 0.1, **options: Any) -> Call:
    net = slr.add_noise(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), snn.Leaky(beta=0.9, init_hidden=True)))
    options = {"attacks": ["FGSM"], "forward": lambda net, x: slr.rollout(net, x, 3)} | options
    return lambda _: robustness.evaluate(net, loader, epsilons, **options)


BAD: dict[str, tuple[Call, type[Exception], str]] = {
    # attach and closure
    "no optimizer": (lambda net: slr.attach([*net.parameters()], net), TypeError, "optimizer must be a .*, not list"),
    "swapped": (lambda net: slr.attach(net, torch.optim.SGD(net.parameters())), TypeError, "optimizer must .* not Net"),
    "no network": (lambda net: slr.attach(torch.optim.SGD(net.parameters()), "net"), ValueError, "no noisy neuron"),
    "plain network": (lambda _: attach(plain()), ValueError, r"Sequential has no noisy.*add_noise\(net\)"),
    "unknown estimator": (lambda net: attach(net, "vanila"), ValueError, "'vanila'; choose one of counterfactual, van"),
    "class": (lambda net: attach(net, slr.Vanilla), TypeError, "estimator .* made for this network, not the class Van"),
    "None": (lambda net: attach(net, None), TypeError, "estimator must be one of counterfactual, .*, not NoneType"),
    "unknown option": (lambda net: attach(net, chunks=3), TypeError, "Counterfactual.*'chunks'"),
    "losses": (lambda net: slr.closure(net.loss(X, Y), X, Y), TypeError, "loss_fn must be a func.* Tensor"),
    "swapped closure": (lambda net: slr.closure(X, net.loss, Y), TypeError, "loss_fn must be a function of"),
    "options of an instance": (lambda net: attach(net, slr.Vanilla(net), seed=3, baseline="none"), ValueError,
        "seed, baseline belongs"),
    "another network's": (lambda net: attach(net, slr.Vanilla(Net())), ValueError, "another network"),
    "one copy": (lambda net: attach(net, "vanilla", copies=1), ValueError,
        r"1 copy leaves nothing.*copies >= 2.*'batch-mean' or 'none'"),
    "one copy, sums": (lambda net: slr.Approximate(net, 1), ValueError, "1 copy leaves nothing"),
    "no copies": (lambda net: attach(net, copies=0), ValueError, "copies must be a positive integer"),
    "discount": (lambda net: attach(net, discount=2), ValueError, r"discount must be in \[0, 1\]"),
    "other parameters": (lambda net: slr.attach(torch.optim.SGD(Net().parameters(), 0.1), net), ValueError,
        "holds none of the parameters of Net"),
    # use_gradient
    "gradient": (lambda net: slr.use_gradient(net, "adam"), ValueError,
        r"unknown gradient 'adam'; choose \"counterfactual\", \"approximate\" or \"surrogate\"$"),
    "gradient with copies": (lambda net: slr.use_gradient(net, "vanilla"), ValueError,
        r"\"vanilla\" needs copies.*attach\(optimizer, net, estimator=\"vanilla\"\) with closure"),
    "discount, no optimizer": (lambda net: slr.use_gradient(net, discount=1.5), ValueError,
        r"discount must be in \[0, 1\], got 1.5"),
    "control": (lambda net: slr.use_gradient(net, control="fit"), ValueError,
        r"control must be in \[0, 1\], or None to fit it, got 'fit'"),
    "surrogate's discount": (lambda net: slr.use_gradient(net, "surrogate", 0.5), ValueError,
        'belong to the gradients "counterfactual" and "approximate"'),
    # estimators
    "seed": (lambda net: slr.Vanilla(net, seed=1.5), ValueError, "seed must be an integer, .* got 1.5"),
    "baseline": (estimate(slr.Vanilla, baseline=None), ValueError, "unknown baseline None; choose .* or a function"),
    "baseline's name": (estimate(slr.Approximate, baseline="mean"), ValueError,
        "unknown baseline 'mean'; choose one of none, batch-mean, leave-one-out"),
    "baseline of one copy": (estimate(slr.Vanilla, copies=1, baseline=BASELINES["leave-one-out"]), ValueError,
        "use more copies of each sample"),
    "others of one copy": (lambda _: leave_one_out(torch.rand(1, 5)), ValueError, "use more copies of each sample"),
    "others of one row": (lambda _: batch_mean(torch.rand(1, 1)), ValueError, "use more samples"),
    "mean of a single row": (single_loss, ValueError, r"shape \(\)"),
    "margin": (lambda net: objectives.clipped_margin(net(X), Y, margin=0), ValueError, "positive"),
    "baseline's shape": (with_baseline(lambda losses: losses.mean()), ValueError,
        r"baseline must .*\(4, 5\), .* \(\)"),
    "baseline's NaN": (with_baseline(lambda losses: losses / 0 * 0), ValueError,
        "baseline .* 20 of them not finite"),
    "no derivative": (zero_one, ValueError, "the loss has no derivative.*vanilla"),
    "empty batch": (estimate(slr.Vanilla, X[:0], Y[:0]), ValueError, "no samples: the batch is empty"),
    "empty batch, credit": (estimate(slr.Counterfactual, X[:0], Y[:0]), ValueError, "no losses: the batch is empty"),
    "empty batch, sums": (estimate(slr.Approximate, X[:0], Y[:0]), ValueError, "no samples: the batch is empty"),
    "few targets": (estimate(slr.Vanilla, X, Y[:3]), ValueError, r"enters Leaky has 5 rows, but there are 3 samples"),
    "time first": (estimate(slr.Vanilla, X.transpose(0, 1)), ValueError, r"enters Leaky has 4 .*must be the batch"),
    "integers": (estimate(slr.Vanilla, X.long()), RuntimeError, "same dtype, but got Long and Float"),
    # noise
    "σ = 0": (lambda _: slr.add_noise(plain(), 0), ValueError,
        "sigma must be positive and finite, got 0; .*noise=False"),
    **{
        f"σ = {sigma}": (lambda _, sigma=sigma: slr.MembraneNoise(sigma), ValueError,
            r"sigma must be positive and finite.*noise=False")
        for sigma in (-0.1, math.nan, math.inf, torch.tensor([0.5, 0]), torch.tensor([0.5, math.nan]), torch.zeros(0))
    },
    "σ is text": (lambda _: slr.EscapeNoise("0.5"), TypeError,
        "sigma must be a number or a tensor of numbers, got '0.5'"),
    "σ is true": (lambda _: slr.add_noise(plain(), True), TypeError, "sigma must be a number .*, got True"),
    "σ of another layer": (with_sigma((3,)), ValueError,
        r"sigma of Leaky .*\(3,\), .* potential, \(\d+, 4\): give one"),
    "σ of more dimensions": (with_sigma((1, 1, 4), slr.EscapeNoise), ValueError,
        r"sigma of Leaky .*\(1, 1, 4\), which does"),
    "no such neuron": (lambda _: slr.add_noise(plain(), only=["fc", 1]), ValueError, "is called fc, 1; there are 1"),
    **{
        f"noise={noise}": (lambda _, noise=noise: slr.Leaky(beta=0.9, noise=noise), ValueError,
            "is not a noise; use True, False, .*MembraneNoise")
        for noise in ("membran", 0.5, torch.tensor(0.5), slr.MembraneNoise)
    },
    "distribution": (lambda _: slr.MembraneNoise(distribution="cauchy"), ValueError,
        "'cauchy'.*gaussian, laplace, logistic"),
    "floor": (lambda _: slr.NoisyInput(floor=1.0), ValueError, "floor"),
    "σ of the input": (lambda _: slr.NoisyInput(sigma=-1.0), ValueError, "positive"),
    "distribution of the input": (lambda _: slr.NoisyInput(distribution="x"), ValueError, "choose"),
    "σ for other pixels": (lambda _: slr.NoisyInput(torch.ones(1, 2, 3))(torch.zeros(4, 1, 3, 3)), ValueError,
        "does not fit"),
    # neurons
    **{
        name: (lambda _, name=name: getattr(slr, name), AttributeError, rf"no {name}: .*; use ") for name in UNSUPPORTED
    },
    "no such class": (lambda _: slr.Leeky, AttributeError, "has no attribute 'Leeky'"),
    "RSynaptic's reset": (lambda _: slr.RSynaptic(0.7, 0.6, linear_features=3, reset_delay=False, noise=True),
        ValueError, "RSynaptic.*reset_delay=True"),
    "Lapicque's leak": (lambda _: slr.Lapicque(0.8, learn_beta=True, noise=True), ValueError, "Lapicque.*use Leaky"),
    **{
        f"Alpha, noise={noise}": (lambda _, noise=noise: slr.Alpha(0.8, 0.5, learn_alpha=True, noise=noise), ValueError,
            "learn_alpha=True; use ")
        for noise in (False, True)
    },
    "inhibition": (lambda _: readout(inhibition=True, noise="escape"), ValueError,
        "escape noise decides for each neuron alone"),
    "pooling": (lambda _: slr.SConv2dLSTM(1, 1, 3, max_pool=2, noise="escape"), ValueError,
        "escape noise decides for each neuron alone"),
    "levels of a state": (lambda _: readout(state_quant=state_quant(num_bits=4), noise="escape"), ValueError,
        "escape noise decides by a potential that state_quant clips.*use membrane noise"),
    # anneal
    **{
        f"steps={steps}": (lambda net, steps=steps: slr.anneal(net, steps), ValueError,
            "steps must be a positive integer")
        for steps in (0, 2.5)
    },
    **{
        f"to={to!r}": (lambda net, to=to: slr.anneal(net, 3, to), ValueError, r"to must be in \(0, 1\]")
        for to in (0, 1.5, "0.1")
    },
    "nothing to anneal": (lambda _: slr.anneal(plain(), 3), ValueError, "Sequential has no noise to anneal"),
    # rollout
    "any module": (lambda net: slr.rollout(net, X, 3), TypeError,
        r"nn.Sequential, not Net: .*snntorch_lr.reset\(net\)"),
    "steps": (lambda _: slr.rollout(plain(), X[:, 0], 2.5), ValueError,
        "num_steps must be a positive integer, got 2.5"),
    "no steps": (lambda _: slr.rollout(plain(), X[:, 0], 0), ValueError,
        "num_steps must be a positive integer, got 0"),
    "states by hand": (lambda _: slr.rollout(readout(), X[:, 0], 2), ValueError,
        r"1 \(Leaky\) does not hold.*init_hidden=True"),
    "output on the way": (lambda _: slr.rollout(nn.Sequential(
        snn.Leaky(beta=0.9, init_hidden=True, output=True), nn.Linear(FEATURES, 2)), X[:, 0], 2), ValueError,
        r"0 \(Leaky\) returns its state.*output=False"),
    "no time": (lambda _: slr.rollout(plain(), X[:0]), ValueError,
        r"shape \(0, 4, 3\) have no time step: .*num_steps="),
    # evaluate
    "ε is text": (evaluate(epsilons="a"), ValueError, r"epsilons must be positive numbers .* got \['a'\]"),
    "ε of bytes": (evaluate(epsilons=8), ValueError, "units of pixels in .*8 / 255; got 8"),
    "images without labels": (evaluate(IMAGES), TypeError, "loader must give pairs of images and labels"),
    "attack": (evaluate(attacks=["PGD-X"]), ValueError, "unknown attack 'PGD-X'; there are"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_named_and_nothing_changes(kind: str) -> None:
    call, error, message = BAD[kind]
    net = Net()
    with nothing_changes(net), pytest.raises(error) as caught:
        call(net)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert all(neuron.sampler is None for neuron in noisy_neurons(net).values())


def test_input_that_looks_bad_has_its_result() -> None:
    assert slr.rollout(plain(), X[:0, 0], 2).shape == (2, 0, 2)
    assert slr.MembraneNoise([0.1, 0.2]).sigma.shape == (2,)
    net = Net()
    for estimator in ("vanilla", {"mine": "vanilla"}):
        assert slr.gradient_report(net, net.loss, X, Y, estimator, copies=2, repeats=2, reference=2)
    assert slr.Vanilla(net, torch.tensor(2), seed=torch.tensor(3)).backward(net.loss, X[:1], Y[:1]) > 0
