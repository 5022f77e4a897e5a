"""What one run measured, and how a step time comes from time stamps."""

from dataclasses import dataclass

NUM_WARM_UP = 2


def step_seconds(ends: list[list[float]]) -> float:
    """Seconds of a steady step: the mean per rank, and the slowest rank's mean.

    Args:
        ends: For every rank the moment, in seconds, at which it finished each step. The first two steps (set-up,
            nothing looked ahead) and the last (nothing to look ahead to) do not count.
    """
    num_steady = len(ends[0]) - NUM_WARM_UP - 1
    if num_steady < 1:
        raise ValueError(f"{len(ends[0])} steps leave none to measure; at least {NUM_WARM_UP + 2} are needed")
    return max((rank[-2] - rank[NUM_WARM_UP - 1]) / num_steady for rank in ends)


@dataclass(frozen=True)
class Measurement:
    """A contender's result on one emulated problem.

    Attributes:
        contender: Who ran.
        problem: The problem's name.
        step_s: Seconds of a steady step.
        utilization: Seconds of work of a rank per step over ``step_s``.
        error: Largest difference of a parameter from the single-process reference.
    """

    contender: str
    problem: str
    step_s: float
    utilization: float
    error: float
