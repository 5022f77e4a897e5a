"""Run the benchmarks, print ratios against the rivals of the same run, and fail when a goal is missed."""

import argparse
import json
import operator
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import limit_threads

limit_threads()  # torch reads the limits when it is imported; and what is imported here, forked processes inherit

import lightning  # noqa: E402
import torch  # noqa: E402

from tests.benchmarks.balance import Cut, measure_balance  # noqa: E402
from tests.benchmarks.measure import Measurement  # noqa: E402
from tests.benchmarks.ours import measure_ours  # noqa: E402
from tests.benchmarks.overhead import Overhead, measure_overhead  # noqa: E402
from tests.benchmarks.planning import Plan, measure_planning  # noqa: E402
from tests.benchmarks.problem import Problem  # noqa: E402
from tests.benchmarks.real import Contest, measure_real  # noqa: E402
from tests.benchmarks.rivals import RIVALS, measure_rival  # noqa: E402
from tests.benchmarks.split import Split, measure_split  # noqa: E402


@dataclass(frozen=True)
class Goal:
    """A bound that a measured figure of ours must keep."""

    figure: str
    sign: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether ``value`` keeps the bound."""
        return bool({">=": operator.ge, "<=": operator.le, "<": operator.lt}[self.sign](value, self.bound))


GOALS = (
    Goal("utilization at P=8 M=24", ">=", 0.95),
    Goal("utilization at P=4 M=12", ">=", 0.95),
    Goal("microseconds per action at P=2 M=24", "<=", 500),
    Goal("microseconds per action at P=4 M=24", "<=", 500),
    Goal("throughput over DDP's", ">=", 0.95),
    Goal("peak memory over DDP's", "<", 1.0),
    Goal("slowest rank over that of the best cut", "<=", 1.05),
    Goal("seconds for a plan of P=16 M=64", "<", 2.0),
)
PROBLEMS = (Problem(num_stages=4, num_microbatches=12, num_steps=8), Problem(8, 24, num_steps=8))

Figures = dict[str, float]


def emulated() -> tuple[list[Measurement], Figures]:
    """Utilization with emulated stages: tspipe and every rival on each problem."""
    measurements = []
    for problem in PROBLEMS:
        measurements.append(measure_ours(problem))
        measurements += [measure_rival(contender, problem) for contender in RIVALS]
    ours = {run.problem: run for run in measurements if run.contender == "tspipe"}
    rows = [
        f"{run.problem} | {run.contender} | {run.step_s:.3f} | {run.utilization:.3f} | "
        f"{run.step_s / ours[run.problem].step_s:.2f} | {run.error:.0e}"
        for run in measurements
    ]
    print_table("emulated stages | contender | s per step | utilization | step over tspipe's | error", rows)
    return measurements, {f"utilization at {name}": run.utilization for name, run in ours.items()}


def overhead() -> tuple[list[Overhead], Figures]:
    """Cost of the runtimes with stages that take no time."""
    overheads = measure_overhead()
    ours = {run.problem: run for run in overheads if run.contender == "tspipe"}
    rows = [
        f"{run.problem} | {run.contender} | {run.us_per_action:.0f} | {run.us_per_microbatch:.0f} | "
        f"{run.us_per_microbatch / ours[run.problem].us_per_microbatch:.2f}"
        for run in overheads
    ]
    print_table("zero-cost stages | contender | us per action | us per microbatch | microbatch over tspipe's", rows)
    return overheads, {f"microseconds per action at {name}": run.us_per_action for name, run in ours.items()}


def real() -> tuple[list[Contest], Figures]:
    """Throughput and memory of real compute against DDP."""
    contests = measure_real()
    ddp, ours = contests
    rows = [
        f"{run.contender} | {run.step_s:.3f} | {run.samples_per_s:.1f} | {run.samples_per_s / ddp.samples_per_s:.2f} | "
        f"{' and '.join(f'{peak:.0f}' for peak in run.peak_mib)} | {max(run.peak_mib) / min(ddp.peak_mib):.2f}"
        for run in contests
    ]
    print_table(
        "resnet50 to resnet18 | s per step | samples per s | over DDP's | peak MiB above idle | over DDP's", rows
    )
    return contests, {
        "throughput over DDP's": ours.samples_per_s / ddp.samples_per_s,
        "peak memory over DDP's": max(ours.peak_mib) / min(ddp.peak_mib),
    }


def balance() -> tuple[list[Cut], Figures]:
    """The cuts that are chosen by measurement against the best ones."""
    cuts = measure_balance()
    rows = [
        f"{cut.teacher} | {cut.stages} | {1e3 * cut.chosen_s:.1f} | {cut.chosen_s / cut.best_s:.3f} | "
        f"{cut.parameters_s / cut.best_s:.3f}"
        for cut in cuts
    ]
    print_table("teacher of a resnet18 | P | slowest rank, ms | over the best cut's | by parameters", rows)
    return cuts, {"slowest rank over that of the best cut": max(cut.chosen_s / cut.best_s for cut in cuts)}


def planning() -> tuple[list[Plan], Figures]:
    """The planner's time, and its plans against the bound."""
    plans = measure_planning()
    rows = [
        f"{plan.asked} | {plan.costs} | {plan.num_microbatches} | {plan.seconds:.2f} | {plan.utilization:.3f} | "
        f"{plan.order}"
        for plan in plans
    ]
    print_table("P=16 | costs | M | s to plan | utilization planned | order", rows)
    return plans, {
        "seconds for a plan of P=16 M=64": max(plan.seconds for plan in plans if plan.num_microbatches == 64)
    }


def split() -> tuple[list[Split], Figures]:
    """A backward in two parts against the whole one."""
    splits = measure_split()
    rows = [
        f"{run.network} | {1e3 * run.whole_s:.1f} | {1e3 * run.first_s:.1f} | {1e3 * run.rest_s:.1f} | "
        f"{(run.first_s + run.rest_s) / run.whole_s:.2f}"
        for run in splits
    ]
    print_table("backward | whole, ms | inputs, ms | weights, ms | both over whole", rows)
    return splits, {}


BENCHMARKS: dict[str, Callable[[], tuple[Sequence[Any], Figures]]] = {
    "emulated": emulated,
    "overhead": overhead,
    "balance": balance,
    "planning": planning,
    "split": split,
    "real": real,
}


def print_table(header: str, rows: list[str]) -> None:
    """Print a Markdown table; cells come separated by bars."""
    rule = " | ".join(["---"] * (header.count("|") + 1))
    print("", *[f"| {row} |" for row in (header, rule, *rows)], "", sep="\n", flush=True)


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the selected benchmarks; the exit status tells whether every measured goal was met."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("json", nargs="?", type=Path, default=Path("bench.json"), help="file for all results")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="benchmarks to run")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are killed on the way out

    results: dict[str, Any] = {"environment": environment()}
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as tempfile.tempdir:  # Lightning leaves files behind, as does who is killed
        for name in options.only:
            runs, measured = BENCHMARKS[name]()
            results[name] = [asdict(run) for run in runs]
            figures |= measured

    goals = [
        asdict(goal) | {"measured": figures[goal.figure], "met": goal.met(figures[goal.figure])}
        for goal in GOALS
        if goal.figure in figures
    ]
    print_table(
        "goal | bound | measured | verdict",
        [
            "{figure} | {sign} {bound} | {measured:.3f} | ".format(**goal) + ("met" if goal["met"] else "MISSED")
            for goal in goals
        ],
    )
    options.json.write_text(json.dumps(results | {"goals": goals}, indent=2) + "\n")
    return 0 if all(goal["met"] for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
