"""The loss of a batch: made on the last rank from the outputs of both networks, and on its way up to the others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.comm import Comm
from lightning_tspipe.data import Batch
from lightning_tspipe.hooks import StepHooks
from lightning_tspipe.logrelay import LossRelay, LossReport, mean_of
from lightning_tspipe.schedule import LossOver, covering
from lightning_tspipe.scope import world_is
from lightning_tspipe.stage import Stage, differentiable
from lightning_tspipe.topology import Topology


class LossSide:
    """What one rank knows of the loss.

    Args:
        stage: this rank's layers.
        comm: this rank's connections; None for a pipeline of one stage.
        loss_over: as of the module.
        topology: who is who.
        world: the ranks that run the loss, this one and those of other replicas; None leaves the default group.
    """

    report: LossReport | None = None  # loss and logged values of the current batch, when they are known

    def __init__(
        self,
        stage: Stage,
        comm: Comm | None,
        loss_over: LossOver,
        topology: Topology,
        world: dist.ProcessGroup | None = None,
    ) -> None:
        self._stage, self._comm, self._loss_over = stage, comm, loss_over
        self._place, self._last, self._world = topology.stage, topology.is_last, world
        self._relay = None if comm is None else LossRelay(comm)
        self._teacher_out: dict[int, list[list[Any]]] = {}  # by batch
        self._student_out: list[list[Any]] = []
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._reports: list[LossReport] = []
        self._backwards = 0
        self._reached: list[bool] = []
        self._reach: dict[Hashable, tuple[list[bool], list[Tensor]]] = {}
        self._unreached: list[Tensor] = []

    def begin(self, batch: Batch, hooks: StepHooks) -> None:
        """A step begins: post what is going to be received, and send the target to where the loss is made."""
        self._hooks = hooks
        self._student_out, self._reports, self.report, self._backwards = [], [], None, 0
        self._reached, self._unreached = [], []
        if self._comm is None:
            return
        if not self._last:
            assert self._relay is not None
            self._relay.post()
        structure, shapes = key = batch.info.target
        if self._place == 0 and shapes:
            self._comm.outward["Y"].know(key, structure, shapes)
            self._comm.outward["Y"].send(key, batch.target)
        if self._last and shapes:
            self._comm.inward["Y"].know(key, structure, shapes)
            self._comm.inward["Y"].post(key)

    def keep_teacher(self, index: int, outputs: list[Any]) -> None:
        """What the teacher gave for the next microbatch of a batch, view by view."""
        self._teacher_out.setdefault(index, []).append(outputs)

    def keep_student(self, outputs: list[Any]) -> None:
        """What the student gave for the next microbatch of the current batch."""
        self._student_out.append(outputs)

    def forget(self, index: int) -> None:
        """Drop what the teacher gave for a batch that is not trained on."""
        self._teacher_out.pop(index, None)

    def gradients(self, batch: Batch, q: int) -> list[Tensor | None]:
        """The gradients of the loss with respect to the student's outputs for a microbatch, on the last rank."""
        if q not in self._gradients:
            self._differentiate(batch, q)
        return self._gradients.pop(q)

    def _differentiate(self, batch: Batch, q: int) -> None:
        """Run `loss` on what it covers and leave its gradients with respect to the outputs for the backwards."""
        self._stage.leave()
        sizes = batch.info.sizes
        whole = self._loss_over == "batch"
        covered = range(len(sizes)) if whole else range(q, q + 1)
        target = self._target(batch)
        if not whole:
            target = tree.split(target, sizes)[q]
        rows = [sizes[p] for p in covered]
        student = _merged([self._student_out[p] for p in covered], rows)
        teacher = self._teacher_rows(batch, q if self._loss_over == "microbatch" else None)
        leaves, structure = tree.flatten(student)
        leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        student = tree.unflatten(leaves, structure)
        first, first_row = not self._reports, sum(sizes[: covered[0]])
        with world_is(self._world):
            loss, report = self._hooks.loss(
                student if batch.info.student.is_list else student[0],
                teacher if batch.info.teacher.is_list else teacher[0],
                target,
                slice(first_row, first_row + sum(rows)),
            )
        self._reports.append(report)
        for p in covered:
            self._student_out[p] = []
        complete = len(self._reports) == (1 if whole else len(sizes))
        if complete:
            self.forget(batch.info.index)
            self.report = mean_of(self._reports)
            self._hooks.log(self.report)
        scaled = self._hooks.before_backward(loss) if first else self._hooks.scale(loss)
        if not whole:
            scaled = scaled / len(sizes)
        with world_is(self._world):
            torch.autograd.backward(scaled)
        floats = differentiable(leaves)
        here = [leaf.grad is not None for leaf in floats]
        self._reached = [a or b for a, b in zip(self._reached, here, strict=True)] if self._reached else here
        if not any(here):
            raise ValueError(
                "The loss does not depend on the student: no gradient reached its outputs. Compute it from "
                "`student_out`, and do not detach it."
            )
        if complete:
            self._pass_on(batch, q, self._reached)
        parts = [_cut(leaf.grad, rows) for leaf in floats]
        for place, p in enumerate(covered):
            self._gradients[p] = [part[place] for part in parts]

    def _teacher_rows(self, batch: Batch, q: int | None) -> list[Any]:
        """What the teacher gave for the rows of a student microbatch, or of the whole batch, view by view."""
        info, outputs = batch.info, self._teacher_out[batch.info.index]
        count, pieces = info.microbatches, info.teacher_microbatches
        covered = range(pieces) if q is None else covering(q, count, pieces)
        merged = _merged([outputs[p] for p in covered], [info.teacher_sizes[p] for p in covered])
        each = count // pieces
        if q is None or each <= 1:
            return merged
        sizes = info.sizes[q - q % each :][:each]  # of those that share one of the teacher's
        return [tree.split(view, sizes, scaled=True)[q % each] for view in merged]

    def _target(self, batch: Batch) -> Any:
        """The whole batch's target, which comes from the first rank."""
        structure, shapes = key = batch.info.target
        if self._comm is not None and not shapes:
            return tree.unflatten([], structure)
        if self._comm is not None and not self._reports:
            batch.target = self._comm.inward["Y"].take(key)
        return batch.target

    def _pass_on(self, batch: Batch, q: int, reached: Sequence[bool]) -> None:
        """Send loss and logged values upstream, ahead of the gradients, and on which activations the loss depends."""
        if self._relay is None:
            return
        key = batch.info.key("student", q), bytes(reached)
        if key not in self._reach:
            self._reach[key] = self._stage.reach((batch.info.index, q), reached)
        inputs, self._unreached = self._reach[key]
        if self._place:
            assert self.report is not None
            self._relay.pass_on(self.report, self._hooks.asked(), bytes(inputs))

    def take_report(self, batch: Batch, q: int) -> None:
        """Before each backward of a rank that is not the last: take loss and logged values from below, pass them on.

        They come before the first backward (loss over the batch) or the last one (per microbatch, when complete).
        """
        assert self._relay is not None
        number, self._backwards = self._backwards, self._backwards + 1
        due = 0 if self._loss_over == "batch" else batch.info.microbatches - 1
        if number not in (0, due):
            return
        self._stage.leave()
        if number != due:
            self._hooks.before_backward(torch.zeros((), device=self._stage.device))
            return
        self.report, asked, reached = self._relay.take()
        self._hooks.ask(asked)
        self._pass_on(batch, q, list(map(bool, reached)))
        self._hooks.log(self.report)
        if due == 0:
            self._hooks.before_backward(self.report.values[0])

    def drop_zeros(self) -> None:
        """After the last backward: what the loss does not reach has no gradient, as in the twin, for the optimizer."""
        zeros = [p for p in self._unreached if p.grad is not None and not p.grad.is_sparse]
        if zeros:  # looked at, since earlier batches, or a layer that goes by values, may have reached them after all
            anything = torch.stack([p.grad.any() for p in zeros if p.grad is not None]).tolist()
            for parameter, there in zip(zeros, anything, strict=True):
                if not there:
                    parameter.grad = None


def _cut(gradient: Tensor | None, rows: list[int]) -> Sequence[Tensor | None]:
    """Rows of each microbatch of the gradient of a merged tensor."""
    if gradient is None or len(rows) == 1:
        return [gradient] * len(rows)
    each = len(gradient) // sum(rows)
    return torch.split(gradient, [each * count for count in rows])


def _merged(microbatches: list[list[Any]], rows: list[int]) -> list[Any]:
    """Rows of microbatches together again, view by view."""
    return [tree.merge([views[view] for views in microbatches], rows) for view in range(len(microbatches[0]))]
