"""What each process holds at most, by the system's count: networks whose memory can be told from everything else's."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.checkpoint import Shards
from lightning_tspipe.measure import Meter
from lightning_tspipe.memory import trim
from lightning_tspipe.split import backward_inputs
from tests.benchmarks.fit import peak_bytes
from tests.benchmarks.processes import status
from tests.multiproc import result_of
from tests.scripts.small import network, trainer
from tests.scripts.zygote import Zygote

STAGES, LAYERS, WIDTH, NARROW = 4, 16, 512, 8  # a layer of the student has 1 MB
OWN = LAYERS * WIDTH * WIDTH * 4  # bytes of a stage's weights, of its gradients, or of one of Adam's two moments
SLACK = 1.1  # times a rank's share
FILE = "weights{}.pt"
EAGER, FROM_FILE = "built in `__init__`", "built in `configure_model` from a file"
FULL, SHARDED = "resumed from a file", "resumed from a folder"


class Large(TeacherStudentModule):
    """A student of many numbers and a teacher of few.

    Args:
        layers: of the student, per stage.
        file: of the weights, which are loaded into a module that is built in `configure_model`; None builds it here.
    """

    def __init__(self, layers: int, file: Path | None = None) -> None:
        super().__init__()
        self.layers, self.file = layers, file
        if file is None:
            self._build()

    def _build(self) -> None:
        self.student, self.teacher = (network(*[w] * (STAGES * n + 1)) for w, n in ((WIDTH, self.layers), (NARROW, 1)))

    def configure_model(self) -> None:
        if not hasattr(self, "student"):
            assert self.file is not None
            self._build()
            for name, state in torch.load(self.file, mmap=True).items():
                getattr(self, name).load_state_dict(state)

    def teacher_input(self, batch: Any) -> Any:
        return batch[0][:, :NARROW]

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        return student_out.square().mean() + teacher_out.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), lr=1e-4)


class Gauge(L.Callback):
    """Notes this process's bytes above those that it had before: after the set-up, its peak until then, and the peak
    of the training, of which ``live`` is that of parameters, gradients and the optimizer's state."""

    def __init__(self) -> None:
        gc.collect()
        trim()
        forget_peak()
        self._idle = status("VmRSS")
        self.seen: dict[str, int] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen |= {"set-up peak": status("VmHWM") - self._idle, "set-up": status("VmRSS") - self._idle}
        forget_peak()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen["peak"] = status("VmHWM") - self._idle
        parameters = [p for p in pl_module.parameters() if not p.is_meta]
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parameters + gradients + states}
        self.seen["live"] = sum(memory.values())


def forget_peak() -> None:
    """Let the peak be what is held now (https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html)."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back_at(size: int) -> None:
    """Let glibc give back at once what is freed in blocks of so many bytes, and keep what is smaller.

    It begins with 128 KB, and raises that up to 32 MB as such blocks are freed; with this call it stays. What is free
    by now is given back as well.
    """
    libc = ctypes.CDLL(None)
    assert libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)


class Saves(L.Callback):
    """Writes a checkpoint after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def fit(layers: int, file: Path | None, gauge: Gauge, kind: Any, path: Path, resume: bool = False) -> None:
    """A training of two steps, of one microbatch each, which is saved; or one step more.

    Args:
        layers, file: see `Large`.
        gauge: notes the memory.
        kind: of checkpoint.
        path: of the checkpoint.
        resume: whether to begin with it.
    """
    balance = {"student": [layers] * STAGES, "teacher": [1] * STAGES}
    strategy = TSPipeStrategy(microbatches=1, balance=balance, state_dict_type=kind)
    callbacks = [gauge] if resume else [gauge, Saves(path)]
    run = trainer(STAGES, strategy, callbacks=callbacks, max_steps=3 if resume else 2)
    rows = DataLoader(TensorDataset(torch.randn(12, WIDTH)), 4)
    run.fit(Large(layers, file), rows, ckpt_path=path if resume else None)


def holds(rank: int, out: Path, folder: str) -> None:
    """One rank of both ways to build, after small networks in the same ways: what is loaded once is loaded."""
    give_back_at(2**16)  # else glibc keeps blocks that nobody uses, more or fewer of them
    seen = {}
    for layers in (1, LAYERS):
        file = Path(folder, FILE.format(layers))
        for way, kind, resume in (
            (EAGER, "full", False), (FROM_FILE, "sharded", False), (FULL, "full", True), (SHARDED, "sharded", True),
        ):  # fmt: skip
            gauge = Gauge()
            fit(layers, None if way == EAGER else file, gauge, kind, Path(folder, f"{kind}{layers}.ckpt"), resume)
            seen[way] = gauge.seen
    (out / f"{rank}.json").write_text(json.dumps(seen))


