"""However a training ends: every rank goes at once and says why, and the last file resumes to the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.scripts.faults import HOOKS, STEPS
from tests.scripts.zygote import Zygote, serve

LIMIT_S = 10.0
RUN = "tests.scripts.faults:run"
TRAINING = ("on_train_start", "on_train_batch_start", "callback", "on_after_backward", "optimizer",
            "on_train_batch_end", "validation_step", "on_save_checkpoint", "on_train_epoch_end")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What strikes whom: see `tests.scripts.faults.Strike`."""

    how: str
    where: str
    victims: tuple[int, ...]
    ranks: int
    nth: int = 1
    delay: float = 0.0
    resume_on: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, zygote: Zygote, out: Path) -> list[int | None]:
        """The exit codes."""
        arguments: dict[str, Any] = {"where": self.where, "how": self.how, "victims": list(self.victims)}
        arguments |= {"nth": self.nth, "delay": self.delay, "devices": self.ranks, **self.options}
        return zygote.run(RUN, self.ranks, out, deadline=30, **arguments)

    def check(self, out: Path, codes: list[int | None]) -> None:
        """Every rank has ended within the limit, with the right code and a last line that says why."""
        lines = [last_line(out, rank) for rank in range(self.ranks)]
        struck = [float(file.read_text()) for file in out.glob("*.struck")]
        assert len(struck) == len(self.victims), (self, codes, lines)
        ends = json.loads((out / "ends.json").read_text())
        assert None not in ends, (self, lines)
        assert max(ends) - max(struck) < LIMIT_S, (self, lines)
        for rank, (code, line) in enumerate(zip(codes, lines, strict=True)):
            expected, text = self.expected(rank)
            assert code == expected, (self, rank, codes, lines)
            assert text in line, (self, rank, lines)

    def expected(self, rank: int) -> tuple[int, str]:
        """A rank's exit code and what its last line has."""
        victim = self.victims[0]
        if self.how in ("SIGTERM", "SIGUSR1"):
            return 143, f"rank {rank} (stage {rank}) ends after step"
        if self.how == "SIGINT" and len(self.victims) > 1:
            return 1, "nterrupt"  # its own, or another rank's that came before it
        if self.how == "SIGINT":
            return 1, f"rank {victim} (stage {victim}) was interrupted"
        if self.how == "disk":
            return 1, "OSError: [Errno 27] File too large"
        if self.how == "raise":
            return 1, f"Struck: {self.where} of rank {victim}"
        return (-9, "") if rank == victim else (1, f"rank {victim} (stage {victim}) died")


def last_line(out: Path, rank: int) -> str:
    """What a rank has written last."""
    lines = [line for line in (out / f"{rank}.txt").read_text().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def faults() -> Iterator[Fault]:
    """Every kind of end at moments that the seed draws."""
    draw = random.Random(3)

    def fault(how: str, where: str, everyone: bool = False, late: bool = False, **options: Any) -> Fault:
        ranks = draw.choice([2, 2, 3])
        victims = {"loss": ranks - 1, "loader": 0}.get(where, draw.randrange(ranks))
        often = where not in ("on_train_start", "on_train_end", "on_fit_end", "setup", "teardown", "configure_model",
                              "on_fit_start", "configure_optimizers", "between")  # fmt: skip
        nth = 2 if where.startswith(("on_validation", "on_train_epoch", "validation")) else draw.randint(3, 9)
        delay = draw.uniform(0.0005, 0.006) if late else 0.0  # a step takes a few milliseconds
        everyone_or = tuple(range(ranks)) if everyone else (victims,)
        resume_on = draw.choice([ranks, ranks, 5 - ranks])
        return Fault(how, where, everyone_or, ranks, nth if often else 1, delay, resume_on, options)

    for where in (*HOOKS, "callback", "loss", "optimizer", "validation_step", "configure_optimizers", "loader"):
        yield fault("raise", where)
    yield Fault("raise", "loader", (0,), 2, 10, options={"workers": 1})
    for where in ("setup", "on_save_checkpoint", "on_train_end", draw.choice(TRAINING), draw.choice(TRAINING)):
        yield fault("SIGKILL", where, late=where in TRAINING)
    for where in ("configure_optimizers", "on_train_end", draw.choice(TRAINING)):
        yield fault("SIGINT", where, late=where in TRAINING)
    yield fault("SIGINT", draw.choice(TRAINING), everyone=True, late=True)
    for everyone in (False, True):
        yield fault("SIGTERM", "on_train_batch_end", everyone, late=True)
        yield fault("SIGTERM", draw.choice(TRAINING), everyone)
    yield fault("SIGTERM", "on_train_end")
    for how in ("raise", "SIGKILL", "SIGTERM"):  # in `validate` after the fit, whose three epochs validate two batches
        yield Fault(how, "validation_step", (1,), 2, 7)
    yield Fault("disk", "on_save_checkpoint", (0,), 2, 1, delay=1.0)
    yield Fault("disk", "on_save_checkpoint", (0,), 3, 6, delay=2.0)


def state_of(file: Path) -> tuple[int, dict[str, Tensor]]:
    """The step of a checkpoint, and its weights."""
    content = torch.load(file, weights_only=True)
    return content["global_step"], content["state_dict"]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: object) -> None:
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        assert torch.equal(found[name], value), (what, name)


