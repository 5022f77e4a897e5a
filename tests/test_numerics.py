"""The pipeline computes what plain sequential training computes: parameter by parameter, rank by rank, to 1e-12."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_tspipe import TeacherStudentModule, cosine_momentum
from lightning_tspipe.schedule import LOSSES
from tests import reference
from tests.multiproc import TWIN, Fit, result_of, run_fits
from tests.reference import Pair, Rule, Trace

TOLERANCE = 1e-12
ROWS, BATCH, WIDTH, CLASSES = 31, 12, 6, 3  # batches of 12, 12 and 7 rows
Ranks = list[dict[str, Any]]


# --- networks


class MeanPool(nn.Module):
    """(rows, length, width) -> (rows, width), so that views of any length fit."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class AsTuple(nn.Module):
    """A tensor becomes a tuple of two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.tanh()


class AsDict(nn.Module):
    """A tensor becomes a dict, with a tuple in it."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"head": x, "more": (x.sin(), x[:, :2])}


class TupleSum(nn.Module):
    """The inverse of `AsTuple`, in shape."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] - 0.5 * pair[1]


class DictSum(nn.Module):
    """The inverse of `AsDict`, in shape."""

    def forward(self, tree: dict[str, Any]) -> Tensor:
        return tree["head"] + tree["more"][0] + tree["more"][1].sum(1, keepdim=True)


def student(*ends: nn.Module, first: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    """Six layers, and what comes before and after them."""
    torch.manual_seed(0)
    body = (nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES), nn.Softsign())
    return nn.Sequential(*first, *body, *ends).double()


def big(*ends: nn.Module) -> nn.Sequential:
    """A teacher of another architecture."""
    torch.manual_seed(5)
    hidden = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, CLASSES))
    return nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), hidden, *ends).double()


def shifted(network: nn.Module) -> nn.Module:
    """A copy with other values, as a momentum teacher begins."""
    result = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    return result


def batch_norms() -> nn.Sequential:
    """The first of the batch norms sees the data as it is."""
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8, momentum=None)
    return nn.Sequential(
        nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 8), middle, nn.Tanh(), nn.Linear(8, CLASSES), nn.BatchNorm1d(CLASSES)
    ).double()


# --- losses


def flat(output: Any) -> Tensor:
    """All tensors of an output side by side: shape (rows, columns)."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return torch.cat([flat(value) for value in values], 1)


def loss_of(student_out: Any, teacher_out: Any, target: Tensor | None, rows: slice = slice(None)) -> Tensor:
    """Every row meets every other row, so a loss over a part of the batch is another one; views meet all views.

    `rows` are those of the student, where the teacher's are of the whole batch.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i, s in enumerate(student_out if isinstance(student_out, list) else [student_out]):
        for j, t in enumerate(teacher_out if isinstance(teacher_out, list) else [teacher_out]):
            x, y = flat(s), flat(t)
            found = (x @ y.T).log_softmax(1)[:, rows].diagonal()
            total = total + (1 + i + 2 * j) * ((x - y[rows]).square().mean() - found.mean())
        if target is not None:
            total = total + 0.3 * nn.functional.cross_entropy(flat(s)[:, :CLASSES], target)
    return total


def validate(student: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
    """What `validation_step` logs."""
    return (flat(student(batch[0])) - 2 * flat(teacher(batch[0]))).square().mean()


# --- optimizers


def sgd(network: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """SGD with momentum."""
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), None


def adamw(network: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW with three groups, and a rate that changes with every step, differently by group."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices[:1], "lr": 0.02, "weight_decay": 0.1},
        {"params": vectors, "lr": 0.01, "weight_decay": 0.0},
        {"params": matrices[1:], "betas": (0.8, 0.95)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.005, eps=1e-3)
    rules: list[Callable[[int], float]] = [lambda n: 0.9**n, lambda n: 1 / (1 + n), lambda n: 1 + 0.1 * n]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rules)


# --- data


class Stream(IterableDataset[Any]):
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def table(rows: int = ROWS, seed: int = 1) -> TensorDataset:
    """Rows of normal numbers that are not centred, and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    return TensorDataset(x, torch.randint(CLASSES, (rows,), generator=generator))


