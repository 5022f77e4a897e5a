"""Runs a script as a user would, within a deadline and with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.ports import free_port
from tests.scripts.zygote import ROOT


def run_script(*command: str, folder: Path | None = None, timeout: float = 60) -> str:
    """What Python prints when it runs a command.

    Args:
        command: arguments of the Python interpreter.
        folder: where it runs; None means here.
        timeout: seconds after which it, and all that it started, is killed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return output
