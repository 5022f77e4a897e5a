"""What each way to train a pair would take: this pipeline's orders, other pipelines, DDP and FSDP, from costs alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_tspipe.clock import of_teacher
from lightning_tspipe.floor import minimal_microbatches
from lightning_tspipe.orders import ORDERS, SPLIT, Found
from lightning_tspipe.placement import fits, peaks
from lightning_tspipe.plan import Planner
from lightning_tspipe.rivals import ways
from lightning_tspipe.schedule import Costs, LossOver, check_teacher_microbatches
from lightning_tspipe.table import table

GB = 1e9
SHORT = 0.5e-3  # seconds of an action that are not much more than what the runtime adds
TRIES = (64, 32, 16)  # microbatches of a larger batch
CLEARLY = 0.99  # what is within 1 % is as fast
ASSUMPTIONS = """\
Assumed: costs are those of a microbatch in every way, though larger batches are often more efficient per sample,
which favours DDP and FSDP. Every pipeline cuts the batch into the same microbatches; "M=" is a rival with as many as
are best for it, up to 64 and what fits: a larger batch, whose time is given for as many samples as the others have, and
which is no choice here. Activations travel while ranks work; only their latency counts. The optimizer's step is left
out. Fused: a stage's forward runs teacher and student. Two chunks per rank (interleaved, ZBV) are halves of a stage.
ZBV is a greedy order within the memory of 1F1B, not the one that its authors search. DDP sends gradients while it
computes its backward. FSDP gathers and scatters while it computes anything, and the layer that is gathered is
not in its memory."""


@dataclass(frozen=True)
class Pair:
    """Student and teacher on so many stages.

    Args:
        costs: seconds per stage and microbatch.
        lookahead: whether the teacher may run a batch ahead (frozen, or delayed by one update).
        loss_over: as of the module; other pipelines know "microbatch" only.
        student, teacher: bytes of their parameters; 0: not known.
        weights: bytes per stage of parameters, gradients and optimizer state; empty: not known.
        held: bytes per stage that a microbatch takes between its forward and its backward; empty: not known.
        pending: bytes per stage that it takes between the two parts of a split backward; empty: as many as `held`.
        passed: bytes per stage that it takes with recomputation, while one at a time takes `held`; empty: without it.
        teacher_microbatches: per batch; "auto": as many as `Planner.teacher_microbatches` takes; None: as the student.
        rows: of a batch, for "auto".
        accumulation: batches of an optimizer step; within these an exact teacher may run a batch ahead, too.
        teacher_held: bytes per stage that a teacher's forward of as many rows takes; empty: not known.
    """

    costs: Costs
    lookahead: bool = True
    loss_over: LossOver = "batch"
    student: float = 0.0
    teacher: float = 0.0
    weights: tuple[float, ...] = ()
    held: tuple[float, ...] = ()
    passed: tuple[float, ...] = ()
    pending: tuple[float, ...] = ()
    teacher_microbatches: int | Literal["auto"] | None = None
    rows: float = math.inf
    accumulation: int = 1
    teacher_held: tuple[float, ...] = ()

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.costs.t)


@dataclass(frozen=True)
class Machine:
    """What it runs on; None: not known.

    Args:
        bandwidth: bytes per second of a rank to another.
        memory: bytes per rank.
    """

    bandwidth: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Prospect:
    """One way to train.

    Args:
        name: of it.
        seconds: of a step.
        utilization: mean work of a rank over that.
        peak: bytes of the fullest rank; None: not known.
        any_loss: whether it can train a loss over the batch.
        ours: whether this package does it.
        known: whether `seconds` is more than a lower bound.
        microbatches: of a pipeline's batch; None: as many as were asked for.
        larger: whether those are more than were asked for; `seconds` are still of as many.
        teacher: microbatches of the teacher in one of our batches.
    """

    name: str
    seconds: float
    utilization: float
    peak: float | None = None
    any_loss: bool = True
    ours: bool = False
    known: bool = True
    microbatches: int | None = None
    larger: bool = False
    teacher: int | None = None

    def fits(self, machine: Machine) -> bool | None:
        """Whether it fits into memory; None: not known."""
        return None if self.peak is None or machine.memory is None else self.peak <= machine.memory


def prospects(pair: Pair, microbatches: int, machine: Machine) -> list[Prospect]:
    """Every order of this package, then the rivals.

    Args:
        pair: what to train.
        microbatches: per batch, in every pipeline.
        machine: what on.

    Raises:
        ValueError: the numbers of microbatches do not go together.
    """
    costs, stages = pair.costs, pair.stages
    if isinstance(pair.teacher_microbatches, int):
        check_teacher_microbatches(microbatches, pair.teacher_microbatches)
    work = [costs.work(stage, microbatches) - costs.optimizer for stage in range(stages)]
    mean = sum(work) / stages
    found = []
    for order in ORDERS[1:]:
        any_loss = order.startswith("afab")
        loss: LossOver = "batch" if any_loss else "microbatch" if pair.loss_over == "batch" else pair.loss_over
        try:
            made = _plan(pair, machine, loss, order, microbatches, _most(pair, machine, order in SPLIT))
        except ValueError:  # it does not fit
            made = _plan(pair, machine, loss, order, microbatches)
        peak = max(peaks(pair, made.schedule)) if pair.weights and pair.held else None
        teacher = made.schedule.teacher_microbatches
        own = of_teacher(costs, microbatches, teacher)
        used = sum(own.work(stage, microbatches) - costs.optimizer for stage in range(stages)) / stages / made.period
        found.append(Prospect(f'tspipe, schedule="{order}"', made.period, used, peak, any_loss, True, teacher=teacher))
    now = [_rival(name, run(), pair, microbatches, microbatches) for name, run in ways(costs, microbatches).items()]
    larger = _larger(pair, microbatches, machine, {one.name: one.seconds for one in now})
    return [*found, *now, *larger, *_data_parallel(pair, microbatches, machine, mean)]


def _plan(
    pair: Pair, machine: Machine, loss: LossOver, order: str, microbatches: int, most: Sequence[int] | None = None
) -> Found:
    """What a run with that order would do; raises ValueError where no more than so many microbatches may be held."""
    planner = Planner(pair.costs, pair.lookahead, loss, order, max_held=most, accumulation=pair.accumulation)
    teacher = pair.teacher_microbatches or microbatches
    if teacher == "auto":
        limit = math.inf if machine.memory is None or not pair.weights or not pair.held else machine.memory
        teacher = planner.teacher_microbatches(microbatches, pair.rows, lambda made: fits(pair, made, limit))
    return planner.search(microbatches, teacher)


def _rival(name: str, seconds: float, pair: Pair, count: int, microbatches: int) -> Prospect:
    """Another pipeline whose step with `count` microbatches takes so long; given is what `microbatches` take of it."""
    stages, order = pair.stages, name.split(",")[0]
    held: dict[str, Sequence[float]] = {
        "GPipe": [count] * stages,
        "1F1B": [min(count, stages - k) for k in range(stages)],
        "ZB1P": [min(count, stages)] * stages,
        "interleaved 1F1B": [min(count, (3 * stages - 2 * k) / 2) for k in range(stages)],
        "ZBV": [min(count, stages + 0.5)] * stages,
    }
    whole = order not in held  # all microbatches at once
    peak = _peak(pair, held.get(order, [count] * stages), order.startswith("ZB"))
    work = [pair.costs.work(stage, microbatches) - pair.costs.optimizer for stage in range(stages)]
    each = seconds * microbatches / count
    return Prospect(name, each, sum(work) / stages / each, peak, any_loss=whole, microbatches=count)


def _larger(pair: Pair, microbatches: int, machine: Machine, now: Mapping[str, float]) -> list[Prospect]:
    """The rivals that a larger batch makes faster, each with the most microbatches that fit: its bubbles do not grow.

    Args:
        pair, microbatches, machine: as in `prospects`.
        now: seconds with as many microbatches as all have.
    """
    best: dict[str, Prospect] = {}
    for count in (most - most % pair.stages for most in TRIES):  # interleaving needs a multiple
        for name, run in ways(pair.costs, count).items() if count > microbatches else ():
            blind = _rival(name, math.inf, pair, count, microbatches)
            if name not in best and not blind.any_loss and blind.fits(machine) is not False:
                best[name] = _rival(name, run(), pair, count, microbatches)
    return [replace(one, name=f"{name}, M={one.microbatches}", larger=True)
            for name, one in best.items() if one.seconds < CLEARLY * now.get(name, math.inf)]  # fmt: skip


def _memory(pair: Pair, split: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Bytes per stage: what is there anyhow, and what comes with each microbatch; a split backward keeps it all."""
    if not pair.passed or split:
        return pair.weights, pair.held
    return [w + h for w, h in zip(pair.weights, pair.held, strict=True)], pair.passed


