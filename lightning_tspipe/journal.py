"""What every rank did and when, as measured or as planned, and why it was idle in between.

A rank turns to an action (`begin`), has its message (`start`), and is done (`end`)::

    rank 0  F0----F1----                        begin = start: nothing to wait for
    rank 1  ......F0----F1----                  F0: begin 0, start 6, end 12; the bubble waits for F0 of rank 0
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_tspipe.schedule import Costs, Kind, Schedule, peers
from lightning_tspipe.simulate import timeline
from lightning_tspipe.table import table

LOAD = "load"
CAUSES = ("T", "F", "B", LOAD, "between steps", "runtime")

Row = tuple[int, str, int, int, bool, float, float, float]  # the fields of an `Entry`


@dataclass(frozen=True, slots=True)
class Entry:
    """One piece of work of a rank.

    Args:
        step: in which of the recorded steps, from 0.
        kind: of an action, or "load": the next batch is loaded (rank 0), or waited for (the others).
        batch, microbatch: what it works for.
        ahead: whether that is the batch after the step's own.
        begin, start, end: seconds; from begin to start its message was waited for.
    """

    step: int
    kind: str
    batch: int
    microbatch: int
    ahead: bool
    begin: float
    start: float
    end: float

    @property
    def name(self) -> str:
        """As an action prints."""
        return self.kind if self.kind == LOAD else f"{self.kind}{self.microbatch}{chr(39) if self.ahead else ''}"

    @property
    def seconds(self) -> float:
        """Of work; loading is none."""
        return 0.0 if self.kind == LOAD else self.end - self.start


@dataclass(frozen=True, slots=True)
class Bubble:
    """A rank had nothing to do.

    Args:
        step: in which step; one between two steps is in the first.
        begin, end: seconds.
        kind: one of `CAUSES`; T, F and B are the messages that were waited for.
        cause: the same in words.
        source: the rank and the entry that it waited for.
    """

    step: int
    begin: float
    end: float
    kind: str
    cause: str
    source: tuple[int, Entry] | None = None


@dataclass(frozen=True)
class Journal:
    """The entries of all ranks, in order of time.

    Args:
        ranks: per rank.
    """

    ranks: tuple[tuple[Entry, ...], ...]

    @classmethod
    def of(cls, ranks: Sequence[Sequence[Row]]) -> Journal:
        """From what the ranks' stopwatches have; the first moment is 0."""
        first = min((row[5] for rank in ranks for row in rank), default=0.0)
        return cls(tuple(tuple(Entry(*row[:5], *(at - first for at in row[5:])) for row in rank) for rank in ranks))

    @property
    def steps(self) -> int:
        """How many every rank has."""
        return min((row[-1].step + 1 if row else 0 for row in self.ranks), default=0)

    def steady(self) -> tuple[int, int]:
        """The first of the steps that tell something, and the one after them: without the first two and the last."""
        return (2, self.steps - 1) if self.steps > 3 else (0, self.steps)

    def window(self, rank: int, first: int, last: int) -> tuple[float, float]:
        """When a rank began its step `first`, and its step `last` or ended the one before."""
        row = self.ranks[rank]
        inside = [entry for entry in row if first <= entry.step < last]
        after = next((entry.begin for entry in row if entry.step == last), inside[-1].end)
        return inside[0].begin, after

    def typical(self, count: int) -> int:
        """The first of as many steady steps in a row that take rank 0 about as long as most do."""
        first, last = self.steady()
        lasts = {}
        for step in range(first, max(first + 1, last - count + 1)):
            begin, end = self.window(0, step, min(step + count, self.steps))
            lasts[step] = end - begin
        middle = statistics.median_low(lasts.values())
        return next(step for step, seconds in lasts.items() if seconds == middle)

    def shifted(self, seconds: float) -> Journal:
        """The same, so much later."""
        return Journal(tuple(
            tuple(replace(e, begin=e.begin + seconds, start=e.start + seconds, end=e.end + seconds) for e in row)
            for row in self.ranks
        ))  # fmt: skip

    def step_seconds(self, first: int, last: int) -> float:
        """Seconds of a step, of the slowest rank."""
        windows = [self.window(rank, first, last) for rank in range(len(self.ranks))]
        return max(end - begin for begin, end in windows) / (last - first)

    def utilization(self, first: int, last: int) -> float:
        """The mean time that a rank works in a step, over the time of the step; optimizers are not in it."""
        work = sum(entry.seconds for row in self.ranks for entry in row if first <= entry.step < last)
        return work / len(self.ranks) / (last - first) / (self.step_seconds(first, last) or 1.0)

    def costs(self) -> Costs:
        """The medians of what was measured, per rank."""

        def median(kind: str, rank: int) -> float:
            return statistics.median([e.seconds for e in self.ranks[rank] if e.kind == kind] or [0.0])

        t, f, b, i, w = (tuple(median(kind, rank) for rank in range(len(self.ranks))) for kind in "TFBIW")
        return Costs(t, f, tuple(map(max, b, i)), w)

    def bubbles(self, rank: int) -> Iterator[Bubble]:
        """Every time that a rank was idle, with its cause."""
        found = {(place, e.kind.replace("I", "B"), e.batch, e.microbatch): e
                 for place in {max(0, rank - 1), min(len(self.ranks) - 1, rank + 1)}
                 for e in self.ranks[place]}  # fmt: skip
        before: Entry | None = None
        for entry in self.ranks[rank]:
            if before is not None and entry.begin > before.end:
                same = before.step == entry.step
                kind = "runtime" if same else "between steps"
                cause = (
                    "Python between two actions" if same else "the optimizer's step, hooks, callbacks and validations"
                )
                yield Bubble(before.step, before.end, entry.begin, kind, cause)
            before = entry
            if entry.kind == LOAD:
                what = "the next batch is loaded" if rank == 0 else "waits for rank 0 to announce the next batch"
                yield Bubble(entry.step, entry.begin, entry.end, LOAD, what)
            elif entry.start > entry.begin:
                yield self._wait(rank, entry, found)

    def _wait(self, rank: int, entry: Entry, found: dict[tuple[int, str, int, int], Entry]) -> Bubble:
        kind: Kind = "B" if entry.kind in "BI" else "T" if entry.kind == "T" else "F"
        span = entry.step, entry.begin, entry.start, kind
        peer = peers(kind, rank, len(self.ranks))[0]
        source = None if peer is None else found.get((peer, kind, entry.batch, entry.microbatch))
        if peer is None:
            return Bubble(*span, f"{entry.name} waits")
        if source is None:
            return Bubble(*span, f"waits for {entry.name} of rank {peer}")
        late = max(0.0, min(source.end, entry.start) - entry.begin)
        parts = [f"{1e3 * late:.2f} ms until it is done"] * (late > 0)
        parts += [f"{1e3 * (entry.start - entry.begin - late):.2f} ms for the message"] * (source.end < entry.start)
        return Bubble(*span, f"waits for {source.name} of rank {peer}: {', '.join(parts)}", (peer, source))

    def shares(self, first: int, last: int) -> list[dict[str, float]]:
        """Per rank, the shares of "work" and of each of `CAUSES` in its steps."""
        shares = []
        for rank, row in enumerate(self.ranks):
            begin, end = self.window(rank, first, last)
            total = (end - begin) or 1.0
            idle = dict.fromkeys(CAUSES, 0.0)
            for bubble in self.bubbles(rank):
                if first <= bubble.step < last:
                    idle[bubble.kind] += (bubble.end - bubble.begin) / total
            work = sum(entry.seconds for entry in row if first <= entry.step < last) / total
            shares.append({"work": work, **idle})
        return shares

    def summary(self) -> str:
        """Step time, utilization, and what the ranks did with the time, as a table."""
        first, last = self.steady()
        seconds, used = self.step_seconds(first, last), self.utilization(first, last)
        header = ["rank", "work", *(f"waits for {cause}" if len(cause) == 1 else cause for cause in CAUSES)]
        rows = [[str(rank), *(f"{share:.1%}" for share in shares.values())]
                for rank, shares in enumerate(self.shares(first, last))]  # fmt: skip
        return f"step {1e3 * seconds:.2f} ms, utilization {used:.3f}\n{table(header, rows)}"


def planned(schedule: Schedule, costs: Costs, steps: int) -> Journal:
    """What a schedule would do with these costs, from a cold start on; the last step has no successor.

    Args:
        schedule: one steady step.
        costs: seconds per action.
        steps: how many, at least 4.
    """
    rows = []
    for spans in timeline(schedule, costs, steps=steps).spans:
        row: list[Entry] = []
        for span in spans:
            action, begin = span.action, row[-1].end if row else 0.0
            step = span.batch - action.ahead
            row.append(
                Entry(step, action.kind, span.batch, action.microbatch, action.ahead, begin, span.start, span.end)
            )
        rows.append(tuple(row))
    return Journal(tuple(rows))
