"""What layers cost, the plan that follows from it, and fits that are cut by it."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.vision_transformer import VisionTransformer

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy, measure
from lightning_tspipe.balance import Chain, joint_cut
from lightning_tspipe.measure import LayerCost, MessageCost, Meter, Peak, fastest
from lightning_tspipe.partition import find_layers
from lightning_tspipe.placement import Placement
from lightning_tspipe.placing import chain_of, check_same
from lightning_tspipe.schedule import Costs
from tests.multiproc import Fit, run_fits
from tests.scripts.small import loader, network
from tests.scripts.zygote import Zygote

LONG = 0.01  # seconds of a layer that waits: far more than any noise


class _Wait(torch.autograd.Function):
    """Passes on; its forward lasts `seconds`, its backward three times that."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        time.sleep(3 * ctx.seconds)
        return grads[0], None


class Slow(nn.Linear):
    """A linear layer that lasts."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width, width)

    def forward(self, value: Tensor) -> Tensor:
        return _Wait.apply(super().forward(value), LONG)


class Tracks(nn.Module):
    """A layer whose forward leaves traces: a count, a buffer, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, value: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.mean + value.detach().mean(0)
        return value + torch.rand(())


class Positions(nn.Module):
    """A layer that gives a part of its buffer, as BERT's embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(8.0)[None])

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value + 1, self.places[:, : value.shape[1]]


def test_a_layer_may_give_a_view_of_its_buffer() -> None:
    """The buffer is put back though the next layer, or the next measurement, still has the view."""
    layer, meter = Positions(), Meter(torch.device("cpu"))
    before = layer.places
    for _ in range(2):
        for views, _ in (
            meter.teacher(layer, [layer.places], [torch.randn(3, 4)]),
            meter.student(layer, [layer.places], [torch.randn(3, 4)], first=False),
        ):
            assert torch.equal(views[0][1], torch.arange(4.0)[None])
    assert layer.places is before


def test_a_measurement_leaves_no_trace() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Tracks())
    before = copy.deepcopy(layer.state_dict())
    tensors = [*layer.parameters(), *layer.buffers()]
    identities = {name: id(value) for name, value in (*layer.named_parameters(), *layer.named_buffers())}
    views, cost = Meter(torch.device("cpu")).student(layer, tensors, [torch.randn(3, 4)], first=False)
    assert views[0].shape == (3, 4)
    assert not views[0].requires_grad
    assert min(cost.forward, cost.inputs, cost.weights) >= 0 < cost.forward
    assert layer[2].count == 0
    assert min(cost.first, cost.rest) > 0
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name: id(v) for name, v in (*layer.named_parameters(), *layer.named_buffers())} == identities
    assert all(parameter.grad is None for parameter in layer.parameters())
    for tensor in layer.parameters():  # nothing holds on to it: it can still be taken off this rank
        torch.utils.swap_tensors(tensor, nn.Parameter(torch.empty_like(tensor, device="meta")))


def test_bytes_are_counted_once() -> None:
    """What two layers save is counted with the first; parameters are not; nor is what nobody saves."""
    meter = Meter(torch.device("cpu"))
    first, second, third = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)
    views: list[Any] = [torch.randn(5, 4)]
    costs = []
    for layer in (first, second, third):
        views, cost = meter.student(layer, list(layer.parameters()), views, first=layer is first)
        costs.append(cost)
    assert [cost.held for cost in costs] == [5 * 4 * 4, 5 * 8 * 4, 0]
    # a split backward needs the input and the gradient of a product; there is nothing to split in the first layer
    assert [cost.pending for cost in costs] == [5 * 8 * 4, 0, 5 * (8 + 2) * 4]
    assert [cost.keeps_graph for cost in costs] == [True, False, False]
    assert [cost.sent for cost in costs] == [5 * 8 * 4, 5 * 8 * 4, 5 * 2 * 4]
    assert [cost.parameters for cost in costs] == [(4 * 8 + 8) * 4, 0, (8 * 2 + 2) * 4]
    assert [cost.trained for cost in costs] == [cost.parameters for cost in costs]


def test_weights_without_memory_are_measured() -> None:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    tensors = [*layer.parameters(), *layer.buffers()]
    views, cost = Meter(torch.device("cpu")).teacher(layer, tensors, [torch.randn(3, 4), torch.randn(2, 4)])
    assert [len(view) for view in views] == [3, 2]
    assert cost.forward > 0
    assert cost.inputs == cost.weights == cost.trained == 0
    # per row the input, and what the two layers give; per view the mean and the deviation of the batch, of 4 channels
    assert cost.held == 5 * 3 * 4 * 4 + 2 * 2 * 4 * 4
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


def test_a_forward_takes_what_it_makes_and_has_not_let_go_of() -> None:
    layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Flatten(), nn.ReLU(inplace=True))
    value = torch.randn(3, 4)
    with torch.no_grad(), Peak() as peak:
        output = layer(value)
        assert peak.most == 2 * 3 * 8 * 4  # a linear layer's output and the function's
        value = layer[0](value)
        assert peak.most == 2 * 3 * 8 * 4
        output = layer[0](torch.randn(6, 4))
        assert peak.most == (3 * 2 + 3 * 8 + 6 * 4 + 6 * 8) * 4  # the first `output` goes only when it is replaced
        del output, value


def test_each_layers_fastest_pass_over_all_counts() -> None:
    """With all that was timed in that pass, so that a backward's two parts stay of one; bytes are of the first one."""
    passes = iter([
        ("first", [LayerCost(3.0, 1.0, 1.0, held=7), LayerCost(1.0, 0.0, 1.0)]),
        ("second", [LayerCost(1.0, 2.0, 1.0), LayerCost(2.0, 0.0, 1.0)]),
        ("third", [LayerCost(1.0, 1.0, 2.5), LayerCost(1.0, 0.5, 1.0)]),
    ])  # fmt: skip
    value, costs = fastest(lambda: next(passes))
    assert value == "third"
    assert costs == [LayerCost(1.0, 2.0, 1.0, held=7), LayerCost(1.0, 0.0, 1.0)]
    assert next(passes, None) is None


