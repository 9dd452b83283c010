"""snnTorch's neurons with ``noise=``, and the way from one to the other."""

from __future__ import annotations

import inspect
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

from ._messages import place
from .kernels import kinds
from .kernels.kinds import Update
from .noise import Noise
from .noisy_neuron import UNSUPPORTED, NoisyNeuron, check_defects

# A reset to zero, before the current is added, or after that.
_LEAKY = {"subtract": kinds.SUBTRACT, "zero": kinds.ZERO, "none": kinds.NONE}
_OTHERS = _LEAKY | {"zero": kinds.ERASE}


def _is_known(neuron: NoisyNeuron, plain: type[nn.Module], *constants: Tensor) -> bool:
    """A time step is snnTorch's own, of a class, and nothing in it is learned but σ, quantised or shared."""
    classes = type(neuron).__mro__
    of_user = classes[: next(place for place, cls in enumerate(classes) if cls in NOISY.values())]
    changed = {name for part in (neuron, *of_user) for name in vars(part)}
    if any(name in ("fire", "mem_reset") or name.startswith("_base_") for name in changed):
        return False
    own = {getattr(plain, name) for name in ("_base_sub", "_base_zero", "_base_int") if hasattr(plain, name)}
    known = getattr(neuron._snn_state_function, "__func__", None) in own and neuron.is_step_function
    learned = any(constant.requires_grad for constant in (*constants, neuron.threshold))
    return known and not (learned or neuron.resets_at_once or neuron.state_quant or neuron.inhibition)


class Leaky(NoisyNeuron, snn.Leaky):
    """``snntorch.Leaky`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    Examples:
        >>> lif = slr.Leaky(beta=0.9, noise=True)
        >>> spikes, mem = lif(torch.ones(2, 3), lif.reset_mem())
        >>> spikes.shape
        torch.Size([2, 3])
    """

    def fused_update(self) -> Update | None:
        """See ``NoisyNeuron``."""
        if not _is_known(self, snn.Leaky, self.beta):
            return None
        vectors = lambda: (self.beta.clamp(0, 1), torch.ones_like(self.threshold), None)  # noqa: E731
        return Update(_LEAKY[self.reset_mechanism], (self.beta,), vectors)


def integrates(neuron: nn.Module) -> bool:
    """A neuron is a ``Leaky`` without noise and without reset, as many readouts are: a linear filter of its current."""
    if type(neuron) not in (snn.Leaky, Leaky) or getattr(neuron, "noise", None) is not None:
        return False
    if neuron.state_quant or neuron.inhibition or "fire" in vars(neuron) or "mem_reset" in vars(neuron):
        return False
    return getattr(neuron.state_function, "__func__", None) is snn.Leaky._base_int


def integrate(neuron: Any, current: Tensor, steps: int, constant: bool) -> tuple[Tensor, Tensor]:
    """Spikes and membrane potentials, ``[steps, batch, ...]``, of a neuron that ``integrates``, as in a loop.

    Args:
        neuron: goes on from its state, and holds that of the last time step afterwards.
        current: ``[batch, ...]``, the same in all steps, or ``[steps, batch, ...]``.
        steps: number of time steps.
        constant: the current is the same.
    """
    shape = current.shape if constant else current.shape[1:]
    beta, mem = neuron.beta.clamp(0, 1), neuron.mem
    mem = mem if mem.shape == shape else torch.zeros(shape, dtype=current.dtype, device=mem.device)
    potentials = []
    for step in range(steps):
        neuron.reset, mem = mem, beta * mem + (current if constant else current[step])
        potentials.append(mem)
    neuron.mem, neuron.reset = mem, neuron.mem_reset(neuron.reset)
    stacked = torch.stack(potentials)
    return neuron.fire(stacked), stacked


class Lapicque(NoisyNeuron, snn.Lapicque):
    """``snntorch.Lapicque`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    Examples:
        >>> lif = slr.Lapicque(R=2.0, C=3.0, noise=True)
        >>> spikes, mem = lif(torch.ones(2, 3), lif.reset_mem())
    """

    def fused_update(self) -> Update | None:
        """See ``NoisyNeuron``."""
        constants = self.R, self.C, self.time_step
        if not _is_known(self, snn.Lapicque, *constants):
            return None
        share = lambda: self.time_step / (self.R * self.C)  # noqa: E731
        return Update(_OTHERS[self.reset_mechanism], constants, lambda: (1 - share(), share() * self.R, None))


class Synaptic(NoisyNeuron, snn.Synaptic):
    """``snntorch.Synaptic`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    Examples:
        >>> lif = slr.Synaptic(alpha=0.8, beta=0.9, noise=True)
        >>> spikes, syn, mem = lif(torch.ones(2, 3), *lif.reset_mem())
    """

    state_names = ("syn", "mem")
    shared_states = ("syn",)

    def fused_update(self) -> Update | None:
        """See ``NoisyNeuron``."""
        constants = self.alpha, self.beta
        if not _is_known(self, snn.Synaptic, *constants):
            return None
        vectors = lambda: (self.beta.clamp(0, 1), torch.ones_like(self.threshold), self.alpha.clamp(0, 1))  # noqa: E731
        return Update(_OTHERS[self.reset_mechanism], constants, vectors)


