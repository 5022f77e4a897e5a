"""A stopwatch on host and device: what it notes, and that nothing waits before the times are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_tspipe import stopwatch
from lightning_tspipe.stopwatch import Stopwatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    """Time goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[str] = []

    def perf_counter(self) -> float:
        return float(self.now)

    def time(self) -> float:
        return 1000.0 + self.now

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: self.waits.append("event")
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def synchronize(self, device: Any) -> None:
        self.waits.append("device")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "synchronize", clock.synchronize)
    return clock


def run(watch: Stopwatch, clock: Clock) -> None:
    """One step: T0 without a message, F0 with one, the next batch, and a rest."""
    watch.next_step()
    clock.now = 1
    watch.begin("T", 7, 0, True)
    clock.now = 3
    watch.end()
    watch.begin("F", 6, 2)
    clock.now = 4
    watch.arrived()
    clock.now = 9
    watch.end()
    watch.begin("load", 7, ahead=True)
    clock.now = 11
    watch.end()
    clock.now = 12
    watch.stop()


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_it_notes_waits_and_work(clock: Clock, device: torch.device) -> None:
    watch = Stopwatch(device)
    run(watch, clock)
    assert clock.waits == [], "nothing waits while the step runs"
    assert watch.rows() == [
        (0, "T", 7, 0, True, 1.0, 1.0, 3.0),
        (0, "F", 6, 2, False, 3.0, 4.0, 9.0),
        (0, "load", 7, 0, True, 9.0, 9.0, 11.0),
    ]
    assert watch.sums() == (12.0, 7.0, 1.0)  # from the start, of work, of the wait for F2's message
    assert clock.waits == (["event"] * 2 if device is CUDA else [])


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_ranks_can_compare_times_that_are_aligned(clock: Clock, device: torch.device) -> None:
    """A GPU is waited for once, before the first step."""
    clock.now = 50
    watch = Stopwatch(device, aligned=True)
    assert clock.waits == (["device", "event"] if device is CUDA else [])
    clock.now = 53
    watch.begin("F", 0)
    watch.end()
    assert watch.rows()[0][5:] == (1053.0, 1053.0, 1053.0)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_restart_forgets_the_time_before(clock: Clock, device: torch.device) -> None:
    watch = Stopwatch(device)
    clock.now = 100
    watch.restart()
    clock.now = 102
    watch.stop()
    assert watch.sums() == (2.0, 0.0, 0.0)