def test_passes_are_told_apart() -> None:
    """The wait of a backward belongs to the inputs; the first layer of all has none of them."""
    meter, layer = Meter(torch.device("cpu")), Slow()
    _, within = meter.student(layer, list(layer.parameters()), [torch.randn(2, 4)], first=False)
    assert within.forward >= LONG
    assert within.inputs >= 3 * LONG
    assert within.first >= 3 * LONG > within.rest
    _, first = meter.student(layer, list(layer.parameters()), [torch.randn(2, 4)], first=True)
    assert first.inputs == 0
    assert first.weights >= 3 * LONG
    assert first.rest >= 3 * LONG > first.first


def test_a_forward_that_runs_again_moves_the_cut() -> None:
    """Its seconds count twice; and of what is in flight only what goes in and out of a stage."""
    passes = (8.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 5.0, 5.0)
    costs = [
        LayerCost(*of, held=held, sent=3, parameters=4, trained=2, received=received)
        for of, held, received in zip(passes, (8, 16, 32), (1, 2, 3), strict=True)
    ]
    kept = chain_of(costs, MessageCost(), 2)
    assert (kept.seconds, kept.held, kept.passed) == ([10.0, 4.0, 11.0], [8, 16, 32], ())
    again = chain_of(costs, MessageCost(), 2, recompute=True, keeps_inputs=True)
    assert (again.seconds, again.held, again.passed) == ([18.0, 5.0, 12.0], [8, 16, 32], [1, 2, 3, 3])
    assert again.weights == kept.weights == [4 + 3 * 2] * 3
    assert chain_of(costs, MessageCost(), 2, recompute=True).passed == ()  # a split backward keeps all for W
    teacher = Chain([0.0, 0.0])
    assert [joint_cut(chain, teacher, 2)[0] for chain in (kept, again)] == [[2, 1], [1, 2]]


# --- fits


