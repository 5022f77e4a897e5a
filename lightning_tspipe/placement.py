"""Which layers each rank has and what they cost, as a table and as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from operator import add
from pathlib import Path
from typing import Any, Protocol

from lightning_tspipe.schedule import Costs, Schedule
from lightning_tspipe.table import table

MIB = 2**20
TIMED = ("t", "f", "b", "w", "first", "rest")
PASSES = {"t": "T ms", "f": "F ms", "again": "F again ms", "b": "I ms", "w": "W ms", "messages": "messages ms"}


@dataclass(frozen=True)
class Placement:
    """The layers of each rank; costs are of one microbatch and empty where nothing was measured.

    Args:
        student, teacher: names of the layers, stage by stage.
        t, f, b, w: seconds of a teacher forward, student forward, backward for inputs and for weights, per stage.
        first, rest: seconds of the two parts of a split backward, per stage; more than b + w.
        messages: seconds of a stage's messages.
        message: seconds of one message, on average.
        weights: bytes per stage of parameters and buffers, gradients, and an optimizer state of two numbers each.
        held: bytes per stage that a microbatch takes between its forward and its backward.
        pending: bytes per stage that it takes between the two parts of a split backward; empty: as `held`.
        passed: bytes per stage that go in and out of it with a microbatch, which is all that it holds with `recompute`;
            `held` is there for one microbatch at a time then.
        rows: samples of a microbatch in the measurement.
        microbatches, teacher_microbatches: per batch, of the student and of the teacher, if numbers were chosen.
        recompute: whether each backward begins with its forward again.
        teacher_held: bytes per stage that a teacher's forward takes while it runs, with its input and output; empty:
            not measured.
        fixed: what of the seconds of `TIMED`, column by column, a microbatch takes however few samples it has; empty:
            nothing, or not measured.
    """

    student: tuple[tuple[str, ...], ...]
    teacher: tuple[tuple[str, ...], ...]
    t: tuple[float, ...] = ()
    f: tuple[float, ...] = ()
    b: tuple[float, ...] = ()
    w: tuple[float, ...] = ()
    messages: tuple[float, ...] = ()
    message: float = 0.0
    weights: tuple[float, ...] = ()
    held: tuple[float, ...] = ()
    rows: int = 0
    microbatches: int | None = None
    passed: tuple[float, ...] = ()
    recompute: bool = False
    first: tuple[float, ...] = ()
    rest: tuple[float, ...] = ()
    teacher_microbatches: int | None = None
    pending: tuple[float, ...] = ()
    fixed: tuple[tuple[float, ...], ...] = ()
    teacher_held: tuple[float, ...] = ()

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.student)

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Numbers of layers per stage, of the student and of the teacher."""
        return [len(stage) for stage in self.student], [len(stage) for stage in self.teacher]

    @property
    def costs(self) -> Costs | None:
        """For the schedule; None where nothing was measured."""
        if not self.t:
            return None
        costs = Costs(self.t, self.f, self.b, self.w, self.message, t_fixed=self.fixed[0] if self.fixed else ())
        if self.first:
            whole = tuple(map(add, self.b, self.w))
            # the first stage owes nobody a gradient: its backward is put off as a whole
            first, rest = (0.0, *self.first[1:]), (whole[0], *self.rest[1:])
            costs = replace(costs, b=first, w=rest, whole=whole)
        return costs.recomputed() if self.recompute else costs

    def of_rows(self, rows: float) -> Placement:
        """The same stages with microbatches of so many samples: passes have a fixed part, all else is in proportion.

        Args:
            rows: samples.
        """
        share = rows / self.rows
        columns = {
            name: getattr(self, name) for name in (*TIMED, "messages", "held", "passed", "pending", "teacher_held")
        }
        fixed = dict(zip(TIMED, self.fixed, strict=True)) if self.fixed else {}
        changed: dict[str, Any] = {
            name: tuple(
                same + share * (value - same)
                for value, same in zip(column, fixed.get(name) or (0.0,) * len(column), strict=True)
            )
            for name, column in columns.items()
        }
        return replace(self, rows=math.ceil(rows), message=share * self.message, **changed)

    def with_fixed(self, small: Placement) -> Placement:
        """With the fixed parts of the passes, from a straight line through these seconds and those of another size.

        Args:
            small: the same stages, with fewer samples.
        """

        def fixed(seconds: float, fewer: float) -> float:
            each = (seconds - fewer) / (self.rows - small.rows)
            return max(0.0, seconds - self.rows * min(max(each, 0.0), seconds / self.rows))

        pairs = ((getattr(self, name), getattr(small, name)) for name in TIMED)
        return replace(self, fixed=tuple(tuple(map(fixed, *pair)) for pair in pairs))

    @property
    def busy(self) -> list[float]:
        """Seconds that each rank needs for a microbatch, messages included."""
        columns = [getattr(self, name) for name in self._passes]
        return [sum(stage) for stage in zip(*columns, strict=True)]

    @property
    def again(self) -> tuple[float, ...]:
        """Seconds of the student's forward within a backward."""
        return self.f if self.recompute else ()

    @property
    def _passes(self) -> dict[str, str]:
        """What a rank does for a microbatch, and how the table calls it."""
        return {name: title for name, title in PASSES.items() if self.recompute or name != "again"}

    def table(self) -> str:
        """One row per stage.

        >>> print(Placement((("a",), ("b", "c")), (("0",), ("1",))).table())
        stage | student | teacher
        ------+---------+--------
        0     | a       | 0
        1     | b .. c  | 1
        """
        header = ["stage", "student", "teacher"]
        rows = [[str(stage), _range(self.student[stage]), _range(self.teacher[stage])] for stage in range(self.stages)]
        if self.t:
            sizes = {"weights MiB": self.weights, "microbatch MiB": self.held}
            if self.recompute and self.passed:
                sizes = {"weights MiB": self.weights, "microbatch MiB": self.passed, "recomputed MiB": self.held}
            if self.pending:
                sizes["until W MiB"] = self.pending
            header += [*self._passes.values(), "sum ms", *sizes]
            for stage, row in enumerate(rows):
                row += [f"{1e3 * getattr(self, name)[stage]:.2f}" for name in self._passes]
                row += [f"{1e3 * self.busy[stage]:.2f}"]
                row += [f"{column[stage] / MIB:.1f}" for column in sizes.values()]
        return table(header, rows)

    def text(self) -> str:
        """JSON, for `parse`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Read what `text` gives."""
        found: Mapping[str, Any] = json.loads(text)
        names = {field.name for field in fields(cls)}
        return cls(**{name: _tuples(value) for name, value in found.items() if name in names})

    def save(self, path: str | Path) -> None:
        """Write a file that `TSPipeStrategy(balance=path)` takes."""
        Path(path).write_text(self.text() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read what `save` has written.

        Raises:
            ValueError: it is no such file.
        """
        try:
            return cls.parse(Path(path).read_text())
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"balance={str(path)!r} is no plan that can be read ({type(error).__name__}: {error}). Save one with "
                "`trainer.strategy.placement.save(path)`."
            ) from error


class Sizes(Protocol):
    """Bytes per stage, as of `Placement`."""

    @property
    def weights(self) -> tuple[float, ...]:
        """At all times."""

    @property
    def held(self) -> tuple[float, ...]:
        """Between a forward and its backward."""

    @property
    def passed(self) -> tuple[float, ...]:
        """In and out of a stage."""

    @property
    def pending(self) -> tuple[float, ...]:
        """Between the parts of a split backward."""

    @property
    def teacher_held(self) -> tuple[float, ...]:
        """While a teacher's forward runs."""


def peaks(sizes: Sizes, schedule: Schedule) -> list[float]:
    """Bytes of each rank at its fullest moment, a teacher's forward left out.

    Args:
        sizes: of a student microbatch; with `passed` the student recomputes.
        schedule: what is run.
    """
    found = []
    for stage, row in enumerate(schedule.ranks):
        whole = sizes.held[stage]
        each = sizes.passed[stage] if sizes.passed else whole
        late = sizes.pending[stage] if sizes.pending else whole
        if sizes.passed and stage == 0:
            late = each  # no first part: it runs again in the second
        now = most = 0.0
        for action in row:
            again = sizes.passed and action.kind in ("BW" if stage == 0 else "BI")
            most = max(most, now + whole if again else now)
            now += {"F": each, "I": late - each, "B": -each, "W": -late}.get(action.kind, 0.0)
            most = max(most, now)
        found.append(sizes.weights[stage] + most)
    return found


def fits(sizes: Sizes, schedule: Schedule, limit: float) -> bool:
    """Whether the teacher's forwards have room in so many bytes per rank beside all else, by what was measured.

    Forwards as large as the student's are in the share of memory that no plan fills.
    """
    larger = schedule.microbatches / schedule.teacher_microbatches
    if limit == math.inf or larger <= 1:
        return True
    pairs = zip(peaks(sizes, schedule), sizes.teacher_held, strict=True) if sizes.teacher_held else ()
    return bool(sizes.teacher_held) and all(most + larger * each <= limit for most, each in pairs)


def _range(names: Sequence[str]) -> str:
    ends = [name or "(whole)" for name in (names[:1] if len(names) == 1 else [*names[:1], *names[-1:]])]
    return " .. ".join(ends) or "(none)"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
