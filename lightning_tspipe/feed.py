"""The loading rank and its followers: one iterates the loader a batch ahead, the others learn of it from headers."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from lightning_tspipe._lightning import SignalLink
from lightning_tspipe._loaders import Fetcher, rows_drawn, set_rows_drawn
from lightning_tspipe.comm import Comm
from lightning_tspipe.data import Batch, BatchInfo, End
from lightning_tspipe.randomness import Generators


class Feed(Fetcher):
    """Gives Lightning its batches and the runtime the batch of the step and the one after it.

    A loader without length is looked ahead two batches, so that the others know early which batch is the last.

    Args:
        inner: Lightning's own fetcher.
        signals: where a SIGTERM is noted.
        on_begin: called when a new pass begins, before anything of it is fetched.
    """

    def __init__(self, inner: Any, signals: SignalLink, on_begin: Callable[[], None]) -> None:
        super().__init__(inner)
        self._signals, self._on_begin = signals, on_begin
        self._queue: deque[Batch | End] = deque()
        self.current: Batch | None = None
        self.stand_in: Any = None

    @property
    def depth(self) -> int:
        """How many batches are announced beyond the current one."""
        return 1 if self.length is not None else 2

    def begin(self) -> None:
        """Forget what was looked ahead in the pass before."""
        self.settle()
        self._on_begin()
        self._queue.clear()
        self.current = None

    def settle(self) -> None:
        """Read every header that was sent."""

    def advance(self) -> tuple[Any, bool]:
        """Lightning's next batch: the real one on the loading rank, a stand-in without memory elsewhere."""
        self._fill(1)
        head = self._queue[0]
        if isinstance(head, End):
            self.current = None
            if head.terminate:
                self._signals.stop()
            raise StopIteration
        self._queue.popleft()
        self.current = head
        if self.length is None:
            self._fill(1)
        self.stand_in = self._raw(head)
        return self.stand_in, bool(self._queue) and isinstance(self._queue[0], End)

    def upcoming(self) -> Batch | None:
        """The batch after the current one, None at the end of the pass; an end by SIGTERM is acted on here."""
        self._fill(1)
        head = self._queue[0]
        if isinstance(head, End):
            if head.terminate:
                self._signals.act()
            return None
        return head

    def _fill(self, count: int) -> None:
        raise NotImplementedError

    def _raw(self, batch: Batch) -> Any:
        raise NotImplementedError


