"""The orders that need no search: what any other has to be faster than.

Each teacher forward stands right before the student's, as if one stage held both. Rank 0 of 2::

    afab    T0 T1 T2 F0 F1 F2 B0 B1 B2  and  T0 F0 T1 F1 T2 F2 B0 B1 B2
    1f1b    T0 F0 T1 F1 B0 T2 F2 B1 B2
    zb      T0 F0 T1 F1 I0 W0 T2 F2 I1 W1 I2 W2        on rank k, W is k microbatches behind I
"""

from __future__ import annotations

import itertools

from lightning_tspipe.greedy import Rows
from lightning_tspipe.schedule import Action, Kind

AFAB: tuple[Kind, Kind, Kind] = ("T", "F", "B")


def plain_rows(
    name: str, stages: int, microbatches: int, teacher_microbatches: int = 0, teacher_first: bool = False
) -> list[Rows]:
    """Orders without lookahead: each teacher forward right before the student's, and for afab also all before all.

    With `teacher_first`, 1f1b and zb have all before all instead, for a loss that sees the teacher's whole batch.
    """
    every, pieces = range(microbatches), teacher_microbatches or microbatches
    begun = [-(-q * pieces // microbatches) for q in range(microbatches + 1)]  # teacher forwards before each student's
    if teacher_first and not name.startswith("afab"):
        begun[1:] = [pieces] * microbatches
    both = [(*(Action("T", p) for p in range(begun[q], begun[q + 1])), Action("F", q)) for q in every]
    if name == "afab":
        own = [Action("T", p) for p in range(pieces)]
        forward, backward = ([Action(kind, q) for q in every] for kind in AFAB[1:])
        return [((*own, *forward, *backward),) * stages, ((*itertools.chain(*both), *backward),) * stages]
    inputs, weights = [Action("I", q) for q in every], [Action("W", q) for q in every]
    if name == "afab-split":
        return [((*itertools.chain(*both), *inputs, *weights),) * stages]
    rows = []
    for k in range(stages):
        warm = min(microbatches, stages - k)
        row = list(itertools.chain(*both[:warm]))
        for q in every:
            if name == "1f1b":
                row.append(Action("B", q))
            else:  # ZB1P: as many weights are pending as keep the memory of 1F1B
                row += [inputs[q], *weights[q - k : q - k + 1 if q >= k else 0]]
            row += both[warm + q] if warm + q < microbatches else ()
        rows.append((*row, *(weights[max(0, microbatches - k) :] if name == "zb" else ())))
    return [tuple(rows)]
