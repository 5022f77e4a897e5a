"""Which emulated problems are measured, with whom, what is to be reached, and how long it takes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.benchmarks.ours import PAPER
from tests.benchmarks.problem import Problem
from tests.benchmarks.rivals import RIVALS, WHOLE

UNIT_S = 0.04  # of an action; shorter ones are lost in the noise of two cores
NUM_STEPS = 5  # of which two are steady; a step's time varies by less than 1 %
NUM_STEPS_RIVALS = 4  # as few as can be measured
MOST = 64  # microbatches
START_S = 6.0  # until the processes run, and to check the parameters


@dataclass(frozen=True)
class Case:
    """A problem and who runs it.

    Attributes:
        problem: Ours to solve.
        goal: Utilization that we have to reach; None where there is no such goal.
        rivals: Who else runs it, with as many microbatches.
    """

    problem: Problem
    goal: float | None = None
    rivals: tuple[str, ...] = ()

    def runs(self) -> Iterator[tuple[str, Problem]]:
        """Every contender, and what it runs."""
        yield "tspipe", self.problem
        for rival in self.rivals:
            yield rival, replace(self.problem, num_steps=NUM_STEPS if rival == PAPER else NUM_STEPS_RIVALS)


def unit(num_stages: int, num_microbatches: int, order: str, **others: object) -> Problem:
    """A problem whose actions last one unit each."""
    options = dict.fromkeys("tfbw", UNIT_S) | others
    return Problem(num_stages, num_microbatches, NUM_STEPS, order=order, **options)  # type: ignore[arg-type]


FUSED = tuple(name for name in RIVALS if name.endswith("fused"))
GOALS = (
    Case(unit(8, 24, "afab"), 0.97),
    Case(unit(8, 16, "afab-split"), 0.95),
    Case(unit(8, 8, "zb", loss_over="microbatch"), 0.93),
    Case(unit(8, 16, "zb", loss_over="microbatch", momentum=0.9), 0.93),
    Case(unit(16, 32, "afab-split"), 0.95),
    Case(unit(8, 8, "zb", loss_over="microbatch", t=3 * UNIT_S), 0.93),
)
# all stages wait for each other before an optimizer step: next to the same problems without that
WAITING = (
    Case(replace(GOALS[0].problem, exchange="clipping")),
    Case(replace(GOALS[1].problem, exchange="clipping")),
    Case(replace(GOALS[1].problem, exchange="scaler")),
)


def quick() -> list[Case]:
    """What is to be reached, and the rivals where bubbles are said to be none with a whole backward."""
    return [replace(GOALS[0], rivals=(PAPER, *FUSED)), *GOALS[1:], *WAITING]


def full() -> list[Case]:
    """Every number of stages; every rival with our microbatches, and with as many as are best for it, too."""
    cases = [replace(case, rivals=FUSED) for case in GOALS]
    everyone = (PAPER, *RIVALS, *WHOLE)
    cases[0] = replace(cases[0], rivals=everyone)
    cases[4] = replace(cases[4], rivals=everyone)
    cases += [Case(unit(count, 3 * count, "afab"), rivals=everyone) for count in (2, 4)]
    most = [*(unit(count, MOST, "afab") for count in (2, 4, 8, 16)), replace(GOALS[5].problem, num_microbatches=MOST)]
    return [*cases, *WAITING, *(Case(problem, rivals=(PAPER, *RIVALS)) for problem in most)]


def seconds(contender: str, problem: Problem) -> float:
    """About how long a run takes."""
    stages, step = problem.num_stages, problem.work_s
    if contender.startswith("serial"):
        step *= stages
    elif contender in WHOLE:
        step += (stages - 1) * problem.num_microbatches * (problem.work_s / problem.num_microbatches - problem.t)
    elif contender not in ("tspipe", PAPER):
        step *= 1 + (stages - 1) / problem.num_microbatches
    return START_S + problem.num_steps * step * 1.04
