"""Every example reaches its stated accuracy on real data in its small form, in one process and in a pipeline."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]


def printed(name: str, folder: Path, *options: str) -> str:
    """What an example prints."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options],
        cwd=folder,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return output


def number(label: str, text: str) -> float:
    found = re.search(rf"{label} (\d+\.\d+)", text)
    assert found, (label, text)
    return float(found[1])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", ["auto", "tspipe"])
def test_distill_digits(tmp_path: Path, strategy: str) -> None:
    text = printed("distill_digits", tmp_path, "--small", "--strategy", strategy)
    teacher, distilled, plain = (number(name, text) for name in ("teacher", "distilled", "plain"))
    assert teacher > 0.95
    assert distilled > 0.93
    assert distilled > plain + 0.05
    if strategy == "tspipe":
        assert number("sequential twin", text) == pytest.approx(distilled, abs=0.01)
        assert "T0'" in text, "the schedule looks nothing ahead"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", ["auto", "tspipe"])
def test_byol_digits(tmp_path: Path, strategy: str) -> None:
    text = printed("byol_digits", tmp_path, "--epochs", "12", "--strategy", strategy)
    before, after = number("before", text), number("after", text)
    assert after > 0.84
    assert after > before + 0.03
