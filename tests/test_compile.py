"""Stages that go through torch.compile give the same numbers, and leave nothing of it behind."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TSPipeStrategy, tree
from lightning_tspipe.layers import Layer
from lightning_tspipe.partition import partition
from lightning_tspipe.refuse import check_compile
from lightning_tspipe.split import COMPILED
from lightning_tspipe.stage import Stage
from tests.multiproc import Fit, result_of, run_fits
from tests.scripts.small import Small, loader, trainer

CPU = torch.device("cpu")
DROPS = [0.0]  # the share that dropout takes


class Residual(nn.Module):
    """Its forward has to be followed: a skip, work in place, dropout as a function, a buffer, a part without grad."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.act = nn.BatchNorm1d(4), nn.ReLU(inplace=True)
        self.register_buffer("shift", torch.rand(4))

    def forward(self, x: Tensor) -> Any:
        y = nn.functional.dropout(self.act(self.first(x)), DROPS[0], self.training)
        y = 1 * y  # dropout of nothing gives its input itself, which must stay
        y += self.shift
        y = self.norm(self.second(y)) + x
        with torch.no_grad():
            scale = y.abs().mean()
        return {"out": self.last(y) * scale, "skip": x}


class Block(nn.Module):
    """Gives several values to the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(DROPS[0])

    def forward(self, pair: Any) -> Any:
        x, y = pair if isinstance(pair, tuple) else (pair, pair)
        return self.drop(self.norm(self.inner(x)).tanh()), y + 1


def chain() -> nn.Module:
    """Layers by structure, the first one in place."""
    return nn.Sequential(nn.ReLU(inplace=True), Block(), nn.Sequential(Block(), nn.Identity()))


def trained(make: Callable[[], nn.Module], split: bool = False, **options: Any) -> dict[str, Tensor]:
    """What two steps of two stages leave behind, the second one of fewer rows, and an evaluation."""
    torch.manual_seed(0)
    student, x = make().double(), torch.rand(4, 4, dtype=torch.float64)
    teacher = copy.deepcopy(student).requires_grad_(False)
    parts = partition(student, teacher, 2, examples=lambda name: [x])
    runs = [(parts.runs("student", place), parts.runs("teacher", place)) for place in range(2)]
    stages = [Stage(*run, place, place == 0, CPU, 5, **options) for place, run in enumerate(runs)]
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> list[Tensor]:
        leaves = tree.flatten(value)[0]
        found.update({f"{name}/{place}": leaf for place, leaf in enumerate(leaves)})
        return leaves

    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step, views in enumerate(([x], [x[1:], x[:2]])):
        work = (step, 0)
        optimizer.zero_grad()
        note("teacher", stages[1].teacher_forward(work, stages[0].teacher_forward(work, views)))
        leaves = note("student", stages[1].student_forward(work, stages[0].student_forward(work, views)))
        gradients = [torch.ones_like(leaf) for leaf in leaves]
        for stage in stages[::-1]:
            gradients = (stage.backward_inputs if split else stage.backward)(work, gradients)
            note(f"gradients of {stage._index}", gradients)
            if split:
                stage.backward_weights(work)
            stage.norms["student"].commit(step)
            stage.norms["teacher"].commit(step)
        note("parameters", [parameter.grad for parameter in student.parameters()])
        optimizer.step()
    student.eval()
    with torch.no_grad():
        note("evaluation", stages[1].run("student", stages[0].run("student", x)))
    note("states", [student.state_dict(), teacher.state_dict()])
    for stage in stages:
        stage.close()
    return found


@pytest.mark.parametrize("drops", [0.0, 0.3])
@pytest.mark.parametrize("make", [chain, Residual])
def test_every_number_is_that_without_it(make: Callable[[], nn.Module], drops: float) -> None:
    """Both networks, whole and split backwards, other shapes, several views, and an evaluation.

    With dropout, of the same function that is not compiled: it draws its numbers by stage, and plain layers by layer.
    """

    def compare() -> int:
        DROPS[0] = drops
        expected = trained(make, compile_options={"disable": True} if drops else None)
        for split, recompute in ((False, False), (True, True))[bool(drops) :]:
            counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
            found = trained(make, split, recompute=recompute, compile_options={"backend": counter, "fullgraph": True})
            assert counter.frame_count > 4
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        return counter.frame_count

    assert result_of(compare) > 4


def test_a_compiled_stage_has_one_backward() -> None:
    """The name by which the split backward knows it; a part that is not compiled then does not wait either."""

    def early() -> tuple[str, list[bool]]:
        layers = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="aot_eager"), nn.Linear(4, 4))
        work = Stage([Layer("", layer) for layer in layers], [], 1, False, CPU, 5)
        (out,) = work.student_forward((1, 0), [torch.rand(2, 4)])
        name = work._saved[1, 0].outputs[0].grad_fn.next_functions[1][0].name()  # type: ignore[union-attr]
        work.backward_inputs((1, 0), [out])
        return name, [parameter.grad is not None for parameter in layers.parameters()]

    assert result_of(early) == (COMPILED, [True] * 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's own backend needs a C++ compiler")
def test_with_the_default_backend() -> None:
    """A few seconds, and up to a minute where nothing of it is in torch's cache."""

    def gap() -> float:
        def run(**options: Any) -> list[Tensor]:
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
            work = Stage([Layer("", layer) for layer in layers], [], 1, False, CPU, 5, **options)
            (out,) = work.student_forward((1, 0), [torch.rand(8, 4)])
            (gradient,) = work.backward((1, 0), [out])
            work.norms["student"].commit(1)
            return [out, gradient, *(p.grad for p in layers.parameters() if p.grad is not None), *layers.buffers()]

        pairs = zip(run(), run(compile_options={"options": {"compile_threads": 1}}), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    assert result_of(gap, timeout=110) < 1e-5


def test_nothing_of_it_is_left_behind() -> None:
    """After a fit the module is what it was: keys, types, and it can be pickled; a fit with one stage."""

    def left() -> Any:
        module, twin = Small(), Small()
        counter = torch._dynamo.testing.CompileCounter()
        strategy = TSPipeStrategy(microbatches=2, compile={"backend": counter})
        trainer(1, strategy, max_steps=2).fit(module, loader())
        assert counter.frame_count == 2
        trainer(1, TSPipeStrategy(microbatches=2), max_steps=2).fit(twin, loader())
        torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-6)
        assert list(module.state_dict()) == list(twin.state_dict())
        assert [type(child) for child in module.modules()] == [type(child) for child in twin.modules()]
        pickle.dumps(module.student)
        return "nothing"

    assert result_of(left) == "nothing"