def _peak(pair: Pair, held: Sequence[float], split: bool) -> float | None:
    if not pair.weights or not pair.held:
        return None
    fixed, each = _memory(pair, split)
    return max(there + n * more for there, n, more in zip(fixed, held, each, strict=True))


def _most(pair: Pair, machine: Machine, split: bool) -> list[int] | None:
    """How many microbatches fit on each rank; None where that is not known."""
    if machine.memory is None or not pair.weights or not pair.held:
        return None
    fixed, each = _memory(pair, split)
    if split and pair.pending:
        each = tuple(map(max, each, pair.pending))
    return [int((machine.memory - there) // more) if more else sys.maxsize
            for there, more in zip(fixed, each, strict=True)]  # fmt: skip


def _data_parallel(pair: Pair, microbatches: int, machine: Machine, mean: float) -> list[Prospect]:
    """DDP and FSDP: each rank has all layers, and its share of the batch."""
    count = pair.stages
    backward = sum(map(sum, (pair.costs.b, pair.costs.w))) * microbatches / count
    weights, held = (sum(column) if column else None for column in (pair.weights, pair.passed or pair.held))
    most = max(pair.held) if pair.passed else 0.0  # one stage at a time runs again
    rest = None if held is None else (held + most) * microbatches / count
    known = count == 1 or (bool(machine.bandwidth) and pair.student > 0)
    part = (count - 1) / count / machine.bandwidth if machine.bandwidth else 0.0
    ddp = mean - backward + max(backward, 2 * part * pair.student)
    fsdp = max(mean, part * (3 * pair.student + pair.teacher))
    peaks = [None if weights is None or rest is None else weights / ranks + rest for ranks in (1, count)]
    pairs = zip(("DDP", "FSDP"), (ddp, fsdp), peaks, strict=True)
    return [Prospect(name, seconds, mean / seconds, peak, known=known) for name, seconds, peak in pairs]


def report(pair: Pair, microbatches: int, machine: Machine, found: Sequence[Prospect]) -> str:
    """All prospects as a table, what was assumed, and which is the best."""
    best = _best(pair, machine, [one for one in found if one.ours])
    seconds = math.nan if best is None else best.seconds
    header = ["way", "loss", "Mt", "step ms", "utilization", "over tspipe's", "peak GB", "fits"]
    rows = []
    for one in found:
        fits = one.fits(machine)
        rows.append([
            one.name,
            "any" if one.any_loss else "per microbatch",
            "" if one.teacher is None else f"{one.teacher}",
            f"{'' if one.known else '>= '}{1e3 * one.seconds:.2f}",
            f"{'' if one.known else '<= '}{one.utilization:.3f}",
            f"{'' if one.known else '>= '}{one.seconds / seconds:.2f}",
            "?" if one.peak is None else f"{one.peak / GB:.3g}",
            "?" if fits is None else "yes" if fits else "NO",
        ])  # fmt: skip
    title = f"{pair.stages} ranks, {microbatches} microbatches, of the teacher Mt; a step is one batch:"
    return "\n".join([title, table(header, rows), "", ASSUMPTIONS, "", *verdict(pair, microbatches, machine, found)])


def _best(pair: Pair, machine: Machine, found: Sequence[Prospect]) -> Prospect | None:
    """The fastest that trains this loss and, as far as is known, fits."""
    can = [one for one in found if trains(pair, one) and one.fits(machine) is not False]
    return min(can, key=lambda one: one.seconds, default=None)


def trains(pair: Pair, one: Prospect) -> bool:
    """Whether it trains this loss; all that the teacher gives is there where its pass comes first."""
    whole = one.ours or "teacher first" in one.name
    return one.any_loss or pair.loss_over == "microbatch" or (pair.loss_over == "student_microbatch" and whole)


def verdict(pair: Pair, microbatches: int, machine: Machine, found: Sequence[Prospect]) -> list[str]:
    """Whether this pipeline is the better choice, and why not, in sentences.

    Args:
        pair, microbatches, machine: as in `prospects`.
        found: what it gave.
    """
    ours = _best(pair, machine, [one for one in found if one.ours])
    rivals = [one for one in found if not one.ours and not one.larger]
    sure = _best(pair, machine, [one for one in rivals if one.known])
    if ours is None:
        fitting = _best(pair, machine, rivals)
        what = "nothing else does either" if fitting is None else f"{fitting.name} does"
        return [f"The pipeline is NOT the better choice: none of its orders fits into memory; {what}."]
    mine = f"{ours.name} with {1e3 * ours.seconds:.2f} ms"
    doubts = [_doubt(pair, microbatches, machine, ours, one) for one in rivals if one.name in ("DDP", "FSDP")]
    may = any(not one.known and _rivals(one, ours, machine) for one in rivals)
    if sure is not None and sure.seconds < CLEARLY * ours.seconds:
        other = f"{sure.name} takes {1e3 * sure.seconds:.2f} ms"
        lines = [f"The pipeline is NOT the better choice: {other}, the best order is {mine}."]
        lines += _reasons(pair, microbatches, ours)
    elif sure is not None and CLEARLY * sure.seconds <= ours.seconds:
        lines = [f"The pipeline is NOT clearly the better choice: {sure.name} is within 1 % of {mine}."]
    elif may:
        lines = [f"The best pipeline is {mine}. Whether it is the better choice is open:"]
    else:
        lines = [f"The pipeline is the better choice: {mine} per step."]
    lines += [line for line in doubts if line]
    actions = (*pair.costs.t, *pair.costs.f, *(b + w for b, w in zip(pair.costs.b, pair.costs.w, strict=True)))
    if (each := sum(actions) / len(actions)) < SHORT:
        lines.insert(
            0,
            f"The pipeline is NOT the better choice: an action takes {1e3 * each:.2f} ms on average, and Python adds "
            "some tenths of a millisecond to each, which the numbers above leave out. Without that:",
        )
    return lines


def _rivals(one: Prospect, ours: Prospect, machine: Machine) -> bool:
    """Whether it may be as fast, and may fit."""
    return CLEARLY * one.seconds <= ours.seconds and one.fits(machine) is not False


def _reasons(pair: Pair, microbatches: int, ours: Prospect) -> list[str]:
    """What keeps the pipeline from the mean work of a rank."""
    work = [pair.costs.work(stage, microbatches) - pair.costs.optimizer for stage in range(pair.stages)]
    mean, most = sum(work) / len(work), max(work)
    found = []
    if most > mean / CLEARLY:
        found.append(f"Stage {work.index(most)} has {most / mean - 1:.0%} more work than the mean: balance the stages.")
    if ours.seconds > most / CLEARLY:
        split = "split" in ours.name or "zb" in ours.name
        loss: LossOver = "batch" if ours.any_loss else "microbatch"
        needed = minimal_microbatches(pair.stages, pair.costs, lookahead=pair.lookahead, split=split, loss_over=loss)
        bubbles = f"{1 - most / ours.seconds:.0%} of its step are bubbles"
        if not ((pair.lookahead and max(pair.costs.t) > 0) or (split and loss == "microbatch")):
            found.append(f"{bubbles}: there is no work that may fill them.")
        elif needed > microbatches:
            found.append(f"{bubbles}: {microbatches} microbatches are too few to fill them, {needed} are needed.")
        else:
            found.append(f"{bubbles}.")
    return found


def _doubt(pair: Pair, microbatches: int, machine: Machine, ours: Prospect, one: Prospect) -> str:
    """What is not known of data parallelism, and what would decide."""
    if one.fits(machine) is False:
        assert one.peak is not None and machine.memory is not None
        return f"{one.name} does not fit: it takes {one.peak / GB:.2f} GB per rank, of {machine.memory / GB:.2f}."
    if not _rivals(one, ours, machine):
        return ""
    memory = "" if one.fits(machine) else "; whether it fits into memory is not known either"
    if one.known:
        return f"Whether {one.name} fits into memory is not known." if memory else ""
    if not pair.student:
        return f"{one.name} is as fast or faster if its messages can be hidden{memory}."
    backward = sum(map(sum, (pair.costs.b, pair.costs.w))) * microbatches / pair.stages
    ddp = one.name == "DDP"
    size = (2 * pair.student if ddp else 3 * pair.student + pair.teacher) * (pair.stages - 1) / pair.stages
    rate = size / (ours.seconds - one.seconds + backward if ddp else ours.seconds) / GB
    return f"{one.name} is as fast or faster if a rank sends {rate:.3g} GB/s or more{memory}."
