"""What the benchmarks compute from what they measure; nothing is measured here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lightning_tspipe import ahead
from lightning_tspipe.ahead import afab_ahead
from lightning_tspipe.clock import clock
from lightning_tspipe.orders import make_schedule
from lightning_tspipe.rivals import periods
from lightning_tspipe.schedule import Costs
from tests.benchmarks import __main__ as bench
from tests.benchmarks import balance, real, report, rivals, scaling, suite
from tests.benchmarks.measure import Measurement
from tests.benchmarks.monitor import Cost
from tests.benchmarks.ours import MESSAGE_S, PAPER
from tests.benchmarks.overhead import NUM_STAGES, Overhead
from tests.benchmarks.pairs import PAIRS
from tests.benchmarks.planning import Plan
from tests.benchmarks.problem import Problem
from tests.benchmarks.results import Results
from tests.benchmarks.scaling import FITTED, Overheads, checked, our_step, overheads, predictions, rival_steps
from tests.benchmarks.split import NETWORKS, Split

MORE = Overheads(action_s=1e-3, message_s=4e-4, step_s=5e-3)


def test_overheads_are_found_in_the_steps_that_they_make() -> None:
    found = overheads({count: our_step(suite.unit(2, count, "afab"), MORE) for count in FITTED})
    assert list(asdict(found).values()) == pytest.approx(list(asdict(MORE).values()))


def test_overheads_are_in_a_step_on_paper() -> None:
    """24 microbatches in three actions each, whose messages are hidden; not so with what the stages wait for."""
    problem = suite.GOALS[0].problem
    free, step = (our_step(problem, more) for more in (Overheads(0, 0, 0), MORE))
    assert free == pytest.approx(problem.work_s, rel=1e-3)
    assert step == pytest.approx(free + 24 * 3 * MORE.action_s + MORE.step_s, rel=2e-3)
    clips = replace(problem, exchange="clipping")
    assert step < our_step(clips, MORE) <= step + 0.01 * problem.work_s
    slow = replace(MORE, message_s=20 * MORE.message_s)  # the teacher does not cover 14 of these
    assert our_step(clips, slow) > our_step(problem, slow) + 0.02 * problem.work_s


@pytest.mark.parametrize("case", suite.WAITING[:2], ids=lambda case: case.problem.name)
def test_the_teacher_covers_what_all_stages_wait_for(case: suite.Case) -> None:
    """Clipping costs two messages per hop; a plan that does not know of it lets the ranks wait for the first one."""
    problem, free = case.problem, replace(case.problem, exchange=None)
    costs = replace(problem.costs, message=MESSAGE_S, exchange=14 * MESSAGE_S)
    plan = make_schedule(8, problem.num_microbatches, replace(costs, exchange=None), order=problem.order)
    without, waiting = (our_step(each, Overheads(0, MESSAGE_S, 0)) for each in (free, problem))
    assert waiting <= without + 0.005 * problem.work_s
    assert clock(plan, costs).period >= without + 0.1 * problem.work_s


def test_steps_of_rivals_lie_on_a_line() -> None:
    problem = suite.unit(4, 40, "afab")
    direct = periods(scaling.with_overheads(problem.costs, MORE), 40)
    assert rival_steps(problem, MORE) == pytest.approx(direct, rel=2e-4)  # ZBV may gain or lose a message


def test_no_rival_is_faster_than_its_work() -> None:
    problem = suite.unit(8, 400, "afab")
    steps = rival_steps(problem, MORE)
    assert min(steps.values()) > problem.work_s + 400 * 3 * MORE.action_s
    assert steps["ZBV, teacher fused"] > problem.work_s + 400 * 4 * MORE.action_s


def test_a_speed_up_is_over_the_serial_step() -> None:
    made = {one.contender: one for one in predictions(4, 12, MORE)}
    assert made["serial model parallelism"].speed_up == pytest.approx(1)
    ours, serial = made["tspipe afab"], made["serial model parallelism"]
    assert ours.speed_up == pytest.approx(serial.step_s / ours.step_s)
    assert ours.speed_up > made["1F1B, teacher fused"].speed_up
    assert {"tspipe afab-split", "tspipe zb", "tspipe exact zb"} <= made.keys()


def test_what_was_measured_is_compared_under_the_same_name() -> None:
    runs = [
        asdict(Measurement("tspipe", "P=8 M=24 afab", 3.9, 0.98, 0.0)),
        asdict(Measurement("1F1B, teacher fused", "P=8 M=24 afab", 5.1, 0.75, 0.0)),
        asdict(Measurement("1F1B, teacher pass first", "P=8 M=24 afab", 4.8, 0.80, 0.0)),
        asdict(Measurement("Interleaved zero bubble, teacher fused", "P=8 M=24 afab", 4.4, 0.88, 0.0)),
        asdict(Measurement("tspipe", "a problem of another time", 1.0, 0.5, 0.0)),
    ]
    found = checked(runs, MORE)
    measured = {one.contender: one.measured_s for one in found}
    assert measured == {"tspipe": 3.9, "1F1B, teacher fused": 5.1, "1F1B, teacher pass first": 4.8}
    text = report.scaling([asdict(one) for one in (*found, *predictions(2, 4, MORE))])
    assert "| P=8 M=24 afab | tspipe | 3.9" in text
    assert "| 2 | 4 | " in text


def test_every_rival_but_one_is_on_paper() -> None:
    names = {scaling.ON_PAPER.get(name, name) for name in {**rivals.RIVALS, **rivals.WHOLE} if "pass first" not in name}
    assert names - periods(Costs.uniform(4), 8).keys() == {"Interleaved zero bubble, teacher fused"}
    first = {scaling.ON_PAPER[name] for name in scaling.ON_PAPER if "pass first" in name}
    assert first <= periods(Costs.uniform(4), 8).keys()


def test_a_large_problem_has_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes as long as there are stages times microbatches."""
    costs = Costs.uniform(8, message=0.01)
    assert afab_ahead(24, costs)[1] > 2 * ahead.FEWEST
    monkeypatch.setattr(ahead, "SIZE", 8 * 24)
    assert afab_ahead(24, costs)[1] <= ahead.FEWEST + 1