def shuffled(rows: int = ROWS, batch: int = BATCH) -> DataLoader[Any]:
    """Another order in every epoch, the same in every run."""
    return DataLoader(table(rows), batch, shuffle=True, generator=torch.Generator().manual_seed(3))


def crops() -> DataLoader[Any]:
    """Two views of unequal shape, and classes."""
    generator = torch.Generator().manual_seed(1)
    long, short = (torch.randn(ROWS, n, WIDTH, generator=generator, dtype=torch.float64) + n for n in (5, 2))
    return DataLoader(TensorDataset(long, short, torch.randint(CLASSES, (ROWS,), generator=generator)), BATCH)


# --- a case: one training, by the pipeline and by the reference


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        make_student, make_teacher: build the networks; the teacher gets the student.
        source: what a momentum teacher follows.
        optimizer: see `sgd`.
        loader: builds the loader.
        inputs: batch -> (student's input, teacher's input, target); None leaves the module's own hooks.
        options: more arguments of `TeacherStudentModule`.
        rule: what the reference does; the pipeline gets the same.
        epochs, limit: how many, and how many batches of each.
        validates: whether there is a validation.
    """

    make_student: Callable[[], nn.Module] = student
    make_teacher: Callable[[nn.Module], nn.Module] = shifted
    source: Callable[[nn.Module], nn.Module] = lambda network: network
    optimizer: Callable[[nn.Module], tuple[torch.optim.Optimizer, Any]] = sgd
    loader: Callable[[], Any] = shuffled
    inputs: Callable[[Any], tuple[Any, Any, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rule: Rule = field(default_factory=Rule)
    epochs: int = 1
    limit: int | None = None
    validates: bool = False
    strategy: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def fit(self, stages: int) -> Fit:
        """The training by the library."""
        trainer: dict[str, Any] = {
            "max_epochs": self.epochs,
            "max_steps": self.rule.max_steps,
            "accumulate_grad_batches": self.rule.accumulate,
        }
        if self.limit is not None:
            trainer["limit_train_batches"] = self.limit
        if self.rule.validate_every:
            trainer["val_check_interval"] = self.rule.validate_every
        validation = (lambda: DataLoader(table(17, 9), 8)) if self.validates else None
        return Fit(
            lambda: CaseModule(self), self.loader, stages, self.rule.microbatches, validation, self.strategy, trainer
        )

    def reference(self) -> Trace:
        """The training by the reference."""
        torch.manual_seed(0)
        network = self.make_student()
        pair = Pair(network, self.make_teacher(network), loss_of, self.source, validate if self.validates else None)
        optimizer, scheduler = self.optimizer(pair.student)
        inputs = self.inputs or (lambda batch: (batch[0], batch[0], batch[1]))
        loader = self.loader()
        # like Lightning, ask for no more batches than there are: another request would advance a sampler's generator
        count = self.limit or (None if isinstance(loader.dataset, Stream) else len(loader))
        epochs = [[inputs(batch) for batch in islice(loader, count)] for _ in range(self.epochs)]
        validation = list(DataLoader(table(17, 9), 8))
        return reference.train(pair, optimizer, epochs, self.rule, scheduler, validation)


class CaseModule(TeacherStudentModule):
    """A case as a user would write it."""

    def __init__(self, case: Case) -> None:
        rule = case.rule
        options: dict[str, Any] = {
            "momentum": rule.momentum,
            "teacher_delay": rule.delay,
            "delay_from_step": rule.delay_from_step,
            "teacher_mode": "train" if rule.teacher_train else "eval",
            "loss_over": rule.loss_over,
        }
        super().__init__(**(options | case.options))
        torch.manual_seed(0)
        self.student = case.make_student().to(case.dtype)
        self.teacher = case.make_teacher(self.student).to(case.dtype)
        self.case = case

    def student_input(self, batch: Any) -> Any:
        return super().student_input(batch) if self.case.inputs is None else self.case.inputs(batch)[0]

    def teacher_input(self, batch: Any) -> Any:
        return super().teacher_input(batch) if self.case.inputs is None else self.case.inputs(batch)[1]

    def target(self, batch: Any) -> Any:
        return super().target(batch) if self.case.inputs is None else self.case.inputs(batch)[2]

    def ema_source(self) -> nn.Module:
        return self.case.source(self.student)

    def loss(self, student_out: Any, teacher_out: Any, target: Any, rows: slice = slice(None)) -> dict[str, Tensor]:
        loss = loss_of(student_out, teacher_out, target, rows)
        self.log("last", loss)
        self.log("mean", loss, on_step=False, on_epoch=True, batch_size=1)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", validate(self.student, self.teacher, batch))

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.case.optimizer(self.student)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def close(actual: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    """Both are equal to the tolerance, absolute and relative; other values than tensors are equal."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(
            torch.as_tensor(actual), expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
        )
    else:
        assert actual == expected, what


