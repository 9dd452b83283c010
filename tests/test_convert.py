from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.network import spiking_neurons
from snntorch_lr.noisy_neuron import UNSUPPORTED

from .helpers import CLASSES, DEVICES, LEARNED, assert_same, build, inputs_for, run


def leaky(**options: Any) -> snn.Leaky:
    return snn.Leaky(beta=0.8, threshold=0.3, init_hidden=True, learn_beta=True, learn_threshold=True, **options)


def synaptic() -> snn.Synaptic:
    return snn.Synaptic(
        alpha=0.7, beta=torch.tensor([0.5, 0.6, 0.7]), threshold=0.8, init_hidden=True, reset_mechanism="zero"
    )


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), leaky(), nn.Sequential(nn.Linear(3, 3), synaptic()))
        self.head = nn.Sequential(nn.Linear(3, 3), leaky(graded_spikes_factor=1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.lif = leaky()
        self.again = self.lif
        self.inner = nn.Sequential(self.fc, self.lif)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(self.lif(self.fc(x))))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.neurons = nn.ModuleList([leaky(), synaptic()])
        self.named = nn.ModuleDict({"last": leaky()})

    def forward(self, x: Tensor) -> Tensor:
        for linear, neuron in zip(self.linears, self.neurons, strict=True):
            x = neuron(linear(x))
        return self.named["last"](x)


class PlainLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.neurons = [leaky(), (synaptic(),)]
        self.named = {"a": leaky(), "deep": [nn.Sequential(leaky())]}

    def forward(self, x: Tensor) -> Tensor:
        first, (second,) = self.neurons
        x = second(first(self.fc(x)))
        return self.named["deep"][0](self.named["a"](x))


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "nested": (Nested, ["body.1", "body.2.1", "head.1"]),
    "shared": (Shared, ["lif"]),
    "sequential": (lambda: nn.Sequential(nn.Linear(3, 3), leaky(), nn.Linear(3, 3), synaptic()), ["1", "3"]),
    "module lists": (Lists, ["neurons.0", "neurons.1", "named.last"]),
    "plain lists": (PlainLists, ["neurons.0", "neurons.1.0", "named.a", "named.deep.0.0"]),
    "root": (leaky, [""]),
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[kind][0]()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            # So that every layer fires.
            nn.init.uniform_(module.weight, 0, 1)
    return net


def anatomy(net: nn.Module) -> dict[str, Any]:
    """Types, attributes, parameters and buffers of all neurons, as far as another network can have the same."""
    return {
        name: (
            type(neuron),
            list(vars(neuron)),
            list(neuron._parameters),
            list(neuron._buffers),
            list(neuron._modules),
            neuron.state_function.__name__,
            neuron.state_function.__self__ is neuron,
        )
        for name, neuron in spiking_neurons(net)
    }


def drive(net: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs over time and gradients of all parameters, those that only plain lists hold included."""
    slr.reset(net)
    net.zero_grad()
    outputs = [net(step) for step in inputs_for("Leaky")]
    assert 0 < torch.stack(outputs).count_nonzero() < torch.stack(outputs).numel()
    (torch.stack(outputs) * torch.linspace(1, 2, 3)).sum().backward()
    modules = [net, *(neuron for _, neuron in spiking_neurons(net))]
    return outputs, [p.grad for module in modules for p in module.parameters()]


@pytest.mark.parametrize("kind", NETS)
def test_every_neuron_gets_noise_and_keeps_everything_else(kind: str) -> None:
    net = make(kind)
    before = {id(neuron): [*neuron.parameters(), *neuron.buffers()] for _, neuron in spiking_neurons(net)}
    settings = [(n.init_hidden, n.reset_mechanism, n.output) for _, n in spiking_neurons(net)]
    assert slr.add_noise(net, sigma=0.25) is net
    neurons = dict(spiking_neurons(net))
    assert list(neurons) == NETS[kind][1]
    assert [id(neuron) for neuron in neurons.values()] == list(before)
    assert [(n.init_hidden, n.reset_mechanism, n.output) for n in neurons.values()] == settings
    for neuron in neurons.values():
        assert type(neuron) is getattr(slr, type(neuron).__name__)
        assert neuron.noise.sigma.item() == pytest.approx(0.25)
        kept = {id(value) for value in (*neuron.parameters(), *neuron.buffers())}
        assert all(id(value) in kept for value in before[id(neuron)])
    with slr.noise_off(net):
        outputs, _ = drive(net)
    assert all(torch.equal(got, expected) for got, expected in zip(outputs, drive(make(kind))[0], strict=True))
    torch.manual_seed(0)
    noisy, gradients = drive(net)
    assert not torch.equal(torch.stack(noisy), torch.stack(outputs))
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("kind", NETS)
def test_removing_noise_undoes_adding_it(kind: str) -> None:
    net = make(kind)
    untouched = copy.deepcopy(net)
    assert slr.remove_noise(slr.add_noise(net)) is net
    assert anatomy(net).keys() == anatomy(untouched).keys()
    for got, expected in zip(anatomy(net).values(), anatomy(untouched).values(), strict=True):
        assert set(got[1]) == set(expected[1])
        assert (got[0], *got[2:]) == (expected[0], *expected[2:])
    assert net.state_dict().keys() == untouched.state_dict().keys()
    torch.testing.assert_close(drive(net), drive(untouched), rtol=0, atol=0)
    assert_same(dict(net.state_dict()), dict(untouched.state_dict()))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_converted_and_back(name: str) -> None:
    neuron = build(snn, name, learn=True)
    expected = run(build(snn, name, learn=True), inputs_for(name))
    slr.add_noise(neuron)
    assert type(neuron) is getattr(slr, name)
    slr.remove_noise(neuron)
    assert type(neuron) is getattr(snn, name)
    torch.testing.assert_close(run(neuron, inputs_for(name)), expected, rtol=0, atol=0)
    assert {parameter for parameter, _ in neuron.named_parameters()} >= set(LEARNED[name])


def test_converted_twice_keeps_the_first_noise() -> None:
    net = slr.add_noise(make("nested"), sigma=0.2, only=["head.1"])
    levels = [neuron.noise.sigma.item() for _, neuron in spiking_neurons(slr.add_noise(net, sigma=0.9))]
    assert levels == pytest.approx([0.9, 0.9, 0.2])


def test_noise_that_is_not_what_was_asked_for_is_said() -> None:
    net = slr.add_noise(make("nested"))
    for other in ({"sigma": 0.9}, {"distribution": "laplace"}, {"kind": "escape"}):
        with pytest.warns(UserWarning, match=r"head.1 had noise before.*remove_noise"):
            slr.add_noise(net, **other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slr.add_noise(net, distribution="gaussian")


@pytest.mark.parametrize("only", [["body.2.1"], ["body.2.1", "head.1"], ("head.1",), "head.1", []], ids=str)
def test_only_the_named_neurons_are_converted(only: Any) -> None:
    net = slr.add_noise(make("nested"), only=only)
    wanted = {only} if isinstance(only, str) else set(only)
    assert {name for name, neuron in spiking_neurons(net) if getattr(neuron, "noise", None)} == wanted


@pytest.mark.parametrize("learn", [True, False])
def test_learn_decides_whether_sigma_is_a_parameter(learn: bool) -> None:
    net = slr.add_noise(make("nested"), learn=learn)
    assert sum("log_sigma" in name for name, _ in net.named_parameters()) == 3 * learn
    assert sum("log_sigma" in name for name in net.state_dict()) == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.5, torch.tensor([0.1, 0.2, 0.3])], ids=["float", "tensor"])
def test_sigma_is_where_the_neuron_is(sigma: Any, dtype: torch.dtype, device: str) -> None:
    net = slr.add_noise(make("nested").to(device, dtype), sigma=sigma)
    for _, neuron in spiking_neurons(net):
        assert neuron.noise.sigma.dtype == dtype
        assert neuron.noise.sigma.device.type == device
        torch.testing.assert_close(neuron.noise.sigma, torch.as_tensor(sigma, dtype=dtype, device=device))
    assert net(inputs_for("Leaky", dtype)[0].to(device)).dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_noise_takes_the_mode_of_the_neuron(training: bool) -> None:
    net = slr.add_noise(make("nested").train(training))
    assert all(neuron.noise.active == training for _, neuron in spiking_neurons(net))


class Mine(snn.Leaky):
    """A user's own neuron, derived from snnTorch's."""


class MineToo(slr.Leaky):
    """A user's own neuron, derived from ours."""


BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "user's class": (lambda: Mine(beta=0.9), r"derive it from\s+snntorch_lr.Leaky.*only="),
    "broken option": (
        lambda: snn.RSynaptic(alpha=0.9, beta=0.8, linear_features=3, reset_delay=False),
        "use reset_delay=True",
    ),
    "broken option of ours": (lambda: slr.Lapicque(beta=0.5, learn_beta=True), "use Leaky"),
}
UNSUPPORTED_NEURONS: dict[str, Callable[[], nn.Module]] = {
    "LeakyParallel": lambda: snn.LeakyParallel(3, 3),
    "DeltaLeaky": lambda: snn.DeltaLeaky(beta=0.9),
    "StateLeaky": lambda: snn.StateLeaky(beta=0.9, channels=3),
    "LinearLeaky": lambda: snn.LinearLeaky(beta=0.9, in_features=3, out_features=3),
    "AssociativeLeaky": lambda: snn.AssociativeLeaky(3, 2, 2, 4),
}
assert UNSUPPORTED_NEURONS.keys() == UNSUPPORTED.keys()
BAD.update(
    {
        name: (neuron, rf"2 \({name}\) cannot have noise: .*; use ")
        for name, neuron in UNSUPPORTED_NEURONS.items()
        if hasattr(snn, name)
    }
)


@pytest.mark.filterwarnings("ignore:.*snnTorch")
@pytest.mark.parametrize("kind", BAD)
def test_neuron_that_cannot_have_noise_is_refused_and_the_net_left_as_it_was(kind: str) -> None:
    neuron, message = BAD[kind]
    net = nn.Sequential(nn.Linear(3, 3), leaky(), neuron(), leaky())
    before = [(type(module), set(vars(module)), set(module._modules)) for module in net]
    with pytest.raises(ValueError, match=message):
        slr.add_noise(net)
    assert [(type(module), set(vars(module)), set(module._modules)) for module in net] == before


def test_our_neuron_without_noise_is_left_as_it_was_when_a_later_one_is_refused() -> None:
    net = nn.Sequential(slr.Leaky(beta=0.9), Mine(beta=0.9))
    with pytest.raises(ValueError, match="Mine"):
        slr.add_noise(net)
    assert type(net[0]) is slr.Leaky
    assert net[0].noise is None


def test_warning_that_is_an_error_leaves_the_net_as_it_was() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = nn.Sequential(leaky(), snn.SLSTM(3, 4))
        with pytest.raises(UserWarning, match="input_size == hidden_size"):
            slr.add_noise(net)
    assert type(net[0]) is snn.Leaky


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (nn.Linear(3, 3), {}, "Linear has no snnTorch neuron"),
        (nn.Sequential(leaky()), {"only": ["0", "lif"]}, "no snnTorch neuron is called lif; there are 0"),
        (nn.Sequential(leaky()), {"sigma": 0.0}, "sigma must be positive"),
        (nn.Sequential(leaky()), {"sigma": float("nan")}, "sigma must be positive"),
    ],
    ids=["no neuron", "unknown name", "zero", "nan"],
)
def test_refuses_nonsense_and_leaves_the_net_as_it_was(net: nn.Module, options: dict[str, Any], message: str) -> None:
    before = anatomy(net)
    with pytest.raises(ValueError, match=message):
        slr.add_noise(net, **options)
    assert anatomy(net) == before


