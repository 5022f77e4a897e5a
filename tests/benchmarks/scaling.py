"""Scaling on paper: step times of many stages and microbatches by simulation, with overheads that are measured here.

Our schedules are those of the planner. The rivals are those of `lightning_tspipe/rivals.py` with the overheads of our
runtime, which are less than their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import add
from typing import Any

from lightning_tspipe.clock import clock
from lightning_tspipe.orders import find_schedule
from lightning_tspipe.rivals import periods, serial, ways
from lightning_tspipe.schedule import Costs
from tests.benchmarks import suite
from tests.benchmarks.ours import MESSAGE_S, measure_ours
from tests.benchmarks.problem import Problem
from tests.benchmarks.processes import run_forked

STAGES = (2, 4, 8, 16, 32, 64)
SMALL, MIDDLE = 8, 16  # stages up to which a short run has many microbatches, and up to which it has a few
MOST = 1000
FITTED = (1, 4, 10)  # microbatches of the fits whose excess gives the overheads, on two stages
STEADY = 5  # times P microbatches, from which on each further one adds as much to a rival's step
TIMEOUT_S = 1800.0
ON_PAPER = {  # how `lightning_tspipe/rivals.py` calls rivals of the emulated benchmark where that has other names
    "Interleaved 1F1B, teacher fused": "interleaved 1F1B, teacher fused",
    "GPipe, teacher pass first": "GPipe, teacher first",
    "1F1B, teacher pass first": "1F1B, teacher first",
    "pass-streaming model parallelism": "passes streamed",
}
ORDERS = {"afab": "afab", "afab-split": "afab-split", "zb": "zb", "exact zb": "zb"}


@dataclass(frozen=True)
class Overheads:
    """What the runtime adds to the work of the stages, in seconds.

    Attributes:
        action_s: To an action, sending and taking its messages included.
        message_s: Latency of a message.
        step_s: To a step: Lightning's loop, the loader, the optimizer.
    """

    action_s: float
    message_s: float
    step_s: float


@dataclass(frozen=True)
class Prediction:
    """A step on paper.

    Attributes:
        problem: Its name.
        contender: Whose schedule.
        num_stages, num_microbatches: P and M.
        step_s: Seconds of a steady step.
        utilization: Work of a rank over that.
        speed_up: Over serial model parallelism.
        measured_s: Seconds of the same step in the emulated benchmark; None where it was not run there.
    """

    problem: str
    contender: str
    num_stages: int
    num_microbatches: int
    step_s: float
    utilization: float
    speed_up: float
    measured_s: float | None = None


def measure_overheads() -> Overheads:
    """From three fits on two stages with the unit of the emulated benchmark."""
    return overheads({count: measure_ours(suite.unit(2, count, "afab")).step_s for count in FITTED})


def overheads(steps: Mapping[int, float]) -> Overheads:
    """From seconds of a step of two stages, by number of microbatches.

    From 3 microbatches on there is no bubble: each microbatch has 4 units of work in 3 actions. With a single one, a
    step is F on both ranks, B on both, and a message after the first two of them, 6 units in all.
    """
    one, few, many = FITTED
    unit = suite.UNIT_S
    action_s = max(0.0, ((steps[many] - steps[few]) / (many - few) - 4 * unit) / 3)
    step_s = max(0.0, steps[few] - few * (4 * unit + 3 * action_s))
    message_s = max(0.0, (steps[one] - 6 * unit - 4 * action_s - step_s) / 2)
    return Overheads(action_s, message_s, step_s)


def with_overheads(costs: Costs, more: Overheads) -> Costs:
    """The costs of the actions as they are in a run."""
    t, f, b, w, whole = (
        tuple(seconds + more.action_s for seconds in column)
        for column in (costs.t, costs.f, costs.b, costs.w, map(add, costs.b, costs.w))
    )
    exchange = None if costs.exchange is None else 2 * (len(t) - 1) * more.message_s
    return Costs(t, f, b, w, more.message_s, more.step_s, exchange, whole)


def our_step(problem: Problem, more: Overheads) -> float:
    """Seconds of a step of the schedule that a run follows."""
    told = replace(problem.costs, message=MESSAGE_S)
    if problem.exchange:
        told = replace(told, exchange=2 * (problem.num_stages - 1) * MESSAGE_S)
    found = find_schedule(
        problem.num_stages, problem.num_microbatches, told, order=problem.order, loss_over=problem.loss_over,
        lookahead=problem.momentum is None or problem.delay > 0,
    )  # fmt: skip
    return clock(found.schedule, with_overheads(told, more)).period


def rival_steps(problem: Problem, more: Overheads) -> dict[str, float]:
    """Seconds of a step of every rival; of many microbatches, in a straight line from fewer."""
    costs, stages, count = with_overheads(problem.costs, more), problem.num_stages, problem.num_microbatches
    most = STEADY * stages
    if count <= most:
        return periods(costs, count)
    fewer, steps = periods(costs, most - stages), periods(costs, most)
    work = {split: max(costs.work(k, 1, split) for k in range(stages)) - costs.optimizer for split in (False, True)}
    slopes = {  # while ZBV's greedy order still settles it may gain on its work, which it cannot for long
        name: max((step - fewer[name]) / stages, work[name.startswith("ZB")]) for name, step in steps.items()
    }
    return {name: step + slopes[name] * (count - most) for name, step in steps.items()}


def checked(emulated: Iterable[Mapping[str, Any]], more: Overheads) -> list[Prediction]:
    """What was measured with emulated stages, beside the prediction.

    Args:
        emulated: The runs of that benchmark.
        more: The overheads.
    """
    problems = {case.problem.name: case.problem for case in (*suite.quick(), *suite.full())}
    found = []
    for run in emulated:
        problem = problems.get(run["problem"])
        if problem is None:
            continue
        if run["contender"] == "tspipe":
            step_s: float | None = our_step(problem, more)
        else:
            name = ON_PAPER.get(run["contender"], run["contender"])
            way = ways(with_overheads(problem.costs, more), problem.num_microbatches).get(name)
            step_s = None if way is None else way()
        if step_s is not None:
            found.append(_prediction(problem, run["contender"], step_s, more, run["step_s"]))
    return found


def on_paper(full: bool, more: Overheads) -> list[Prediction]:
    """Every order and every rival, by stages and microbatches; a short run has no large problems."""
    tasks = []
    for stages in STAGES:
        many = MOST - MOST % stages
        counts = (stages, 2 * stages, 3 * stages) if full or stages <= MIDDLE else (3 * stages,)
        counts += (many,) if full or stages <= SMALL else ()
        tasks += [(stages, count) for count in counts]
    tasks.sort(key=lambda task: -task[0] * task[1])
    shares = run_forked(_share, 2, tasks, more, timeout_s=TIMEOUT_S)
    return sorted((p for share in shares for p in share), key=lambda p: (p.num_stages, p.num_microbatches))


def _share(rank: int, tasks: list[tuple[int, int]], more: Overheads) -> list[Prediction]:
    """Every second task."""
    return [made for stages, count in tasks[rank::2] for made in predictions(stages, count, more)]


def predictions(stages: int, count: int, more: Overheads) -> list[Prediction]:
    """All contenders on one problem."""
    made = []
    for name, order in ORDERS.items():
        options = {"loss_over": "microbatch"} if order == "zb" else {}
        problem = suite.unit(stages, count, order, momentum=0.9 if "exact" in name else None, **options)
        made.append(_prediction(problem, f"tspipe {name}", our_step(problem, more), more))
    problem = suite.unit(stages, count, "afab")
    return made + [_prediction(problem, name, s, more) for name, s in rival_steps(problem, more).items()]


def _prediction(
    problem: Problem, contender: str, step_s: float, more: Overheads, measured_s: float | None = None
) -> Prediction:
    slowest = serial(with_overheads(problem.costs, more), problem.num_microbatches)
    stages, count = problem.num_stages, problem.num_microbatches
    utilization = problem.work_s / step_s
    return Prediction(problem.name, contender, stages, count, step_s, utilization, slowest / step_s, measured_s)
