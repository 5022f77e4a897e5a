"""The same code path on GPUs: equality with the sequential twin, and no wait for the device in a steady step.

The cases with the device "cpu" run everywhere: they show that these tests can pass, and that equality can fail, without
a GPU too. Waits for the device, and memory that grows, are seen on a GPU only.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import PipelineMonitor, PipelineTrace, TeacherStudentModule, TSPipeStrategy, edge
from lightning_tspipe.comm import Comm
from lightning_tspipe.stage import Stage
from tests.multiproc import Fit, result_of, run_fits
from tests.scripts.zygote import Zygote

pytestmark = pytest.mark.timeout(120)
GPUS = torch.cuda.device_count()


def on(device: str, gpus: int = 1) -> Any:
    """A parameter for a device, skipped where there are too few GPUs."""
    reason = f"needs {gpus} CUDA device(s), there are {GPUS}"
    marks = [pytest.mark.cuda, pytest.mark.skipif(gpus > GPUS, reason=reason)]
    return pytest.param(device, marks=marks if device == "cuda" else [])


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    server = Zygote(visible_gpus=None)
    yield server
    server.close()


class Pair(TeacherStudentModule):
    """A momentum pair in float64 that logs numbers of the host and of the device."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"momentum": 0.9, "teacher_delay": 1} | options))
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)).double()
        self.teacher = copy.deepcopy(self.student)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        assert student_out.device.type == self.trainer.strategy.root_device.type
        loss = (student_out - teacher_out - target).square().mean()
        self.log("rows", float(len(student_out)))
        self.log("loss", loss)
        return {"loss": loss, "temperature": torch.tensor(0.5)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)


