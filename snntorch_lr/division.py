"""How the work on one gradient is divided among processes: here, not at all. ``distributed`` has the other ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn


def apart(
    parameters: Iterable[nn.Parameter], backward: Callable[[], Tensor]
) -> tuple[Tensor, dict[nn.Parameter, Tensor | None]]:
    """What ``backward`` returns and leaves in ``.grad``, which is as it was afterwards, also after an error."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        loss = backward()
        return loss, {parameter: parameter.grad for parameter in trained}
    finally:
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient


def add(gradients: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Adds into ``.grad``, as a backward pass does."""
    for parameter, gradient in gradients.items():
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class Undivided:
    """All copies of all samples are run by this process.

    What an estimator asks whenever another process could have a part in the answer; each method answers for one
    process alone.
    """

    def own_copies(self, copies: int) -> tuple[int, int]:
        """First of the copies that are run here, and the end of their range."""
        return 0, copies

    def seed(self, seed: int) -> int:
        """Seed of this process's noise, from the one that it drew."""
        return seed

    def gather(self, losses: Tensor) -> Tensor:
        """Losses that the baseline compares, from those of this process; both ``[copies, batch]``."""
        return losses

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes of what each of them found."""
        return values

    def run(self, parameters: Iterable[nn.Parameter], backward: Callable[[], Tensor]) -> Tensor:
        """Runs the part of this process, and adds the gradients of all processes into ``.grad``.

        An error leaves every ``.grad`` as it was.

        Args:
            parameters: whose gradients.
            backward: leaves this process's part of the gradient in ``.grad``, and returns its mean loss.

        Returns:
            The mean loss of all processes.
        """
        loss, own = apart(parameters, backward)
        add(own)
        return loss
