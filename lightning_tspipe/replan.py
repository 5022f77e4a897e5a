"""A new plan, once, from the times that the ranks have taken in their first steps.

The first plan is made of what single layers cost, or of numbers of parameters. After `WARM_UP` steps that do not count
and `MEASURED` ones that do, every rank knows what its actions take, and all learn it of each other::

    step          1 .. 2     3 .. 10           11 ..
                  warm up    times are taken   the new plan, if its step is 1 % shorter

Every rank makes the same plan from the same numbers, before the same step. It keeps the number of microbatches, the
layers of each rank and the bounds on memory. No number of the training changes with it, since gradients add up in the
order of the microbatches in every schedule. What the old plan's last step has done ahead for the next batch is not
done again: `schedule.step_order` puts in front what the new plan's rows take for done and is not, and leaves out the
rest, and `simulate.replay` has shown before that the ranks do not wait for each other in that step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_tspipe.comm import Comm
from lightning_tspipe.plan import Planner
from lightning_tspipe.runtime import Runtime
from lightning_tspipe.schedule import Costs
from lightning_tspipe.simulate import ReplayError

WARM_UP = 2
MEASURED = 8
GAIN = 1.01  # by so much the predicted step must be shorter

Seconds = Mapping[str, float]  # per kind of action

log = logging.getLogger(__name__)


class Replanner:
    """Counts the steps of a rank, and plans anew when it is time.

    Args:
        runtime: of this rank.
        comm: its connections.
    """

    def __init__(self, runtime: Runtime, comm: Comm) -> None:
        self._runtime, self._comm = runtime, comm
        self._steps, self._done = 0, False
        self._before: tuple[Seconds, Mapping[str, int]] = {}, {}

    def before_step(self, microbatches: int, teacher: int | None = None) -> None:
        """Call it before each step, on all ranks.

        Args:
            microbatches: of the batch that the step is for. One that has less than those before is no time to plan.
            teacher: how many the teacher has; None: as many.
        """
        current, teacher = self._runtime.current, microbatches if teacher is None else teacher
        if self._steps == WARM_UP:
            self._before = dict(self._runtime.spent), dict(self._runtime.ran)
        same = current is not None and (current.microbatches, current.teacher_microbatches) == (microbatches, teacher)
        due = self._steps >= WARM_UP + MEASURED and same
        self._steps += 1
        if due and not self._done:
            self._done = True
            self._plan(microbatches, teacher)

    def _plan(self, microbatches: int, teacher: int) -> None:
        spent, ran = self._runtime.spent, self._runtime.ran
        seconds, counts = self._before
        counted = {kind: count - counts.get(kind, 0) for kind, count in ran.items()}
        mine = {kind: (spent[kind] - seconds.get(kind, 0.0)) / count for kind, count in counted.items() if count}
        ranks: Sequence[Seconds] = self._comm.share(self._comm.gather(mine), 0)
        costs = measured(self._runtime.planner.costs, ranks)
        costs = costs.per_action(teacher, microbatches)  # a T has run on one of the teacher's
        planner = better(self._runtime.planner, costs, microbatches, teacher)
        if planner is not None:
            self._runtime.follow(planner)


def measured(costs: Costs, ranks: Sequence[Seconds]) -> Costs:
    """Costs with the times of actions put in.

    Args:
        costs: what was planned with; a backward that did not run keeps its proportions to the one that did.
        ranks: per rank, the mean seconds of each kind of action that it has run.
    """
    t, f = (tuple(seconds[kind] for seconds in ranks) for kind in "TF")
    parts, whole = [], []
    for stage, seconds in enumerate(ranks):
        first, rest, full = (costs.seconds(kind, stage) for kind in ("I", "W", "B"))
        if "B" in seconds:
            scale = seconds["B"] / full if full else 0.0
            parts.append((first * scale, rest * scale) if full else (seconds["B"], 0.0))
            whole.append(seconds["B"])
        else:
            parts.append((seconds["I"], seconds["W"]))
            whole.append(full * sum(parts[-1]) / (first + rest) if first + rest else sum(parts[-1]))
    b, w = zip(*parts, strict=True)
    return replace(costs, t=t, f=f, b=b, w=w, whole=tuple(whole) if costs.whole else ())


def better(planner: Planner, costs: Costs, microbatches: int, teacher: int | None = None) -> Planner | None:
    """A planner with these costs, if its schedule is the shorter one and can follow the old one's last step."""
    old = planner.schedule(microbatches, teacher)
    made = planner.again(costs)
    before = made.seconds(old)
    found = made.find(microbatches, teacher)
    if found.period * GAIN > before:
        log.debug("The plan stays: %.4g s per step by measured times, %.4g s at best.", before, found.period)
        return None
    try:
        made.come_after(old)
    except ReplayError as error:  # the old one runs, so it stays
        log.debug("The plan stays, since a new one cannot follow it: %s", error)
        return None
    log.info("New plan by measured times: %.4g s per step instead of %.4g s.", found.period, before)
    return made
