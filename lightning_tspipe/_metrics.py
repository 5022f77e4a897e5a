"""The private names of torchmetrics; `tests/test_lightning.py` holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection


def metrics_of(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    """Every torchmetrics object of the user's module, by attribute name."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, Metric))


def stop_syncing(metric: Metric) -> Callable[[], None]:
    """No collective in `compute` and `forward`; `_to_sync` would follow them only after a `forward` on this rank.

    Returns:
        What undoes it.
    """
    before = {name: getattr(metric, name) for name in ("sync_on_compute", "dist_sync_on_step", "_to_sync")}
    metric.sync_on_compute = metric.dist_sync_on_step = metric._to_sync = False
    return partial(vars(metric).update, before)


def sync_within(metric: Metric, group: Any) -> Callable[[], None]:
    """Collectives of a metric among the ranks of a group only; returns what undoes it."""
    before = metric.process_group
    metric.process_group = group
    return partial(setattr, metric, "process_group", before)


def cached_value(metric: Metric) -> Tensor | None:
    """The value that the last `forward` of a metric gave for its batch."""
    value = metric._forward_cache
    return value if isinstance(value, Tensor) else None


def set_cached_value(metric: Metric, value: Tensor | None) -> None:
    """Let a metric that was updated on another rank show that rank's value of the batch."""
    metric._forward_cache = value  # type: ignore[assignment]
    metric._update_count = max(metric._update_count, 1)
    metric._computed = None


def states_of(module: nn.Module) -> dict[str, tuple[dict[str, Any], int]]:
    """State and number of updates of every torchmetrics object that has been updated, by attribute name."""
    for child in module.modules():
        if isinstance(child, MetricCollection):
            child.values(copy_state=False)  # those that share a state refer to it again
    return {name: (metric.metric_state, metric._update_count) for name, metric in metrics_of(module)
            if metric._update_count}  # fmt: skip


def adopt_state(metric: Metric, state: dict[str, Any], updates: int) -> None:
    """Let a metric hold the state that another rank's has after so many updates."""
    for name, value in state.items():
        setattr(metric, name, value)
    metric._update_count, metric._computed = updates, None
