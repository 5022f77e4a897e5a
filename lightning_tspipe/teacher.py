"""The momentum teacher: which version a step uses, and the update itself.

n counts optimizer steps. After step n the student is theta_n, and xi_n = m_n xi_{n-1} + (1 - m_n) theta_n, with xi_0
the teacher as built. Update n is applied lazily, in step n + 1, so that a checkpoint holds the weights that made the
teacher outputs in flight and no second copy of the teacher is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Momentum = float | Callable[[int], float]


def teacher_version(step: int, delay: int, delay_from_step: int = 1) -> int:
    """The version of the teacher that every batch of an optimizer step uses: ``max(0, step - 1 - delay)``.

    ::

        step                    1  2  3  4  5
        delay 0                 0  1  2  3  4     the classic, synchronous rule
        delay 1                 0  0  1  2  3     one update late
        delay 1 from step 4     0  1  2  2  3     synchronous before step 4

    Args:
        step: the optimizer step n, counted from 1.
        delay: 0 or 1.
        delay_from_step: steps before this one use delay 0.
    """
    return max(0, step - 1 - (delay if step >= delay_from_step else 0))


@dataclass(frozen=True)
class cosine_momentum:
    """Momentum that rises from `start` at step 1 to `end` after `num_steps` steps along half a cosine.

    Source: Grill et al., "Bootstrap your own latent", NeurIPS 2020, section 3.2, https://arxiv.org/abs/2006.07733.

    Args:
        start: momentum of step 1.
        end: momentum of step ``num_steps + 1`` and of all later ones.
        num_steps: optimizer steps of the whole training, at least 1.
    """

    start: float
    end: float
    num_steps: int

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}: give the optimizer steps of the training, at least 1")
        for name in ("start", "end"):
            check_momentum(getattr(self, name))

    def __call__(self, step: int) -> float:
        """The momentum of a step, counted from 1."""
        share = min(step - 1, self.num_steps) / self.num_steps
        return self.end - (self.end - self.start) * (math.cos(math.pi * share) + 1) / 2


# as a hyperparameter it is in checkpoints, which are loaded with weights_only=True
torch.serialization.add_safe_globals([cosine_momentum])


def check_momentum(value: float) -> float:
    """Return a momentum that lies in [0, 1]; raise ValueError for any other."""
    if not 0 <= value <= 1:
        raise ValueError(f"momentum is {value}: the share of the old teacher that is kept lies between 0 and 1")
    return value


def pair_parameters(teacher: nn.Module, source: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair every teacher parameter with the student's parameter of the same name.

    Raises:
        ValueError: a teacher parameter has no source, or its shape differs; the text names the parameter.
    """
    sources = dict(source.named_parameters())
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parameter in teacher.named_parameters():
        if name not in sources:
            raise ValueError(
                f"The teacher's parameter {name!r} has no source: `ema_source()` has no parameter of that name (it has "
                f"{', '.join(list(sources)[:5]) or 'none'}, ...). Build the teacher as a copy of what `ema_source()` "
                "returns, or override `ema_source()` to return the student's submodule that the teacher follows."
            )
        if sources[name].shape != parameter.shape:
            raise ValueError(
                f"The teacher's parameter {name!r} has shape {tuple(parameter.shape)}, its source "
                f"{tuple(sources[name].shape)}. A momentum teacher needs the shapes of the student it follows."
            )
        pairs[name] = (parameter, sources[name])
    return pairs


class MomentumTeacher:
    """Applies the updates of one rank's teacher parameters, each exactly once and in order.

    Args:
        pairs: (teacher parameter, student parameter) on this rank.
        momentum: the momentum m_n, or a callable of the step number n.
        version: the update that the teacher holds now.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], momentum: Momentum, version: int = 0) -> None:
        self._teacher = [teacher for teacher, _ in pairs]
        self._student = [student for _, student in pairs]
        self._momentum = momentum
        self.version = version

    @torch.no_grad()
    def advance(self, version: int, completed: int) -> None:
        """Bring the teacher to `version`, given that the student has made `completed` optimizer steps.

        Only the update of the last completed step can be made, since the student's earlier weights are gone.
        """
        if version <= self.version:
            return
        assert version == completed == self.version + 1, (version, completed, self.version)
        momentum = check_momentum(self._momentum(version) if callable(self._momentum) else self._momentum)
        if self._teacher:
            torch._foreach_mul_(self._teacher, momentum)
            torch._foreach_add_(self._teacher, self._student, alpha=1 - momentum)
        self.version = version