def test_users_class_derived_from_ours_loses_only_its_noise() -> None:
    net = nn.Sequential(MineToo(beta=0.9, noise=True, init_hidden=True), MineToo(beta=0.9, init_hidden=True))
    slr.add_noise(net)
    assert all(neuron.noise.active for neuron in net)
    slr.remove_noise(net)
    assert all(type(neuron) is MineToo and neuron.noise is None for neuron in net)
    expected = nn.Sequential(snn.Leaky(beta=0.9, init_hidden=True), snn.Leaky(beta=0.9, init_hidden=True))
    assert torch.equal(net(torch.ones(2, 3) * 2), expected(torch.ones(2, 3) * 2))


def test_the_rest_of_a_net_with_a_users_class_can_be_converted() -> None:
    net = slr.add_noise(nn.Sequential(leaky(), Mine(beta=0.9)), only=["0"])
    assert [type(neuron) for neuron in net] == [slr.Leaky, Mine]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_resets_all_neurons_of_this_network_only(kind: str, noisy: bool) -> None:
    nets = [make(kind), make(kind)]
    for net in nets:
        if noisy:
            slr.add_noise(net)
        drive(net)
    slr.reset(nets[0])
    assert not any(neuron.mem.any() for _, neuron in spiking_neurons(nets[0]))
    assert all(neuron.mem.any() for _, neuron in spiking_neurons(nets[1]))
    # Cut from the graph of the last forward pass.
    copy.deepcopy(nets[0])


@pytest.mark.parametrize("name", CLASSES)
def test_reset_starts_from_scratch(name: str) -> None:
    neuron = build(snn, name, learn=True, init_hidden=True)
    first = run(neuron, inputs_for(name))
    # run itself starts from reset_mem(); this does not.
    slr.reset(neuron)
    again = [neuron(step) for step in inputs_for(name)]
    assert all(torch.equal(spikes, want[0]) for spikes, want in zip(again, first, strict=True))


def test_kind_and_distribution_are_as_asked() -> None:
    net = slr.add_noise(nn.Sequential(leaky()), kind="escape", distribution="gaussian")
    assert (type(net[0].noise), net[0].noise.distribution) == (slr.EscapeNoise, "gaussian")
    with pytest.raises(ValueError, match="membrane, escape"):
        slr.add_noise(nn.Sequential(leaky()), kind="pink")