class LeadingFeed(Feed):
    """The loading rank's feed.

    Args:
        inner, signals, on_begin: see `Feed`.
        make: turns what the loader gave into (the prepared batch, its `Batch`).
        announce: sends a header to the other ranks.
        is_last_step: whether training ends with the current batch, so that no next one is fetched.
        generators: of this process.
        restore: states to put them back to, one before each of the first fetches.
    """

    def __init__(
        self,
        inner: Any,
        signals: SignalLink,
        on_begin: Callable[[], None],
        make: Callable[[Any], tuple[Any, Batch]],
        announce: Callable[[BatchInfo | End], None],
        is_last_step: Callable[[], bool],
        generators: Generators,
        restore: Iterable[Any] = (),
    ) -> None:
        super().__init__(inner, signals, on_begin)
        self._make, self._announce, self._is_last_step = make, announce, is_last_step
        self._generators, self._restore = generators, deque(restore)
        self._untouched: Any = generators.state()  # while nothing has been fetched
        self._raws: dict[int, Any] = {}
        self._random: dict[int, Any] = {}  # before a batch was fetched
        self._states: dict[int, list[Any]] = {}  # of the loaders, when a batch had been fetched

    def begin(self) -> None:
        """Forget what was looked ahead in the pass before."""
        super().begin()
        self._raws.clear()
        self._random.clear()
        self._states.clear()

    def __iter__(self) -> LeadingFeed:
        """Begin a pass; one after which nothing was fetched, as in a resume at the end of an epoch, counts for none."""
        if self._untouched is not None:
            self._generators.restore(self._untouched)
        super().__iter__()
        return self

    def advance(self) -> tuple[Any, bool]:
        """Fetch and announce before the step begins, so that the others hear of it while this rank works."""
        self._fill(self.depth + 1)
        done = self.current
        result = super().advance()
        if done is not None:
            self._states.pop(done.info.index, None)
        assert self.current is not None
        self._random.pop(self.current.info.index, None)
        return result

    def loader_states(self) -> list[Any]:
        """The state of each loader that has one, as of the current batch: what was looked ahead is fetched again."""
        finished = self.length is None and bool(self._queue) and isinstance(self._queue[0], End)
        if self.current is None or finished:  # a loader without length has been asked for one more
            return self.states_now()
        return self._states[self.current.info.index]

    def ahead(self) -> list[Any] | None:
        """The random state before each batch that was looked ahead was fetched; None between two passes."""
        if self.current is None or self.done:
            return None
        return [self._random[batch.info.index] for batch in self._queue if isinstance(batch, Batch)]

    def _fill(self, count: int) -> None:
        while len(self._queue) < count and not (self._queue and isinstance(self._queue[-1], End)):
            self._queue.append(self._fetch())

    def _fetch(self) -> Batch | End:
        entry: Batch | End = End()
        self._untouched = None
        if self._restore:
            self._generators.restore(self._restore.popleft())
        if self._signals.due:
            entry = End(terminate=True)
        elif self._is_within() and not (self._queue and self._is_last_step()):
            try:
                random = self._generators.state()
                raw, entry = self._make(next(self._inner)[0])
                index = entry.info.index
                self._raws[index], self._random[index] = raw, random
                self._states[index] = copy.deepcopy(self.states_now())  # the loader may go on changing it
                if self._signals.take_requeue():
                    entry.info = replace(entry.info, requeue=True)
            except StopIteration:
                entry = End()
        self._announce(entry if isinstance(entry, End) else entry.info)
        return entry

    def _is_within(self) -> bool:
        """Whether the pass has one more batch; one that was resumed in its middle has fewer than the loader."""
        return self.length is None or self.fetched + len(self._queue) < self.length

    def _raw(self, batch: Batch) -> Any:
        return self._raws.pop(batch.info.index)


class FollowingFeed(Feed):
    """The feed of every other rank.

    Args:
        inner, signals, on_begin: see `Feed`.
        comm: where the headers come from.
    """

    def __init__(self, inner: Any, signals: SignalLink, on_begin: Callable[[], None], comm: Comm) -> None:
        super().__init__(inner, signals, on_begin)
        self._line = comm.lines_in["header"]

    def settle(self) -> None:
        """Read what the loading rank has sent beyond what was needed here."""
        if self.current is not None:
            while len(self._queue) < self.depth and not (self._queue and isinstance(self._queue[-1], End)):
                self._queue.append(self._pull())

    def _fill(self, count: int) -> None:
        while len(self._queue) < count:
            self._queue.append(self._pull())

    def _pull(self) -> Batch | End:
        header: BatchInfo | End = self._line.take()
        return header if isinstance(header, End) else Batch(header)

    def _raw(self, batch: Batch) -> Any:
        return batch.info.stand_in()


class SilentLoader:
    """Stands for the training loader on a rank that does not load: it has the length and attributes, but no batch."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class SharedLoader(SilentLoader):
    """An evaluation loader: rank 0 iterates it, and every rank gets the same batches.

    Args:
        loader: the user's.
        comm: this rank's connections.
        before_batch: called on every rank before each batch.
    """

    def __init__(self, loader: Any, comm: Comm, before_batch: Callable[[], None] = lambda: None) -> None:
        super().__init__(loader)
        self._comm, self._before_batch = comm, before_batch

    def __iter__(self) -> Iterator[Any]:
        source = iter(self._loader) if self._comm.stage == 0 else None
        sampler = getattr(self._loader, "batch_sampler", None)
        rows: list[Any] = []
        while True:
            self._before_batch()
            # a batch travels as a list of one, the end as an empty list; with it go the numbers of its rows
            found = [] if source is None else list(itertools.islice(source, 1))
            batch, numbers = self._comm.share((found, rows_drawn(sampler)[len(rows) : len(rows) + 1]), 0)
            if not batch:
                return
            rows += numbers
            if source is None:
                set_rows_drawn(sampler, rows)
            yield batch[0]
