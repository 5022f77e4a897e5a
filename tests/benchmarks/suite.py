"""Which emulated problems are measured, with whom, and what is to be reached."""

from dataclasses import dataclass, replace

from tests.benchmarks.problem import Problem
from tests.benchmarks.rivals import RIVALS, WHOLE

UNIT_S = 0.04  # of an action; shorter ones are lost in the noise of two cores
NUM_STEPS = 6
NUM_STEPS_SERIAL = 4  # as few as can be measured: a step takes P times as long
MOST = 64  # microbatches


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


def quick() -> list[Case]:
    """What is to be reached, and the rivals where bubbles are said to be none with a whole backward."""
    return [replace(GOALS[0], rivals=FUSED), *GOALS[1:]]


def full() -> list[Case]:
    """Every number of stages; every rival with our microbatches, and the fused ones with as many as they like, too."""
    cases = [replace(case, rivals=FUSED) for case in GOALS]
    cases[0] = replace(cases[0], rivals=(*RIVALS, *WHOLE))
    cases[4] = replace(cases[4], rivals=(*RIVALS, *WHOLE))
    cases += [Case(unit(count, 3 * count, "afab"), rivals=(*RIVALS, *WHOLE)) for count in (2, 4)]
    most = [*(unit(count, MOST, "afab") for count in (8, 16)), replace(GOALS[5].problem, num_microbatches=MOST)]
    return [*cases, *(Case(replace(problem, num_steps=NUM_STEPS - 1), rivals=FUSED) for problem in most)]
