"""The emulated training problem, the same for every contender, and its single-process reference."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.benchmarks.emulated import EmulatedLayer

LEARNING_RATE = 0.1
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Problem:
    """A teacher and a student of ``num_stages`` emulated layers each, and the batches they train on.

    Attributes:
        num_stages: Stages, hence processes (P).
        num_microbatches: Microbatches per step (M).
        num_steps: Optimizer steps of the whole run.
        forward_s: Seconds of a teacher or student forward per microbatch and stage (t = f).
        backward_s: Seconds of a student backward per microbatch and stage (b + w).
        width: Features of every activation.
        rows: Samples of a microbatch.
    """

    num_stages: int
    num_microbatches: int
    num_steps: int
    forward_s: float = 0.02
    backward_s: float = 0.04
    width: int = 8
    rows: int = 2

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"P={self.num_stages} M={self.num_microbatches}"

    @property
    def work_s(self) -> float:
        """Seconds of work of a rank per step, M (t + f + b + w): the lower bound of every schedule's step."""
        return self.num_microbatches * (2 * self.forward_s + self.backward_s)

    @property
    def timeout_s(self) -> float:
        """Hard limit for a run: generous next to the serial time of its steps."""
        return 60 + 3 * self.num_steps * self.num_stages * (self.work_s + self.num_microbatches * 0.002)

    def networks(self, emulate: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
        """The frozen teacher and the student, one layer per stage, the same numbers whoever asks."""
        costs = (self.forward_s, self.backward_s) if emulate else (0.0, 0.0)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = [EmulatedLayer(self.width, *costs) for _ in range(2 * self.num_stages)]
        teacher, student = nn.Sequential(*layers[: self.num_stages]), nn.Sequential(*layers[self.num_stages :])
        return teacher.requires_grad_(False).eval(), student

    def samples(self) -> Tensor:
        """All inputs of the run, in order. Shape: [num_steps * num_microbatches * rows, width]."""
        generator = torch.Generator().manual_seed(2)
        num_samples = self.num_steps * self.num_microbatches * self.rows
        return torch.randn(num_samples, self.width, dtype=torch.float64, generator=generator)

    def batches(self) -> tuple[Tensor, ...]:
        """The batch of every step. Shape of each: [num_microbatches * rows, width]."""
        return self.samples().chunk(self.num_steps)

    def reference(self) -> nn.Sequential:
        """The student after all steps: one process, no waiting, the same microbatches."""
        teacher, student = self.networks(emulate=False)
        optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE)
        for batch in self.batches():
            optimizer.zero_grad()
            for microbatch in batch.chunk(self.num_microbatches):
                loss = nn.functional.mse_loss(student(microbatch), teacher(microbatch))
                (loss / self.num_microbatches).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return student

    def check(self, trained: Iterable[nn.Module], first_layer: int = 0) -> float:
        """Compare trained layers with the reference's.

        Args:
            trained: Student layers after all steps, consecutive in the student.
            first_layer: The place of the first of them in the student.

        Returns:
            The largest absolute difference of any parameter.

        Raises:
            RuntimeError: It is above the tolerance, or the training moved nothing, so that agreement says nothing.
        """
        reference, untrained = self.reference(), self.networks(emulate=False)[1]
        error, moved = 0.0, 0.0
        for index, layer in enumerate(trained, start=first_layer):
            names = dict(layer.named_parameters())
            for name, expected in reference[index].named_parameters():
                error = max(error, (names[name] - expected).abs().max().item())
                moved = max(moved, (untrained[index].get_parameter(name) - expected).abs().max().item())
        if not error <= TOLERANCE:
            raise RuntimeError(f"parameters differ from the reference by {error:.1e} after {self.num_steps} steps")
        if moved < 1e-3:
            raise RuntimeError(f"training moved no parameter by more than {moved:.1e}: the check would be empty")
        return error
