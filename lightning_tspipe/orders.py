"""The orders, and the search for the fastest one under a memory bound.

A step of rank 0 of 2, and the most student microbatches in flight at stage k of P::

    afab        F0 F1 F2 T0' T1' T2' B0 B1 B2             M
    afab-split  F0 F1 F2 T2 T0' T1' I0 I1 I2 W0 W1 W2     M
    1f1b        F0 F1 F2 T0' B0 T1' B1 T2' B2             P-k to 2(P-k)-1, or what the bound of "auto" allows
    zb          T0 F0 T1 F1 I0 T2 F2 I1 W0 W1 I2 W2       as 1f1b

Those that begin with afab serve any loss; the other two need a loss per microbatch. With the backward split into I and
W an exact teacher (no lookahead) needs no bubbles either. Rows of all orders but afab come from `holes.filled` or
`greedy.greedy_rows`; the search is for how far the teacher runs ahead (s_k), how many microbatches are in flight, and
who gives way to whom.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ParamSpec

from lightning_tspipe.ahead import afab_ahead, in_turn, slower_messages, staircases, unique, vary
from lightning_tspipe.clock import Clock, of_teacher
from lightning_tspipe.floor import step_floor
from lightning_tspipe.greedy import Policy, Rows, greedy_rows
from lightning_tspipe.holes import filled, waves
from lightning_tspipe.plain import AFAB, plain_rows
from lightning_tspipe.schedule import (
    Action,
    Costs,
    LossOver,
    Schedule,
    ScheduleError,
    check_scalars,
    check_teacher_microbatches,
    require,
    validate,
)

ORDERS = ("auto", "afab", "1f1b", "afab-split", "zb")
SPLIT = ("afab-split", "zb")
BUDGET = 14_000  # stages x microbatches x simulations in a search: less than a second
FEWEST = 12  # simulations, for a large problem
PAYS = 1.01  # by so much a step must be shorter for "auto" to split the backward, which takes more memory
NEAR = 1.0025  # a step that is this near to its bound is as good as any
PATIENCE = 0.6  # of a rank that could start a W while student work is on its way, in the student's timetable
MOST = 200  # simulations, for a small problem

Score = tuple[bool, float, int, int]
Options = ParamSpec("Options")


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Args:
        schedule: the fastest one.
        order: its name, never "auto".
        period: seconds of a steady step.
        bound: seconds that no schedule beats: work alone.
        floor: the same with the waits that no order avoids (`floor.step_floor`).
        evaluations: how many orders were simulated.
    """

    schedule: Schedule
    order: str
    period: float
    bound: float
    floor: float
    evaluations: int


def find_schedule(
    stages: int,
    microbatches: int,
    costs: Costs | None = None,
    *,
    lookahead: bool = True,
    loss_over: LossOver = "batch",
    order: str = "auto",
    split_backward: bool = False,
    max_in_flight: Sequence[int] | None = None,
    max_held: Sequence[int] | None = None,
    teacher_microbatches: int | None = None,
    max_held_split: Sequence[int] | None = None,
) -> Found:
    """Search the schedule with the shortest step.

    It minimises the step time as given plus that with messages slower by 2 % of an action (so that ranks do not wait
    for each other's every jitter), and among equals prefers the simpler order and the fewest teacher forwards ahead
    (less memory). It is never slower than the plain orders: the teacher before the student, or each of its forwards
    right before the student's (as if one stage held both), all forwards first or 1F1B.

    Args:
        stages: P, at least 1.
        microbatches: M, view-microbatches per batch, at least 1.
        costs: seconds per student microbatch; None means t = f = b = w.
        lookahead: False keeps the teacher within its own step (delay 0 of a momentum teacher).
        loss_over: "batch": the loss needs all outputs at once; "student_microbatch": all of the teacher's.
        order: one of `ORDERS`; "auto" is the fastest of those that the other arguments allow.
        split_backward: whether "auto" may split the backward into I and W; it does if that makes the step 1 % shorter.
        max_in_flight, max_held: as in `schedule.validate`; None: no bound for "auto".
        teacher_microbatches: of a batch, a multiple or a divisor of M; None: M.
        max_held_split: `max_held` of orders that split the backward, which may need more for W; None: the same.

    Raises:
        ValueError: a bad argument, or nothing that keeps the bounds.
    """
    require(order in ORDERS, f"order is {order!r}: choose from {', '.join(ORDERS)}")
    check_scalars(stages, microbatches, loss_over, costs)
    teacher = microbatches if teacher_microbatches is None else teacher_microbatches
    check_teacher_microbatches(microbatches, teacher)
    costs = of_teacher(costs or Costs.uniform(stages), microbatches, teacher)
    bounds = {"max_in_flight": max_in_flight, "max_held": max_held, "max_held_split": max_held_split}
    for name, bound in bounds.items():
        fits = bound is None or (len(bound) == stages and min(bound) >= 1)
        require(fits, f"{name} is {bound}: give at least 1 for each of the {stages} stages")
    names = [name for name in ORDERS[1:] if split_backward or name in ("afab", "1f1b")] if order == "auto" else [order]
    lean = [name for name in names if not name.startswith("afab")]
    if loss_over == "batch":
        require(names != lean, f'order "{order}" needs a loss per microbatch: set loss_over="microbatch", or take afab')
        names = [name for name in names if name not in lean]
    held = max_held, max_held if max_held_split is None else max_held_split
    search = _Search(microbatches, teacher, costs, lookahead, loss_over, order == "auto", max_in_flight, held)
    names = [name for name in names if name in lean or search.holds_all(name)]
    hint = "allow more, or take fewer microbatches" + ', or set loss_over="microbatch"' * (loss_over == "batch")
    require(bool(names), f"all {microbatches} microbatches are in flight at once, which the bound forbids: {hint}")
    return search.run(names)