class Normed(Pair):
    """The same with batch norms and dropout."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        first, second = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)), (nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.student = nn.Sequential(*first, *second, nn.Linear(8, 2)).double()
        self.teacher = copy.deepcopy(self.student)


class Unsynchronised(L.Callback):
    """Makes every wait of the host for the device an error, from the third batch on, and growing memory, too."""

    def __init__(self) -> None:
        self.peaks: list[int] = []  # bytes that were taken on the device, by epoch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if GPUS:
            torch.cuda.set_sync_debug_mode("error" if batch_idx >= 2 else "default")

    def on_train_epoch_end(self, *_: Any) -> None:
        if GPUS:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            self.peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, *_: Any) -> None:
        assert all(later <= 1.1 * self.peaks[0] for later in self.peaks[1:]), self.peaks


def batches() -> DataLoader[Any]:
    data = torch.randn(48, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data, data[:, :2].sin()), 8, pin_memory=GPUS > 0)


def train(
    rank: int,
    out: Path,
    places: list[str],
    backend: str | None,
    unsynchronised: dict[str, Any] | None,
    watched: bool = False,
) -> None:
    """What every rank runs; no place means the twin. Rank 0 writes the whole module's state.

    `unsynchronised` gives the arguments of the module with which a wait for the device is an error.
    """
    strategy: Any = "auto"
    options: dict[str, Any] = {"accelerator": "gpu" if GPUS else "cpu", "devices": 1}
    if places:
        devices = [torch.device(place) for place in places]
        strategy = TSPipeStrategy(microbatches=2, parallel_devices=devices, process_group_backend=backend)
        options = {}
    callbacks: list[L.Callback] = [] if unsynchronised is None else [Unsynchronised()]
    if watched:  # the monitor looks at the second epoch: the trace has the first
        callbacks += [PipelineTrace(out / "trace", steps=6), PipelineMonitor(2)]
    trainer = L.Trainer(
        strategy=strategy, max_epochs=2, logger=CSVLogger(out) if watched else False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **options,
    )  # fmt: skip
    module = Pair() if unsynchronised is None else Normed(**unsynchronised)
    trainer.fit(module, batches())
    assert trainer.world_size == max(1, len(places))
    if rank == 0:
        torch.save({name: value.cpu() for name, value in module.state_dict().items()}, out / "state.pt")


def run(
    zygote: Zygote,
    folder: Path,
    places: list[str],
    backend: str | None = None,
    unsynchronised: dict[str, Any] | None = None,
    watched: bool = False,
) -> dict[str, Any]:
    folder.mkdir()
    ranks = max(1, len(places))
    arguments = {"places": places, "backend": backend, "unsynchronised": unsynchronised, "watched": watched}
    codes = zygote.run("tests.test_cuda:train", ranks, folder, deadline=90, **arguments)
    assert codes == [0] * ranks, "\n".join((folder / f"{rank}.txt").read_text() for rank in range(ranks))
    return dict(torch.load(folder / "state.pt"))


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_ranks_that_share_a_device_equal_the_twin(zygote: Zygote, tmp_path: Path, device: str, stages: int) -> None:
    """On a GPU, gloo stages every message through host memory."""
    place = "cuda:0" if device == "cuda" else device
    assert_equal(run(zygote, tmp_path / "pipe", [place] * stages, "gloo"), run(zygote, tmp_path / "twin", []))


@pytest.mark.parametrize("device", [on("cuda", 2)])
def test_nccl_equals_the_twin(zygote: Zygote, tmp_path: Path, device: str) -> None:
    assert_equal(run(zygote, tmp_path / "pipe", ["cuda:0", "cuda:1"], "nccl"), run(zygote, tmp_path / "twin", []))


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
def test_what_watches_the_pipeline_times_the_device(zygote: Zygote, tmp_path: Path, device: str) -> None:
    """On a GPU by events; every action takes some time there, and they do not overlap."""
    place = "cuda:0" if device == "cuda" else device
    run(zygote, tmp_path / "pipe", [place] * 2, "gloo", watched=True)
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    assert rows
    for row in rows:
        assert 0 < float(row["PipelineMonitor/utilization"]) <= 1
    trace = json.loads((tmp_path / "pipe" / "trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        mine = [e for e in trace if e["ph"] == "X" and (e["pid"], e["tid"]) == (0, rank) and e["cat"] != "bubble"]
        assert {e["name"][0] for e in mine} == set("TFB")
        assert all(event["dur"] > 0 for event in mine)
        for before, after in pairwise(mine):
            assert before["ts"] + before["dur"] <= after["ts"] + 1


WAITS = [{"momentum": None}, {"loss_over": "microbatch"}, {"teacher_delay": 0}]


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
@pytest.mark.parametrize("module", WAITS)
def test_one_stage_never_waits_for_the_device(
    zygote: Zygote, tmp_path: Path, device: str, module: dict[str, Any]
) -> None:
    place = "cuda:0" if device == "cuda" else device
    run(zygote, tmp_path / "pipe", [place], None, unsynchronised=module)


@pytest.mark.parametrize("device", [on("cuda", 2)])
@pytest.mark.parametrize("module", WAITS)
def test_nccl_never_waits_for_the_device(zygote: Zygote, tmp_path: Path, device: str, module: dict[str, Any]) -> None:
    run(zygote, tmp_path / "pipe", ["cuda:0", "cuda:1"], "nccl", unsynchronised=module)


def profiled(rank: int, out: Path) -> None:
    """Trains on two GPUs; of this rank's kernels the stream, whether it is NCCL's, and the microseconds."""
    module = Pair()
    module.student = nn.Sequential(module.student[:2], Slow(), module.student[2:], Slow())
    module.teacher = nn.Sequential(module.teacher[:2], Slow(), module.teacher[2:], Slow())
    devices = [torch.device("cuda", index) for index in (0, 1)]
    strategy = TSPipeStrategy(microbatches=4, parallel_devices=devices, balance="parameters")
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(strategy=strategy, max_steps=4, logger=False, enable_checkpointing=False, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        trainer.fit(module, batches())
        torch.cuda.synchronize()
    kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    (out / f"{rank}.json").write_text(json.dumps([
        (event.device_resource_id, "nccl" in event.name.lower(), event.time_range.start, event.time_range.end)
        for event in kernels
    ]))  # fmt: skip


@pytest.mark.parametrize("device", [on("cuda", 2)])
def test_messages_travel_beside_the_work(zygote: Zygote, tmp_path: Path, device: str) -> None:
    """NCCL has streams of its own, and its kernels run while others do."""
    codes = zygote.run("tests.test_cuda:profiled", 2, tmp_path, deadline=90)
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    for rank in range(2):
        kernels = json.loads((tmp_path / f"{rank}.json").read_text())
        messages, work = ([kernel for kernel in kernels if kernel[1] == is_nccl] for is_nccl in (True, False))
        assert not {stream for stream, *_ in messages} & {stream for stream, *_ in work}
        assert any(a < end and start < b for _, _, a, b in messages for _, _, start, end in work)


class Slow(nn.Module):
    """Keeps its stream busy, and notes when."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[Any, Any]] = []

    def forward(self, x: Any) -> Any:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        torch.cuda._sleep(20_000_000)
        pair[1].record()
        self.times.append(pair)
        return x


