"""Nobody hangs: a rank that dies, raises or is asked to end takes the others along, and all say why."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.ports import free_port
from tests.scripts.zygote import ROOT, Zygote
from tests.subprocesses import python_path

LIMIT_S = 10.0
TRAIN = "tests.scripts.train:run"


def outputs(folder: Path, ranks: int = 3) -> list[str]:
    return [(folder / f"{rank}.txt").read_text() for rank in range(ranks)]


def until(condition: Callable[[], object], limit: float, what: str) -> None:
    """Poll with a deadline."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def marked(marker: str) -> list[psutil.Process]:
    """Every live process whose environment holds the marker."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("TSPIPE_TEST_MARK") == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.timeout(60)
def test_kill_9_ends_every_rank_and_names_the_dead(zygote: Zygote, tmp_path: Path, victim: int) -> None:
    delay = random.Random(victim).uniform(0, 0.4)
    codes = zygote.run(TRAIN, 3, tmp_path, victims=[victim], number=signal.SIGKILL, delay=delay)
    struck = float((tmp_path / f"{victim}.struck").read_text())
    ends = json.loads((tmp_path / "ends.json").read_text())
    texts = outputs(tmp_path)
    for rank in range(3):
        if rank == victim:
            assert codes[rank] == -signal.SIGKILL
            continue
        assert codes[rank] not in (0, None), texts[rank]
        assert ends[rank] - struck < LIMIT_S
        assert f"rank {victim} (stage {victim}) died" in texts[rank]


@pytest.mark.parametrize(
    ("fault", "victim"), [("loss", 2), ("forward:0", 0), ("forward:1", 1), ("forward:2", 2), ("loader", 0)]
)
@pytest.mark.timeout(60)
def test_an_exception_is_told_on_every_rank_with_its_traceback(
    zygote: Zygote, tmp_path: Path, fault: str, victim: int
) -> None:
    codes = zygote.run(TRAIN, 3, tmp_path, fault=fault, deadline=30)
    texts = outputs(tmp_path)
    assert all(code not in (0, None) for code in codes), (codes, texts)
    ends = json.loads((tmp_path / "ends.json").read_text())
    assert max(ends) - ends[victim] < LIMIT_S
    for rank, text in enumerate(texts):
        assert f"ArithmeticError: broken {fault}" in text, (rank, text)
        assert "tests/scripts/train.py" in text, (rank, text)
        if rank != victim:
            assert f"rank {victim} (stage {victim}) failed:\nTraceback" in text, (rank, text)


@pytest.mark.parametrize("victims", [[0], [1], [2], [0, 1, 2]], ids=str)
@pytest.mark.timeout(60)
def test_sigterm_to_some_ranks_ends_all_in_good_order(zygote: Zygote, tmp_path: Path, victims: list[int]) -> None:
    delay = random.Random(str(victims)).uniform(0, 0.3)
    monitored = victims == [1]  # then numbers of `PipelineMonitor` are under way, which rank 0 no longer takes
    options = {"victims": victims, "number": signal.SIGTERM, "delay": delay, "monitored": monitored}
    codes = zygote.run(TRAIN, 3, tmp_path, deadline=30, **options)
    texts = outputs(tmp_path)
    assert codes == [143, 143, 143], texts
    assert not any("PipelineError" in text for text in texts), texts
    struck = max(float((tmp_path / f"{rank}.struck").read_text()) for rank in victims)
    assert max(json.loads((tmp_path / "ends.json").read_text())) - struck < LIMIT_S


class Script:
    """The training as a script that starts its own processes."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.marker = folder, uuid.uuid4().hex
        own = {"TSPIPE_TEST_DIR": str(folder), "TSPIPE_TEST_MARK": self.marker, "TSPIPE_TEST_DEVICES": str(ranks)}
        common = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": python_path(),
            "MASTER_PORT": str(free_port()),
        }
        self._log = (folder / "script.txt").open("w")
        self.main = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/scripts/train.py")],
            env=os.environ | common | own,
            cwd=folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._ranks = ranks

    def wait_until_training(self) -> list[int]:
        """The process ids by rank."""
        files = [self.folder / f"{rank}.pid" for rank in range(self._ranks)]
        until(lambda: all(map(Path.exists, files)) or self.main.poll() is not None, 60, "training did not begin")
        assert self.main.poll() is None, self.text
        return [int(file.read_text()) for file in files]

    @property
    def text(self) -> str:
        """What all processes have written."""
        return (self.folder / "script.txt").read_text()

    def close(self) -> None:
        """Kill what is left."""
        for process in marked(self.marker):
            process.kill()
        self.main.wait()
        self._log.close()


