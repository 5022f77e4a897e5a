"""What the strategy tells callbacks of the pipeline that runs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lightning_tspipe.partition import Balance
from lightning_tspipe.placement import Placement
from lightning_tspipe.runtime import Runtime
from lightning_tspipe.saving import CheckpointStrategy
from lightning_tspipe.schedule import Costs, Schedule
from lightning_tspipe.selective import Recompute


class Asked(NamedTuple):
    """What the user has asked of the strategy."""

    stages: int | Literal["auto"]
    microbatches: int | Literal["auto"]
    recompute: Recompute
    teacher_microbatches: int | Literal["auto"]


class ReportingStrategy(CheckpointStrategy):
    """Shows placement, plan, costs and the runtime."""

    placement: Placement | None = None  # which rank has which layers, and what they cost
    _microbatches: int | Literal["auto"] = "auto"
    _balance: Balance | Placement = "auto"
    _stages: int | Literal["auto"] = "auto"
    _recompute: Recompute = False
    _teacher_microbatches: int | Literal["auto"] = "auto"

    @property
    def asked(self) -> Asked:
        """What the plan depends on, as the user has given it."""
        return Asked(self._stages, self._microbatches, self._recompute, self._teacher_microbatches)

    @property
    def runtime(self) -> Runtime | None:
        """What runs the steps of this rank; None outside of a fit."""
        return None if self._fitting is None else self._fitting.runtime

    @property
    def plan(self) -> Schedule | None:
        """The schedule of the last step; None outside of a fit."""
        return None if self.runtime is None else self.runtime.current

    @property
    def costs(self) -> Costs | None:
        """The costs that the schedule was made for; None outside of a fit."""
        return None if self.runtime is None else self.runtime.costs

    @property
    def predicted_costs(self) -> Costs | None:
        """Measured seconds of a microbatch as large as they are; None where nothing was measured."""
        return None if self.placement is None or self.placement.microbatches is None else self.placement.costs

    @property
    def busy(self) -> dict[str, float]:
        """Seconds that this rank has spent in T, F and B since the fit began."""
        return {} if self.runtime is None else dict(self.runtime.busy)
