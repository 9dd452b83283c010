"""Linear and convolution layers between neurons, in a loop over time: a constant input is computed once.

Tutorials write ``fc1(x)`` in every time step. While the input is the same tensor, and nothing was changed in place, the
layer returns the same output: autograd adds up its gradients, and goes back through the layer once. Spikes that a fused
neuron emitted are kept for the backward pass as the neuron keeps them anyway, once they would take much memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .graph import outside_of_graphs, version

# Bytes of the spikes of one layer in one presentation, from which on they are not kept as numbers.
WORTH_KEEPING_AS_BITS = 4_000_000
_STEPS_AT_ONCE = 4
SPIKES = "_snntorch_lr_spikes"
"""Name of what a fused neuron hangs on its spikes: see ``Emitted``."""


# Presentations of any network that have begun.
_presentation = 0


def _count_presentation() -> None:
    """What was computed before belongs to another presentation, which may go back, and be freed, before this one."""
    global _presentation
    _presentation += 1


_count_apart = outside_of_graphs(_count_presentation)


def new_presentation() -> None:
    """Says that a presentation begins."""
    if torch.compiler.is_compiling():
        _count_apart()
    else:
        _count_presentation()


def _autocasts(device: torch.device) -> bool:
    try:
        return torch.is_autocast_enabled(device.type)
    except RuntimeError:
        # There is none on this device.
        return False
    except TypeError:
        # Torch before 2.4.
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


@dataclass(frozen=True)
class Emitted:
    """Where the spikes of a tensor are kept, too.

    Attributes:
        code: integers, whose lowest bits are the spikes, ``[..., batch, ...]``, in the order of the tensor.
        version: of the tensor, to tell changes in place.
        bytes: of the spikes of the neuron in this presentation, so far.
    """

    code: Tensor
    version: int
    bytes: int


@dataclass
class _Memo:
    """An output, and what it was computed from."""

    input: weakref.ref[Tensor]
    known: tuple[Any, ...]
    output: Tensor
    version: int


_TRANSIENT = ("_memo", "_began", "_changes")


class _Remembering(nn.Module):
    """Mixin in front of a layer of torch, by which it is what this module says."""

    weight: Tensor
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        """As torch's layer."""
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or _is_checkpointed():
            plain: Tensor = super().forward(x)
            return plain
        if self.__dict__.get("_changes") == _presentation:
            return self._compute(x)
        known = self._known(x)
        memo: _Memo | None = self.__dict__.get("_memo")
        if memo is not None and memo.input() is x and memo.known == known and version(memo.output) == memo.version:
            return memo.output
        output = self._compute(x)
        if self.__dict__.get("_began") == _presentation:
            # An input that changed once will change again.
            self.__dict__["_changes"] = _presentation
        else:
            self.__dict__["_began"] = _presentation
            self._keep(x, known, output)
        return output

    def _compute(self, x: Tensor) -> Tensor:
        emitted: Emitted | None = getattr(x, SPIKES, None)
        if emitted is not None and self._is_worth_it(x, emitted):
            return self._from_spikes(x, emitted.code)
        output: Tensor = super().forward(x)
        return output

    def _known(self, x: Tensor) -> tuple[Any, ...]:
        """All that decides about the output, beside the input itself. A backward pass that runs it again is apart."""
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        task = torch._C._current_graph_task_id()
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocasts(x.device)
        held = tuple((id(parameter), version(parameter)) for parameter in parameters)
        return _presentation, version(x), x.requires_grad, task, modes, held

    def _keep(self, x: Tensor, known: tuple[Any, ...], output: Tensor) -> None:
        me = weakref.ref(self)

        def forget(_: object) -> None:
            module = me()
            if module is not None:
                module.__dict__.pop("_memo", None)

        self.__dict__["_memo"] = _Memo(weakref.ref(x, forget), known, output, version(output))
        if output.requires_grad:
            # After a backward pass the graph behind the output is gone.
            output.register_hook(forget)  # type: ignore[no-untyped-call]

    def _is_worth_it(self, x: Tensor, emitted: Emitted) -> bool:
        if emitted.version != version(x) or emitted.bytes < WORTH_KEEPING_AS_BITS:
            return False
        same = x.dtype == self.weight.dtype and not _autocasts(x.device)
        return same and torch.is_grad_enabled() and self.weight.requires_grad

    def _from_spikes(self, x: Tensor, code: Tensor) -> Tensor:
        raise NotImplementedError

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Remembering")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _TRANSIENT}


