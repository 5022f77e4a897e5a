"""What `loss` said arrives as it was."""

import pytest
import torch
from torchmetrics import MeanMetric

from lightning_tspipe.logrelay import LossReport, Recorder, mean_of


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
