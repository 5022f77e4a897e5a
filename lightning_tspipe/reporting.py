"""What the strategy tells callbacks of the pipeline that runs."""

from __future__ import annotations

from lightning_tspipe.placement import Placement
from lightning_tspipe.runtime import Runtime
from lightning_tspipe.saving import CheckpointStrategy
from lightning_tspipe.schedule import Costs, Schedule


class ReportingStrategy(CheckpointStrategy):
    """Shows placement, plan, costs and the runtime."""

    placement: Placement | None = None  # which rank has which layers, and what they cost

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
    def busy(self) -> dict[str, float]:
        """Seconds that this rank has spent in T, F and B since the fit began."""
        return {} if self.runtime is None else dict(self.runtime.busy)
