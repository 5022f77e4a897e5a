"""What a running step asks of the outside: the user's loss, and Lightning's hooks around the backward."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_tspipe.logrelay import LossReport


class StepHooks(Protocol):
    """What the runtime needs from outside while a step runs."""

    def loss(self, student_out: Any, teacher_out: Any, target: Any, rows: slice) -> tuple[Tensor, LossReport]:
        """The user's loss of these rows of the batch and what it logged; called on the last rank only."""

    def log(self, report: LossReport) -> None:
        """Called on every rank when it knows what `loss` had to say of a batch."""

    def before_backward(self, loss: Tensor) -> Tensor:
        """Called on every rank before its first backward; returns what is differentiated on the last rank."""

    def scale(self, loss: Tensor) -> Tensor:
        """What is differentiated for a microbatch after the first one of a batch."""

    def after_backward(self, loss: Tensor) -> None:
        """Called on every rank after its last backward."""

    def asked(self) -> int:
        """What signals have asked of this rank, as bits."""

    def ask(self, what: int) -> None:
        """Note what they have asked of a rank behind this one."""

    def agree(self, what: int) -> None:
        """Note what they have asked of any replica; every replica knows of it after the same step."""