class Alpha(NoisyNeuron, snn.Alpha):
    """``snntorch.Alpha`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    snnTorch's Alpha computes its membrane from the synaptic currents alone, so noise acts on the spike and the reset
    of one time step and is not carried on.

    Examples:
        >>> lif = slr.Alpha(alpha=0.8, beta=0.7, noise=True)
        >>> spikes, *states = lif(torch.ones(2, 3), *lif.reset_mem())
    """

    state_names = ("syn_exc", "syn_inh", "mem")


class RLeaky(NoisyNeuron, snn.RLeaky):
    """``snntorch.RLeaky`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    Examples:
        >>> lif = slr.RLeaky(beta=0.9, linear_features=3, noise=True)
        >>> spikes, mem = lif(torch.ones(2, 3), *lif.reset_mem())
    """


class RSynaptic(NoisyNeuron, snn.RSynaptic):
    """``snntorch.RSynaptic`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    Examples:
        >>> lif = slr.RSynaptic(alpha=0.8, beta=0.9, linear_features=3, noise=True)
        >>> spikes, syn, mem = lif(torch.ones(2, 3), *lif.reset_mem())
    """

    state_names = ("syn", "mem")


class SLSTM(NoisyNeuron, snn.SLSTM):
    """``snntorch.SLSTM`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    Examples:
        >>> cell = slr.SLSTM(3, 3, noise=True)
        >>> spikes, syn, mem = cell(torch.ones(2, 3), *cell.reset_mem())
    """

    state_names = ("syn", "mem")
    is_elementwise = False

    def _state_shape(self, input_: Tensor) -> tuple[int, ...]:
        return (input_.shape[0], self.hidden_size)


class SConv2dLSTM(NoisyNeuron, snn.SConv2dLSTM):
    """``snntorch.SConv2dLSTM`` with ``noise=``; arguments, shapes and return values are snnTorch's.

    Examples:
        >>> cell = slr.SConv2dLSTM(1, 4, kernel_size=3, noise=True)
        >>> spikes, syn, mem = cell(torch.ones(2, 1, 8, 8), *cell.reset_mem())
    """

    state_names = ("syn", "mem")
    is_elementwise = False

    def _state_shape(self, input_: Tensor) -> tuple[int, ...]:
        return (input_.shape[0], self.out_channels, *input_.shape[2:])


NOISY: dict[type[nn.Module], type[NoisyNeuron]] = {
    cls.__bases__[1]: cls for cls in (Leaky, Lapicque, Synaptic, Alpha, RLeaky, RSynaptic, SLSTM, SConv2dLSTM)
}


def _give_signature(noisy: type[NoisyNeuron], plain: type[nn.Module]) -> None:
    """Shows snnTorch's arguments and ``noise`` to ``help`` and editors."""

    def __init__(self: NoisyNeuron, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        NoisyNeuron.__init__(self, *args, **kwargs)

    signature = inspect.signature(plain.__init__)
    noise = inspect.Parameter("noise", inspect.Parameter.KEYWORD_ONLY, default=False)
    vars(__init__)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), noise])
    setattr(noisy, "__init__", __init__)  # noqa: B010


for _plain, _noisy in NOISY.items():
    _give_signature(_noisy, _plain)


def to_noisy(neuron: nn.Module, noise: Noise, name: str = "") -> None:
    """Turns a snnTorch neuron into its noisy counterpart, in place: the same object, parameters and state.

    Raises:
        ValueError: if the class of the neuron has no noisy counterpart, or one of its options is broken in snnTorch.
    """
    cls = type(neuron)
    where = place(name, neuron)
    if isinstance(neuron, NoisyNeuron):
        check_defects(neuron, noise, name)
        neuron.noise = noise
        return
    for unsupported in UNSUPPORTED:
        if cls.__name__ == unsupported:
            raise ValueError(f"{where} cannot have noise: {UNSUPPORTED[unsupported]}")
    if cls not in NOISY:
        raise ValueError(
            f"{where} is a class of your own, and noise could be lost in its code: derive it from "
            "snntorch_lr.Leaky (or another neuron of snntorch_lr) and pass noise=, or leave it out through only="
        )
    check_defects(neuron, noise, name)
    function = neuron.__dict__.pop("state_function")
    vars(neuron)["_snn_state_function"] = function
    neuron.__class__ = NOISY[cls]
    neuron.noise = noise


def to_plain(neuron: nn.Module) -> None:
    """Turns a noisy neuron back into snnTorch's, in place. A class derived by the user stays, without noise."""
    delattr(neuron, "noise")
    for name in (*NoisyNeuron.transient, "sampler", "warned", "_reset_during"):
        neuron.__dict__.pop(name, None)
    cls = type(neuron)
    for plain, noisy in NOISY.items():
        if noisy is cls:
            function = neuron.__dict__.pop("_snn_state_function")
            neuron.__class__ = plain
            neuron.__dict__["state_function"] = function
            return
    vars(neuron)["noise"] = None
