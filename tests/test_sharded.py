"""Checkpoints as folders of shards: written by every rank, resumed on any number of stages, made into one file."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lightning_tspipe import TSPipeStrategy
from lightning_tspipe.errors import PipelineError
from lightning_tspipe.files import beside
from lightning_tspipe.sharded import find, is_sharded, prepare
from tests.multiproc import result_of
from tests.scripts.small import loader, trainer
from tests.test_checkpoint import AUTO, PARTS, Exact, assert_same, flat, read
from tests.test_files import DiesWriting

MODULE: dict[str, Any] = {"momentum": 0.9, "teacher_delay": 1, "adam": True}


def fit(
    folder: Path, stages: int, epochs: int, resume: Path | None = None, kind: Any = "sharded", *more: L.Callback
) -> L.Trainer:
    """Train until so many epochs have been made; ``last.ckpt`` is written anew after each."""
    strategy: Any = "auto"
    if stages != AUTO:
        strategy = TSPipeStrategy(microbatches=1, start_method="fork", state_dict_type=kind)
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    run = trainer(max(1, stages), strategy, max_epochs=epochs, callbacks=[keep, *more], enable_checkpointing=True)
    run.fit(Exact(**MODULE), loader(), ckpt_path=resume)
    return run


def consolidate(folder: Path, file: Path) -> None:
    """Lightning's own tool, as a user calls it."""
    sys.argv = ["consolidate", str(folder), "--output_file", str(file)]
    runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")


def by_number(content: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state by numbers, as a plain checkpoint has it."""
    (state,) = content["optimizer_states"]
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = iter(range(len(names)))
    groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in state["param_groups"]]
    return {
        **content,
        "optimizer_states": [{"state": dict(enumerate(map(state["state"].get, names))), "param_groups": groups}],
    }


def assert_content(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same values; a folder does not keep the order of keys."""
    for part in PARTS:
        one, other = (dict(sorted(flat(each[part]).items())) for each in (found, expected))
        assert_same({part: one}, {part: other}, part)


def test_it_resumes_anywhere_and_becomes_one_file(tmp_path: Path) -> None:
    """Sharded on two stages, on three, then a file; the folder as a file, in the pipeline and in plain Lightning."""

    def trainings() -> None:
        fit(tmp_path / "whole", 2, 1, kind="full")
        (tmp_path / "whole/last.ckpt").rename(tmp_path / "whole/1.ckpt")
        fit(tmp_path / "whole", 2, 3, kind="full")
        fit(tmp_path / "1", 2, 1)
        fit(tmp_path / "2", 3, 2, tmp_path / "1/last.ckpt")
        fit(tmp_path / "3", 2, 3, tmp_path / "2/last.ckpt", "full")
        fit(tmp_path / "4", 1, 3, tmp_path / "2/last.ckpt", "full")
        consolidate(tmp_path / "2/last.ckpt", tmp_path / "2.ckpt")
        consolidate(tmp_path / "1/last.ckpt", tmp_path / "1.ckpt")
        fit(tmp_path / "5", 3, 3, tmp_path / "2.ckpt", "full")
        fit(tmp_path / "6", AUTO, 3, tmp_path / "2.ckpt")

    result_of(trainings, timeout=100)
    folder = tmp_path / "1/last.ckpt"
    assert is_sharded(folder)
    assert_content(by_number(read(tmp_path / "1.ckpt")), read(tmp_path / "whole/1.ckpt"))
    storage = FileSystemReader(folder).read_metadata().storage_data
    writer = {index.fqn: info.relative_path for index, info in storage.items()}
    for rank, layer in ((0, "0"), (1, "2")):
        for name in (f"model.teacher.{layer}.weight", f"optimizer_0.state.student.{layer}.weight.exp_avg"):
            assert writer[name].startswith(f"__{rank}_"), "a rank wrote another one's part"
    expected = read(tmp_path / "whole/last.ckpt")
    for resumed in "3456":
        found = read(tmp_path / resumed / "last.ckpt")
        assert_content(by_number(found), expected)


class Evaluated(Exact):
    """Says whether it holds the weights of a folder."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("out", self.student(batch[0].double()).sum())


def test_folders_and_files_replace_each_other(tmp_path: Path) -> None:
    """Nothing else is left; `test` loads folders, also of weights alone."""

    def trainings() -> list[Any]:
        path = tmp_path / "last.ckpt"
        kinds: list[Any] = []

        class Saves(L.Callback):
            def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
                trainer.save_checkpoint(path)
                trainer.save_checkpoint(tmp_path / "weights", weights_only=True)

        for kind in ("full", "sharded", "sharded", "full", "sharded"):
            fit(tmp_path, 2, 1, None, kind, Saves())
            kinds.append(is_sharded(path))
        run = trainer(2, TSPipeStrategy(microbatches=2, start_method="fork", state_dict_type="sharded"))
        module = Evaluated(**MODULE)
        for each in (path, tmp_path / "weights"):
            run.test(module, loader(), ckpt_path=each, verbose=False)
            kinds.append(float(run.callback_metrics["out"]))
        run.test(module, loader(), verbose=False)
        return [*kinds, float(run.callback_metrics["out"])]

    *kinds, found, weights, now = result_of(trainings, timeout=100)
    assert kinds == [False, True, True, False, True]
    assert found == weights != now
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "weights"]
    assert "tspipe" in torch.load(tmp_path / "last.ckpt/meta.pt", weights_only=True)
    assert "tspipe" not in torch.load(tmp_path / "weights/meta.pt", weights_only=True)


def test_a_rank_that_dies_while_it_writes_leaves_the_last_folder(tmp_path: Path) -> None:
    """And what it has left does not disturb the next one."""

    def trainings() -> None:
        fit(tmp_path, 2, 1)
        with pytest.raises(PipelineError):
            fit(tmp_path, 2, 3, tmp_path / "last.ckpt", "sharded", DiesWriting(rank=1, epoch=2))
        consolidate(tmp_path / "last.ckpt", tmp_path / "kept")
        fit(tmp_path, 2, 3, tmp_path / "last.ckpt")
        consolidate(tmp_path / "last.ckpt", tmp_path / "end")

    result_of(trainings, timeout=100)
    assert read(tmp_path / "kept")["epoch"] == 1  # of two epochs
    assert read(tmp_path / "end")["epoch"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["end", "kept", "last.ckpt"]


def test_a_folder_is_found_between_the_two_renames(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    old = beside(path, "old")
    old.mkdir()
    (old / "meta.pt").touch()
    assert find(path) == old
    prepare(path)
    assert is_sharded(path)
    assert find(path) == path
    assert not old.exists()
