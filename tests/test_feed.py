"""What is asked of the loader and when, and what the other ranks hear of it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset

from lightning_tspipe.comm import Comm
from lightning_tspipe.data import Batch, BatchInfo, End, make_batch
from lightning_tspipe.feed import FollowingFeed, LeadingFeed, SharedLoader, SilentLoader
from tests.test_comm import ranks


class Signals:
    """Stands for `SignalLink`."""

    def __init__(self) -> None:
        self.received = self.requeue = self.acted = False

    @property
    def due(self) -> bool:
        return self.received

    def take_requeue(self) -> bool:
        asked, self.requeue = self.requeue, False
        return asked

    def act(self) -> None:
        self.acted = True

    def stop(self) -> None:
        self.act()
        raise SIGTERMException


class Loader:
    """Stands for Lightning's fetcher: numbers its batches, and notes how many were asked for."""

    def __init__(self, batches: int, sized: bool, fails_at: int = 0) -> None:
        self.batches, self.length, self.asked, self.fails_at = batches, batches if sized else None, 0, fails_at
        self.live_state = {"asked": 0, "ended": False}

    def __iter__(self) -> Iterator[Any]:
        self.asked = 0
        return self

    def __next__(self) -> Any:
        if self.asked >= self.batches:
            self.live_state["ended"] = True
            raise StopIteration
        self.asked += 1
        self.live_state["asked"] = self.asked
        if self.asked == self.fails_at:
            raise OSError("a broken file")
        return torch.full((2, 1), float(self.asked)), self.asked - 1, 0


class Case:
    """A leading feed over a `Loader`, and the headers that it sent; also a generator, which counts what it drew."""

    def __init__(
        self, batches: int, sized: bool = True, last_step: int = 0, fails_at: int = 0, to_restore: Any = ()
    ) -> None:
        self.drawn, self.noise = 0, list[int]()
        self.headers: list[BatchInfo | End] = []
        self.loader, self.signals, self.loaded, self.last_step = (
            Loader(batches, sized, fails_at),
            Signals(),
            0,
            last_step,
        )
        self.feed = LeadingFeed(  # type: ignore[arg-type]
            self.loader, self.signals, lambda: None, self.make, self.headers.append, self.is_last, self, to_restore
        )  # fmt: skip
        self.feed.states_now = lambda: [self.loader.live_state]
        iter(self.feed)

    def state(self) -> int:
        return self.drawn

    def restore(self, state: int) -> None:
        self.drawn = state

    def make(self, raw: Any) -> tuple[Any, Batch]:
        self.loaded += 1
        self.noise.append(self.drawn)
        self.drawn += 1
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


# --- what a checkpoint holds


@pytest.mark.parametrize("sized", [True, False])
def test_loader_states_are_those_of_the_current_batch(sized: bool) -> None:
    """Whatever was looked ahead; and what a loader changes later is not seen."""
    case = Case(4, sized)
    assert case.feed.loader_states() == [{"asked": 0, "ended": False}]
    for _ in range(2):
        for number in (1, 2, 3, 4):
            case.step()
            # a loader without length has been asked for one more batch than there are, as under plain Lightning
            assert case.feed.loader_states() == [{"asked": number, "ended": not sized and number == 4}]
            assert len(case.feed._states) <= 1 + case.feed.depth
        iter(case.feed)
        case.loader.live_state.update(asked=0, ended=False)


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
@pytest.mark.parametrize(("sized", "last_step"), [(True, 0), (False, 0), (True, 5)])
def test_a_resumed_pass_draws_the_same_numbers(sized: bool, last_step: int, stop: int) -> None:
    """While batches are fetched, and between steps; a resume fetches again what was looked ahead."""

    def steps(case: Case, count: int) -> list[float]:
        found = []
        for _ in range(count):
            found.append(case.step()[0])
            case.drawn += 100  # a hook
        return found

    total = last_step or 6
    whole = Case(6, sized, last_step)
    expected = steps(whole, total)
    first = Case(6, sized, last_step)
    steps(first, stop)
    (state,), ahead, now = first.feed.loader_states(), first.feed.ahead(), first.drawn
    assert ahead is not None
    assert len(ahead) == min(first.feed.depth, total - stop)
    second = Case(6, sized, last_step, to_restore=[*ahead, now])
    second.loader.asked = state["asked"]
    second.feed.fetched = stop  # Lightning's doing
    second.drawn = -1
    assert steps(second, total - stop) == expected[stop:]
    assert second.noise == whole.noise[stop:]
    assert stop == total or second.drawn == whole.drawn


