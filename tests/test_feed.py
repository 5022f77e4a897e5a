"""What is asked of the loader and when, and what the other ranks hear of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_tspipe.data import Batch, BatchInfo, End, make_batch
from lightning_tspipe.feed import LeadingFeed, SilentLoader


class Signals:
    """Stands for `SignalLink`."""

    def __init__(self) -> None:
        self.received = self.acted = False

    def act(self) -> None:
        self.acted = True

    def stop(self) -> None:
        self.act()
        raise SIGTERMException


class Loader:
    """Stands for Lightning's fetcher: numbers its batches, and notes how many were asked for."""

    def __init__(self, batches: int, sized: bool, fails_at: int = 0) -> None:
        self.batches, self.length, self.asked, self.fails_at = batches, batches if sized else None, 0, fails_at

    def __iter__(self) -> Iterator[Any]:
        self.asked = 0
        return self

    def __next__(self) -> Any:
        if self.asked >= self.batches:
            raise StopIteration
        self.asked += 1
        if self.asked == self.fails_at:
            raise OSError("a broken file")
        return torch.full((2, 1), float(self.asked)), self.asked - 1, 0


class Case:
    """A leading feed over a `Loader`, and the headers that it sent."""

    def __init__(self, batches: int, sized: bool = True, last_step: int = 0, fails_at: int = 0) -> None:
        self.headers: list[BatchInfo | End] = []
        self.loader, self.signals, self.loaded, self.last_step = (
            Loader(batches, sized, fails_at),
            Signals(),
            0,
            last_step,
        )
        self.feed = LeadingFeed(self.loader, self.signals, self.make, self.headers.append, self.is_last)  # type: ignore[arg-type]
        iter(self.feed)

    def make(self, raw: Any) -> tuple[Any, Batch]:
        self.loaded += 1
        return raw, make_batch(self.loaded, raw, raw, raw, None, 2, fixed=True)

    def is_last(self) -> bool:
        return bool(self.last_step) and self.feed.fetched + 1 >= self.last_step

    def step(self) -> tuple[float, int, bool]:
        """One training step: the batch, batches asked for when it begins, whether the feed says it is the last one."""
        batch = next(self.feed)[0]
        asked = self.loader.asked
        upcoming = self.feed.upcoming()
        assert self.loader.asked == asked, "the loader was asked in the middle of a step"
        assert self.feed.current is not None
        assert upcoming is None or upcoming.info.index == self.feed.current.info.index + 1
        return float(batch[0]), asked, self.feed.done


@pytest.mark.parametrize(
    ("sized", "steps"),
    [
        (True, [(1.0, 2, False), (2.0, 3, False), (3.0, 3, True)]),
        (False, [(1.0, 3, False), (2.0, 3, False), (3.0, 3, True)]),  # read two ahead, to know the last one early
    ],
)
def test_batches_come_in_order_and_one_is_loaded_ahead(sized: bool, steps: list[Any]) -> None:
    case = Case(3, sized)
    for _ in range(2):  # epochs
        assert [case.step() for _ in range(3)] == steps
        with pytest.raises(StopIteration):
            next(case.feed)
        assert case.feed.done
        iter(case.feed)
    kinds = [header.index if isinstance(header, BatchInfo) else "end" for header in case.headers]
    assert kinds == [1, 2, 3, "end", 4, 5, 6, "end"]


def test_nothing_is_fetched_beyond_the_last_step() -> None:
    case = Case(10, last_step=2)
    assert [case.step()[:2] for _ in range(2)] == [(1.0, 2), (2.0, 2)]
    assert case.feed.upcoming() is None
    assert isinstance(case.headers[-1], End)


def test_an_error_of_the_loader_comes_through() -> None:
    case = Case(5, fails_at=3)
    case.step()
    with pytest.raises(OSError, match="a broken file"):
        case.step()


def test_a_sigterm_ends_the_pass_for_all_at_a_step_boundary() -> None:
    case = Case(5)
    case.step()
    case.signals.received = True
    assert case.step()[0] == 2.0  # was announced before
    assert case.headers[-1] == End(terminate=True)
    assert case.signals.acted
    with pytest.raises(SIGTERMException):
        next(case.feed)


def test_an_empty_loader() -> None:
    case = Case(0)
    with pytest.raises(StopIteration):
        next(case.feed)
    assert case.headers == [End()]


def test_a_silent_loader_has_the_length_and_no_batches() -> None:
    loader = SilentLoader(torch.utils.data.DataLoader(torch.arange(6), batch_size=2))
    assert len(loader) == 3
    assert loader.batch_size == 2
    assert list(loader) == []