def compare(ranks: Ranks, trace: Trace, which: str = "") -> None:
    """Every rank saw what the reference saw, and every parameter is on exactly one rank."""
    expected = {f"student.{n}": v for n, v in trace.student.items()}
    expected |= {f"teacher.{n}": v for n, v in trace.teacher.items()}
    trained = {f"student.{n}" for n in trace.grads[0]}
    owned = [name for seen in ranks for name in seen["local"]]
    assert sorted(owned) == sorted(expected)
    assert sorted(name for seen in ranks for name in seen["optimizer"]) == sorted(trained)
    for rank, seen in enumerate(ranks):
        where = f"{which}rank {rank} of {len(ranks)}"
        assert seen["steps"] == len(trace.grads), where
        assert len(seen["losses"]) == len(trace.losses), where
        for number, (actual, wanted) in enumerate(zip(seen["losses"], trace.losses, strict=True)):
            close(actual, wanted, f"{where}: loss of batch {number}")
        close(seen["metrics"]["last"], trace.losses[-1], f"{where}: logged loss")
        mean = torch.stack(trace.losses[trace.epoch_starts[-1] :]).mean()
        close(seen["metrics"]["mean"], mean, f"{where}: logged mean of the epoch")
        mine = trained & set(seen["local"])
        assert len(seen["grads"]) == len(trace.grads), where
        for step, (grads, wanted) in enumerate(zip(seen["grads"], trace.grads, strict=True), start=1):
            assert set(grads) == mine, where
            for name, grad in grads.items():
                close(grad, wanted[name.removeprefix("student.")], f"{where}: gradient of {name} in step {step}")
        for kind in ("local", "whole"):
            for name, value in seen[kind].items():
                close(value, expected[name], f"{where}: {kind} {name}")
        assert set(seen["whole"]) == set(expected), where
        for name, state in seen["optimizer"].items():
            wanted_state = trace.optimizer[name.removeprefix("student.")]
            assert set(state) == set(wanted_state), f"{where}: optimizer state of {name}"
            for key, value in state.items():
                close(value, wanted_state[key], f"{where}: {key} of {name}")
        assert [group["lr"] for group in seen["groups"]] == trace.rates, where
        values = [metrics["validation"] for metrics in seen["history"]]
        assert len(values) == len(trace.validations), where
        for number, (value, wanted) in enumerate(zip(values, trace.validations, strict=True)):
            close(value, wanted, f"{where}: validation {number}")


def check(*cases: Case, stages: int = 3) -> list[Ranks]:
    """Train each case by the pipeline and by the reference, and compare."""
    results = run_fits([case.fit(stages) for case in cases])
    for number, (ranks, trace) in enumerate(zip(results, references(*cases), strict=True)):
        compare(ranks, trace, f"case {number}, ")
    return results


