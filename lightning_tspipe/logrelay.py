"""What `loss` returned and logged, carried from the last rank to all others as one vector and its description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.channel import Channel
from lightning_tspipe.comm import Comm

POSITIONAL = (  # the arguments of `LightningModule.log` after name and value
    "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "sync_dist_group",
    "add_dataloader_idx", "batch_size", "metric_attribute", "rank_zero_only",
)  # fmt: skip
REDUCTIONS: dict[Any, str] = {
    torch.mean: "mean", torch.sum: "sum", sum: "sum", torch.min: "min", min: "min", torch.max: "max", max: "max",
    "avg": "mean", "mean": "mean", "sum": "sum", "min": "min", "max": "max",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One value of the vector: an entry of the dict that `loss` returned, or one `self.log` call with its arguments."""

    kind: str  # "output", "log" (a number or tensor), "metric" (a torchmetrics object, by attribute name)
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    metric: str = ""
    shape: tuple[int, ...] | None = ()  # None: the metric has no value of this batch
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """How many numbers of the vector belong to it."""
        if self.shape is None:
            return 0
        return int(torch.Size(self.shape).numel())

    def reduce(self, values: Tensor) -> Tensor:
        """The value of a batch from those of its microbatches, of shape (microbatches, ...): as `reduce_fx` says."""
        given = dict(self.options).get("reduce_fx", "mean")
        match REDUCTIONS[given.lower() if isinstance(given, str) else given]:
            case "sum":
                return values.sum(0)
            case "min":
                return values.amin(0)
            case "max":
                return values.amax(0)
            case _:
                return values.mean(0)


@dataclass
class LossReport:
    """Everything that one call of `loss` had to say; entry 0 is the loss itself."""

    entries: list[Entry]
    values: list[Tensor]

    def vector(self, device: torch.device) -> Tensor:
        """All values as one float64 vector of shape (sum of sizes,)."""
        parts = [value.detach().reshape(-1).to(device, torch.float64, non_blocking=True) for value in self.values]
        return torch.cat(parts)

    @classmethod
    def of_vector(cls, entries: list[Entry], vector: Tensor) -> LossReport:
        """The inverse of `vector`."""
        sizes = [entry.size for entry in entries if entry.shape is not None]
        values = [
            part.reshape(entry.shape or ()).to(entry.dtype)
            for entry, part in zip((e for e in entries if e.shape is not None), torch.split(vector, sizes), strict=True)
        ]
        return cls(entries, values)

    def items(self) -> list[tuple[Entry, Tensor | None]]:
        """Each entry with its value."""
        values = iter(self.values)
        return [(entry, None if entry.shape is None else next(values)) for entry in self.entries]


class LossRelay:
    """Carries a report, and what signals asked for, from the last rank up to rank 0.

    Args:
        comm: this rank's connections.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def post(self) -> None:
        """Post the receive of this step's report."""
        self._comm.lines_in["relay"].post()

    def take(self) -> tuple[LossReport, int, bytes]:
        """Wait for what `pass_on` of the rank behind this one was given."""
        entries, asked, reached = self._comm.lines_in["relay"].take()
        size, channel = self._know(entries, self._comm.inward["L"])
        channel.post(size)
        (vector,) = channel.take(size)
        return LossReport.of_vector(entries, vector), asked, reached

    def pass_on(self, report: LossReport, asked: int, reached: bytes) -> None:
        """Send it to the rank before this one, with what signals ask, and which of its outputs the loss depends on."""
        self._comm.lines_out["relay"].send((report.entries, asked, reached))
        size, channel = self._know(report.entries, self._comm.outward["L"])
        channel.send(size, [report.vector(self._comm.device)])

    def _know(self, entries: list[Entry], channel: Channel) -> tuple[int, Channel]:
        size = sum(entry.size for entry in entries)
        channel.know(size, tree.flatten([torch.empty(0)])[1], (((size,), torch.float64),))
        return size, channel


class Recorder:
    """Stands in for `LightningModule.log` while `loss` runs on the last rank.

    Args:
        metrics: attribute name of each torchmetrics object of the module, by identity.
        cached: the value that a metric's last `forward` gave, or None.
    """

    def __init__(self, metrics: Mapping[int, str], cached: Any) -> None:
        self._metrics, self._cached = metrics, cached
        self.entries: list[Entry] = []
        self.values: list[Tensor] = []

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Record one call with the arguments of `LightningModule.log`; it is made on every rank after the step.

        Raises:
            ValueError: a value or a `reduce_fx` that Lightning does not take either.
        """
        kept = tuple(sorted({**dict(zip(POSITIONAL, args, strict=False)), **options}.items()))
        _check(name, dict(kept).get("reduce_fx", "mean"), value, id(value) in self._metrics)
        if id(value) in self._metrics:
            cache = self._cached(value)
            shape = None if cache is None else tuple(cache.shape)
            dtype = torch.float32 if cache is None else cache.dtype
            self.entries.append(Entry("metric", name, kept, self._metrics[id(value)], shape, dtype))
            if cache is not None:
                self.values.append(cache)
        else:
            self.add("log", name, value, kept)

    def add(self, kind: str, name: str, value: Any, options: tuple[tuple[str, Any], ...] = ()) -> None:
        """Record one number or tensor."""
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.get_default_dtype())
        self.entries.append(Entry(kind, name, options, "", tuple(tensor.shape), tensor.dtype))
        self.values.append(tensor)


def _check(name: str, reduction: Any, value: Any, is_metric: bool) -> None:
    if (reduction.lower() if isinstance(reduction, str) else reduction) not in REDUCTIONS:
        raise ValueError(
            f"`self.log({name!r}, ...)` in `loss` has reduce_fx={reduction!r}. Give 'mean', 'sum', 'min' or 'max', or "
            "log a torchmetrics object, which reduces as it likes."
        )
    if not is_metric and not isinstance(value, Tensor | Number):
        raise ValueError(
            f"`self.log({name!r}, ...)` in `loss` got a {type(value).__name__}. Log a number, a tensor, or a "
            "torchmetrics object that is an attribute of the module; a dict or a MetricCollection by `self.log_dict`."
        )


def mean_of(reports: Sequence[LossReport]) -> LossReport:
    """The report of a batch from those of its microbatches: means, and logged values as their `reduce_fx` says.

    Raises:
        ValueError: `loss` logged other things in one microbatch than in another.
    """
    if len(reports) == 1:
        return reports[0]
    names = [[(entry.kind, entry.name) for entry in report.entries] for report in reports]
    if any(other != names[0] for other in names):
        raise ValueError(
            "`loss` logged different things for the microbatches of one batch. With loss_over='microbatch' log the "
            "same names in every call."
        )
    columns = zip(*(report.values for report in reports), strict=True)
    joined, entries, values = LossReport(reports[0].entries, [torch.stack(column) for column in columns]), [], []
    for entry, column in joined.items():
        dtype = entry.dtype if entry.dtype.is_floating_point else torch.get_default_dtype()  # of a mean
        entries.append(replace(entry, dtype=dtype))
        if column is not None:
            values.append(entry.reduce(column.to(torch.float64)).to(dtype))
    return LossReport(entries, values)