class Uneven(TeacherStudentModule):
    """The layers that take long are those with few parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        torch.manual_seed(0)
        fast = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 4))
        self.student = nn.Sequential(Slow(), Slow(), *fast)
        self.teacher = nn.Sequential(Slow(), nn.Linear(4, 4), nn.Linear(4, 4), Slow())
        if self.momentum is not None:
            self.teacher = copy.deepcopy(self.student)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out - teacher_out).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


class Shown(L.Callback):
    """The plan that each rank ran by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        strategy: Any = trainer.strategy
        strategy.placement.save(self.folder / f"{trainer.global_rank}.json")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        strategy: Any = trainer.strategy
        (self.folder / f"{trainer.global_rank}.plan").write_text(str(strategy.plan))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_fit_is_cut_by_time(tmp_path: Path, momentum: float | None) -> None:
    """Both slow layers of each network are shared out; by parameters they would be on one rank."""

    def make() -> Uneven:
        return Uneven(momentum=momentum)

    options: dict[str, Any] = {"callbacks": [Shown(tmp_path)], "limit_train_batches": 2}
    strategy = {"balance": "auto", "recompute": momentum is not None}
    run_fits([Fit(make, loader, 2, 2, strategy=strategy, trainer=options)])
    ours, other = (Placement.load(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert ours == other
    assert len(ours.student[0]) == 1
    assert len(ours.teacher[0]) == 1 if momentum else len(ours.teacher[0]) in (1, 2, 3)
    assert min(ours.t) >= LONG
    assert min(ours.f) >= LONG
    assert min(b + w for b, w in zip(ours.b, ours.w, strict=True)) >= 3 * LONG
    assert min(ours.messages) > 0
    assert ours.recompute == (momentum is not None)
    assert ours.passed == (64.0, 64.0)  # two rows of four numbers, in and out
    by_parameters = {"balance": "parameters"}
    run_fits([Fit(make, loader, 2, 2, strategy=by_parameters, trainer=options)])
    assert len(Placement.load(tmp_path / "0.json").student[0]) > 2
    assert not Placement.load(tmp_path / "0.json").t


class Steady(nn.Linear):
    """A linear layer whose passes last as long with few rows as with many."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        return _Wait.apply(super().forward(value), LONG / 2)


class AllSteady(Uneven):
    """Networks of such layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student, self.teacher = (nn.Sequential(Steady(), Steady()) for _ in range(2))


def one_batch(rows: int = 24) -> DataLoader[Any]:
    """All rows at once."""
    return DataLoader(TensorDataset(torch.randn(rows, 4)), batch_size=rows)


def test_a_fit_measures_at_two_sizes(tmp_path: Path) -> None:
    """In proportion to the rows 4 microbatches would fill the bubbles; here each takes as long as half a batch."""
    options: dict[str, Any] = {"callbacks": [Shown(tmp_path)], "max_steps": 1}
    run_fits([Fit(AllSteady, one_batch, 2, "auto", strategy={"balance": "auto"}, trainer=options)])
    found = Placement.load(tmp_path / "0.json")
    assert found.microbatches == 2
    assert found.rows == 12
    assert min(found.fixed[0]) >= LONG / 4


def test_the_teacher_has_fewer_microbatches_if_each_takes_a_fixed_time(tmp_path: Path) -> None:
    """Where all passes last as long with any rows, four forwards of it fill the bubbles; in mode train it keeps the
    student's eight."""
    for mode, count in (("eval", 4), ("train", 8)):
        fit = Fit(
            partial(AllSteady, teacher_mode=mode), partial(one_batch, 96), 2, 8, strategy={"balance": "auto"},
            trainer={"callbacks": [Shown(tmp_path)], "max_steps": 1},
        )  # fmt: skip
        run_fits([fit])
        found = Placement.load(tmp_path / "0.json")
        assert (found.microbatches, found.teacher_microbatches) == (8, count)
        assert bool(found.fixed) == (mode == "eval")
        assert min(found.teacher_held) > 0
        assert f"teacher_microbatches={count}" in (tmp_path / "0.plan").read_text() or count == 8


def follow(rank: int, out: Path, plan: Placement, **options: Any) -> Any:
    """Fit by a saved plan; the trainer and its strategy."""
    torch.set_num_threads(1)
    plan.save(out / f"given{rank}.json")
    strategy = TSPipeStrategy(microbatches=2, balance=str(out / f"given{rank}.json"), **options)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Shown(out)],
    )  # fmt: skip
    trainer.fit(Uneven(), loader())
    return trainer, strategy


NAMES, ONES = tuple("01234"), (1.0, 1.0)
GIVEN = Placement(
    (NAMES[:4], NAMES[4:]), (("0", "1", "2"), ("3",)), ONES, (2.0, 3.0), ONES, ONES, ONES,
    weights=(7.0, 7.0), held=(50.0, 50.0), passed=(5.0, 5.0),
)  # fmt: skip


def give_back(rank: int, out: Path) -> None:
    """A plan in which all slow layers are on one rank.

    There is room for two microbatches only if of one of them nothing but what goes in and out of the stage is there.
    """
    trainer, strategy = follow(rank, out, GIVEN, recompute=True, max_memory=67)
    strategy._max_memory = 61
    with pytest.raises(ValueError, match="A microbatch takes 5 bytes on rank 0, more than the 4"):
        trainer.fit(Uneven(), loader())