@pytest.mark.parametrize(
    ("number", "victim", "code"), [(signal.SIGKILL, 1, 1), (signal.SIGTERM, 0, 143)], ids=["kill -9", "SIGTERM"]
)
@pytest.mark.timeout(100)
def test_a_script_ends_with_all_its_processes(tmp_path: Path, number: int, victim: int, code: int) -> None:
    script = Script(tmp_path, ranks=2)
    try:
        pids = script.wait_until_training()
        assert pids[0] == script.main.pid
        assert {process.pid for process in marked(script.marker)} >= set(pids)
        os.kill(pids[victim], number)
        until(lambda: script.main.poll() is not None, LIMIT_S, "the main process did not end")
        until(lambda: not marked(script.marker), 5, "a process was left behind")
        assert script.main.returncode == code, script.text
        if number == signal.SIGKILL:
            assert f"rank {victim} (stage {victim}) died" in script.text
    finally:
        script.close()


@pytest.mark.parametrize("everyone", [False, True], ids=["main", "group"])
@pytest.mark.timeout(100)
def test_ctrl_c_ends_a_script_and_every_rank_says_so(tmp_path: Path, everyone: bool) -> None:
    """Sent to the main process alone, or to the whole group as a terminal does."""
    script = Script(tmp_path, ranks=2)
    try:
        script.wait_until_training()
        (os.killpg if everyone else os.kill)(script.main.pid, signal.SIGINT)
        until(lambda: script.main.poll() is not None, LIMIT_S, "the main process did not end")
        until(lambda: not marked(script.marker), 5, "a process was left behind")
        assert script.main.returncode == 1, script.text
        interrupted = "rank 0 (stage 0) was interrupted (SIGINT, Ctrl-C)"
        if everyone:
            assert script.text.count("was interrupted") >= 2, script.text
        else:
            assert f"Rank 1 stops because the pipeline lost a rank: {interrupted}" in script.text
            assert script.text.splitlines().count(interrupted) == 1, script.text
    finally:
        script.close()


@pytest.mark.parametrize("method", ["fork"])
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 1)])
@pytest.mark.timeout(60)
def test_processes_that_lightning_forks_end_together(
    zygote: Zygote, tmp_path: Path, method: str, number: int, victim: int
) -> None:
    options = {"victims": [victim], "number": number, "devices": 2, "start_method": method, "delay": 0.1}
    codes = zygote.run(TRAIN, 1, tmp_path, **options)
    (text,) = outputs(tmp_path, 1)
    if number == signal.SIGTERM:
        assert codes == [143], text
    else:
        assert codes[0] not in (0, None), text
        assert f"rank {victim} (stage {victim}) died" in text
    pids = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
    until(lambda: not any(map(alive, pids)), 5, "a process was left behind")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_forked_job_whose_main_process_is_asked_to_end(
    zygote: Zygote, tmp_path: Path, number: int, code: int
) -> None:
    codes = zygote.run("tests.scripts.train:run_and_end_main", 1, tmp_path, number=number, deadline=20)
    (text,) = outputs(tmp_path, 1)
    assert codes in ([143], [code]), text
    if number == signal.SIGINT:
        for rank in range(2):
            assert f"rank {rank} (stage {rank}) was interrupted (SIGINT, Ctrl-C)\n" in text
    pids = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
    until(lambda: not any(map(alive, pids)), 5, "a process was left behind")
