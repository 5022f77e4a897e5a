"""One ordinary Lightning checkpoint: resumed training is uninterrupted training, bit by bit, wherever it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from lightning_tspipe import TSPipeStrategy, cosine_momentum
from tests.multiproc import result_of
from tests.scripts.small import Small, loader, network, trainer
from tests.scripts.zygote import Zygote

AUTO = 0  # stages that stand for strategy="auto"


class Exact(Small):
    """In float64, with two groups and a scheduler."""

    def __init__(self, adam: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.adam = adam
        self.double()

    def student_input(self, batch: Any) -> Any:
        return batch[0].double()

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.student[0].parameters()}, {"params": self.student[1:].parameters(), "lr": 0.03}]
        adam = torch.optim.AdamW(groups, lr=0.01)
        optimizer = adam if self.adam else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(
    folder: Path, stages: int, epochs: int, resume: Path | None = None, microbatches: int = 2, **module: Any
) -> Path:
    """Train until so many epochs have been made, in this process and its forks; the last checkpoint."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    strategy: Any = "auto"
    if stages != AUTO:
        strategy = TSPipeStrategy(microbatches=microbatches, start_method="fork")
    run = trainer(max(1, stages), strategy, max_epochs=epochs, callbacks=[keep], enable_checkpointing=True)
    run.fit(Exact(**module), loader(), ckpt_path=resume)
    return folder / f"epoch={epochs - 1}.ckpt"


def read(file: Path) -> dict[str, Any]:
    return dict(torch.load(file, weights_only=True))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nesting as one dict by path."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, child in items for path, leaf in flat(child, f"{name}/{key}").items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Equal keys in equal order, equal values, tensors bit by bit."""
    one, other = flat(found[what]), flat(expected[what])
    assert list(one) == list(other)
    for path, value in other.items():
        same = torch.equal(one[path], value) if isinstance(value, Tensor) else one[path] == value
        assert same, (what, path, one[path], value)


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


@pytest.mark.parametrize(
    "module",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "teacher_delay": 0, "adam": True},
        {"momentum": 0.7, "delay_from_step": 12, "adam": True},
    ],
    ids=["frozen", "late", "exact", "late from step 12"],
)
def test_resumed_training_is_uninterrupted_training(tmp_path: Path, module: dict[str, Any]) -> None:
    def trainings() -> None:
        fit(tmp_path / "whole", 2, 3, **module)
        for before, after in ((2, 2), (2, 3), (3, 1), (1, 2)):
            folder, first = tmp_path / f"{before} {after}", tmp_path / "whole/epoch=0.ckpt"
            if before != 2:
                first = fit(folder / "first", before, 1, **module)
            fit(folder, after, 3, first, **module)

    result_of(trainings, timeout=100)
    expected = read(tmp_path / "whole/epoch=2.ckpt")
    assert expected["global_step"] == 3 * 8
    start = read(tmp_path / "whole/epoch=0.ckpt")
    assert not torch.equal(start["state_dict"]["student.0.weight"], expected["state_dict"]["student.0.weight"])
    for name in ("2 2", "2 3", "3 1", "1 2"):
        for part in PARTS:
            assert_same(read(tmp_path / name / "epoch=2.ckpt"), expected, part)


@pytest.mark.parametrize("module", [{}, {"momentum": 0.9, "teacher_delay": 1}, {"momentum": 0.9, "teacher_delay": 0}])
def test_plain_lightning_goes_on_and_gives_back(tmp_path: Path, module: dict[str, Any]) -> None:
    def trainings() -> None:
        fit(tmp_path / "auto", AUTO, 3, **module)
        first = fit(tmp_path / "1", 2, 1, microbatches=1, **module)
        second = fit(tmp_path / "2", AUTO, 2, first, **module)
        fit(tmp_path / "3", 2, 3, second, microbatches=1, **module)

    result_of(trainings, timeout=100)
    expected = read(tmp_path / "auto/epoch=2.ckpt")
    for part in PARTS:
        assert_same(read(tmp_path / "3/epoch=2.ckpt"), expected, part)


def test_the_file_is_that_of_plain_lightning(tmp_path: Path) -> None:
    def trainings() -> None:
        for adam in (False, True):
            fit(tmp_path / f"auto {adam}", AUTO, 1, adam=adam)
            fit(tmp_path / f"pipe {adam}", 3, 1, microbatches=1, adam=adam)

    result_of(trainings)
    for adam in (False, True):
        plain, ours = read(tmp_path / f"auto {adam}/epoch=0.ckpt"), read(tmp_path / f"pipe {adam}/epoch=0.ckpt")
        assert set(ours) == {*plain, "tspipe"}
        for part in PARTS:
            assert_same(ours, plain, part)


