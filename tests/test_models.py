"""Known networks, cut into stages, compute what they compute uncut.

By default each family is tried at one P, and P goes round; with ``TSPIPE_MODELS=all`` at P=2, 3 and 4.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.multiproc import result_of
from tests.zoo import DOUBLE, Kind, check, kinds

KINDS = list(kinds())
ALL = os.environ.get("TSPIPE_MODELS") == "all"
CASES = [
    pytest.param(kind, stages, id=f"{kind.name}-{stages}")
    for place, kind in enumerate(KINDS)
    for stages in (2, 3, 4)
    if ALL or (stages == 2 + place % 3 and kind.name != "inception")  # which takes as long as ten others
]


@pytest.mark.parametrize(("kind", "stages"), CASES)
def test_a_cut_network_computes_the_same(kind: Kind, stages: int) -> None:
    """Outputs, gradients and buffers over two steps, the second one of fewer rows, and an evaluation."""
    if kind.extra is not None:
        pytest.importorskip(kind.extra)

    def worst() -> float:
        torch.manual_seed(0)
        return check(kind.build().to(DOUBLE), kind.inputs, stages, kind.steps, kind.rows)

    assert result_of(worst, timeout=110) < 1e-11