def test_between_two_passes_nothing_was_looked_ahead() -> None:
    case = Case(2)
    assert case.feed.ahead() is None
    case.step()
    assert case.feed.ahead() == [1]
    case.step()
    assert case.feed.ahead() is None


# --- the other ranks


class Line(deque[BatchInfo | End]):
    """Stands for the line of headers, where a take waits for ever when nothing was sent."""

    def take(self) -> BatchInfo | End:
        assert self, "a header was asked for before it was sent"
        return self.popleft()


class Followed(Case):
    """A case, and the feed of another rank that takes each of its steps after it."""

    def __init__(self, batches: int, sized: bool = True, last_step: int = 0) -> None:
        super().__init__(batches, sized, last_step)
        self.unread, self.heard, self.unused = Line(), Signals(), Loader(batches, sized)
        comm: Any = SimpleNamespace(lines_in={"header": self.unread})
        self.follower = FollowingFeed(self.unused, self.heard, lambda: None, comm)  # type: ignore[arg-type]
        iter(self.follower)

    def both(self) -> Any:
        """The next batch; what the follower gives for it."""
        next(self.feed)
        self.unread += self.headers
        self.headers.clear()
        return next(self.follower)[0]

    def same(self) -> bool:
        """Whether the strategy and Lightning see the same of both feeds."""
        views = []
        for feed in (self.feed, self.follower):
            upcoming = feed.upcoming()
            assert feed.current is not None
            views.append((feed.current.info, upcoming and upcoming.info, feed.fetched, feed.done))
        return views[0] == views[1]


@pytest.mark.parametrize("sized", [True, False])
def test_a_follower_does_what_the_headers_say(sized: bool) -> None:
    """Batch for batch, over two passes, without a batch of its own."""
    case = Followed(3, sized)
    for _ in range(2):
        for _ in range(3):
            batch = case.both()
            assert case.same()
            assert (batch.device.type, batch.shape) == ("meta", (2, 1))
            assert case.follower.stand_in is batch
        for feed in (case.feed, case.follower):
            with pytest.raises(StopIteration):
                next(feed)
            assert (feed.current, feed.done) == (None, True)
            iter(feed)
        assert not case.unread
    assert not case.unused.asked
    assert not case.heard.acted


def test_a_sigterm_is_acted_on_by_a_follower() -> None:
    case = Followed(5)
    case.both()
    case.signals.received = True
    case.both()
    assert not case.heard.acted
    assert case.follower.upcoming() is None
    assert case.heard.acted
    with pytest.raises(SIGTERMException):
        next(case.follower)


@pytest.mark.parametrize("end", [FollowingFeed.settle, iter], ids=["settle", "iter"])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize(("sized", "last_step"), [(True, 0), (False, 0), (True, 2)])
def test_a_pass_that_is_broken_off_leaves_no_header(end: Any, steps: int, sized: bool, last_step: int) -> None:
    """Even if the follower has not looked at the next batch yet; then another pass works."""
    case = Followed(4, sized, last_step)
    for _ in range(steps):
        case.both()
    end(case.follower)
    assert not case.unread
    iter(case.feed)
    iter(case.follower)
    case.both()
    assert case.same()


# --- loaders


class Rows(Dataset[Any]):
    """Rows that tell the rank that loads them, and a record of what was asked for."""

    def __init__(self, rank: int) -> None:
        self.rank, self.asked = rank, list[int]()

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return {"row": torch.tensor(10.0 * self.rank + index, dtype=torch.float64), "name": f"row {index}"}


def test_every_rank_gets_the_batches_of_rank_0() -> None:
    """Over two passes; the others do not load."""

    def body(comm: Comm) -> Any:
        rows = Rows(comm.stage + 1)
        loader = SharedLoader(DataLoader(rows, 3), comm)
        passes = [[(batch["row"].dtype, batch["row"].tolist(), batch["name"]) for batch in loader] for _ in range(2)]
        return passes, len(loader), loader.batch_size, rows.asked, list(SharedLoader([], comm))

    first = (torch.float64, [10.0, 11.0, 12.0], ["row 0", "row 1", "row 2"])
    second = (torch.float64, [13.0, 14.0], ["row 3", "row 4"])
    expected = [[first, second]] * 2, 2, 3
    assert ranks(body, 3) == [(*expected, [*range(5)] * 2, []), (*expected, [], []), (*expected, [], [])]


def test_a_silent_loader_has_the_length_and_no_batches() -> None:
    loader = SilentLoader(DataLoader(Rows(0), batch_size=2))
    for each in (loader, copy.copy(loader)):
        assert len(each) == 3
        assert each.batch_size == 2
        assert list(each) == []
    assert loader.dataset.asked == []
    with pytest.raises(TypeError):
        len(SilentLoader(iter([])))