def references(*cases: Case) -> list[Trace]:
    """What the reference makes of each case."""
    traces: list[Trace] = result_of(lambda: [case.reference() for case in cases])
    return traces


FROZEN = Case(make_teacher=lambda _: big())
LATE = Case(rule=Rule(momentum=0.8, delay=1, teacher_train=True))
EXACT = Case(rule=Rule(momentum=0.8, delay=0, teacher_train=True))


def case(base: Case, **rule: Any) -> Case:
    """A case with another rule."""
    return replace(base, rule=replace(base.rule, **rule))


# --- tests


@pytest.mark.parametrize("microbatches", [1, 2, 4, 5])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_and_microbatches(stages: int, microbatches: int) -> None:
    """Frozen, late and exact teachers, two epochs, each with a short last batch."""
    bases = [replace(base, epochs=2) for base in (FROZEN, LATE, EXACT)]
    check(*(case(base, microbatches=microbatches) for base in bases), stages=stages)


def test_a_wrong_reference_is_noticed() -> None:
    """The comparison itself can fail: a delay, a momentum or a cut that is not the pipeline's is told apart."""
    base = replace(LATE, epochs=2)
    ranks = run_fits([case(base, microbatches=4).fit(2)])[0]
    changes: list[dict[str, Any]] = [
        {"delay": 0}, {"momentum": 0.8001}, {"delay_from_step": 3}, {"accumulate": 2}, {"max_steps": 5},
    ]  # fmt: skip
    right, *others = references(base, *(case(base, **change) for change in changes))
    compare(ranks, right)  # this network has no batch statistics: the cut into microbatches does not show
    for wrong in others:
        with pytest.raises(AssertionError):
            compare(ranks, wrong)
    lost = copy.deepcopy(ranks)
    lost[1]["grads"][-1].popitem()
    with pytest.raises(AssertionError):
        compare(lost, right)


def cosine(step: int) -> float:
    """Half a cosine from 0.7 to 1 in five steps, from its definition."""
    return 1 - 0.3 * (1 + math.cos(math.pi * min(step - 1, 5) / 5)) / 2


def test_momentum_that_changes_and_delay_from_step() -> None:
    """A callable of the step, the cosine schedule, and steps that are synchronous before some step."""
    changing = case(LATE, momentum=lambda n: 1 / (1 + n), microbatches=2)
    cosines = replace(case(LATE, momentum=cosine, microbatches=2), options={"momentum": cosine_momentum(0.7, 1.0, 5)})
    later = [case(base, delay_from_step=4, microbatches=4) for base in (LATE, changing)]
    check(*(replace(base, epochs=3) for base in (changing, cosines, *later)))
    (trace,) = references(replace(later[0], epochs=3))
    assert trace.used == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def multi_crop(batch: Any) -> tuple[Any, Any, Any]:
    """Two views for the student, one of them for the teacher."""
    return [batch[0], batch[1]], [batch[0]], batch[2]


def swapped(batch: Any) -> tuple[Any, Any, Any]:
    """The teacher sees the views in the other order."""
    return [batch[0], batch[1]], [batch[1], batch[0]], None


def pooled() -> nn.Module:
    """The network with a first layer that takes any length."""
    return student(first=(MeanPool(),))


def pooled_norms() -> nn.Module:
    """The same with batch norms, which see one view at a time."""
    return nn.Sequential(MeanPool(), *batch_norms())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_views_of_unequal_shape(stages: int) -> None:
    """Multi-crop and swapped views, with and without batch statistics."""
    base = replace(case(LATE, microbatches=3), make_student=pooled, loader=crops, inputs=multi_crop, epochs=2)
    crossed = replace(base, inputs=swapped)
    norms = replace(crossed, make_student=pooled_norms)
    check(base, crossed, norms, replace(norms, inputs=multi_crop), stages=stages)


