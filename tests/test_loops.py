"""Training loops as users write them: nothing but ``loss.backward()`` is known of the likelihood ratio there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from snntorch import functional as SF
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import snntorch_lr as slr

from .helpers import Net, assert_same, backward, every_noise, every_path, gradients, weights

FEATURES, CLASSES, STEPS = 6, 3, 5


class Spiking(Net):
    """A constant input; returns the spikes of its second layer, ``[time, batch, classes]``."""

    def __init__(self, noise: str = "escape", init_hidden: bool = False) -> None:
        super().__init__(init_hidden, FEATURES, hidden=20, last=CLASSES, noise=noise)
        self.readout = nn.Identity()

    def forward(self, x: Tensor, step: Any = None) -> Tensor:
        slr.reset(self)
        states, spikes = self.fresh(), []
        for _ in range(STEPS):
            out, *states = (step or self.step)(x, *states)
            spikes.append(out)
        return torch.stack(spikes)


def batch(size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes that can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(size) % CLASSES
    x = 0.5 * torch.rand(size, FEATURES, generator=generator)
    x[torch.arange(size), y] += 1
    return x, y


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x).mean(0), y)


def credit(noise: str = "escape", **options: Any) -> Spiking:
    """A network with a fixed λ, so that calls differ by nothing but their noise."""
    net = Spiking(noise, **options)
    slr.use_gradient(net, "counterfactual", control=0.4)
    return net


def accuracy(net: nn.Module) -> float:
    x, y = batch(60, seed=9)
    with torch.no_grad(), slr.noise_on(net, torch.Generator().manual_seed(0)):
        return float((net(x).sum(0).argmax(1) == y).float().mean())


def step_by(loss: Callable[[Net, Tensor, Tensor], Tensor], parts: int = 1) -> Callable[..., None]:
    """A step of a plain loop, after so many micro-batches."""

    def step(net: Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss(net, a, b) / parts).backward()
        optimizer.step()

    return step


def trained(net: Net, step: Callable[..., object], steps: int = 60) -> Net:
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    slr.attach(optimizer, net)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # There is nothing to be said about loops as these.
        warnings.simplefilter("error", UserWarning)
        for number in range(steps):
            step(net, optimizer, *batch(seed=number))
    return net


def autocast(net: Net, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(net, x, y)


def of_snntorch(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Net, Tensor, Tensor], Tensor]:
    return lambda net, x, y: loss(net(x), y)


LEARNS: dict[str, tuple[str, Callable[..., None]]] = {
    "plain": ("membrane", step_by(loss_of)),
    "micro-batches": ("escape", step_by(loss_of, parts=4)),
    "autocast": ("escape, not fused", step_by(autocast)),
    "ce_rate_loss": ("escape", step_by(of_snntorch(SF.ce_rate_loss()))),
    "ce_count_loss": ("escape", step_by(of_snntorch(SF.ce_count_loss()))),
    "mse_count_loss": ("escape", step_by(of_snntorch(SF.mse_count_loss(correct_rate=0.9, incorrect_rate=0.1)))),
}


@pytest.mark.parametrize("kind", LEARNS)
def test_a_plain_loop_learns(kind: str) -> None:
    noise, step = LEARNS[kind]
    net = Spiking(noise)
    assert accuracy(net) < 0.7
    assert accuracy(trained(net, step)) > 0.9


def test_a_regulariser_of_the_mean_rate_of_a_batch_holds_it() -> None:
    def loss(net: Net, x: Tensor, _: Tensor) -> Tensor:
        rate = net(x).mean()
        rates.append(float(rate.detach()))
        return (rate - 0.1).square()

    net, rates = Spiking(), list[float]()
    with torch.no_grad():
        net.fc2.bias.fill_(0.5)
    trained(net, step_by(loss), steps=100)
    assert rates[0] > 0.3
    assert sum(rates[-10:]) / 10 == pytest.approx(0.1, abs=0.02)


@every_path
def test_backward_passes_of_several_losses_add_up_to_that_of_their_sum(noise: str) -> None:
    net, (x, y) = credit(noise), batch()

    def both() -> tuple[Tensor, Tensor]:
        spikes = net(x)
        return F.cross_entropy(spikes.mean(0), y), F.relu(spikes.mean() - 0.05)

    def apart() -> Tensor:
        first, second = both()
        first.backward(retain_graph=True)
        return second

    parts = backward(net, lambda: both()[0]), backward(net, lambda: both()[1])
    expected = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert all(part["fc1.weight"].any() for part in parts)
    assert_same(backward(net, lambda: sum(both())), expected, rtol=1e-4, atol=1e-7)
    assert_same(backward(net, apart), expected, rtol=1e-4, atol=1e-7)


@every_path
def test_several_presentations_of_a_batch_may_go_back_one_by_one(noise: str) -> None:
    net, (x, y) = credit(noise), batch()
    losses: list[Tensor] = []

    def apart() -> Tensor:
        losses[:] = [loss_of(net, x, y) for _ in range(3)]
        losses[1].backward()
        losses[0].backward()
        return losses[2]

    expected = backward(net, lambda: sum(loss_of(net, x, y) for _ in range(3)))
    assert_same(backward(net, apart), expected, rtol=1e-4, atol=1e-7)


@every_path
def test_a_loss_enters_in_proportion(noise: str) -> None:
    """So accumulation, scaled losses and averages over ranks are right whatever the noise is."""
    net, (x, y) = credit(noise), batch()
    once = backward(net, lambda: loss_of(net, x, y))
    assert_same(backward(net, lambda: -8 * loss_of(net, x, y)), {name: -8 * value for name, value in once.items()})


def test_gradients_are_clipped_before_an_attached_step() -> None:
    net, (x, y) = Spiking(), batch()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    slr.attach(optimizer, net)
    before = weights(net)
    found = backward(net, lambda: loss_of(net, x, y))
    norm = torch.stack([value.norm() for value in found.values()]).norm()
    nn.utils.clip_grad_norm_(net.parameters(), float(norm) / 3)
    optimizer.step()
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] - 0.5 * found[name] / 3, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="no scaler for a CPU")
@every_noise
def test_a_grad_scaler_keeps_small_losses_in_float16_and_skips_an_overflow(noise: str) -> None:
    small, (x, y) = 2.0**-17, batch(600)
    net = credit(noise)
    optimizer, scaler = torch.optim.SGD(net.parameters(), 1.0), torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def loss(scale: float) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return scale * loss_of(net, x, y)

    exact = backward(net, lambda: loss_of(net, x, y))
    backward(net, lambda: scaler.scale(loss(small)))
    scaler.unscale_(optimizer)
    for name in ("fc1.weight", "fc2.weight"):
        assert (gradients(net)[name] / small - exact[name]).norm() < 0.1 * exact[name].norm()
    scaler.update()

    net = Spiking(noise)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    slr.attach(optimizer, net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    skipped = []
    for number in range(90):
        x, y = batch(seed=number)
        optimizer.zero_grad()
        before = weights(net)
        scaler.scale(loss(1.0)).backward()
        overflows = not all(value.isfinite().all() for value in gradients(net).values())
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(value, before[name]) for name, value in net.named_parameters()) == overflows
        skipped.append(overflows)
    assert 1 <= sum(skipped) < 30
    assert not skipped[-1]
    assert bool(net.lif1.noise.control.isfinite().all())
    assert accuracy(net) > 0.9


def by_time_steps(net: Spiking, x: Tensor) -> Any:
    return net(x, lambda *states: checkpoint(net.step, *states, use_reentrant=False))


def as_a_whole(net: Spiking, x: Tensor, use_reentrant: bool = False) -> Any:
    return checkpoint(net.forward, x, use_reentrant=use_reentrant)


@pytest.mark.parametrize(
    ("checkpointed", "init_hidden", "options"),
    [
        (by_time_steps, False, {}),
        (as_a_whole, True, {}),
        (as_a_whole, True, {"copies": 3}),
        # λ stays at half there: all that it could be fitted by is computed in backward passes.
        (partial(as_a_whole, use_reentrant=True), True, {"control": 0.4}),
    ],
    ids=["time steps", "presentation", "copies", "reentrant"],
)
@every_path
def test_activation_checkpointing_gives_the_same_gradient(
    noise: str, checkpointed: Callable[[Spiking, Tensor], Any], init_hidden: bool, options: dict[str, float]
) -> None:
    results = []
    for forward in (Spiking.__call__, checkpointed):
        net, (x, y) = Spiking(noise, init_hidden), batch()
        estimator = slr.Counterfactual(net, **options)

        def loss(x: Tensor, y: Tensor, net: Spiking = net, forward: Any = forward) -> Tensor:
            return F.cross_entropy(forward(net, x).mean(0), y)

        # The second one with a λ that was fitted in the first one.
        for seed in range(2):
            net.zero_grad()
            torch.manual_seed(seed)
            estimator.backward(loss, x.requires_grad_(), y)
            results.append(gradients(net))
    for plain, saved in zip(results[:2], results[2:], strict=True):
        assert_same(saved, plain, rtol=1e-4, atol=1e-7)
        assert plain["fc1.weight"].any()


@pytest.mark.parametrize(
    ("options", "init_hidden", "message"), [
        ({"use_reentrant": False}, True, r"Leaky: activation checkpointing.*whole presentation"),
        ({"use_reentrant": True}, False, r"use use_reentrant=False"),
    ],
)  # fmt: skip
def test_activation_checkpointing_that_would_change_the_gradient_is_refused(
    options: dict[str, Any], init_hidden: bool, message: str
) -> None:
    net, (x, y) = credit(init_hidden=init_hidden), batch()
    x.requires_grad_()
    if init_hidden:
        slr.reset(net)
        steps = [checkpoint(lambda x: net.lif2(net.fc2(net.lif1(net.fc1(x)))), x, **options) for _ in range(STEPS)]
        loss = F.cross_entropy(torch.stack(steps).mean(0), y)
    else:
        loss = F.cross_entropy(net(x, lambda *args: checkpoint(net.step, *args, **options)).mean(0), y)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_activation_checkpointing_with_noise_from_a_generator_of_ones_own_is_refused() -> None:
    """It repeats the noise of torch's global generator alone."""
    net, (x, y) = Spiking(init_hidden=True), batch()
    with pytest.raises(RuntimeError, match="seed"):
        slr.Counterfactual(net, seed=0).backward(
            lambda x, y: F.cross_entropy(checkpoint(net.forward, x, use_reentrant=False).mean(0), y), x, y
        )


