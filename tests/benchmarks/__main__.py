"""Run the benchmarks, print ratios against the rivals of the same run, and fail when a goal is missed."""

import argparse
import itertools
import operator
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import limit_threads

limit_threads()  # torch reads the limits when it is imported; and what is imported here, forked processes inherit

import lightning  # noqa: E402
import torch  # noqa: E402

from tests.benchmarks import report, suite  # noqa: E402
from tests.benchmarks import scaling as paper  # noqa: E402
from tests.benchmarks.balance import Cut, measure_balance  # noqa: E402
from tests.benchmarks.measure import Measurement  # noqa: E402
from tests.benchmarks.monitor import Cost, measure_monitor  # noqa: E402
from tests.benchmarks.ours import PAPER, measure_ours  # noqa: E402
from tests.benchmarks.overhead import NUM_STAGES, Overhead, measure_overhead  # noqa: E402
from tests.benchmarks.pairs import PAIRS  # noqa: E402
from tests.benchmarks.planning import Plan, measure_planning  # noqa: E402
from tests.benchmarks.real import RIVAL_MICROBATCHES, Contest, measure_real  # noqa: E402
from tests.benchmarks.results import Figures, Results  # noqa: E402
from tests.benchmarks.rivals import measure_rival  # noqa: E402
from tests.benchmarks.split import NETWORKS, ORDER, Split, measure_split  # noqa: E402

US = "tspipe"