@pytest.mark.parametrize("end", [AsTuple, AsDict])
def test_nested_outputs(end: type[nn.Module]) -> None:
    """The networks return tuples and dicts, and nestings cross the cut between two stages."""
    inverse = TupleSum if end is AsTuple else DictSum
    ends = replace(FROZEN, make_student=lambda: student(end()), make_teacher=lambda _: big(end()))
    inner = replace(
        case(LATE, microbatches=2),
        make_student=lambda: student(nn.Linear(CLASSES, 4), end(), first=(nn.Linear(WIDTH, WIDTH), end(), inverse())),
        strategy={"balance": [2, 4, 5]},
    )
    check(case(ends, microbatches=2), inner)


def test_validation_between_epochs_and_within() -> None:
    """Three epochs with a validation after each, or after every second batch: values, and what comes after them."""
    bases = [replace(base, epochs=3, validates=True) for base in (FROZEN, LATE, EXACT)]
    norms = replace(bases[1], make_student=batch_norms)
    late = [case(base, microbatches=2) for base in (*bases, norms)]
    check(*late, *(case(base, validate_every=2) for base in late[1:]))


def test_optimizer_groups_and_schedulers() -> None:
    """AdamW with three groups and a rate that changes every step; a group can be empty on a rank."""
    bases = [replace(base, optimizer=adamw, epochs=3) for base in (FROZEN, LATE, EXACT)]
    check(*(case(base, microbatches=2) for base in bases))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation(accumulate: int) -> None:
    """Five batches per epoch: the last window is short, and every batch of a window has one teacher."""
    several = [replace(base, loader=lambda: shuffled(31, 7), epochs=2) for base in (FROZEN, LATE, EXACT)]
    several.append(replace(several[1], optimizer=adamw))
    several.append(replace(several[1], make_student=batch_norms, loader=lambda: shuffled(34, 7)))
    several.append(case(several[1], delay_from_step=3))
    check(*(case(base, microbatches=2, accumulate=accumulate) for base in several))


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_an_exact_teacher_ahead_within_a_window(stages: int) -> None:
    """`test_runtime` shows that it is; three batches per step, of several sizes, with validations between."""
    base = case(replace(EXACT, loader=lambda: shuffled(31, 7), epochs=2, validates=True), accumulate=3)
    norms = replace(base, make_student=batch_norms, loader=lambda: shuffled(34, 7))
    bases = [base, norms, replace(base, optimizer=adamw)]
    bases += [replace(case(base, loss_over=over), strategy={"schedule": "zb"}) for over in LOSSES[1:]]
    check(*(case(each, microbatches=3) for each in bases), case(base, microbatches=2, validate_every=2), stages=stages)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 3])
def test_batch_norm(stages: int, microbatches: int) -> None:
    """Normalised by microbatch, statistics by batch; a teacher in train mode moves its own."""
    kinds = LATE, EXACT, case(LATE, teacher_train=False)
    bases = [replace(base, make_student=batch_norms, epochs=2) for base in kinds]
    for ranks in check(*(case(base, microbatches=microbatches) for base in bases), stages=stages):
        assert ranks[0]["whole"]["student.0.num_batches_tracked"] == 6


def test_running_statistics_do_not_depend_on_microbatches() -> None:
    """Those of a layer that sees the data itself are the same for every M, and they are not where they began."""
    base = replace(LATE, make_student=batch_norms, loader=lambda: shuffled(36), epochs=2)
    (plain,) = references(base)
    for ranks in run_fits([case(base, microbatches=m).fit(2) for m in (1, 2, 4, 6)]):
        for network, wanted in (("student", plain.student), ("teacher", plain.teacher)):
            for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
                close(ranks[0]["whole"][f"{network}.{name}"], wanted[name], f"{network} {name}")
    assert (plain.student["0.running_mean"] - 0.5).abs().max() < 0.5
    assert plain.student["0.running_mean"].abs().min() > 0.01