def test_a_compiled_network_has_the_same_numbers() -> None:
    torch.compiler.reset()
    (x, _), options = batch(), {"beta": 0.8, "threshold": 0.3}
    held = slr.Leaky(noise="membrane", init_hidden=True, **options)
    net = nn.Sequential(nn.Linear(FEATURES, 20), held, nn.Linear(20, 4), slr.Leaky(noise="escape", **options))

    def loss(x: Tensor) -> Tensor:
        held.reset_mem()
        mem, total = net[3].reset_mem(), torch.zeros(())
        for _ in range(2):
            spikes, mem = net[3](net[:3](x), mem)
            total = total + spikes.square()
        return total.square().mean()

    compiled = torch.compile(loss, backend="aot_eager")
    for gradient, more in (("counterfactual", {"control": 0.4}), ("surrogate", {})):
        # Code that was compiled for one gradient is not used for another.
        slr.use_gradient(net, gradient, **more)
        expected = backward(net, lambda: loss(x))
        assert expected["0.weight"].any()
        assert_same(backward(net, lambda: compiled(x)), expected, rtol=1e-5, atol=1e-7)
    net.eval()
    torch.testing.assert_close(compiled(x), loss(x))


def test_lightning_trains_it_by_automatic_optimization(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="pip install lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.steps = Spiking(init_hidden=True), 0

        def training_step(self, data: Any, _: int) -> Tensor:
            return loss_of(self.net, *data)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.steps += 1
            norms = [parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]
            assert float(torch.stack(norms).norm()) > 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.Adam(self.parameters(), 0.02)
            slr.attach(optimizer, self.net)
            return optimizer

    torch.manual_seed(0)
    module = Module()
    batches = [batch(16, seed=number) for number in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert module.steps == 60
    assert module.net.lif1.control.steps == 3 * 40 * STEPS
    assert accuracy(module.net) > 0.9


def test_an_attack_library_follows_the_likelihood_ratio_of_a_network_in_training_mode() -> None:
    torchattacks = pytest.importorskip("torchattacks")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(16, 10), slr.Leaky(beta=0.8, threshold=0.5, noise=slr.EscapeNoise(0.3))

        def forward(self, images: Tensor) -> Tensor:
            mem, count = self.lif.reset_mem(), torch.zeros(())
            for _ in range(5):
                spikes, mem = self.lif(self.fc(images.flatten(1)), mem)
                count = count + spikes
            return count

    torch.manual_seed(0)
    net = Classifier()
    slr.use_gradient(net)
    images, labels = torch.rand(40, 1, 4, 4), torch.randint(10, (40,))
    attack = torchattacks.PGD(net, eps=0.2, alpha=0.1, steps=10)
    attack.set_model_training_mode(model_training=True)
    found = attack(images, labels)
    assert net.training
    with torch.no_grad():
        before, after = (
            nn.functional.cross_entropy(net(x.repeat(50, 1, 1, 1)), labels.repeat(50)) for x in (images, found)
        )
    assert net.lif.control.steps > 0, "the gradient was that of the neuron"
    assert after > before + 0.1
