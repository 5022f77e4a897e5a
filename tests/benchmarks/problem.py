"""The emulated training problem, the same for every contender, and its single-process reference."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tspipe.schedule import Costs
from tests.benchmarks.emulated import EmulatedLayer

LEARNING_RATE = 0.1
TOLERANCE = 1e-10
Exchange = Literal["clipping", "scaler"]
CLIP = 0.1  # what the norm of all gradients is clipped to; without that it is several times as large


@dataclass(frozen=True)
class Problem:
    """A teacher and a student of emulated layers, one of each per stage, and the batches they train on.

    Attributes:
        num_stages: Stages, hence processes (P).
        num_microbatches: Microbatches per step (M).
        num_steps: Optimizer steps of the whole run.
        t, f, b, w: Seconds of a teacher forward, student forward, backward for inputs and for weights, per microbatch
            and stage.
        momentum: None for a frozen teacher; else the teacher follows the student.
        delay: Updates by which a momentum teacher is late.
        loss_over: What a loss sees; it is the same loss either way.
        order: Ours; the rivals have their own.
        teacher_microbatches: Of the teacher, a divisor of M; None: M. Only we run that.
        exchange: What makes all stages wait for each other before an optimizer step, if anything: clipping by the norm
            of all gradients, or the check of a loss scale. Only we run that.
        chunks: Layers of each network per process, of which each takes its share of the seconds.
        width: Features of every activation.
        rows: Samples of a microbatch.
    """

    num_stages: int
    num_microbatches: int
    num_steps: int
    t: float = 0.02
    f: float = 0.02
    b: float = 0.02
    w: float = 0.02
    momentum: float | None = None
    delay: int = 0
    loss_over: Literal["batch", "microbatch"] = "batch"
    order: str = "afab"
    teacher_microbatches: int | None = None
    exchange: Exchange | None = None
    chunks: int = 1
    width: int = 8
    rows: int = 2

    @property
    def name(self) -> str:
        """How tables call it."""
        t = "" if self.t == self.f else f" t={self.t / self.f:g}f"
        exact = "" if self.momentum is None or self.delay else " exact"
        exchange = f" {self.exchange}" if self.exchange else ""
        teacher = f" Mt={self.teacher_microbatches}" if self.teacher_microbatches else ""
        return f"P={self.num_stages} M={self.num_microbatches}{teacher}{t}{exact} {self.order}{exchange}"

    @property
    def work_s(self) -> float:
        """Seconds of work of a rank per step, M (t + f + b + w): the lower bound of every schedule's step."""
        return self.num_microbatches * (self.t + self.f + self.b + self.w)

    @property
    def timeout_s(self) -> float:
        """Hard limit for a run: generous next to the serial time of its steps."""
        return 60 + 3 * self.num_steps * self.num_stages * (self.work_s + self.num_microbatches * 0.002)

    @property
    def costs(self) -> Costs:
        """For a planner; the first stage does for the weight what others do for the input."""
        stages = self.num_stages
        b, w = (0.0, *(self.b,) * (stages - 1)), (self.b + self.w, *(self.w,) * (stages - 1))
        return Costs((self.t,) * stages, (self.f,) * stages, b, w)

    def serial(self) -> "Problem":
        """The same work in one microbatch."""
        times = {name: self.num_microbatches * getattr(self, name) for name in "tfbw"}
        return replace(self, num_microbatches=1, rows=self.num_microbatches * self.rows, **times)

    def halved(self) -> "Problem":
        """The same batch with the student's microbatches half as large as the teacher's, as the paper has them."""
        times = {name: getattr(self, name) / 2 for name in "tfbw"}
        count, rows = self.num_microbatches, self.rows // 2
        return replace(self, num_microbatches=2 * count, teacher_microbatches=count, rows=rows, order="afab", **times)

    def networks(self, emulate: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
        """Teacher and student, the same numbers whoever asks."""
        count = self.num_stages * self.chunks
        t = self.t * self.num_microbatches / (self.teacher_microbatches or self.num_microbatches)
        seconds = [value / self.chunks if emulate else 0.0 for value in (t, self.f, self.b, self.w)]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            teacher = nn.Sequential(*[EmulatedLayer(self.width, seconds[0], 0.0, 0.0) for _ in range(count)])
            student = nn.Sequential(*[EmulatedLayer(self.width, *seconds[1:]) for _ in range(count)])
        return teacher.requires_grad_(False).eval(), student

    def samples(self) -> Tensor:
        """All inputs of the run, in order. Shape: [num_steps * num_microbatches * rows, width]."""
        generator = torch.Generator().manual_seed(2)
        num_samples = self.num_steps * self.num_microbatches * self.rows
        return torch.randn(num_samples, self.width, dtype=torch.float64, generator=generator)

    def batches(self) -> tuple[Tensor, ...]:
        """The batch of every step. Shape of each: [num_microbatches * rows, width]."""
        return self.samples().chunk(self.num_steps)

    def follow(self, teacher: nn.Module, student: nn.Module) -> None:
        """Update a momentum teacher."""
        if self.momentum is not None:
            with torch.no_grad():
                for mine, its in zip(teacher.parameters(), student.parameters(), strict=True):
                    mine.mul_(self.momentum).add_(its, alpha=1 - self.momentum)

    def reference(self) -> nn.Sequential:
        """The student after all steps: one process, no waiting, the same microbatches."""
        teacher, student = self.networks(emulate=False)
        optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
        teachers = [_values(teacher)]
        for number, batch in enumerate(self.batches()):
            optimizer.zero_grad()
            teacher.load_state_dict(teachers[max(0, number - self.delay)])
            for microbatch in batch.chunk(self.num_microbatches):
                loss = nn.functional.mse_loss(student(microbatch), teacher(microbatch))
                (loss / self.num_microbatches).backward()  # type: ignore[no-untyped-call]
            if self.exchange == "clipping":
                nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            optimizer.step()
            teacher.load_state_dict(teachers[number])
            self.follow(teacher, student)
            teachers.append(_values(teacher))
        return student

    def check(self, trained: Iterable[tuple[int, nn.Module]]) -> float:
        """Compare trained layers with the reference's.

        Args:
            trained: Student layers after all steps, each with its place in the student.

        Returns:
            The largest absolute difference of any parameter.

        Raises:
            RuntimeError: It is above the tolerance, or the training moved nothing, so that agreement says nothing.
        """
        reference, untrained = self.reference(), self.networks(emulate=False)[1]
        error, moved = 0.0, 0.0
        for index, layer in trained:
            names = dict(layer.named_parameters())
            for name, expected in reference[index].named_parameters():
                error = max(error, (names[name] - expected).abs().max().item())
                moved = max(moved, (untrained[index].get_parameter(name) - expected).abs().max().item())
        if not error <= TOLERANCE:
            raise RuntimeError(f"parameters differ from the reference by {error:.1e} after {self.num_steps} steps")
        if moved < 1e-3:
            raise RuntimeError(f"training moved no parameter by more than {moved:.1e}: the check would be empty")
        return error


def _values(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}