def test_loss_over_microbatches() -> None:
    """The mean of the losses of the microbatches, of unequal sizes too; targets are cut like inputs."""
    bases = [replace(base, epochs=2) for base in (FROZEN, LATE, EXACT)]
    bases.append(replace(LATE, make_student=pooled, loader=crops, inputs=multi_crop))
    cases = [case(base, microbatches=5, loss_over="microbatch") for base in bases]
    check(*cases)
    whole, parts = references(case(cases[0], loss_over="batch"), cases[0])
    assert (whole.losses[0] - parts.losses[0]).abs() > 1e-3


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_each_microbatch_of_the_student_sees_the_whole_batch_of_the_teacher(stages: int) -> None:
    """Of unequal sizes, in every order, with views and other microbatches of the teacher."""
    views = replace(LATE, make_student=pooled, loader=crops, inputs=multi_crop)
    orders = [replace(LATE, strategy={"schedule": order}) for order in ("afab", "1f1b", "afab-split", "zb")]
    bases = [*(replace(base, epochs=2) for base in (FROZEN, LATE, EXACT)), *orders, views]
    bases += [replace(EXACT, strategy={"schedule": "zb"}), replace(FROZEN, strategy={"teacher_microbatches": 1})]
    cases = [case(base, microbatches=5, loss_over="student_microbatch") for base in bases]
    cases.append(case(LATE, microbatches=3, accumulate=2, loss_over="student_microbatch"))
    check(*cases, stages=stages)


def test_with_as_many_rows_in_each_microbatch_it_is_the_loss_over_the_batch() -> None:
    """As of a contrastive loss whose keys are the teacher's: twin and pipeline need no change of the algorithm."""
    base = replace(LATE, loader=lambda: shuffled(32, 8), epochs=2)
    wanted = references(case(base, microbatches=1))
    ranks = run_fits([case(base, microbatches=4, loss_over="student_microbatch").fit(2)])[0]
    compare(ranks, wanted[0])
    part = references(case(base, microbatches=4, loss_over="microbatch"))[0]
    assert (part.losses[0] - wanted[0].losses[0]).abs() > 1e-3


@pytest.mark.parametrize("stages", [1, 3])
def test_loss_over_microbatches_with_accumulation(stages: int) -> None:
    """Every microbatch's gradient is divided by the length of the window, as a batch's is."""
    base = replace(LATE, loader=lambda: shuffled(31, 7), epochs=2)
    check(*(case(base, microbatches=3, accumulate=a, loss_over="microbatch") for a in (2, 3)), stages=stages)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("order", ["1f1b", "afab-split", "zb"])
def test_every_order_computes_the_same(order: str, stages: int) -> None:
    """Forwards and backwards in turn, and backwards in two parts; batch norms, short batches and accumulation too."""
    loss_over = "batch" if order == "afab-split" else "microbatch"
    bases = [replace(base, epochs=2, strategy={"schedule": order}) for base in (FROZEN, LATE, EXACT)]
    cases = [case(base, microbatches=5, loss_over=loss_over) for base in bases]
    cases.append(case(replace(bases[1], make_student=batch_norms), microbatches=3, loss_over=loss_over))
    cases.append(case(bases[1], microbatches=4, loss_over=loss_over, accumulate=2))
    for ranks in check(*cases, stages=stages):
        assert len(ranks) == stages


def stream() -> DataLoader[Any]:
    """A loader without a length."""
    return DataLoader(Stream(list(DataLoader(table(), BATCH))), batch_size=None)


