"""What `loss` said arrives as it was."""

from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric

from lightning_tspipe.logrelay import REDUCTIONS, LossReport, Recorder, mean_of


def report(value: float) -> LossReport:
    """A loss, a logged tensor with options, a metric with and one without a value."""
    first, second = MeanMetric(), MeanMetric()
    recorder = Recorder({id(first): "a", id(second): "b"}, lambda metric: torch.ones(2) if metric is first else None)
    recorder.add("output", "loss", torch.tensor(value))
    recorder.log("x", torch.tensor(value, dtype=torch.float64), True, on_epoch=True)
    recorder.log("m", first)
    recorder.log("n", second)
    return LossReport(recorder.entries, recorder.values)


def test_round_trip() -> None:
    """Values keep their types and shapes, options their names, and a metric without a value stays without."""
    sent = report(0.1)
    back = LossReport.of_vector(sent.entries, sent.vector(torch.device("cpu")))
    (loss, x, m, n) = back.items()
    assert loss[1] == torch.tensor(0.1)
    assert x[0].options == (("on_epoch", True), ("prog_bar", True))
    assert x[1] is not None
    assert x[1].dtype == torch.float64
    assert torch.equal(m[1], torch.ones(2))  # type: ignore[arg-type]
    assert (m[0].metric, n[0].metric, n[1]) == ("a", "b", None)


def test_microbatches_are_averaged() -> None:
    """And must have said the same things."""
    assert float(mean_of([report(1.0), report(3.0)]).values[0]) == 2.0
    other = report(1.0)
    other.entries.pop()
    with pytest.raises(ValueError, match="logged different things"):
        mean_of([report(1.0), other])


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_microbatches_are_joined_as_reduce_fx_says(reduction: Any, dtype: torch.dtype) -> None:
    """And the other ranks get, bit by bit and in the same type, what the last one has."""
    reports = []
    for value in (1, 2, 5):
        recorder = Recorder({}, None)
        recorder.log("x", torch.tensor(value, dtype=dtype), reduce_fx=reduction)
        reports.append(LossReport(recorder.entries, recorder.values))
    joined = mean_of(reports)
    expected = {"mean": 8 / 3, "sum": 8.0, "min": 1.0, "max": 5.0}[REDUCTIONS[reduction]]
    assert float(joined.values[0]) == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    (there,) = LossReport.of_vector(joined.entries, joined.vector(torch.device("cpu"))).values
    assert there.dtype == joined.values[0].dtype
    assert torch.equal(there, joined.values[0])


@pytest.mark.parametrize(
    ("value", "options", "cause"),
    [
        ({"a": 1.0}, {}, "got a dict. Log a number"),
        (MeanMetric(), {}, "got a MeanMetric. Log .* an attribute of the module"),
        (1.0, {"reduce_fx": lambda values: values[-1]}, "has reduce_fx=<function.* Give 'mean', 'sum', 'min' or 'max'"),
        (1.0, {"reduce_fx": "median"}, "has reduce_fx='median'"),
    ],
)
def test_what_lightning_does_not_take_is_refused(value: Any, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Recorder({}, None).log("x", value, **options)