def give_back_parts(rank: int, out: Path) -> None:
    """A plan that says that the two parts of a backward take no more than the whole, and little can fill holes."""
    follow(rank, out, replace(GIVEN, t=(0.1, 0.1), f=ONES, first=ONES, rest=ONES))


def test_a_saved_plan_is_followed(zygote: Zygote, tmp_path: Path) -> None:
    assert zygote.run("tests.test_measure:give_back", 2, tmp_path) == [0, 0]
    for rank in (0, 1):
        found = Placement.load(tmp_path / f"{rank}.json")
        assert found.sizes == ([4, 1], [3, 1])
        assert found.recompute  # of this run, not of the one that was measured
        assert found.costs == Costs((1.0, 1.0), (2.0, 3.0), (1.0, 4.0), (3.0, 1.0))
        assert found.busy == [1 + 2 + 2 + 1 + 1 + 1, 1 + 3 + 3 + 1 + 1 + 1]
        header, _, row, _ = found.table().splitlines()
        titles, cells = ([cell.strip() for cell in line.split("|")] for line in (header, row))
        assert titles[3:] == ["T ms", "F ms", "F again ms", "I ms", "W ms", "messages ms", "sum ms", "weights MiB",
                              "microbatch MiB", "recomputed MiB"]  # fmt: skip
        assert cells[3:9] == ["1000.00", "2000.00", "2000.00", "1000.00", "1000.00", "1000.00"]


def test_a_saved_plan_may_split_the_backward(zygote: Zygote, tmp_path: Path) -> None:
    assert zygote.run("tests.test_measure:give_back_parts", 2, tmp_path) == [0, 0]
    for rank in (0, 1):
        assert "I0 I1 W0 W1" in (tmp_path / f"{rank}.plan").read_text()
    parts = replace(GIVEN, first=ONES, rest=(2.0, 2.0), recompute=True).costs
    assert parts == Costs((1.0, 1.0), (2.0, 3.0), (0.0, 4.0), (4.0, 2.0), whole=(4.0, 5.0))


def keep_number(rank: int, out: Path) -> None:
    """Two stages choose a number of microbatches, three go on with it, and a number that is given comes before it."""
    torch.set_num_threads(1)
    measure.REPEATS = 1  # exact times do not matter here

    def fit(stages: int, resume: Path | None, microbatches: int | str = "auto") -> int | None:
        strategy = TSPipeStrategy(stages, microbatches=microbatches, start_method="fork")  # type: ignore[arg-type]
        trainer = L.Trainer(
            accelerator="cpu", devices=stages, strategy=strategy, max_steps=2 if resume else 1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[Shown(out), Saved(out / "last.ckpt")],
        )  # fmt: skip
        trainer.fit(Uneven(), loader(24, 12), ckpt_path=None if resume is None else str(resume))
        return Placement.load(out / "0.json").microbatches

    first = fit(2, None)
    numbers = [first, fit(3, out / "last.ckpt"), fit(2, out / "last.ckpt", 5)]
    (out / "numbers.txt").write_text(" ".join(map(str, numbers)))


class Saved(L.Callback):
    """A checkpoint of the first step, made on all ranks."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.file)


def test_a_resumed_run_keeps_its_microbatches(zygote: Zygote, tmp_path: Path) -> None:
    """What was measured again would give another number, and batch norms other microbatches."""
    assert zygote.run("tests.test_measure:keep_number", 1, tmp_path) == [0]
    first, second, third = map(int, (tmp_path / "numbers.txt").read_text().split())
    assert first == second
    assert third == 5


def test_a_limit_of_memory_moves_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage may not hold all the large layers, however fast they are; too little is an error."""
    monkeypatch.setattr(measure, "REPEATS", 1)  # exact times do not matter here
    whole = 4 * sum(p.numel() for p in Uneven().student.parameters())
    options: dict[str, Any] = {"callbacks": [Shown(tmp_path)], "limit_train_batches": 1}
    strategy = {"balance": "auto", "max_memory": int(4 * whole * 0.97)}
    run_fits([Fit(Uneven, loader, 2, 2, strategy=strategy, trainer=options)])
    found = Placement.load(tmp_path / "0.json")
    assert len(found.student[0]) > 1
    assert max(found.weights) <= strategy["max_memory"]  # type: ignore[operator]
    refused = {"balance": "auto", "max_memory": 100, "recompute": True}
    text = r"No cut into 2 stages keeps max_memory=100 bytes per rank: .* Use more stages or smaller microbatches\."
    with pytest.raises(AssertionError, match=text):
        run_fits([Fit(Uneven, loader, 2, 2, strategy=refused, trainer=options)])


