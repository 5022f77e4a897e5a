"""When a rank begins and ends each action, on the host or, by events that are read later, on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_tspipe.journal import LOAD, Row


class Stopwatch:
    """Notes times while a step runs; `rows` reads them afterwards. Nothing in between waits for the device.

    On a GPU the times are those of its stream: a message that is waited for there holds up the stream, not the host.

    Args:
        device: where the work runs.
        aligned: whether times are seconds of the host's clock, to be compared between ranks. On a GPU that waits for
            the device once, now; without it times count from now.
    """

    def __init__(self, device: torch.device, *, aligned: bool = False) -> None:
        now: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self._now = now
        wait = aligned and device.type == "cuda"
        if wait:
            torch.cuda.synchronize(device)
        origin: Any = now()
        if wait:
            origin.synchronize()
        self._origin = origin
        self._offset = time.time() if aligned else 0.0
        self._marks: list[tuple[int, str, int, int, bool, Any, Any, Any]] = []
        self._open: tuple[str, int, int, bool] = ("", 0, 0, False)
        self._began: Any = None
        self._arrived: Any = None
        self._last = origin
        self._step = -1

    def restart(self) -> None:
        """The time before now does not count."""
        self._origin = self._last = self._now()

    def next_step(self) -> None:
        """A step begins."""
        self._step += 1

    def begin(self, kind: str, batch: int, microbatch: int = 0, ahead: bool = False) -> None:
        """The rank turns to an action."""
        self._open = kind, batch, microbatch, ahead
        self._began, self._arrived = self._now(), None

    def arrived(self) -> None:
        """The action's message is there."""
        self._arrived = self._now()

    def end(self) -> None:
        """The action is done."""
        start = self._began if self._arrived is None else self._arrived
        self._last = self._now()
        self._marks.append((self._step, *self._open, self._began, start, self._last))

    def stop(self) -> None:
        """The last step has ended."""
        self._last = self._now()

    def rows(self) -> list[Row]:
        """What was noted, for `Journal.of`; waits until the device has come to the last of it."""
        self._wait()
        return [(*mark[:5], *(self._offset + self._since(at) for at in mark[5:])) for mark in self._marks]  # type: ignore[misc]

    def sums(self) -> tuple[float, float, float]:
        """Seconds from the start to the stop, of work, and of waits for messages; waits as `rows` does."""
        self._wait()
        times = [tuple(map(self._since, mark[5:])) for mark in self._marks if mark[1] != LOAD]
        work, waits = sum(end - start for _, start, end in times), sum(start - begin for begin, start, _ in times)
        return self._since(self._last), work, waits

    def _wait(self) -> None:
        if not isinstance(self._last, float):
            self._last.synchronize()

    def _since(self, mark: Any) -> float:
        if isinstance(mark, float):
            return float(mark - self._origin)
        return float(self._origin.elapsed_time(mark)) / 1e3


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