class TestTeacher:
    """Whether the file holds the teacher, and what loading makes of its absence."""

    @pytest.mark.parametrize(
        ("module", "held"),
        [
            ({}, False),
            ({"save_teacher": True}, True),
            ({"momentum": 0.9}, True),
            ({"momentum": 0.9, "save_teacher": False}, False),
        ],
    )
    def test_it_is_there_or_not(self, tmp_path: Path, module: dict[str, Any], held: bool) -> None:
        result_of(lambda: fit(tmp_path, 2, 1, **module))
        keys = list(read(tmp_path / "epoch=0.ckpt")["state_dict"])
        expected = [*Exact().student.state_dict(prefix="student."), *Exact().teacher.state_dict(prefix="teacher.")]
        assert sorted(keys) == sorted(key for key in expected if held or key.startswith("student."))

    def test_loading_tolerates_exactly_its_absence(self, tmp_path: Path) -> None:
        result_of(lambda: fit(tmp_path, 2, 1))
        file = tmp_path / "epoch=0.ckpt"
        content = read(file)
        module = Exact.load_from_checkpoint(file)
        for name, value in content["state_dict"].items():
            assert torch.equal(module.state_dict()[name], value)
        for name, parameter in Exact().teacher.named_parameters():
            assert torch.equal(module.teacher.get_parameter(name), parameter)
        del content["state_dict"]["student.1.bias"]
        torch.save(content, file)
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "student\.1\.bias"\.'):
            Exact.load_from_checkpoint(file)


class Tuned(Exact):
    """Has hyperparameters, among them the momentum, logs, and evaluates."""

    def __init__(self, momentum: Any = None) -> None:
        super().__init__(momentum=momentum, teacher_delay=1, adam=True)
        self.save_hyperparameters()

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = super().loss(student_out, teacher_out, target)
        self.log("gap", (loss.detach() * 1e4) % 1, on_epoch=True)  # neither rises nor falls
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("out", self.student(batch[0].double()).sum())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.student(batch[0].double()).sum())


def keep(rank: int, out: Path, twin: bool = False) -> None:
    """One rank that uses all of `ModelCheckpoint`, every way to load, and `save_checkpoint` after `fit`."""
    best = ModelCheckpoint(out, "{epoch}-{gap:.6f}", "gap", save_top_k=2, save_last=True)
    often = ModelCheckpoint(out, "step-{step}", every_n_train_steps=12, save_top_k=-1, save_weights_only=True)
    stopping = EarlyStopping("gap", patience=9)

    def make(epochs: int, *callbacks: Any) -> Any:
        strategy: Any = "auto" if twin else TSPipeStrategy(microbatches=1)
        return trainer(1 if twin else 2, strategy, max_epochs=epochs, callbacks=[*callbacks], enable_checkpointing=True)

    run, module = make(4, best, often, stopping), Tuned(cosine_momentum(0.9, 1.0, 40))
    run.fit(module, loader(), loader(8))
    run.save_checkpoint(out / "after.ckpt")
    run.save_checkpoint(out / "light.ckpt", weights_only=True)
    seen: dict[str, Any] = {
        "best": best.best_model_path,
        "last": best.last_model_path,
        "score": float(best.best_model_score),
    }
    run.test(module, loader(8), ckpt_path="best", verbose=False)
    seen["out"] = float(run.callback_metrics["out"])
    run.validate(module, loader(8), ckpt_path="last", verbose=False)
    seen["val"] = float(run.callback_metrics["val"])
    seen["predicted"] = run.predict(module, [next(iter(loader(8)))[0].double()], ckpt_path=out / "light.ckpt")
    for path in (out / "after.ckpt", out / "last.ckpt"):
        again = make(5, ModelCheckpoint(out, f"{path.stem} {{epoch}}"), EarlyStopping("gap", patience=9))
        again.fit(Tuned(cosine_momentum(0.9, 1.0, 40)), loader(), loader(8), ckpt_path=path)
        seen[f"waited {path.stem}"] = again.early_stopping_callback.wait_count
    partial = read(out / "light.ckpt")
    del partial["state_dict"]["student.1.bias"]
    run.strategy.barrier()
    if rank == 0:
        torch.save(partial, out / "partial.ckpt")
    run.strategy.barrier()
    with pytest.raises(RuntimeError, match=r"student\.1\.bias"):
        make(1).test(Tuned(), loader(8), ckpt_path=out / "partial.ckpt", verbose=False)
    lenient = Tuned()
    lenient.strict_loading = False
    make(1).test(lenient, loader(8), ckpt_path=out / "partial.ckpt", verbose=False)
    torch.save(seen, out / f"{rank}.seen")