@pytest.fixture(scope="module")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Tensor]]:
    """The weights after every step of the training that nothing strikes."""
    out = tmp_path_factory.mktemp("whole")
    assert zygote.run(RUN, 2, out, devices=2, every=1) == [0, 0], (out / "0.txt").read_text()
    found = dict(state_of(file) for file in (out / "files").glob("step=*.ckpt"))
    assert sorted(found) == list(range(1, STEPS + 1))
    weights = list(found.values())
    for before, after in pairwise(weights):
        assert not torch.equal(before["student.0.weight"], after["student.0.weight"])
    for rank in range(2):
        final = torch.load(out / f"{rank}.pt", weights_only=True)
        assert torch.equal(final["student.0.weight"], found[STEPS]["student.0.weight"])
    found[0] = torch.load(out / "0.pt", weights_only=True)  # at the end of everything, by the step that is never saved
    return found


def check_files(files: list[Path], whole: dict[int, dict[str, Tensor]]) -> Path | None:
    """Every file is whole and what the training that nothing strikes had at that step; the last one."""
    steps = {}
    for file in files:
        step, weights = state_of(file)
        steps[step] = file
        assert_same(weights, whole[step], file)
    return steps[max(steps)] if steps else None


def resume(zygote: Zygote, out: Path, ranks: int, whole: dict[int, dict[str, Tensor]], file: Path) -> None:
    """Train from a file to the end: the weights are those of the other training on every rank."""
    out.mkdir()
    assert zygote.run(RUN, ranks, out, devices=ranks, resume=str(file)) == [0] * ranks, last_line(out, 0)
    for rank in range(ranks):
        assert_same(torch.load(out / f"{rank}.pt", weights_only=True), whole[0], (out, rank))
    check_files(list((out / "files").glob("*.ckpt")), whole)


@pytest.mark.timeout(300)
def test_many_faults(zygote: Zygote, tmp_path: Path, whole: dict[int, dict[str, Tensor]]) -> None:
    """Nobody hangs, nothing is lost, and what was saved goes on as if nothing had happened."""
    drawn, resumed = list(faults()), 0
    assert len(drawn) >= 30
    for number, fault in enumerate(drawn):
        out = tmp_path / str(number)
        out.mkdir()
        fault.check(out, fault.run(zygote, out))
        last = check_files(list((out / "files").glob("*.ckpt")), whole)
        if last is not None:
            resumed += 1
            resume(zygote, tmp_path / f"{number} resumed", fault.resume_on, whole, last)
    assert resumed >= 24


@pytest.mark.timeout(60)
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=str)
def test_slurm_saves_at_a_step_boundary_and_requeues_once(
    zygote: Zygote, tmp_path: Path, whole: dict[int, dict[str, Tensor]], victims: tuple[int, ...]
) -> None:
    fault = Fault("SIGUSR1", "on_train_batch_end", victims, 2, 2, 0.002, options={"slurm": True, "every": 100})
    fault.check(tmp_path, fault.run(zygote, tmp_path))
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 1234\n"
    (file,) = tmp_path.glob("*.ckpt")
    assert file.name == "hpc_ckpt_1.ckpt"
    step, weights = state_of(file)
    assert 2 <= step < STEPS
    assert_same(weights, whole[step], file)
    # the queue starts it again in the same folder, where Lightning finds the file by itself
    assert zygote.run(RUN, 2, tmp_path, devices=2, slurm=True) == [0, 0], last_line(tmp_path, 0)
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), whole[0], rank)


@pytest.mark.timeout(60)
def test_a_full_disk(zygote: Zygote, tmp_path: Path, whole: dict[int, dict[str, Tensor]]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=False).returncode:
        pytest.skip("this user cannot mount a small disk")
    try:
        assert zygote.run(RUN, 2, tmp_path, devices=2, files=str(disk)) == [1, 1]
        for rank in range(2):
            assert "OSError: [Errno 28] No space left on device" in last_line(tmp_path, rank)
        assert not list(disk.glob(".*"))
        last = check_files(list(disk.glob("*.ckpt")), whole)
        assert last is not None
        resume(zygote, tmp_path / "resumed", 2, whole, last)
    finally:
        subprocess.run(["umount", disk], check=True)


def sleep(rank: int, out: Path) -> None:
    """Tell the process, and stay."""
    (out / f"{rank}.new").write_text(str(os.getpid()))
    (out / f"{rank}.new").rename(out / f"{rank}.pid")
    time.sleep(25)


def alive(process: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{process}").exists()


@pytest.mark.timeout(30)
def test_no_rank_outlives_tests_that_are_killed(tmp_path: Path) -> None:
    request = {"target": "tests.test_ends:sleep", "ranks": 2, "out": str(tmp_path), "deadline": 25, "arguments": {}}
    if not (tests := os.fork()):
        if not os.fork():
            try:
                serve(request, os.getppid())
            finally:
                os._exit(0)
        time.sleep(25)
        os._exit(0)
    try:
        while len(files := list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.01)
    finally:
        os.kill(tests, signal.SIGKILL)
        os.waitpid(tests, 0)
    end = time.monotonic() + 5
    while any(alive(int(file.read_text())) for file in files):
        assert time.monotonic() < end
        time.sleep(0.01)