@pytest.mark.parametrize("stages", [1, 3])
def test_where_the_data_end(stages: int) -> None:
    """A loader without length, a limit, and an end in the middle of an epoch."""
    check(
        *(replace(case(base, microbatches=2), loader=stream, epochs=2) for base in (FROZEN, LATE, EXACT)),
        replace(case(LATE, microbatches=2), limit=2, epochs=3),
        replace(case(LATE, microbatches=2), loader=lambda: shuffled(36), epochs=3),
        replace(case(LATE, microbatches=2), loader=stream, limit=2, epochs=2),
        replace(case(LATE, microbatches=2, max_steps=2), epochs=3),
        replace(case(FROZEN, microbatches=2, max_steps=5), epochs=3),
        replace(case(LATE, microbatches=2, max_steps=2, accumulate=2), loader=lambda: shuffled(31, 6), epochs=3),
        replace(case(LATE, microbatches=2, max_steps=4), loader=stream, epochs=3),
        replace(
            case(LATE, microbatches=2, max_steps=2, accumulate=2),
            make_student=batch_norms,
            loader=lambda: shuffled(36, 6),
            epochs=3,
        ),
        stages=stages,
    )


def with_predictor() -> nn.Module:
    """An encoder, and a head that the teacher lacks."""
    encoder = student()
    return nn.Sequential(encoder, nn.Sequential(nn.Linear(CLASSES, 7), nn.ReLU(), nn.Linear(7, CLASSES)).double())


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_teacher_follows_a_part_of_the_student(stages: int) -> None:
    """`ema_source` names the encoder; the stages that hold the predictor alone have no teacher layers."""
    base = replace(
        case(LATE, microbatches=4),
        make_student=with_predictor,
        make_teacher=lambda network: shifted(network[0]),  # type: ignore[index]
        source=lambda network: network[0],  # type: ignore[index]
        epochs=2,
    )
    check(base, case(base, delay=0), stages=stages)


def test_the_sequential_twin() -> None:
    """The same module under ``strategy="auto"`` is the reference with one microbatch."""
    bases = [FROZEN, LATE, EXACT, case(LATE, delay_from_step=4), case(LATE, accumulate=2), case(EXACT, accumulate=2)]
    bases += [case(LATE, max_steps=5), replace(LATE, validates=True), replace(EXACT, validates=True)]
    bases += [replace(LATE, make_student=batch_norms, validates=True), replace(LATE, optimizer=adamw)]
    bases += [replace(LATE, make_student=pooled, loader=crops, inputs=swapped)]
    bases += [replace(LATE, loader=stream), replace(LATE, loader=lambda: shuffled(36)), replace(LATE, limit=2)]
    check(*(replace(base, epochs=3) for base in bases), stages=TWIN)


def singles() -> DataLoader[Any]:
    """The rows in float32."""
    x, y = table().tensors
    return DataLoader(TensorDataset(x.float(), y), BATCH)


def test_float32_equals_the_twin() -> None:
    """With one microbatch the order of sums is the twin's: bitwise. With more, close."""
    bases = [replace(base, loader=singles, dtype=torch.float32, epochs=2) for base in (FROZEN, LATE, EXACT)]
    bases.append(replace(bases[1], optimizer=adamw))
    for base in bases:
        twin, one, three, cut = run_fits([base.fit(TWIN), base.fit(1), base.fit(3), case(base, microbatches=4).fit(3)])
        for name, expected in twin[0]["whole"].items():
            assert expected.dtype == torch.float32
            assert torch.equal(one[0]["whole"][name], expected), name
            for rank in range(3):
                assert torch.equal(three[rank]["whole"][name], expected), name
                close(cut[rank]["whole"][name], expected, name, 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(twin[0]["losses"], three[0]["losses"], strict=True))


def dropping() -> nn.Module:
    """Dropout on every stage."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES), nn.Dropout(0.3)
    ).double()


def test_dropout_is_reproducible() -> None:
    """The same seed gives the same bits, another seed does not; teacher and microbatches draw their own numbers."""
    base = replace(case(LATE, microbatches=3), make_student=dropping, epochs=2).fit(3)
    first, again, other = run_fits([base, base, replace(base, seed=8)])
    for rank in range(3):
        for name, value in first[rank]["whole"].items():
            assert torch.equal(again[rank]["whole"][name], value), name
        assert first[rank]["losses"] == again[rank]["losses"]
        assert first[rank]["losses"][0] != other[rank]["losses"][0]