@dataclass(frozen=True)
class Goal:
    """A bound that a measured figure of ours must keep."""

    figure: str
    sign: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether ``value`` keeps the bound."""
        signs = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
        return bool(signs[self.sign](value, self.bound))


GOALS = (
    *(Goal(f"utilization at {case.problem.name}", ">=", case.goal) for case in suite.GOALS if case.goal is not None),
    *(
        Goal(f"utilization lost by {case.problem.exchange} at {case.problem.name}", "<=", 0.01)
        for case in suite.WAITING
    ),
    Goal("simulated step next to the emulated one, off by", "<=", 0.03),
    Goal("speed-up over serial at P=16 M=32 afab-split", ">=", 15),
    *(Goal(f"microseconds per action at P={num} M=24 afab", "<=", 200) for num in NUM_STAGES),
    *(Goal(f"microbatch over the best rival's at P={num} M=24 afab", "<=", 0.5) for num in NUM_STAGES),
    *(Goal(f"throughput over DDP's, {pair}", ">=", 1.0) for pair in PAIRS),
    *(Goal(f"peak memory over DDP's, {pair}", "<=", 0.75) for pair in PAIRS),
    *(Goal(f"throughput over the best other pipeline's, {pair}", ">", 1.0) for pair in PAIRS),
    Goal("monitor's share of a step", "<=", 0.01),
    Goal("slowest rank over that of the best cut", "<=", 1.05),
    *(Goal(f"split backward over the whole, {n.name}", "<=", n.goal) for n in NETWORKS if n.goal is not None),
    Goal("seconds for a plan of P=16 M=64", "<", 2.0),
)


def emulated(results: Results) -> Figures:
    """Utilization with emulated stages: tspipe and its rivals on each problem."""
    todo = [run for case in (suite.full() if results.full else suite.quick()) for run in case.runs()]
    runs = [Measurement(**run) for run in results.runs("emulated")]
    known = {(run.contender, run.problem) for run in runs}
    todo = [(contender, problem) for contender, problem in todo if (contender, problem.name) not in known]
    minutes = sum(suite.seconds(*run) for run in todo) / 60
    print(f"emulated stages: {len(todo)} runs, about {minutes:.0f} minutes; {len(runs)} are in the file", flush=True)
    print_header("emulated stages | contender | s per step | utilization | error")
    for contender, problem in todo:
        is_ours = contender in (US, PAPER)
        run = measure_ours(problem, contender) if is_ours else measure_rival(contender, problem)
        runs.append(run)
        results.keep("emulated", runs)
        print_row(f"{run.problem} | {run.contender} | {run.step_s:.3f} | {run.utilization:.3f} | {run.error:.0e}")
    ours = {run.problem: run for run in runs if run.contender == US}
    figures = {f"utilization at {name}": run.utilization for name, run in ours.items()}
    for case in suite.WAITING:
        name = case.problem.name
        free = name.removesuffix(f" {case.problem.exchange}")
        if name in ours and free in ours:
            lost = ours[free].utilization - ours[name].utilization
            figures[f"utilization lost by {case.problem.exchange} at {name}"] = lost
    for run in runs:
        if run.contender.startswith("serial"):
            figures[f"speed-up over serial at {run.problem}"] = run.step_s / ours[run.problem].step_s
    return figures


def scaling(results: Results) -> Figures:
    """Many stages and microbatches on paper, and how near that is to the emulated stages that are in the file."""
    more = paper.measure_overheads()
    checked = paper.checked(results.runs("emulated"), more)
    results.keep("scaling", [*checked, *paper.on_paper(results.full, more)])
    print(f"\n{report.scaling(results.runs('scaling'))}", flush=True)
    figures = {f"microseconds {name[:-2]}": 1e6 * seconds for name, seconds in asdict(more).items()}
    off = [abs(run.step_s / run.measured_s - 1) for run in checked if run.measured_s and run.contender == US]
    return figures | ({"simulated step next to the emulated one, off by": max(off)} if off else {})


def overhead(full: bool) -> tuple[list[Overhead], Figures]:
    """Cost of the runtimes with stages that take no time."""
    overheads = measure_overhead(full)
    ours = {run.problem: run for run in overheads if run.contender == US}
    rows = [
        f"{run.problem} | {run.contender} | {run.us_per_action:.0f} | {run.us_per_microbatch:.0f} | "
        f"{run.us_per_microbatch / ours[run.problem].us_per_microbatch:.2f}"
        for run in overheads
    ]
    print_table("zero-cost stages | contender | us per action | us per microbatch | microbatch over tspipe's", rows)
    figures = {f"microseconds per action at {name}": run.us_per_action for name, run in ours.items()}
    for name, run in ours.items():
        rivals = [other for other in overheads if other.problem == name and other is not run]
        best = min(other.us_per_microbatch for other in rivals)
        figures[f"microbatch over the best rival's at {name}"] = run.us_per_microbatch / best
    return overheads, figures


def real(results: Results) -> Figures:
    """Throughput and memory of real compute against DDP and other pipelines."""
    fewest = 3 + len(RIVAL_MICROBATCHES) if results.full else 2  # contenders
    old = [Contest(**run) for run in results.runs("real")]
    known = {run.pair for run in old if sum(other.pair == run.pair for other in old) >= fewest}
    contests = [run for run in old if run.pair in known]
    figures = {}
    print_header("pair | contender | s per step | samples per s | over DDP's | peak MiB above idle | over DDP's")
    for run in itertools.chain(list(contests), measure_real(results.full, known)):
        if run.pair not in known:
            contests.append(run)
            results.keep("real", contests)
        throughput, memory = report.over_ddp(asdict(run), map(asdict, contests))
        peaks = " and ".join(f"{peak:.0f}" for peak in run.peak_mib)
        print_row(
            f"{run.pair} | {run.contender} | {run.step_s:.3f} | {run.samples_per_s:.1f} | {throughput:.2f} | "
            f"{peaks} | {memory:.2f}"
        )
        if run.contender == US:
            figures[f"throughput over DDP's, {run.pair}"] = throughput
            figures[f"peak memory over DDP's, {run.pair}"] = memory
    for run in contests:
        others = [one.samples_per_s for one in contests if one.pair == run.pair and one.contender not in ("DDP", US)]
        if run.contender == US and others:
            figures[f"throughput over the best other pipeline's, {run.pair}"] = run.samples_per_s / max(others)
    return figures


def balance(full: bool) -> tuple[list[Cut], Figures]:
    """The cuts that are chosen by measurement against the best ones."""
    cuts = measure_balance(full)
    rows = [
        f"{cut.teacher} | {cut.stages} | {1e3 * cut.chosen_s:.1f} | {cut.chosen_s / cut.best_s:.3f} | "
        f"{cut.parameters_s / cut.best_s:.3f}"
        for cut in cuts
    ]
    print_table("teacher of a resnet18 | P | slowest rank, ms | over the best cut's | by parameters", rows)
    return cuts, {"slowest rank over that of the best cut": max(cut.chosen_s / cut.best_s for cut in cuts)}


def planning(_: bool) -> tuple[list[Plan], Figures]:
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


def split(full: bool) -> tuple[list[Split], Figures]:
    """A backward in two parts against the whole one."""
    splits = []
    print_header(
        f"backwards of {ORDER.count('I')} microbatches | whole, ms | inputs, ms | weights, ms | both over whole"
    )
    for run in measure_split(full):
        splits.append(run)
        cells = (f"{1e3 * seconds:.1f}" for seconds in (run.whole_s, run.first_s, run.rest_s))
        print_row(" | ".join([run.network, *cells, f"{run.ratio:.3f}"]))
    return splits, {f"split backward over the whole, {run.network}": run.ratio for run in splits}


def monitor(_: bool) -> tuple[list[Cost], Figures]:
    """What watching costs."""
    costs = measure_monitor()
    rows = [
        f"{c.problem} | {1e3 * c.step_s:.2f} | {1e3 * c.more_s:.2f} | {1e6 * c.hook_s:.1f} | {100 * c.share:.2f}"
        for c in costs
    ]
    print_table("zero-cost stages | ms per step | ms that a look adds | us of a hook | % of 50 steps", rows)
    return costs, {"monitor's share of a step": max(cost.share for cost in costs)}


KEPT: dict[str, Callable[[Results], Figures]] = {"emulated": emulated, "scaling": scaling, "real": real}  # run by run
WHOLE: dict[str, Callable[[bool], tuple[Sequence[Any], Figures]]] = {
    "overhead": overhead,
    "balance": balance,
    "monitor": monitor,
    "planning": planning,
    "split": split,
}
BENCHMARKS = ("emulated", "scaling", *WHOLE, "real")


def print_table(header: str, rows: list[str]) -> None:
    """Print a Markdown table; cells come separated by bars."""
    print_header(header)
    for row in rows:
        print_row(row)
    print()


def print_header(header: str) -> None:
    """The first two lines of a table."""
    print()
    print_row(header)
    print_row(" | ".join(["---"] * (header.count("|") + 1)))


def print_row(row: str) -> None:
    """A line of it, as soon as it is known."""
    print(f"| {row} |", flush=True)


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("json", nargs="?", type=Path, default=Path("bench.json"), help="file for all results")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="benchmarks to run")
    parser.add_argument("--full", action="store_true", help="more problems and all rivals, which takes long")
    parser.add_argument("--again", action="store_true", help="measure again what the file has")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the selected benchmarks; the exit status tells whether every measured goal was met."""
    options = options_of(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are killed on the way out

    results = Results(options.json, options.full, options.only if options.again else ())
    results.values["environment"] = environment()
    with tempfile.TemporaryDirectory() as tempfile.tempdir:  # Lightning leaves files behind, as does who is killed
        for name in options.only:
            if results.has(name):
                print(f"{name}: {options.json} has it; --again measures it again", flush=True)
                continue
            start = time.monotonic()
            if name in KEPT:
                figures = KEPT[name](results)
            else:
                runs, figures = WHOLE[name](options.full)
                results.keep(name, runs)
            results.finish(name, figures)
            results.values.setdefault("seconds", {})[name] = time.monotonic() - start

    figures = results.figures
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
    missing = [goal.figure for goal in GOALS if goal.figure not in figures]
    if missing and set(options.only) == set(BENCHMARKS):
        print(f"not measured here: {'; '.join(missing)}\n")
    results.values["goals"] = goals
    results.write()
    return 0 if all(goal["met"] for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
