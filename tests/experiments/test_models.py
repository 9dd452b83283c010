"""Models: what they take, what they compute, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import snntorch as snn
import torch
from torch import nn

from snntorch_lr.experiments import data
from snntorch_lr.experiments.models import MODELS, SMALLEST, SURROGATES, build
from snntorch_lr.experiments.train import FITTING, Recipe, load_trained, train

RECORDING, SOUND, COLOUR, FEATURES = (5, 2, 17, 18), (6, 7), (3, 16, 19), (9,)
SHAPES = (RECORDING, SOUND, COLOUR, FEATURES)


def fits(model: str, shape: tuple[int, ...]) -> bool:
    return model not in SMALLEST or len(shape) > 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model", [*MODELS, "ann"])
def test_every_model_takes_samples_of_any_shape_or_says_which_do(model: str, shape: tuple[int, ...]) -> None:
    if fits(model, shape):
        assert build(model, shape, 3)(torch.rand(2, *shape)).shape == (2, 3)
    else:
        with pytest.raises(ValueError, match=rf"model {model} needs .* pixels, and these samples are .* one of mlp, "):
            build(model, shape, 3)


@pytest.mark.parametrize("model", SMALLEST)
def test_images_that_are_too_small_are_refused(model: str) -> None:
    side = SMALLEST[model]
    assert build(model, (1, side, side), 3)(torch.rand(2, 1, side, side)).shape == (2, 3)
    with pytest.raises(ValueError, match=f"at least {side} × {side} pixels"):
        build(model, (1, side, side - 1), 3)


@pytest.mark.parametrize("model", ["deep-mlp", "spiking-mlp", "recurrent", "event-conv", "vgg"])
def test_a_recording_runs_frame_by_frame(model: str) -> None:
    torch.manual_seed(0)
    net, recordings = build(model, RECORDING, 3), torch.rand(4, *RECORDING)
    with torch.no_grad():
        # Fresh neurons are silent, and BatchNorm has no statistics.
        for weight in (parameter for parameter in net.parameters() if parameter.dim() > 1):
            weight *= 4
        for _ in range(20):
            net(recordings)
    net.eval()
    hidden = [module for pair in zip(net.blocks, net.neurons, strict=True) for module in pair]
    layers = nn.Sequential(*hidden, net.readout, net.output)
    with torch.no_grad():
        logits = net(recordings)
        for neuron in [*net.neurons, net.output]:
            neuron.reset_mem()
            if isinstance(neuron, snn.RLeaky):
                neuron.spk = torch.zeros(())
        spikes, potentials = zip(*(layers(frame) for frame in recordings.unbind(1)), strict=True)
    expected = torch.stack(spikes).sum(0) if net.counts else torch.stack(potentials).mean(0)
    torch.testing.assert_close(logits, expected)
    assert not torch.equal(net(recordings.flip(1)), logits)


def test_batch_norm_has_one_mean_for_all_time_steps() -> None:
    net = build("vgg", RECORDING, 3)
    calls: list[torch.Tensor] = []
    for block in net.blocks:
        block[1].register_forward_hook(lambda module, inputs, output: calls.append(output))
    net(torch.rand(4, *RECORDING))
    assert len(calls) == len(net.blocks)
    for rows in calls:
        assert len(rows) == 4 * RECORDING[0]
        torch.testing.assert_close(rows.mean((0, 2, 3)), torch.zeros(rows.shape[1]), atol=1e-4, rtol=0)


def test_the_derivative_of_a_spike_is_a_choice() -> None:
    gradients = {}
    for surrogate in (None, *SURROGATES):
        torch.manual_seed(0)
        net = build("mlp", FEATURES, 3, surrogate=surrogate)
        net(torch.ones(2, *FEATURES)).square().sum().backward()
        gradients[surrogate] = net.blocks[0][1].weight.grad
    assert torch.equal(gradients[None], gradients["atan"])
    assert not torch.equal(gradients["atan"], gradients["fast-sigmoid"])


def test_data_sets_have_models_that_fit() -> None:
    assert {name: Recipe(method="surrogate", dataset=name).model for name in data.NAMES} == {
        name: FITTING.get(name, "mlp") for name in data.NAMES
    }
    assert (Recipe(method="surrogate", dataset="cifar10").num_steps, Recipe(method="surrogate").num_steps) == (4, 8)


@pytest.mark.parametrize("model", ["recurrent", "event-conv"])
def test_a_network_of_recordings_comes_back_from_its_checkpoint(model: str, tmp_path: Path) -> None:
    samples, labels = torch.rand(6, *RECORDING), torch.tensor([0, 1, 2, 0, 1, 2])
    recordings = data.Dataset("file", samples, labels, samples, labels)
    recipe = Recipe(method="likelihood ratio", dataset="file", model=model, epochs=1)
    trained = train(recipe, recordings, tmp_path / "c.pt", torch.device("cpu")).net
    loaded_recipe, loaded = load_trained(tmp_path / "c.pt")
    assert loaded_recipe == recipe
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(samples), trained.eval()(samples))
    assert loaded(samples).shape == (6, 3)