class Distill(Small):
    """A network that is followed learns from layers by structure; the last batch is short."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Residual().double(), chain().double().requires_grad_(False)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out["out"] - teacher_out[0]).square().mean() + student_out["skip"].mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        gap = self.student(batch[0])["out"] - self.teacher(batch[0])[0]
        self.log("gap", gap.square().mean(), sync_dist=True)


def doubles() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.rand(14, 4, generator=torch.Generator().manual_seed(1)).double()), 8)


@pytest.mark.timeout(100)
def test_in_the_pipeline_every_rank_has_the_same_numbers() -> None:
    """Losses, gradients, weights, buffers and validations at P=2, dropout included, with the options and without.

    What is compiled draws its random numbers by stage, so it is compared with the same that is not compiled.
    """
    DROPS[0] = 0.3
    by_stage = {"compile": {"disable": True}}
    options: list[dict[str, Any]] = [{}, {"recompute": True}, by_stage]
    options.append({"compile": {"backend": "aot_eager"}, "recompute": True})
    fits = [Fit(Distill, doubles, 2, 2, make_val_loader=doubles, strategy=strategy) for strategy in options]
    plain, recomputed, not_compiled, compiled = run_fits(fits, timeout=90)
    DROPS[0] = 0.0
    for ranks, reference in ((recomputed, plain), (compiled, not_compiled)):
        for found, expected in zip(ranks, reference, strict=True):
            for name in ("losses", "grads", "local", "whole", "history"):
                assert expected[name]
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"needs a C\+\+ compiler .* install g\+\+"):
        check_compile({}, "auto", CPU)
    for options in (None, {"backend": "aot_eager"}, {"disable": True}):
        check_compile(options, "auto", CPU)


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_cuda_graphs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"holds those of several .*no-cudagraphs"):
        check_compile(options, "auto", torch.device("cuda"))


def test_a_split_backward_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="splits the backward, but that of a compiled stage is one piece"):
        check_compile({"backend": "aot_eager"}, "zb", CPU)