def write(folder: Path) -> None:
    """The files that the trainings load."""
    for layers in (1, LAYERS):
        module = Large(layers)
        torch.save({n: getattr(module, n).state_dict() for n in ("student", "teacher")}, folder / FILE.format(layers))


@pytest.fixture(scope="module")
def held(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What every one of four ranks noted."""
    folder = tmp_path_factory.mktemp("peak")
    result_of(lambda: write(folder))
    codes = zygote.run("tests.test_memory_peak:holds", STAGES, folder, deadline=80, folder=str(folder))
    assert codes == [0] * STAGES, "\n".join((folder / f"{rank}.txt").read_text() for rank in range(STAGES))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(STAGES)]


@pytest.mark.parametrize("way", [EAGER, FROM_FILE, SHARDED])
def test_a_rank_holds_a_quarter_of_weights_gradients_and_optimizer_state(held: list[Any], way: str) -> None:
    """And nothing else that could be told from it: the peak of the whole process stays below 1.1 times its share."""
    for rank in held:
        assert 4 * OWN <= rank[way]["live"] <= rank[way]["peak"] <= SLACK * 4 * OWN, rank


def test_a_file_that_is_resumed_from_is_let_go(held: list[Any]) -> None:
    """There are three quarters and the pages of the file that they came from, but not these and the training's four."""
    for rank in held:
        assert 4 * OWN <= rank[FULL]["live"] <= rank[FULL]["peak"] <= SLACK * 6 * OWN, rank


def test_what_was_built_of_other_stages_is_released_in_the_set_up(held: list[Any]) -> None:
    """After a peak of the whole student, which every process has built."""
    for rank in held:
        assert rank[EAGER]["set-up peak"] >= STAGES * OWN, rank
        assert rank[EAGER]["set-up"] <= 1.2 * OWN, rank


@pytest.mark.parametrize("way", [FROM_FILE, FULL, SHARDED])
def test_no_rank_ever_reads_the_whole_file(held: list[Any], way: str) -> None:
    """Its peak is its quarter twice: the pages of the file, and what it makes of them; less than one whole by far."""
    for rank in held:
        assert OWN <= rank[way]["set-up peak"] <= 2.5 * OWN, rank


def test_a_split_backward_keeps_the_bytes_that_are_counted() -> None:
    """All of a microbatch until its first part, and then what the weights need, which is more here."""
    rows, layers = 1024, 4  # a layer's output has 2 MB

    def in_use() -> int:
        trim()  # what is freed does not count, also where a process has much of it from earlier tests
        return status("VmRSS")

    def run() -> tuple[list[int], list[int]]:
        give_back_at(2**16)
        parts = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        meter, views, costs = Meter(torch.device("cpu")), [torch.randn(rows, WIDTH)], []
        for part in parts:
            views, cost = meter.student(part, [*part.parameters(), *part.buffers()], views, first=False)
            costs.append(cost)
        del views
        stage, gradient = nn.Sequential(*parts), torch.randn(rows, WIDTH)
        before = in_use()
        input = torch.randn(rows, WIDTH, requires_grad=True)
        output = stage(input)
        held = in_use() - before
        rest = backward_inputs([output], [gradient], [input])
        del output, input.grad  # both are for other ranks
        pending = in_use() - before
        rest()
        return [held, pending], [sum(cost.held for cost in costs), sum(cost.pending for cost in costs)]

    for really, counted in zip(*result_of(run), strict=True):
        assert 0.9 * counted <= really <= 1.1 * counted, (really, counted)


def test_what_is_released_goes_back_to_the_system() -> None:
    """Also where glibc keeps it: below something that is still in use, as is soon the case in every long run."""

    def rest() -> int:
        give_back_at(2**25)
        for layers in (1, LAYERS):
            before = status("VmRSS")
            module = network(*[WIDTH] * (STAGES * layers + 1))
            owners = {name: int(name.split(".")[0]) // layers for name, _ in module.named_parameters()}
            built = status("VmRSS") - before
            Shards(module, owners, STAGES - 1, None).take_own(0, {})
        assert built >= 0.9 * STAGES * OWN
        return status("VmRSS") - before

    assert result_of(rest) <= 1.2 * OWN


def test_the_benchmarks_count_no_pages_of_files(tmp_path: Path) -> None:
    """Those of a library stay mapped; what is allocated and given back is in the peak."""
    size = 64 * 2**20
    (file := tmp_path / "library").write_bytes(bytes(size))

    def peaks() -> tuple[int, int, int]:
        before = peak_bytes()
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as library:
            assert not sum(library[:: mmap.PAGESIZE])
            mapped = peak_bytes()
            torch.ones(size // 4).sum().item()
            return before, mapped, peak_bytes()

    before, mapped, allocated = result_of(peaks)
    assert abs(mapped - before) < size / 8
    assert 7 / 8 * size < allocated - mapped < 9 / 8 * size