def test_results_are_kept_run_by_run(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    run = Measurement("tspipe", "P=8 M=24 afab", 3.9, 0.98, 0.0)
    Results(path).keep("emulated", [run])
    cut = Results(path)
    assert cut.runs("emulated") == [asdict(run)]
    assert not cut.has("emulated")
    cut.finish("emulated", {"utilization": 0.98})
    whole = Results(path)
    assert whole.has("emulated")
    assert not Results(path, full=True).has("emulated")
    assert whole.figures == {"utilization": 0.98}
    forgetful = Results(path, again=["emulated"])
    assert not forgetful.has("emulated")
    assert not forgetful.runs("emulated")
    assert not forgetful.figures


def test_the_table_has_every_contender_and_its_best_number() -> None:
    runs = [
        asdict(Measurement(name, problem, 1.0, value, 0.0))
        for name, problem, value in (
            ("tspipe", "P=8 M=24 afab", 0.976),
            ("ZBV", "P=8 M=24 afab", 0.907),
            ("tspipe", "P=8 M=8 t=3f zb", 0.98),
            ("tspipe", "P=8 M=64 afab", 0.97),
            ("ZBV", "P=8 M=64 afab", 0.95),
            ("tspipe", "P=8 M=24 afab clipping", 0.99),
            ("tspipe", "P=8 M=16 exact zb", 0.99),
        )
    ]
    text = report.emulated(runs)
    assert "| P=8 M=24 afab | 0.976 | 0.907 |" in text
    assert "| P=8 | tspipe | M=24 | 0.976 |\n| P=8 | ZBV | M=64 | 0.950 |" in text
    assert "| P=8 t=3f |" not in text  # nobody to compare with


def test_ratios_are_over_ddp_of_the_same_pair() -> None:
    runs = [
        {"pair": pair, "contender": name, "samples_per_s": rate, "peak_mib": peaks}
        for pair, name, rate, peaks in (
            ("a", "DDP", 100.0, [400.0, 300.0]),
            ("b", "DDP", 10.0, [40.0, 50.0]),
            ("b", "tspipe", 12.0, [20.0, 30.0]),
        )
    ]
    assert report.over_ddp(runs[2], runs) == (1.2, 0.75)


def test_problems_have_names_of_their_own_and_as_many_steps_as_are_measured() -> None:
    for cases in (suite.quick(), suite.full()):
        runs = [(contender, problem) for case in cases for contender, problem in case.runs()]
        names = [(contender, problem.name) for contender, problem in runs]
        assert len(set(names)) == len(names)
        assert min(problem.num_steps for _, problem in runs) >= 4
    assert sum(suite.seconds(*run) for case in suite.quick() for run in case.runs()) < 6 * 60


def test_clipping_changes_the_reference() -> None:
    """Else agreement with it would say nothing."""
    free = Problem(2, 2, 4)
    pairs = zip(free.reference().parameters(), replace(free, exchange="clipping").reference().parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) > 1e-2


def test_the_papers_cut_is_of_the_same_batch() -> None:
    """A student's microbatch has half of the rows and takes half as long; the teacher's are what they were."""
    base = suite.GOALS[0].problem
    halved = base.halved()
    assert halved.name == "P=8 M=48 Mt=24 afab"
    assert halved.work_s == pytest.approx(base.work_s)
    assert (halved.samples() == base.samples()).all()
    costs = halved.costs.per_action(halved.num_microbatches, halved.teacher_microbatches)
    assert costs.t == pytest.approx(base.costs.t)
    assert costs.f == pytest.approx([base.f / 2] * 8)
    for networks, problem in zip(halved.networks(), (base, halved), strict=True):
        assert [layer.forward_s for layer in networks] == [problem.f] * 8
    assert any(contender == PAPER for case in suite.quick() for contender, _ in case.runs())


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_best_of_all_cuts(stages: int) -> None:
    """Next to a look at every pair of cuts."""
    random = np.random.default_rng(stages)
    student, teacher = (balance.Times(random.exponential(size=n), random.random(n + 1) / 5) for n in (7, 9))

    def every(count: int) -> Iterator[list[int]]:
        for ends in itertools.combinations(range(1, count), stages - 1):
            yield [b - a for a, b in itertools.pairwise([0, *ends, count])]

    pairs = itertools.product(every(7), every(9))
    assert balance.best(student, teacher, stages) == min(balance.slowest(student, teacher, pair) for pair in pairs)


def test_every_goal_has_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A goal whose figure has another name would never be missed. All runs are in the file, so that none is made."""
    results = Results(tmp_path / "full.json", full=True)
    problems = [run for case in suite.full() for run in case.runs()]
    results.keep("emulated", [Measurement(name, problem.name, 1.0, 0.9, 0.0) for name, problem in problems])
    contenders = (bench.US, "DDP", "serial", *(f"M={count}" for count in real.RIVAL_MICROBATCHES))
    pairs = [(pair, name) for pair in PAIRS for name in contenders]
    results.keep("real", [real.Contest(pair, name, 1.0, 2.0, [3.0, 4.0]) for pair, name in pairs])
    monkeypatch.setattr(real, "run_forked", lambda *_, **__: [0])
    monkeypatch.setattr(scaling, "measure_overheads", lambda: MORE)
    monkeypatch.setattr(scaling, "on_paper", lambda *_: [])
    overheads = [
        Overhead(name, f"P={count} M=24 afab", 1.0, 3.0) for count in NUM_STAGES for name in (bench.US, "GPipe, fused")
    ]
    monkeypatch.setattr(bench, "measure_overhead", lambda _: overheads)
    monkeypatch.setattr(bench, "measure_balance", lambda _: [balance.Cut("a", 2, 1.0, 1.0, 1.0)])
    monkeypatch.setattr(bench, "measure_monitor", lambda: [Cost("a", 1.0, 0.0, 0.0, 0.0)])
    monkeypatch.setattr(bench, "measure_planning", lambda: [Plan("a", "b", 64, 1.0, 1.0, "zb")])
    monkeypatch.setattr(bench, "measure_split", lambda _: [Split(n.name, 1.0, 0.5, 0.5, 1.0) for n in NETWORKS])
    figures = {name for measure in bench.KEPT.values() for name in measure(results)}
    figures |= {name for measure in bench.WHOLE.values() for name in measure(True)[1]}
    assert {goal.figure for goal in bench.GOALS} <= figures
