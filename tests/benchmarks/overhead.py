"""What the runtimes themselves cost: stages that take no time, so that a step is nothing but overhead and messages."""

from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from tests.benchmarks.measure import Measurement
from tests.benchmarks.ours import measure_ours
from tests.benchmarks.problem import Problem
from tests.benchmarks.rivals import RIVALS, measure_rival

NUM_STAGES = (2, 4)
NUM_MICROBATCHES = 24
CHEAPEST = ("GPipe, teacher fused", "1F1B, teacher fused")  # of the rivals, per microbatch
NUM_ROUNDS = 2  # of which the faster one counts, since four processes share the cores
NUM_STEPS = 100  # the second plan of tspipe, after ten steps, is one of the things that a step costs


@dataclass(frozen=True)
class Overhead:
    """A runtime's cost on one problem.

    Attributes:
        contender: Whose runtime.
        problem: The problem's name.
        us_per_action: Microseconds of a step per action of a rank, messages included.
        us_per_microbatch: The same per microbatch: comparable where one action does the work of two.
    """

    contender: str
    problem: str
    us_per_action: float
    us_per_microbatch: float


def measure_overhead(full: bool) -> list[Overhead]:
    """Ours and the rivals on each number of stages: the two that cost least per microbatch, or all of them."""
    problems = [Problem(num, NUM_MICROBATCHES, NUM_STEPS, 0.0, 0.0, 0.0, 0.0) for num in NUM_STAGES]
    best = []
    for problem in problems:
        runs = [partial(measure_ours, problem)]
        runs += [partial(measure_rival, contender, problem) for contender in (RIVALS if full else CHEAPEST)]
        rounds = [[run() for run in runs] for _ in range(NUM_ROUNDS)]
        best += [min(tries, key=attrgetter("step_s")) for tries in zip(*rounds, strict=True)]
    return [_overhead(measurement) for measurement in best]


def _overhead(measurement: Measurement) -> Overhead:
    actions = 2 if "fused" in measurement.contender else 3  # teacher forward, student forward, backward
    us_per_microbatch = measurement.step_s * 1e6 / NUM_MICROBATCHES
    return Overhead(measurement.contender, measurement.problem, us_per_microbatch / actions, us_per_microbatch)
