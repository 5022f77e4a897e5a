"""Every example reaches its stated accuracy on real data in its small form, in one process and in a pipeline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.scripts.zygote import ROOT
from tests.subprocesses import run_script


def printed(name: str, folder: Path, *options: str) -> str:
    """What an example prints."""
    return run_script(str(ROOT / "examples" / f"{name}.py"), *options, folder=folder, timeout=100)


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
