"""The private names of Lightning's loaders and fetchers; `tests/test_lightning.py` holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loops import fit_loop
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper


class LoaderLink:
    """Puts a fetcher of ours in the place of Lightning's, whenever the fit loop makes one.

    The fetcher is the one place that sees whole batches, after all loaders are combined and limited.

    Args:
        trainer: the trainer.
        wrap: makes our fetcher from Lightning's.
    """

    def __init__(self, trainer: pl.Trainer, wrap: Callable[[Any], Fetcher]) -> None:
        self._loop = trainer.fit_loop
        self._loaders: list[Any] = []
        original, module = self._loop.setup_data, cast(Any, fit_loop)
        select = module._select_data_fetcher

        def ours(inner: Any) -> Fetcher:
            assert isinstance(inner, _PrefetchDataFetcher)
            inner.prefetch_batches = 0  # ours looks ahead, and knows the loader's state at each batch
            fetcher, loader = wrap(inner), cast(Any, self._loop._combined_loader)
            fetcher.states_now = partial(type(loader)._state_dicts, loader)
            loader._state_dicts = fetcher.loader_states
            self._loaders.append(loader)
            return fetcher

        def setup_data() -> None:
            module._select_data_fetcher = lambda *args: ours(select(*args))
            try:
                original()
            finally:
                module._select_data_fetcher = select

        self._loop.setup_data = setup_data  # type: ignore[method-assign]
        made = self._loop._data_fetcher  # by `estimated_stepping_batches` in `configure_optimizers`
        if made is not None:
            self._loop._data_fetcher = cast(Any, ours(made))

    def close(self) -> None:
        """Take the hook out again; what is saved after the fit still holds the loaders as of the last batch."""
        self._loop.__dict__.pop("setup_data", None)
        if self._loaders:
            states, loader = self._loaders[-1]._state_dicts(), copy.copy(self._loaders[-1])
            loader._state_dicts = lambda: states
            self._loop._combined_loader = loader
        for loader in self._loaders:
            loader.__dict__.pop("_state_dicts", None)


def rows_drawn(sampler: Any) -> list[Any]:
    """The numbers of the rows of every batch of this pass, which Lightning notes while predicting; else nothing."""
    return getattr(sampler, "seen_batch_indices", []) if isinstance(sampler, _IndexBatchSamplerWrapper) else []


def set_rows_drawn(sampler: Any, rows: list[Any]) -> None:
    """Let a sampler that does not draw show what rank 0's has drawn, for a `BasePredictionWriter`."""
    if isinstance(sampler, _IndexBatchSamplerWrapper):
        sampler.seen_batch_indices = rows


class Fetcher:
    """What Lightning's epoch loop asks of a data fetcher; subclasses say where the batches come from."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.fetched = 0
        self.done = False
        self.length: int | None = inner.length
        self.states_now: Callable[[], list[Any]] = list  # states of the loaders that have one
        self._start_profiler: Callable[[], None] = lambda: None
        self._stop_profiler: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """A new pass over the data begins."""
        raise NotImplementedError

    def advance(self) -> tuple[Any, bool]:
        """The next batch, and whether it is the last one; raises StopIteration at the end."""
        raise NotImplementedError

    def loader_states(self) -> list[Any]:
        """What a checkpoint holds of the loaders."""
        return self.states_now()

    def __iter__(self) -> Fetcher:
        iter(self._inner)
        self.fetched, self.done, self.length = 0, False, self._inner.length
        self.begin()
        return self

    def __next__(self) -> tuple[Any, int, int]:
        self._start_profiler()
        try:
            batch, last = self.advance()
        except StopIteration:
            self.done = True
            raise
        finally:
            self._stop_profiler()
        self.fetched += 1
        self.done = last if self.length is None else self.fetched >= self.length
        return batch, self.fetched - 1, 0

    def teardown(self) -> None:
        """Stop the workers of the loader."""
        self._inner.teardown()

    def setup(self, combined_loader: Any) -> None:
        """Take the loaders."""
        self._inner.setup(combined_loader)

    def reset(self) -> None:
        """Lightning's name for forgetting the position."""
        self._inner.reset()