class RememberingLinear(_Remembering, nn.Linear):
    """``torch.nn.Linear`` that computes a constant input once."""

    def _from_spikes(self, x: Tensor, code: Tensor) -> Tensor:
        output: Tensor = _LinearOfSpikes.apply(x, code, self.weight, self.bias)
        return output


class RememberingConv2d(_Remembering, nn.Conv2d):
    """``torch.nn.Conv2d`` that computes a constant input once."""

    def _is_worth_it(self, x: Tensor, emitted: Emitted) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str) and super()._is_worth_it(x, emitted)

    def _from_spikes(self, x: Tensor, code: Tensor) -> Tensor:
        options = self.stride, self.padding, self.dilation, self.groups
        output: Tensor = _ConvolutionOfSpikes.apply(x, code, self.weight, self.bias, options)
        return output


class _LinearOfSpikes(torch.autograd.Function):
    """A linear layer whose input is had again from the bits in which the neuron keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, code: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(code, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        code, weight = ctx.saved_tensors
        gradient = grads[0]
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad
        to_x = gradient @ weight if needs_x else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_weight = torch.zeros_like(weight) if needs_weight else None
        if to_weight is not None:
            start = 0
            # A few time steps at a time: as numbers all of them may be too many.
            for part in code.reshape(-1, *code.shape[-2:]).split(_STEPS_AT_ONCE):
                spikes = _spikes(part, weight).reshape(-1, weight.shape[1])
                to_weight.addmm_(flat[start : start + len(spikes)].T, spikes)
                start += len(spikes)
        return to_x, None, to_weight, flat.sum(0) if needs_bias else None


class _ConvolutionOfSpikes(torch.autograd.Function):
    """The same of a convolution."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, code: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(code, weight)
        ctx.options, ctx.biases, ctx.shape = options, None if bias is None else list(bias.shape), x.shape
        return nn.functional.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        code, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        # Rows of the input may be time steps and batch, which are apart in the code.
        spikes = _spikes(code, weight).reshape(ctx.shape)
        gradients = torch.ops.aten.convolution_backward(
            grads[0], spikes, weight, ctx.biases, stride, padding, dilation, False, [0] * len(stride), groups,
            [needs_x, needs_weight, needs_bias],
        )  # fmt: skip
        return gradients[0], None, gradients[1], gradients[2], None


def _is_checkpointed() -> bool:
    """Saved tensors go through hooks, as in activation checkpointing, which has to compute all of a part again."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    # Torch before 2.4 cannot be asked.
    return top is None or top(False) is not None


def _spikes(code: Tensor, like: Tensor) -> Tensor:
    return code.bitwise_and(1).to(like.dtype)


_REMEMBERING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RememberingLinear, nn.Conv2d: RememberingConv2d}
_PLAIN = {remembering: plain for plain, remembering in _REMEMBERING.items()}


def remember_constant_inputs(net: nn.Module) -> None:
    """Has the linear and convolution layers of a network compute a constant input once, in place."""
    for module in net.modules():
        if type(module) in _REMEMBERING:
            module.__class__ = _REMEMBERING[type(module)]


def forget_constant_inputs(net: nn.Module) -> None:
    """Turns them back into layers of torch."""
    for module in net.modules():
        if type(module) in _PLAIN:
            for name in _TRANSIENT:
                module.__dict__.pop(name, None)
            module.__class__ = _PLAIN[type(module)]
