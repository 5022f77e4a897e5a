"""A journal as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing show.

One process is what was measured, another one what was planned, with a thread per rank; bubbles are slices like the
work, named by what was waited for, and an arrow leads from there. Format: "Trace Event Format",
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_tspipe.journal import LOAD, Bubble, Entry, Journal

SHORTEST = 10e-6  # seconds; bubbles that are shorter are left out
NAMES = {"T": "teacher forward", "F": "student forward", "B": "student backward", "I": "backward for inputs",
         "W": "backward for weights"}  # fmt: skip

Event = dict[str, Any]


def trace_of(journals: Mapping[str, Journal]) -> dict[str, Any]:
    """What goes into a JSON file.

    Args:
        journals: by name, such as "measured" and "planned"; with the same origin of time.
    """
    first = min((row[0].begin for journal in journals.values() for row in journal.ranks if row), default=0.0)
    events = [
        event
        for process, (name, journal) in enumerate(journals.items())
        for event in _events(process, name, journal, first)
    ]
    summaries = {name: journal.summary().splitlines() for name, journal in journals.items()}
    return {"displayTimeUnit": "ms", "otherData": summaries, "traceEvents": events}


def _events(process: int, name: str, journal: Journal, origin: float) -> Iterator[Event]:
    def at(seconds: float) -> float:
        return round(1e6 * (seconds - origin), 3)

    def slice_(rank: int, begin: float, end: float, title: str, kind: str, args: Event) -> Event:
        place = {"pid": process, "tid": rank, "ts": at(begin), "dur": round(at(end) - at(begin), 3)}
        return {"ph": "X", "name": title, "cat": kind, "args": args} | place

    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    arrows = 0
    for rank, row in enumerate(journal.ranks):
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
        for entry in row:
            if entry.kind != LOAD:
                where = {"batch": entry.batch, "microbatch": entry.microbatch, "step": entry.step}
                yield slice_(rank, entry.start, entry.end, entry.name, NAMES[entry.kind], where)
        for bubble in journal.bubbles(rank):
            if bubble.end - bubble.begin < SHORTEST:
                continue
            args = {"cause": bubble.cause, "step": bubble.step}
            yield slice_(rank, bubble.begin, bubble.end, short_cause(bubble), "bubble", args)
            if bubble.source is not None:
                arrows += 1
                arrow = {"cat": "message", "name": bubble.source[1].name, "id": f"{process}.{arrows}", "pid": process}
                yield arrow | {"ph": "s", "tid": bubble.source[0], "ts": at(_within(bubble.source[1]))}
                yield arrow | {"ph": "f", "bp": "e", "tid": rank, "ts": at(bubble.end)}


def _within(entry: Entry) -> float:
    """A moment in a slice, at which an arrow can begin."""
    return entry.end - 0.01 * (entry.end - entry.start)


def short_cause(bubble: Bubble) -> str:
    """A few letters for a bubble."""
    return bubble.kind if bubble.source is None else f"waits for {bubble.source[1].name} of rank {bubble.source[0]}"