def _schedule_of(find: Callable[Options, Found]) -> Callable[Options, Schedule]:
    def make(*args: Options.args, **kwargs: Options.kwargs) -> Schedule:
        """The fastest schedule that `find_schedule` finds; arguments and errors are the same."""
        return find(*args, **kwargs).schedule

    return make


make_schedule = _schedule_of(find_schedule)


@dataclass(slots=True)
class _Candidate:
    name: str
    rows: Rows
    ahead: tuple[int, ...]
    score: Score
    period: float


@dataclass
class _Search:
    """One search: what is asked for, and the best that was found."""

    microbatches: int
    teacher: int  # its microbatches
    costs: Costs
    lookahead: bool
    loss_over: LossOver
    auto: bool
    max_in_flight: Sequence[int] | None
    max_held: tuple[Sequence[int] | None, Sequence[int] | None]  # without and with a split backward
    evaluations: int = 0
    limit: float = math.inf
    best: _Candidate | None = None
    seen: dict[tuple[str, Policy], Score] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stages = len(self.costs.t)
        unbounded = (self.microbatches,) * self.stages
        self.in_flight, *held = (
            unbounded if bound is None else tuple(min(self.microbatches, most) for most in bound)
            for bound in (self.max_in_flight, *self.max_held)
        )
        self.held = {name: held[name in SPLIT] for name in ORDERS[1:]}
        self.bound = max(self.costs.work(k, self.microbatches) for k in range(self.stages))
        self.slower = slower_messages(self.costs)
        self.waits = self.costs.exchange is not None  # the teacher can fill what lies behind the last backward, too
        self.actions = self.costs.per_action(self.microbatches, self.teacher)
        self.budget = min(MOST, max(FEWEST, BUDGET // (self.stages * max(self.microbatches, self.teacher))))

    def run(self, names: Sequence[str]) -> Found:
        self.floor = min(map(self.floor_of, {name in SPLIT: name for name in names}.values()))
        self.plain(names)
        if "afab" in names:  # others have more to try
            self.all_forward_first(20 if self.waits else 75 if "afab-split" in names else 150)
        if not self.enough and self.lookahead:
            self.into_holes(names)
        if not self.enough:
            self.greedy([name for name in names if name != "afab" or self.waits])
        if self.best is None:
            raise ValueError("nothing keeps the bounds: allow more microbatches in flight or held")
        schedule = self.schedule(self.best.rows)
        self.check(self.best.name, schedule)
        return Found(schedule, self.best.name, self.best.period, self.bound, self.floor, self.evaluations)

    def floor_of(self, name: str) -> float:
        """Seconds of a step at least; a teacher with microbatches of its own counts as work only."""
        ahead, loss = self.lookahead or self.teacher != self.microbatches, self.loss_over
        bounds = self.in_flight, self.held[name]
        return step_floor(self.costs, self.microbatches, name in SPLIT, *bounds, lookahead=ahead, loss_over=loss)

    def holds_all(self, name: str) -> bool:
        """Whether all microbatches of a batch may be there at once."""
        return min(*self.in_flight, *self.held[name]) >= self.microbatches

    def check(self, name: str, schedule: Schedule) -> None:
        """Raises ScheduleError for what breaks a rule or a bound."""
        validate(schedule, max_in_flight=self.in_flight, max_held=self.held[name])

    def shortest(self) -> float:
        """Seconds of the best step so far."""
        return math.inf if self.best is None else self.best.period

    @property
    def enough(self) -> bool:
        """Whether nothing much better can be found; where only jitter is left, a part of the budget is spent on it."""
        if self.best is None or self.best.score[0] or self.best.period > self.floor * NEAR:
            return False
        return self.best.score[1] <= 2 * self.floor * NEAR or self.evaluations >= self.budget // 4

    def schedule(self, rows: Rows) -> Schedule:
        return Schedule(self.stages, self.microbatches, self.loss_over, rows, self.teacher)

    def offer(self, name: str, rows: Rows, timed: Clock | None = None) -> Score:
        """Time the rows, with a clock that they may have, and keep them if they are the best."""
        self.evaluations += 1
        schedule = self.schedule(rows)
        timed = timed or Clock(schedule, self.costs)
        period = timed(self.costs).period
        worse = period > self.limit * (1 + 1e-9)
        if self.best is not None and (worse, 2 * period) > self.best.score[:2]:  # slower messages make it no better
            return worse, 2 * period, 0, 0
        both = period + timed(self.slower).period
        if self.auto and name in SPLIT:
            both *= PAYS
        score = worse, float(f"{both:.9g}"), ORDERS.index(name), sum(schedule.ahead)
        if self.best is None or score < self.best.score:
            self.best = _Candidate(name, rows, schedule.ahead, score, period)
        return score

    def plain(self, names: Sequence[str]) -> None:
        """The orders without a search, which set the limit for all others."""
        found, taught = [], self.loss_over == "student_microbatch"
        for name in names:
            for rows in plain_rows(name, self.stages, self.microbatches, self.teacher, taught):
                schedule = self.schedule(rows)
                if not self.holds_all(name):  # else nothing is in the way, and it takes time
                    try:
                        self.check(name, schedule)
                    except ScheduleError:
                        continue
                timed = Clock(schedule, self.costs)
                found.append((name, rows, timed))
                self.limit = min(self.limit, timed(self.costs).period)
        for name, rows, timed in found:
            self.offer(name, rows, timed)

    def all_forward_first(self, budget: int) -> None:
        """All forwards, then all backwards; the teacher in one block before each."""
        ahead, evaluations = (0,) * self.stages, 0
        if self.lookahead:
            ahead, evaluations = afab_ahead(self.microbatches, self.actions, budget, self.teacher)
        self.evaluations += evaluations
        counts = self.teacher, self.microbatches, self.microbatches
        own, forward, backward = ([Action(k, q) for q in range(n)] for k, n in zip(AFAB, counts, strict=True))
        self.offer(
            "afab", tuple((*own[s:], *forward, *(replace(a, ahead=True) for a in own[:s]), *backward) for s in ahead)
        )

    def into_holes(self, names: Sequence[str]) -> None:
        """The teacher in the holes of the student's timetable. Mostly the first try is the best, so there are few."""
        before = self.evaluations
        lean = [name for name in names if not name.startswith("afab") or self.waits]
        tries = [self.holes(name) for name in lean or names]
        for name, rows in in_turn(*tries):
            try:  # the teacher may come too late for a loss per microbatch
                self.check(name, self.schedule(rows))
            except ScheduleError:
                self.evaluations += 1
            else:
                self.offer(name, rows)
            if self.enough or self.evaluations - before >= self.budget // 3:
                break

    def holes(self, name: str) -> Iterator[tuple[str, Rows]]:
        """Rows of an order, for steps from its bound to a little more."""
        bound = max(self.costs.work(k, self.microbatches, name in SPLIT) for k in range(self.stages))
        periods = [bound * share for share in (1, 1.005, 1.01, 1.02, 1.03, 1.06)]
        policies = [self.policy(name, limit) for limit in self.limits(name)]
        given = self.microbatches, self.actions
        patient = [replace(policy, patience=PATIENCE) for policy in policies if policy.split]  # lest a W be in the way
        for group in [[policy] for policy in policies] if self.waits else [[*policies, *patient]]:
            ways = [filled(group, *given, periods, self.teacher)]
            if self.teacher == self.microbatches and name in ("1f1b", "zb"):
                plain = group[: len(policies)]
                ways.append(row for policy in plain for row in waves(policy, *given, bound, self.shortest))
            yield from ((name, rows) for rows in (itertools.chain if self.waits else in_turn)(*ways))

    def greedy(self, names: Sequence[str]) -> None:
        """Simulate policies, the most promising of every order first, then vary the best one."""
        before = self.evaluations
        tries = [self.policies(name) for name in names]
        for name, policy in in_turn(*tries):
            self.evaluate(name, policy)
            if self.enough or self.evaluations - before >= self.budget * 2 // 3:
                break
        if self.enough or not self.seen:
            return
        for patience in (0.6, 0.3, 1.0):
            name, policy = min(self.seen, key=self.seen.__getitem__)
            self.evaluate(name, replace(policy, patience=patience))
        name, policy = min(self.seen, key=self.seen.__getitem__)
        if self.lookahead:
            vary(
                policy.ahead,
                self.teacher,
                lambda ahead: self.evaluate(name, replace(policy, ahead=ahead)),
                lambda: self.enough or self.evaluations - before >= self.budget,
                last=0 if policy.ahead[-1] == 0 else None,
            )

    def evaluate(self, name: str, policy: Policy) -> Score:
        if (known := self.seen.get((name, policy))) is not None:
            return known
        rows = greedy_rows(policy, self.microbatches, self.actions, teacher_microbatches=self.teacher)
        if rows is None:
            self.evaluations += 1
            score: Score = (True, math.inf, 0, 0)
        else:
            score = self.offer(name, rows)
        self.seen[name, policy] = score
        return score

    def policy(self, name: str, in_flight: tuple[int, ...]) -> Policy:
        """The policy of an order that has no teacher ahead."""
        loss_over = "batch" if name.startswith("afab") else self.loss_over
        return Policy((0,) * self.stages, in_flight, self.held[name], name in SPLIT, loss_over)

    def limits(self, name: str) -> list[tuple[int, ...]]:
        """How many microbatches an order may have in flight, the most promising first."""
        stages, free = self.stages, self.in_flight
        single, middle, double = (
            tuple(min(most, math.ceil(wide * (stages - k) - wide + 1)) for k, most in enumerate(free))
            for wide in (1, 1.5, 2)
        )
        any_number = [free] if self.auto or self.max_in_flight is not None else []
        return [free] if name.startswith("afab") else unique([double, *any_number, single, middle])

    def policies(self, name: str) -> Iterator[tuple[str, Policy]]:
        """The policies of an order to try, the most promising first."""
        stages, count, limits = self.stages, self.teacher, self.limits(name)
        base = self.policy(name, self.in_flight)
        leads: tuple[int | None, ...] = (1, 0, stages, None)
        patiences: tuple[float, ...] = (0.0, 0.3, 1.0, 0.5)
        if self.lookahead:
            leads, patiences = (1, None) if base.split else (), patiences[:1]  # else lookahead alone fills bubbles
        for patience, lead, limit in itertools.product(patiences, leads, limits):
            yield name, replace(base, in_flight=limit, lead=lead, patience=patience)
        if self.lookahead:
            stairs = unique([*staircases(count, self.actions, split=base.split), (count,) * stages])
            tight = not self.holds_all(name)  # then a wait goes round all ranks
            waits = tight or (base.split and max(self.costs.t) <= max(self.costs.f))  # lest W be in the way
            tries = [*itertools.product((None,), stairs, limits, (0.0, 0.6)[: 1 + waits])]
            more = itertools.product((1, 2), stairs, limits[-1:], (0.3,)) if tight and base.split else ()
            for lead, ahead, limit, patience in [*(tries if tight else sorted(tries, key=lambda each: each[3])), *more]:
                yield name, replace(base, in_flight=limit, ahead=ahead, lead=lead, patience=patience)
