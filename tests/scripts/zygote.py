"""Forks ranks from a process that has imported everything, as torchrun would start them but without the wait.

Reads one JSON request per line from stdin: the function ("module:name") that every rank calls with its rank, the folder
and the arguments, the number of ranks, a folder for their output, and a deadline in seconds. Answers with one line: the
exit code of each rank, None for one that had to be killed. ``ends.json`` in the folder says when each rank ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.scripts.hiding import LARGE, Hide, roomy, tell_apart

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """The client's side: start it once, ask it often.

    Args:
        visible_gpus: as in CUDA_VISIBLE_DEVICES; None shows all.
    """

    def __init__(self, visible_gpus: str | None = "") -> None:
        own = {"OMP_NUM_THREADS": "1"} | ({} if visible_gpus is None else {"CUDA_VISIBLE_DEVICES": visible_gpus})
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.scripts.zygote"],
            cwd=ROOT,
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, target: str, ranks: int, out: Path, deadline: float = 40, **arguments: Any) -> list[int | None]:
        """Run `target` on that many ranks; the exit codes. Each rank's output is in ``out/<rank>.txt``."""
        request = {"target": target, "ranks": ranks, "out": str(out), "deadline": deadline, "arguments": arguments}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            codes: list[int | None] = json.loads(self._process.stdout.readline())
        return codes

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _rank(request: dict[str, Any], rank: int, port: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(request["ranks"]),
            LOCAL_WORLD_SIZE=str(request["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="zygote",
        )  # fmt: skip
        if request["ranks"] == 1:
            for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
                del os.environ[name]
        file = os.open(f"{request['out']}/{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        module, name = request["target"].split(":")
        function = getattr(importlib.import_module(module), name)
        roomy(lambda: function(rank, Path(request["out"]), **request["arguments"]))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _warm_up(module: str) -> None:
    """Import what ranks would import, each of them and each time; what fails here fails in them and is told there."""
    if module not in sys.modules:
        gc.disable()  # nothing that is imported is garbage
        with suppress(Exception), redirect_stdout(sys.stderr):  # stdout has the answers
            importlib.import_module(module)
            tell_apart()
        gc.enable()
        gc.collect()
        gc.freeze()  # a child's garbage collector would else copy all that is there


def serve(request: dict[str, Any], asker: int) -> list[int | None]:
    """Run what is asked for; its ranks end with the process that asks, too, however that ends.

    Args:
        request: as in `Zygote.run`.
        asker: this process's parent, at first.
    """
    _warm_up(request["target"].partition(":")[0])
    port = free_port()
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            _rank(request, rank, port)
        pids.append(pid)
    codes: dict[int, int | None] = {}
    ends: dict[int, float] = {}
    end = time.monotonic() + request["deadline"]
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid], ends[pid] = os.waitstatus_to_exitcode(found[1]), time.time()
        if time.monotonic() > end or os.getppid() != asker:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = None
        time.sleep(0.02)
    Path(request["out"], "ends.json").write_text(json.dumps([ends.get(pid) for pid in pids]))
    for pid in pids:  # what a rank may have left behind is in its group
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def main() -> None:
    """Answer requests until stdin closes."""
    import torch

    asker = os.getppid()
    torch.set_num_threads(1)
    hide = Hide(LARGE)
    _warm_up("lightning_tspipe")
    hide.end()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), asker)), flush=True)


if __name__ == "__main__":
    main()
