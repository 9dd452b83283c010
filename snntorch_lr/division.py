"""How the work on one gradient is divided among processes: here, not at all. ``distributed`` has the other ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


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
        """Runs the part of this process, and puts the gradients of all processes together.

        Args:
            parameters: whose gradients.
            backward: adds this process's part of the gradient into ``.grad``, and returns its mean loss.

        Returns:
            The mean loss of all processes.
        """
        return backward()
