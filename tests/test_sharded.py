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
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.checkpoint import Shards
from lightning_tspipe.errors import PipelineError
from lightning_tspipe.files import beside
from lightning_tspipe.memory import LENT, OWN, state_of
from lightning_tspipe.sharded import WeightShards, find, is_sharded, load, prepare, save
from tests.multiproc import result_of
from tests.scripts.small import loader, trainer
from tests.test_checkpoint import AUTO, PARTS, Exact, assert_same, flat, read
from tests.test_files import DiesWriting

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # one process writes and reads here
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated"),
]
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


class Net(nn.Module):
    """Tied weights, running statistics, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight, self.note = self.first.weight, "new"

    def get_extra_state(self) -> str:
        return self.note

    def set_extra_state(self, state: str) -> None:
        self.note = state


class Holder(TeacherStudentModule):
    """A student that is loaded."""

    def __init__(self) -> None:
        super().__init__(save_teacher=False)
        self.student, self.teacher = Net(), nn.Linear(4, 4)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What was saved, what `load` gives, and the names that are read from then on."""
    module, asked = Holder(), []
    module.student.note = "saved"
    nn.init.ones_(module.student.norm.running_mean)
    expected = {name: value for name, value in module.state_dict().items() if not name.startswith("teacher.")}
    save({"state_dict": dict(expected), "epoch": 3}, tmp_path / "folder", 0, None, alone=True)
    read = WeightShards.read
    monkeypatch.setattr(WeightShards, "read", lambda self, names: asked.extend(names) or read(self, names))
    return expected, load(tmp_path / "folder", None), asked


def restored(module: Holder, checkpoint: dict[str, Any]) -> Holder:
    """Loaded as before the set-up of a run."""
    strategy = TSPipeStrategy()
    strategy._lightning_module = module
    strategy.load_model_state_dict(checkpoint)
    return module


def test_a_rank_reads_the_weights_that_it_holds(saved: tuple[dict[str, Any], dict[str, Any], list[str]]) -> None:
    expected, checkpoint, asked = saved
    before = Holder()
    identities = {name: id(parameter) for name, parameter in before.named_parameters()}
    module = restored(before, checkpoint)
    weights = {name for name, _ in module.student.named_parameters(prefix="student", remove_duplicate=False)}
    assert set(asked) == set(expected) - weights  # statistics, and what is no tensor
    assert all(state_of(parameter) == LENT and parameter.is_meta for parameter in module.student.parameters())
    assert state_of(module.teacher.weight) == OWN  # it is in no checkpoint
    asked.clear()
    owners = {name: int("last" in name or "norm" in name) for name in module.state_dict()}
    Shards(module, owners, 1, None).take_own(0, {})
    assert sorted(asked) == ["student.last.bias", "student.norm.bias", "student.norm.weight"]
    assert module.student.first.weight.is_meta
    assert module.student.note == "saved"
    for name in [*asked, "student.norm.running_mean"]:
        assert torch.equal(module.state_dict()[name], expected[name])
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == identities


def test_who_looks_at_weights_while_they_are_loaded_gets_them(
    saved: tuple[dict[str, Any], dict[str, Any], list[str]],
) -> None:
    """A hook of the checkpoint may read and replace values, one of `load_state_dict` changes them."""
    expected, checkpoint, asked = saved
    weights = checkpoint["state_dict"]
    assert (weights["student.first.bias"] == expected["student.first.bias"]).all()
    assert asked == ["student.first.bias"]
    weights["student.last.bias"] = torch.zeros(4)
    module = restored(Holder(), checkpoint)
    assert state_of(module.student.first.weight) == LENT
    assert torch.equal(module.student.first.bias, expected["student.first.bias"])
    assert not module.student.last.bias.any()

    def double(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]

    other = Holder()
    other.student.norm.register_load_state_dict_pre_hook(double)
    assert torch.equal(restored(other, checkpoint).student.norm.weight, 2 * expected["student.norm.weight"])
    assert torch.equal(other.student.first.weight, expected["student.first.weight"])


class KeepsGraph(Holder):
    """`weight_norm` keeps the weight that it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.student.last = nn.utils.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_kept_graph_does_not_hinder_loading(tmp_path: Path, kind: str) -> None:
    module, strategy = KeepsGraph(), TSPipeStrategy()
    module.student.last(torch.ones(1, 4))
    if kind == "full":
        torch.save({"state_dict": KeepsGraph().state_dict()}, tmp_path / "last.ckpt")
    else:
        save({"state_dict": KeepsGraph().state_dict()}, tmp_path / "last.ckpt", 0, None, alone=True)
    restored(module, strategy.load_checkpoint(tmp_path / "last.ckpt"))
    assert state_of(module.student.last.weight_g) == LENT


def test_weights_that_are_missing_are_named(saved: tuple[dict[str, Any], dict[str, Any], list[str]]) -> None:
    _, checkpoint, _ = saved
    del checkpoint["state_dict"]["student.last.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"student.last.bias\""):
        restored(Holder(), checkpoint)


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
