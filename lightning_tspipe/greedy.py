"""One order per rank from a simulation in which every rank, when it is free, runs the most urgent work that is ready.

The backward for inputs comes first, since the rank above waits for it; then the student's forward, the teacher's, and
the backward for weights, for which nobody waits::

    rank 0: F0 F1 F2 F3 T0' T1' T2' I0 W0 I1 W1 I2 W2 I3 W3 T3'
    rank 3: T0 T1 T2 T3 F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3

How far the teacher runs ahead and how many microbatches are in flight is given from outside (`Policy`), so that every
step has the same shape and one of them can be taken as the schedule. Method of the split backward: Qi et al., "Zero
Bubble Pipeline Parallelism", ICLR 2024, https://arxiv.org/abs/2401.10241.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from lightning_tspipe.schedule import KINDS, Action, Costs, Kind, LossOver

Rows = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """What a rank may do when it is free.

    Args:
        ahead: per rank, how many teacher forwards of the next batch it makes in a step (s_k); must not grow.
        in_flight: per rank, the most student microbatches whose forward is done and whose B (or I) is not.
        held: per rank, the most whose forward is done and whose B (or W) is not.
        split: whether the backward is split into I and W.
        loss_over: what the first backward waits for.
        lead: how far the teacher goes before the student in a microbatch that both may do next; None: it gives way.
        patience: a rank waits for student work that comes within this share of the teacher or W work in its place.
    """

    ahead: tuple[int, ...]
    in_flight: tuple[int, ...]
    held: tuple[int, ...]
    split: bool = False
    loss_over: LossOver = "microbatch"
    lead: int | None = None
    patience: float = 0.0


def greedy_rows(
    policy: Policy, microbatches: int, costs: Costs, *, steps: int = 4, teacher_microbatches: int = 0
) -> Rows | None:
    """The last of some simulated steps, which is taken as the steady one; None if the ranks get stuck.

    Args:
        policy: what a rank may do.
        microbatches: M, at least 1.
        costs: seconds per action; `t` is of one of the teacher's microbatches.
        steps: how many steps; the first begins with the teacher forwards of `ahead` made.
        teacher_microbatches: of a batch, a multiple or a divisor of M; 0 stands for M.
    """
    stages, teacher = len(costs.t), teacher_microbatches or microbatches
    ranks = [_Rank(k, policy, microbatches, teacher, costs, steps) for k in range(stages)]
    events = [(0.0, k) for k in range(stages)]
    waiting, gate = [stages] * steps, [0.0] * steps  # ranks that are not through with a step, and when the rest was
    while events:
        now, k = heapq.heappop(events)
        rank = ranks[k]
        if rank.free > now or rank.step == steps:
            continue
        if rank.may_close(now):
            rank.close(now)
            heapq.heappush(events, (rank.free, k))
            continue
        kind, when = rank.choose(now)
        if kind is None:
            if when < math.inf:
                heapq.heappush(events, (when, k))
            continue
        end = rank.run(kind, now)
        heapq.heappush(events, (end, k))
        receiver = k + 1 if kind in "TF" else k - 1
        if kind != "W" and 0 <= receiver < stages:
            ranks[receiver].arrivals["B" if kind == "I" else kind].append(end + costs.message)
            heapq.heappush(events, (end + costs.message, receiver))
        if costs.exchange is not None and rank.row_done():
            waiting[rank.step] -= 1
            gate[rank.step] = max(gate[rank.step], end + costs.exchange)
            if not waiting[rank.step]:
                for other in ranks:
                    other.gates[rank.step] = gate[rank.step]
                    heapq.heappush(events, (gate[rank.step], other.stage))
    if any(rank.step < steps for rank in ranks):
        return None
    return tuple(tuple(rank.row) for rank in ranks)


class _Rank:
    """What one rank has done; microbatches are counted through all batches."""

    def __init__(self, stage: int, policy: Policy, microbatches: int, teacher: int, costs: Costs, steps: int) -> None:
        self.stage, self.policy, self.count, self.teacher, self.steps = stage, policy, microbatches, teacher, steps
        self.first, self.last = stage == 0, stage == len(costs.t) - 1
        self.in_flight, self.held, self.ahead = policy.in_flight[stage], policy.held[stage], policy.ahead[stage]
        self.seconds: dict[Kind, float] = {kind: costs.seconds(kind, stage) for kind in KINDS}
        self.back: Kind = "I" if policy.split else "B"
        self.optimizer = costs.optimizer
        self.done: dict[Kind, int] = {"T": self.ahead, "F": 0, "B": 0, "W": 0}
        self.arrivals: dict[Kind, list[float]] = {"T": [], "F": [], "B": []}
        if not self.first:
            self.arrivals["T"] = [0.0] * policy.ahead[stage - 1]
        self.step, self.free = 0, 0.0
        self.gates = [math.inf if costs.exchange is not None else 0.0] * steps
        self.row: list[Action] = []

    def ready(self, kind: Kind, now: float) -> float:
        """When the input of the next action of a kind is there; infinity if that is not known."""
        if (kind == "B" and self.last) or (kind != "B" and self.first):
            return now
        arrived, place = self.arrivals[kind], self.done[kind]
        return arrived[place] if place < len(arrived) else math.inf

    def choose(self, now: float) -> tuple[Kind | None, float]:
        """What to run now, or None and when to look again."""
        done, end, taught = self.done, (self.step + 1) * self.count, (self.step + 1) * self.teacher
        teacher, forward, backward, weights = done["T"], done["F"], done["B"], done["W"]
        finished = weights if self.policy.split else backward
        may_return = backward < forward and (not self.last or self._loss_is_there(end, taught))
        soon = self.ready("B", now) if may_return else math.inf
        if soon <= now:
            return self.back, now
        full = forward - finished >= self.held
        at_t = self.ready("T", now) if teacher < taught + self.ahead else math.inf
        if teacher >= taught and forward == self.step * self.count:
            at_t = math.inf  # a rank learns of the next batch only when this one has begun
        at_f = self.ready("F", now) if forward < end and forward - backward < self.in_flight else math.inf
        if full and at_f <= now and weights < backward and self.policy.split:
            return "W", now
        at_f = math.inf if full else at_f
        if self.policy.lead is not None and max(at_t, at_f) <= now:
            return ("F" if teacher * self.count // self.teacher - forward >= self.policy.lead else "T"), now
        if at_f <= now:
            return "F", now
        soon, patience = min(soon, at_f), self.policy.patience
        if at_t <= now and soon >= now + patience * self.seconds["T"]:
            return "T", now
        if self.policy.split and weights < backward and soon >= now + patience * self.seconds["W"]:
            return "W", now
        return None, min(soon, at_t) if at_t > now else soon

    def _loss_is_there(self, end: int, taught: int) -> bool:
        if self.policy.loss_over == "microbatch":
            return self.done["T"] * self.count >= (self.done["B"] + 1) * self.teacher
        return self.done["T"] >= taught and (self.policy.loss_over != "batch" or self.done["F"] == end)

    def run(self, kind: Kind, now: float) -> float:
        """Run the next action of a kind; returns its end."""
        counted: Kind = "B" if kind == "I" else kind
        index = self.done[counted]
        self.done[counted] += 1
        if self.step == self.steps - 1:
            batch, q = divmod(index, self.teacher if kind == "T" else self.count)
            self.row.append(Action(kind, q, batch > self.step))
        self.free = now + self.seconds[kind]
        return self.free

    def backwards_done(self) -> bool:
        """Whether the step's backwards have all begun; their end is `free`."""
        return self.done["W" if self.policy.split else "B"] == (self.step + 1) * self.count

    def row_done(self) -> bool:
        """Whether only the optimizer step is left."""
        return self.done["T"] >= (self.step + 1) * self.teacher + self.ahead and self.backwards_done()

    def may_close(self, now: float) -> bool:
        """Whether that may be made."""
        return self.gates[self.step] <= now and self.row_done()

    def close(self, now: float) -> None:
        """Make the optimizer step."""
        self.free = now + self.optimizer
        self.step += 1