def overlapping(rank: int, out: Path) -> None:
    """Trains on one GPU; of each step, what share of the teacher's time was left when the student began."""
    module = Pair()
    slow = Slow(), Slow()
    module.student = nn.Sequential(module.student, slow[0])
    module.teacher = nn.Sequential(module.teacher, slow[1])
    strategy = TSPipeStrategy(microbatches=2, parallel_devices=[torch.device("cuda:0")])
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(strategy=strategy, max_steps=6, logger=False, enable_checkpointing=False, **options).fit(
        module, batches()
    )
    torch.cuda.synchronize()
    found = []
    for first in range(0, 12, 2):  # two microbatches per step
        begin, end = slow[1].times[first][0], slow[1].times[first + 1][1]
        found.append(slow[0].times[first][0].elapsed_time(end) / begin.elapsed_time(end))
    (out / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("device", [on("cuda")])
def test_one_stage_runs_both_networks_at_once(zygote: Zygote, tmp_path: Path, device: str) -> None:
    codes = zygote.run("tests.test_cuda:overlapping", 1, tmp_path, deadline=90)
    assert codes == [0], (tmp_path / "0.txt").read_text()
    shares = json.loads((tmp_path / "found.json").read_text())
    assert min(shares[2:]) > 0.5, "one after the other, nothing would be left"


class Streams:
    """A device's streams, as far as `Beside` needs them: what was given to which, in order."""

    def __init__(self, name: str = "first") -> None:
        self.name, self.log, self.current = name, list[str](), self

    def Stream(self, device: torch.device) -> Streams:
        self.second = Streams("second")
        self.second.log = self.log
        return self.second

    def current_stream(self, device: torch.device) -> Streams:
        return self.current

    def wait_stream(self, other: Streams) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(self, stream: Streams) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


def test_the_order_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one stage: the teacher beside the student, from the step's start to its loss, and nothing else."""
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    for name in ("teacher_forward", "student_forward", "backward"):
        method = getattr(Stage, name)

        def noted(*args: Any, name: str = name, method: Any = method) -> Any:
            streams.log.append(f"{streams.current.name} {name}")
            return method(*args)

        monkeypatch.setattr(Stage, name, noted)

    def train() -> list[str]:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, strategy=TSPipeStrategy(microbatches=2), max_steps=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Pair(), batches())
        return streams.log

    step = ["second waits for first", *["second teacher_forward"] * 2, *["first student_forward"] * 2]
    step += ["first waits for second", "first backward"] * 2
    assert result_of(train) == step * 2


@pytest.mark.parametrize("stages", [2, 3])
def test_every_edge_is_connected_before_the_first_step(monkeypatch: pytest.MonkeyPatch, stages: int) -> None:
    """With NCCL's manners: the first message of an edge is waited for where it is made, by both ends."""
    met: set[Any] = set()
    start = Comm.start

    def slow(comm: Comm, call: Any, tensor: Any, peer: int, place: int, tag: int) -> Any:
        work = start(comm, call, tensor, peer, place, tag)
        edge = call.__name__, peer, tag
        if call.__self__ is not comm.control and edge not in met:
            met.add(edge)
            work.wait()
            return Done()
        return work

    monkeypatch.setattr(Comm, "start", slow)
    monkeypatch.setattr(edge, "USED", False)  # messages in shared memory meet nobody
    modules = [lambda options=options: Pair(**options) for options in ({}, {"momentum": None}, {"teacher_delay": 0})]
    run_fits([Fit(module, batches, stages, m) for module in modules for m in (1, 4)], timeout=40)


class Done:
    """A message that has been waited for."""

    def wait(self) -> None:
        """At once."""
