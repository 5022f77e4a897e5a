"""Known networks, cut into stages, compute what they compute uncut.

By default each family is tried at one P, and P goes round; with ``TSPIPE_MODELS=all`` at P=2, 3 and 4.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch

from tests.multiproc import result_of
from tests.zoo import DOUBLE, Kind, check, check_split, kinds

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
    """Outputs, gradients and buffers over two steps, the second one of fewer rows, and an evaluation.

    A backward in parts gives the same gradients bit for bit.
    """
    if kind.extra is not None:
        pytest.importorskip(kind.extra)

    def found() -> tuple[float, list[str]]:
        torch.manual_seed(0)
        network = kind.build().to(DOUBLE)
        other = check_split(copy.deepcopy(network), kind.inputs, stages, kind.rows)
        return check(network, kind.inputs, stages, kind.steps, kind.rows), other

    worst, other = result_of(found, timeout=110)
    assert worst < 1e-11
    assert not other
