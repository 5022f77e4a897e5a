"""Traces and pictures of journals, and what `PipelineTrace` refuses; `tests/test_cli.py` has one of a run."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_tspipe import PipelineTrace
from lightning_tspipe.journal import Journal, planned
from lightning_tspipe.orders import make_schedule
from lightning_tspipe.perfetto import trace_of
from lightning_tspipe.picture import AHEAD, IDLE, LEFT, LINE, ROW, WIDTH, WORK, draw_png
from lightning_tspipe.schedule import Costs
from lightning_tspipe.tracing import write
from tests.multiproc import Fit, result_of, run_fits
from tests.scripts.small import Small, loader
from tests.test_runtime import SHORT

COSTS = Costs.uniform(2, message=0.5)


@pytest.fixture
def journal() -> Journal:
    """Two ranks without lookahead, so that both wait."""
    return planned(make_schedule(2, 3, COSTS, lookahead=False), COSTS, 6)


def test_slices_cover_a_rank_and_arrows_lead_to_waits(journal: Journal) -> None:
    trace = trace_of({"one": journal, "two": journal.shifted(1.0)})
    assert json.loads(json.dumps(trace)) == trace
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for process, rank in ((process, rank) for process in (0, 1) for rank in (0, 1)):
        row = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if (e["pid"], e["tid"]) == (process, rank))
        assert row[0][0] == process * 1e6
        for (_, end), (begin, _) in pairwise(row):
            assert begin == pytest.approx(end)
    waits = [e for e in slices if e["cat"] == "bubble" and e["pid"] == 0 and e["tid"] == 1 and e["args"]["step"] == 0]
    assert [(e["name"], e["ts"], e["dur"]) for e in waits[:1]] == [("waits for T0 of rank 0", 0.0, 1.5e6)]
    assert waits[0]["args"]["cause"] == "waits for T0 of rank 0: 1000.00 ms until it is done, 500.00 ms for the message"
    starts, ends = ({e["id"]: e for e in trace["traceEvents"] if e["ph"] == kind} for kind in "sf")
    assert len(starts) == len(ends) == sum(e["cat"] == "bubble" for e in slices)
    assert starts.keys() == ends.keys()
    for key, start in starts.items():
        end = ends[key]
        assert start["tid"] != end["tid"]
        (inside,) = (
            e for e in slices if (e["pid"], e["tid"]) == (start["pid"], start["tid"]) and e["cat"] != "bubble"
            and e["ts"] < start["ts"] < e["ts"] + e["dur"]
        )  # fmt: skip
        assert inside["name"] == start["name"]
        assert start["ts"] < end["ts"]


def colour(picture: Any, seconds: float, rank: int, window: tuple[float, float]) -> str:
    x = LEFT + (seconds - window[0]) * (WIDTH - LEFT - 10) / (window[1] - window[0])
    y = 3 * LINE + 4 + rank * 40 + ROW - 4
    return "#{:02x}{:02x}{:02x}".format(*picture.getpixel((round(x), y)))


def test_the_picture_has_work_and_bubbles_in_their_colours(journal: Journal, tmp_path: Path) -> None:
    window = journal.window(0, 2, 4)
    draw_png(tmp_path / "a.png", {"plan": journal}, {"plan": window})
    with Image.open(tmp_path / "a.png") as picture:
        seen = 0
        for rank, row in enumerate(journal.ranks):
            for entry in row:
                if window[0] <= entry.start and entry.end <= window[1]:
                    assert colour(picture, (entry.start + entry.end) / 2, rank, window) == WORK[entry.kind]
                    seen += 1
            for bubble in journal.bubbles(rank):
                if window[0] <= bubble.begin and bubble.end <= window[1]:
                    assert colour(picture, (bubble.begin + bubble.end) / 2, rank, window) == IDLE[bubble.kind]
                    seen += 1
    assert seen > 20


def test_a_plan_is_drawn_below_the_run_from_the_same_step_on(tmp_path: Path) -> None:
    """Here the run is the plan itself, later and slower."""
    costs = Costs.uniform(2)
    plan = planned(make_schedule(2, 3, costs), costs, 8)
    slow = planned(make_schedule(2, 3, costs), Costs.uniform(2, 2, 2, 2, 2), 8).shifted(100)
    write(tmp_path / "sub" / "seen", slow, plan)
    trace = json.loads((tmp_path / "sub" / "seen.json").read_text())
    starts = {
        process: min(e["ts"] for e in trace["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == (process, 0)
                     and e["args"]["step"] == 2)
        for process in (0, 1)
    }  # fmt: skip
    assert starts[0] == pytest.approx(starts[1])
    window = slow.window(0, 2, 4)
    with Image.open(tmp_path / "sub" / "seen.png") as picture:
        assert picture.width == WIDTH
        ahead = next(e for e in slow.ranks[0] if e.ahead and e.step == 2)
        assert colour(picture, (ahead.start + ahead.end) / 2, 0, window) == AHEAD
        below = next(e for e in plan.ranks[0] if e.ahead and e.step == 2)
        shift = window[0] - plan.window(0, 2, 4)[0]
        top = 2 * LINE + 2 * 40 + 3 * LINE  # of the panel above
        x = LEFT + ((below.start + below.end) / 2 + shift - window[0]) * (WIDTH - LEFT - 10) / (window[1] - window[0])
        y = 2 * LINE + top + LINE + 4 + ROW - 4
        assert "#{:02x}{:02x}{:02x}".format(*picture.getpixel((round(x), y))) == AHEAD  # type: ignore[misc]
    assert slow.typical(2) == 2


def test_without_pillow_the_error_says_what_to_install(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        draw_png(tmp_path / "a.png", {"plan": journal}, {"plan": (0, 1)})


def test_it_needs_a_pipeline_and_some_steps(tmp_path: Path) -> None:
    def message() -> str:
        trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[PipelineTrace(tmp_path)], logger=False)
        with pytest.raises(MisconfigurationException) as caught:
            trainer.fit(Small(), loader())
        return str(caught.value)

    assert "`PipelineTrace` watches a pipeline" in result_of(message)
    for options in ({"steps": 3}, {"first": -1}):
        with pytest.raises(ValueError, match="give at least 4 steps"):
            PipelineTrace(tmp_path, **options)


def test_a_part_of_a_run_is_recorded_and_the_numbers_stay(tmp_path: Path) -> None:
    """Of eight batches the third to the seventh, with the backward split; a run that is too short leaves no file."""

    def fit(stages: int, *callbacks: L.Callback) -> Fit:
        strategy = SHORT | {"schedule": "afab-split"}
        return Fit(Small, lambda: loader(32, 4), stages, 2, strategy=strategy, trainer={"callbacks": [*callbacks]})

    trace, short = PipelineTrace(tmp_path / "a", first=2, steps=5), PipelineTrace(tmp_path / "b", first=5)
    recorded, plain, _ = run_fits([fit(2, trace), fit(2), fit(1, short)], 40)
    for ours, other in zip(recorded, plain, strict=True):
        for name, tensor in ours["whole"].items():
            torch.testing.assert_close(tensor, other["whole"][name], rtol=0, atol=0)
    written = json.loads((tmp_path / "a.json").read_text())
    work = [e for e in written["traceEvents"] if e["ph"] == "X" and e["pid"] == 0 and e["cat"] != "bubble"]
    for rank in (0, 1):
        mine = [e for e in work if e["tid"] == rank]
        assert {e["args"]["batch"] - e["name"].endswith("'") for e in mine} == {2, 3, 4, 5, 6}
        for kind in "FIW":
            assert [e["args"]["microbatch"] for e in mine if e["name"][0] == kind] == [0, 1] * 5
    assert not (tmp_path / "b.json").exists()
