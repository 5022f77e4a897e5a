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


def python_path(lean: bool = True) -> str:
    """PYTHONPATH of a script that a test starts.

    Args:
        lean: hide packages that the script does not need, since importing them takes seconds of each process.
    """
    hides = [str(ROOT / "tests/scripts/lean")] if lean else []
    return os.pathsep.join(filter(None, [*hides, str(ROOT), os.environ.get("PYTHONPATH")]))


def run_script(*command: str, folder: Path | None = None, timeout: float = 60, lean: bool = True) -> str:
    """What Python prints when it runs a command.

    Args:
        command: arguments of the Python interpreter.
        folder: where it runs; None means here.
        timeout: seconds after which it, and all that it started, is killed.
        lean: see `python_path`.
    """
    path, port = python_path(lean), str(free_port())
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "MASTER_PORT": port}
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