def test_model_checkpoint_and_every_way_to_load_are_those_of_plain_lightning(zygote: Zygote, tmp_path: Path) -> None:
    """The same files with the same values, the same best and last one, the same results, on every rank."""
    (tmp_path / "pipe").mkdir()
    (tmp_path / "auto").mkdir()
    result_of(lambda: keep(0, tmp_path / "auto", twin=True))
    assert zygote.run("tests.test_checkpoint:keep", 2, tmp_path / "pipe") == [0, 0]

    def seen(folder: str, rank: int) -> Any:
        found = torch.load(tmp_path / folder / f"{rank}.seen")
        return {str(key).replace(folder, ""): str(value).replace(folder, "") for key, value in found.items()}

    assert seen("pipe", 0) == seen("pipe", 1) == seen("auto", 0)
    names = sorted(path.name for path in (tmp_path / "auto").glob("*.ckpt"))
    assert names == sorted(path.name for path in (tmp_path / "pipe").glob("*.ckpt"))
    assert sum(name.startswith("epoch=") for name in names) == 2
    assert {"last.ckpt", "step-step=12.ckpt", "after epoch=4.ckpt", "last epoch=4.ckpt"} < set(names)
    for name in names:
        ours, plain = read(tmp_path / "pipe" / name), read(tmp_path / "auto" / name)
        assert set(ours) - {"tspipe"} == set(plain)
        assert ("tspipe" in ours) == ("optimizer_states" in plain)
        for part in (*PARTS, "loops", "hyper_parameters"):
            if part in plain:
                assert_same(ours, plain, part)
    for part in PARTS:  # a file that was written after `fit` resumes like one from within
        after, last = (read(tmp_path / f"pipe/{name} epoch=4.ckpt") for name in ("after", "last"))
        assert_same(after, last, part)
    module = Tuned.load_from_checkpoint(tmp_path / "pipe/last.ckpt")
    assert module.hparams.momentum == module.momentum == cosine_momentum(0.9, 1.0, 40)
    last = read(tmp_path / "pipe/last.ckpt")["state_dict"]
    assert all(torch.equal(value, last[name]) for name, value in module.state_dict().items())


class Regrouped(Exact):
    """The same parameters in other groups: the first layer's bias has moved."""

    def configure_optimizers(self) -> Any:
        first, *rest = self.student.parameters()
        return torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1, momentum=0.9)


def resume_regrouped(rank: int, out: Path, file: str) -> None:
    """One rank that resumes with other groups; it writes the error that it gets."""
    try:
        trainer(2, max_epochs=2).fit(Regrouped(), loader(), ckpt_path=file)
    except ValueError as error:
        (out / f"{rank}.err").write_text(str(error))
        raise


def test_other_optimizer_groups_are_refused_on_every_rank(zygote: Zygote, tmp_path: Path) -> None:
    """The state of one parameter would be given to another."""
    file = result_of(lambda: str(fit(tmp_path, 2, 1)))
    assert zygote.run("tests.test_checkpoint:resume_regrouped", 2, tmp_path, file=file) == [1, 1]
    for rank in range(2):
        text = (tmp_path / f"{rank}.err").read_text()
        assert "has groups of [2, 4] parameters, configure_optimizers gives groups of [1, 5]" in text


class Counting(nn.Linear):
    """A layer with a state of its own making."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x) if self.training else 0
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "sum": self.weight.detach().sum()}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class Counted(Exact):
    """Such a layer in both networks."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = (nn.Sequential(Counting(4, 8), *network(8, 8, 2)).double() for _ in range(2))


def count(rank: int, out: Path) -> None:
    """One rank that trains an epoch and then another one; it writes what the module says after each."""
    keep = ModelCheckpoint(out, filename="{epoch}", save_top_k=-1)
    for epoch in (0, 1):
        module = Counted()
        run = trainer(2, max_epochs=epoch + 1, callbacks=[keep], enable_checkpointing=True)
        run.fit(module, loader(), ckpt_path=out / "epoch=0.ckpt" if epoch else None)
        (out / f"{rank}.{epoch}").write_text(str(module.student[0].seen))


def test_extra_states_are_those_of_the_rank_that_has_the_layer(zygote: Zygote, tmp_path: Path) -> None:
    """In the file, after a resume, and in the module after `fit`, on every rank."""
    assert zygote.run("tests.test_checkpoint:count", 2, tmp_path) == [0, 0]
    for epoch, rows in ((0, 32), (1, 64)):
        assert read(tmp_path / f"epoch={epoch}.ckpt")["state_dict"]["student.0._extra_state"]["seen"] == rows
        assert [int((tmp_path / f"{rank}.{epoch}").read_text()) for rank in range(2)] == [rows, rows]
