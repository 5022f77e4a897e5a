"""The teacher's microbatches are others than the student's: every number is that of a loop that cuts as they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from torch import nn
from torch.utils.data import DataLoader

from lightning_tspipe import TSPipeStrategy
from lightning_tspipe.arranging import Arrangement
from lightning_tspipe.plan import Planner
from lightning_tspipe.schedule import Costs
from tests.multiproc import result_of, run_fits
from tests.test_numerics import (
    EXACT,
    FROZEN,
    LATE,
    AsDict,
    AsTuple,
    Case,
    CaseModule,
    batch_norms,
    big,
    case,
    check,
    compare,
    crops,
    multi_crop,
    pooled,
    references,
    shuffled,
    student,
)


def cut(base: Case, microbatches: int, teacher: int, **rule: Any) -> Case:
    """A case with these numbers, in the pipeline and in the reference; the last batch is a short one."""
    strategy = base.strategy | {"teacher_microbatches": teacher}
    base = replace(base, strategy=strategy)
    return case(base, microbatches=microbatches, teacher_microbatches=teacher, **rule)


def wide() -> DataLoader[Any]:
    """Batches of 14, 14 and 13 rows: two or more in each of six microbatches."""
    return shuffled(41, 14)


def nested_student(end: type[nn.Module]) -> nn.Module:
    """A student that returns a nesting."""
    return student(end())


def several(microbatches: int, teacher: int) -> Sequence[Case]:
    """Both losses with delay 0 and 1, where rows meet by batch norm, and a frozen teacher."""
    norms = [replace(base, make_student=batch_norms, loader=wide) for base in (LATE, EXACT)]
    cases = [cut(base, microbatches, teacher, loss_over=loss) for base in norms for loss in ("batch", "microbatch")]
    return [*cases, cut(FROZEN, microbatches, teacher, loss_over="microbatch")]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("microbatches", "teacher"), [(4, 2), (3, 6)])
def test_the_numbers_of_the_reference(stages: int, microbatches: int, teacher: int) -> None:
    """By parameter and rank; a teacher in train mode takes the statistics of its own microbatches."""
    check(*several(microbatches, teacher), stages=stages)


def test_one_stage_views_nested_outputs_and_split_backwards() -> None:
    views = replace(LATE, make_student=pooled, loader=crops, inputs=multi_crop)
    nested = [
        Case(partial(nested_student, end), lambda _, end=end: big(end()))  # type: ignore[misc]
        for end in (AsTuple, AsDict)
    ]
    zb = replace(LATE, strategy={"schedule": "zb"})
    cases = (views, 4, 1), (views, 2, 4), (nested[0], 4, 2), (nested[1], 2, 4), (zb, 2, 4)
    check(
        *(cut(base, student, teacher, loss_over="microbatch") for base, student, teacher in cases),
        cut(replace(views, rule=replace(views.rule, accumulate=2)), 4, 2),
    )
    check(cut(LATE, 2, 6), cut(LATE, 6, 2, loss_over="microbatch"), stages=1)


def test_a_teacher_that_is_cut_in_another_way_is_told_apart() -> None:
    """The comparison can fail: batch norms in train mode see the cut."""
    base = replace(LATE, make_student=batch_norms, loader=wide)
    ranks = run_fits([cut(base, 2, 4).fit(2)])[0]
    right, wrong = references(cut(base, 2, 4), cut(base, 2, 2))
    compare(ranks, right)
    with pytest.raises(AssertionError):
        compare(ranks, wrong)


# --- who chooses


def test_what_is_taken_if_nobody_says() -> None:
    """What a resumed run or a saved plan had; else what pays, for a teacher in mode eval and by measured costs."""

    def chosen(resumed: dict[str, Any] | None = None, **changed: Any) -> int:
        saved = {"microbatches": changed.pop("saved", None), "teacher_microbatches": changed.pop("of_teacher", None)}
        asked = {"_teacher_microbatches": changed.pop("asked", "auto"), "_rows": changed.pop("rows", 32)}
        module = SimpleNamespace(teacher_mode=changed.pop("mode", "eval"))
        arrangement: Any = object.__new__(Arrangement)
        vars(arrangement).update(_module=module, _limit=inf, placement=SimpleNamespace(**saved), **asked)
        return Arrangement.teacher_microbatches(arrangement, planner, 4, resumed or {})

    planner = Planner(Costs.uniform(4, t=3), True, "batch", split_backward=True)
    assert chosen() == 8
    assert chosen(rows=7) == chosen(rows=0) == chosen(mode="train") == 4
    assert chosen(asked=2) == chosen(asked=2, resumed={"microbatches": 4, "teacher_microbatches": 8}) == 2
    assert chosen(resumed={"microbatches": 4, "teacher_microbatches": 16}) == 16
    assert chosen(resumed={"microbatches": 4}) == 4  # one of an earlier version
    assert chosen(resumed={"microbatches": 2, "teacher_microbatches": 1}) == 8
    assert chosen(saved=4, of_teacher=2) == 2
    assert chosen(saved=2, of_teacher=2) == chosen(saved=4) == 8


def test_a_checkpoint_and_a_saved_plan_keep_the_numbers(tmp_path: Path) -> None:
    """The schedule that is followed, in a run that asks for the numbers, and in two that ask for none."""

    def run() -> list[tuple[int, int]]:
        found = []
        file, plan = tmp_path / "model.ckpt", str(tmp_path / "plan.json")
        for options, resumed in (
            ({"microbatches": 3, "teacher_microbatches": 6}, None), ({}, file), ({"balance": plan}, None),
        ):  # fmt: skip
            strategy: Any = TSPipeStrategy(**options)
            keep = L.pytorch.callbacks.LambdaCallback(
                on_train_end=lambda trainer, _: found.append(
                    (trainer.strategy.plan.microbatches, trainer.strategy.plan.teacher_microbatches)
                )
            )
            trainer = L.Trainer(
                max_epochs=2 if resumed else 1, accelerator="cpu", devices=1, strategy=strategy, callbacks=[keep],
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(CaseModule(FROZEN), shuffled(24, 12), ckpt_path=resumed)
            if not found[1:]:
                trainer.save_checkpoint(file)
                strategy.placement.save(plan)
        return found

    assert result_of(run) == [(3, 6)] * 3
