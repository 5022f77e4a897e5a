"""How long the planner takes, and how near its plans come to the bound; nothing is trained."""

import time
from dataclasses import dataclass, replace
from typing import Any

from lightning_tspipe.orders import find_schedule
from lightning_tspipe.schedule import Costs

NUM_STAGES = 16
HARD, CLIPPING, ALL = "t = 3f", "t = f = b = w, clipping", "split, per microbatch"
ONE_EACH: dict[str, dict[str, Any]] = {
    "whole, over the batch": {},
    "whole, per microbatch": {"loss_over": "microbatch"},
    "whole, 1F1B's memory": {"loss_over": "microbatch", "max_in_flight": range(NUM_STAGES, 0, -1)},
    "split, over the batch": {"split_backward": True},
    ALL: {"split_backward": True, "loss_over": "microbatch"},
    "split, exact teacher": {"split_backward": True, "loss_over": "microbatch", "lookahead": False},
}


@dataclass(frozen=True)
class Plan:
    """One plan.

    Attributes:
        asked: What backward, loss and memory.
        costs: Which stages.
        num_microbatches: Of a batch.
        seconds: Of a processor that planning took.
        utilization: Of the planned step, 1 at the bound.
        order: That was chosen.
    """

    asked: str
    costs: str
    num_microbatches: int
    seconds: float
    utilization: float
    order: str


def measure_planning() -> list[Plan]:
    """Every kind of plan for 16 stages, equal ones and a ramp."""
    ramp = tuple(1 + k / 40 for k in range(NUM_STAGES))
    stages = {
        "t = f = b = w": Costs.uniform(NUM_STAGES),
        HARD: Costs.uniform(NUM_STAGES, t=3),
        CLIPPING: replace(Costs.uniform(NUM_STAGES, message=0.05), exchange=1.5),
        "ramps": Costs(t=ramp[::-1], f=ramp, b=ramp[::-1], w=ramp, message=0.1, optimizer=1),
    }
    plans = []
    for name, costs in stages.items():
        for num in (48, 64) if name == HARD else (64,):
            # with clipping the search for the most orders takes the longest
            each = {ALL: ONE_EACH[ALL]} if name == CLIPPING else ONE_EACH
            for asked, options in each.items():
                start = time.process_time()
                found = find_schedule(NUM_STAGES, num, costs, **options)
                seconds = time.process_time() - start
                plans.append(Plan(asked, name, num, seconds, found.bound / found.period, found.order))
    return plans
