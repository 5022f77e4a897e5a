"""Modules that are built without memory, and what each rank holds of a network."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.memory import EMPTY, LENT, OWN, dropped, release, state_of, without_memory
from lightning_tspipe.refuse import check_values
from tests.scripts.small import loader, trainer, weights
from tests.scripts.zygote import Zygote

FILE = "weights.pt"


class Scale(nn.Module):
    """A layer without `reset_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8))

    def forward(self, value: Tensor) -> Tensor:
        return self.factor * value


def layers(*more: nn.Module) -> nn.Sequential:
    """Three layers of which the middle one has buffers."""
    return nn.Sequential(nn.Linear(4, 8), *more, nn.BatchNorm1d(8), nn.Linear(8, 2))


class Distil(TeacherStudentModule):
    """A distillation that is built in `__init__`, or in `configure_model`.

    Args:
        file: of both networks' weights; None loads none.
        build: makes one network.
        late: whether `configure_model` builds them.
        load_student: whether the student is in the file, too.
    """

    def __init__(
        self,
        file: Path | None = None,
        build: Callable[[], nn.Module] = layers,
        late: bool = False,
        load_student: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._file, self._build, self._load_student = file, build, load_student
        if not late:
            self.build()

    def build(self) -> None:
        """Both networks; a momentum teacher is a copy of its student."""
        self.build_networks()
        self.states = sorted({state_of(parameter) for parameter in self.parameters()})

    def build_networks(self) -> None:
        """See above."""
        self.student = self._build()
        saved = None if self._file is None else torch.load(self._file, mmap=True)
        if saved is not None and self._load_student:
            self.student.load_state_dict(saved["student"])
        if self.momentum is not None:
            self.teacher = copy.deepcopy(self.student)
            return
        self.teacher = self._build()
        if saved is not None:
            self.teacher.load_state_dict(saved["teacher"])

    def configure_model(self) -> None:
        if getattr(self, "student", None) is None:
            self.build()

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out - teacher_out - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), lr=0.01)


class Eyes(L.Callback):
    """Notes what its rank holds when the training starts, and the losses."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = itertools.chain(pl_module.named_parameters(), pl_module.named_buffers())
        self.start = {name: tensor.detach().clone() for name, tensor in named if not tensor.is_meta}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())


def fit(
    stages: int,
    make: Callable[[L.Trainer], Distil],
    balance: Any = "parameters",
    resume: Path | None = None,
    save: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One training of a few steps."""
    eyes = Eyes()
    run = trainer(
        stages,
        TSPipeStrategy(microbatches=2, balance=balance),
        callbacks=[eyes],
        **({"limit_train_batches": 3} | options),
    )
    torch.manual_seed(5)
    module = make(run)
    run.fit(module, loader(), ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    return {
        "start": eyes.start,
        "losses": eyes.losses,
        "whole": weights(module),
        "states": module.states,
    }


def empty(file: Path | None = None, **options: Any) -> Callable[[L.Trainer], Distil]:
    """Builds under `init_module`."""

    def make(run: L.Trainer) -> Distil:
        with run.init_module(empty_init=True):
            return Distil(file, **options)

    return make


def trains(rank: int, out: Path, stages: int, file: str) -> None:
    """One rank of every way to build, then of what is refused."""
    path = Path(file)
    found: dict[str, Any] = {
        "eager": fit(stages, lambda _: Distil(path)),
        "configure_model": fit(stages, lambda _: Distil(path, late=True)),
        "init_module": fit(stages, empty(path)),
        "reset": fit(stages, empty(path, load_student=False), "auto"),
        "momentum": fit(stages, lambda _: Distil(late=True, momentum=0.5), "auto", save=out / "momentum.ckpt"),
    }
    for late in (False, True):
        found[f"resumed {late}"] = fit(
            stages, lambda _, late=late: Distil(late=late, momentum=0.5), resume=out / "momentum.ckpt", max_epochs=2
        )
    refused: dict[str, Callable[[L.Trainer], Distil]] = {
        "no reset": empty(momentum=0.5, build=lambda: layers(Scale())),
        "no values": empty(),
    }
    for name, make in refused.items():
        with pytest.raises(MisconfigurationException) as caught:
            fit(stages, make)
        found[name] = str(caught.value)
    torch.save(found, out / f"{rank}.pt")


def ran(zygote: Zygote, out: Path, target: str, stages: int, **arguments: Any) -> list[Any]:
    """What every rank returned."""
    out.mkdir()
    codes = zygote.run(f"tests.test_memory:{target}", stages, out, stages=stages, **arguments)
    assert codes == [0] * stages, "\n".join((out / f"{rank}.txt").read_text() for rank in range(stages))
    return [torch.load(out / f"{rank}.pt") for rank in range(stages)]


@pytest.fixture(scope="module")
def trained(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By number of stages what every rank found."""
    folder = tmp_path_factory.mktemp("memory")
    torch.manual_seed(1)
    torch.save({name: layers().state_dict() for name in ("student", "teacher")}, folder / FILE)
    return {stages: ran(zygote, folder / str(stages), "trains", stages, file=str(folder / FILE)) for stages in (2, 3)}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("way", ["configure_model", "init_module"])
@pytest.mark.parametrize("stages", [2, 3])
def test_weights_from_a_file_train_as_in_a_module_that_was_built_with_memory(
    trained: dict[int, list[Any]], way: str, stages: int
) -> None:
    for rank in trained[stages]:
        equal(rank[way]["start"], rank["eager"]["start"])
        equal(rank[way]["whole"], rank["eager"]["whole"])
        assert list(map(float, rank[way]["losses"])) == list(map(float, rank["eager"]["losses"]))
        assert len(rank[way]["losses"]) == 3
        changed = rank["eager"]["whole"]["student.0.weight"]
        assert not torch.equal(changed, trained[stages][0]["eager"]["start"]["student.0.weight"])


def test_nothing_has_memory_of_its_own_before_the_set_up(trained: dict[int, list[Any]]) -> None:
    expected = {
        "eager": [OWN],
        "configure_model": [LENT],
        "init_module": [LENT],
        "reset": sorted([EMPTY, LENT]),
        "momentum": [EMPTY],
    }
    for ranks in trained.values():
        for rank in ranks:
            assert {way: rank[way]["states"] for way in expected} == expected


@pytest.mark.parametrize("way", ["eager", "configure_model", "init_module", "reset", "momentum"])
def test_the_module_is_whole_after_fit(trained: dict[int, list[Any]], way: str) -> None:
    for ranks in trained.values():
        for rank in ranks:
            equal(rank[way]["whole"], ranks[0][way]["whole"])
            assert not any(tensor.is_meta for tensor in rank[way]["whole"].values())


def test_a_module_without_memory_resumes_as_one_with(trained: dict[int, list[Any]]) -> None:
    for ranks in trained.values():
        for rank in ranks:
            late, eager = rank["resumed True"], rank["resumed False"]
            equal(late["start"], eager["start"])
            equal(late["whole"], eager["whole"])
            assert not torch.equal(late["whole"]["student.0.weight"], rank["momentum"]["whole"]["student.0.weight"])


@pytest.mark.parametrize("way", ["reset", "momentum"])
def test_values_that_are_made_do_not_depend_on_the_number_of_stages(trained: dict[int, list[Any]], way: str) -> None:
    starts = []
    for ranks in trained.values():
        start: dict[str, Tensor] = {}
        for rank in ranks:
            start |= rank[way]["start"]
        starts.append(start)
        bound = 8**-0.5  # of nn.Linear
        assert 0.8 * bound < start["student.2.weight"].abs().max() <= bound
        assert torch.equal(start["student.1.weight"], torch.ones(8))
        assert torch.equal(start["student.1.running_var"], torch.ones(8))
    two, three = starts
    equal(dict(sorted(two.items())), dict(sorted(three.items())))
    if way == "reset":
        assert not torch.equal(two["student.0.weight"], two["teacher.0.weight"])


def test_a_momentum_teacher_begins_as_its_student(trained: dict[int, list[Any]]) -> None:
    for ranks in trained.values():
        for rank in ranks:
            start = rank["momentum"]["start"]
            names = [name for name in start if name.startswith("student.")]
            assert names
            for name in names:
                assert torch.equal(start[name], start[name.replace("student.", "teacher.", 1)]), name


def test_values_that_can_come_from_nowhere_are_refused_on_every_rank(trained: dict[int, list[Any]]) -> None:
    for ranks in trained.values():
        for rank in ranks:
            assert (
                "'student.1.factor' was built without memory, and Scale has no `reset_parameters`" in rank["no reset"]
            )
            assert "Write that method, load a state dict" in rank["no reset"]
            assert "The teacher is frozen, and nothing was loaded into its '0.weight'" in rank["no values"]
            assert "Load its weights where it is built" in rank["no values"]


class Wished(nn.Sequential):
    """Gives its layers other values than they give themselves."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.MultiheadAttention(2, 1), nn.Linear(2, 2))
        nn.init.ones_(self[0].weight)
        nn.init.kaiming_normal_(self[2].weight)


def test_what_a_constructor_wanted_is_known() -> None:
    with without_memory():
        network = Wished()
    assert dropped(network) == ["0.weight", "2.weight"]
    network.load_state_dict(Wished().state_dict(), assign=True)
    assert dropped(network) == []


def test_rank_0_warns_of_what_a_constructor_wanted() -> None:
    with without_memory(L.LightningModule):
        module = Distil(build=Wished, momentum=0.5)
    with pytest.warns(UserWarning, match=r"'student.0.weight' was built without memory, so .* is lost \(2 such"):
        check_values(module)


def test_a_module_of_a_failed_run_is_refused() -> None:
    module = Distil()
    release(module.student[2].weight)
    with pytest.raises(MisconfigurationException, match=r"'student.2.weight' is lost: .* Build the module anew"):
        check_values(module)