class Drops(TeacherStudentModule):
    """Random numbers in both networks."""

    def __init__(self, followed: bool) -> None:
        super().__init__(teacher_mode="train")
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(4)]
        self.student: nn.Module = nn.Sequential(*layers)
        if followed:
            self.student = VisionTransformer(16, 8, 3, 2, 8, 16, dropout=0.3, attention_dropout=0.2, num_classes=4)
            nn.init.normal_(self.student.heads.head.weight)  # it is zero otherwise
        self.teacher = copy.deepcopy(self.student)

    def student_input(self, batch: Any) -> Any:
        return batch[0] if isinstance(self.student, nn.Sequential) else batch[0].mean(1)[:, None, None, None].expand(
            -1, 3, 16, 16
        )  # fmt: skip

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out - teacher_out).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


@pytest.mark.parametrize("followed", [False, True])
def test_dropout_does_not_depend_on_the_cuts(followed: bool) -> None:
    """Nor on their number: a run with measured cuts can be repeated, and resumed on other devices."""
    count = len(find_layers(Drops(followed).student, nn.Identity(), 2, {}, None, lambda _: [torch.ones(2, 3, 16, 16)])
                .student)  # fmt: skip
    cuts = [1, count - 1], [count - 1, 1], [1, 1, count - 2]
    fits = [Fit(lambda: Drops(followed), loader, len(sizes), 2, strategy={"balance": sizes}) for sizes in cuts]
    expected, *others = [ranks[0] for ranks in run_fits(fits)]
    assert len({float(loss) for loss in expected["losses"]}) > 1
    for found in others:
        assert found["losses"] == expected["losses"]
        for name, value in expected["whole"].items():
            assert torch.equal(found["whole"][name], value), name


# --- the plan as a table and as a file


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    plan = Placement((("a",), ("b", "c")), (("x",), ("y",)), (1e-3, 2e-3), (3e-3, 4e-3), (0.0, 0.0), (0.0, 0.0),
                     (0.0, 1e-3), 1e-3, (2.0**20, 0.0), (0.0, 2.0**21), 8, 4)  # fmt: skip
    plan.save(tmp_path / "plan.json")
    assert Placement.load(tmp_path / "plan.json") == plan
    assert plan.costs is not None
    assert plan.costs.t == (1e-3, 2e-3)
    parts = replace(plan, b=(2.0, 2.0), w=(1.0, 1.5), first=(2.5, 2.5), rest=(2.0, 2.0)).costs
    assert parts is not None
    assert (parts.b, parts.w, parts.whole) == ((0.0, 2.5), (3.0, 2.0), (3.0, 3.5))  # rank 0 puts all of it off
    header, _, first, second = plan.table().splitlines()
    assert header.split(" | ")[:2] == ["stage", "student"]
    assert [cell.strip() for cell in first.split("|")][1:5] == ["a", "x", "1.00", "3.00"]
    assert [cell.strip() for cell in second.split("|")][1:] == [
        *("b .. c", "y", "2.00", "4.00", "0.00", "0.00", "1.00", "7.00", "0.0", "2.0")
    ]


def test_a_bad_plan_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no plan that can be read"):
        TSPipeStrategy(balance=tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is no plan that can be read"):
        TSPipeStrategy(balance=str(tmp_path / "bad.json"))
    student, teacher = network(4, 8, 2), network(4, 8, 8, 2)
    layers = find_layers(student, teacher, 2, {})
    good = Placement((("0",), ("1",)), (("0",), ("1", "2")))
    check_same(good, layers, 2)
    with pytest.raises(ValueError, match="a plan of 2 stages, but there are 3"):
        check_same(good, layers, 3)
    with pytest.raises(ValueError, match="a plan of another teacher \\(2 layers in place of 3\\)"):
        check_same(Placement(good.student, (("0",), ("1",))), layers, 2)
    with pytest.raises(ValueError, match="a plan of another student \\('conv' in place of '1'\\)"):
        check_same(Placement((("0",), ("conv",)), good.teacher), layers, 2)
