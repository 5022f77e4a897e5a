"""Seconds that no schedule's step goes below: its work, and the round trips that a bound on memory forces.

With at most k microbatches in flight at a stage, Fq+k waits there for the backward of q, whose forward has been to the
last stage in between and whose gradient has come back. So a batch of M takes ceil(M/k) such round trips, one after the
other. Stage 0 of 2 with k = 1, a microbatch of which takes as long as both stages do::

    rank 0 F0- ....... B0----- F1- ....... B1-----
    rank 1 ... F0- B0----- ....... F1- B1-----
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_tspipe.schedule import Costs


def step_floor(costs: Costs, microbatches: int, split: bool, in_flight: Sequence[int], held: Sequence[int]) -> float:
    """Seconds of a step at least.

    Args:
        costs: seconds per student microbatch.
        microbatches: M.
        split: whether the backward is split into I and W.
        in_flight: per rank, the most student microbatches whose forward is done and whose B (or I) is not.
        held: per rank, the most whose forward is done and whose B (or W) is not.
    """
    every = range(len(costs.t))
    least = max(costs.work(stage, microbatches, split) for stage in every)
    trip, rest = 0.0, costs.optimizer + (costs.exchange or 0.0)
    for stage in reversed(every):
        trip += costs.f[stage] + costs.seconds("I" if split else "B", stage)
        late = costs.w[stage] if split else 0.0
        trips, longer = (math.ceil(microbatches / most[stage]) for most in (in_flight, held))
        least = max(least, trips * trip + late + rest, longer * (trip + late) + rest)
        trip += 2 * costs.message
    return least
