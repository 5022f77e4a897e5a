"""From the layers of both networks to stages: by parameters, as given, or as measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.balance import Chain, joint_cut
from lightning_tspipe.batchnorm import too_few_values
from lightning_tspipe.comm import Comm
from lightning_tspipe.measure import LayerCost, MessageCost, Meter, fastest
from lightning_tspipe.partition import Layers, Partition
from lightning_tspipe.placement import Placement
from lightning_tspipe.recording import tensors_of
from lightning_tspipe.schedule import LossOver

Sample = dict[str, list[Any]]
SPARE = 0.01  # of the slowest rank, which a measurement does not tell, for less memory
ENOUGH_FOR_ALL = 2.0, 0.2  # seconds after which a rank's layers are not measured again, with many rows and with few


def named(parts: Partition) -> Placement:
    """The layers of each stage, without costs."""
    student, teacher = (
        tuple(tuple(layer.name for layer in stage) for stage in stages) for stages in (parts.student, parts.teacher)
    )
    return Placement(student, teacher)


def check_same(found: Placement, layers: Layers, stages: int) -> None:
    """Raises ValueError if a saved plan is of other networks or of another number of stages."""
    if found.stages != stages:
        raise ValueError(f"balance names a plan of {found.stages} stages, but there are {stages}. Make a new one.")
    for network in ("student", "teacher"):
        expected = [layer.name for layer in getattr(layers, network)]
        saved = [name for stage in getattr(found, network) for name in stage]
        if saved != expected:
            other = next((pair for pair in zip(saved, expected, strict=False) if pair[0] != pair[1]), None)
            counts = f"{len(saved)} layers in place of {len(expected)}"
            what = counts if other is None else f"{other[0]!r} in place of {other[1]!r}"
            raise ValueError(f"balance names a plan of another {network} ({what}). Make a new one.")


def fewest_in_flight(loss_over: LossOver, microbatches: int, stages: int) -> list[int]:
    """Student microbatches that each stage must be able to hold: all, or those of 1F1B if the loss allows that."""
    return [microbatches if loss_over == "batch" else min(microbatches, stages - k) for k in range(stages)]


class Cutter:
    """Finds the cut whose slowest rank is the fastest, from what layers cost.

    Args:
        layers: of both networks.
        stages: P.
        recompute: whether each backward of the student begins with its forward again.
        keeps_inputs: whether until then a stage holds what goes in and out of it only (`Chain.passed`).
    """

    def __init__(self, layers: Layers, stages: int, recompute: bool = False, keeps_inputs: bool = False) -> None:
        self._layers, self._stages = layers, stages
        self._recompute, self._keeps_inputs = recompute, keeps_inputs

    def place(
        self,
        student: Sequence[LayerCost],
        teacher: Sequence[LayerCost],
        message: MessageCost,
        rows: int,
        limit: float = math.inf,
        in_flight: Sequence[int] = (),
    ) -> Placement:
        """The stages.

        Args:
            student, teacher: costs of their layers, in order.
            message: what one costs.
            rows: samples of a microbatch that the costs are of.
            limit: bytes per rank for weights, gradients, optimizer state and activations.
            in_flight: microbatches per stage whose activations are held at once.

        Raises:
            ValueError: no cut keeps the limit.
        """
        of_student = chain_of(student, message, 2, self._recompute, self._keeps_inputs)
        chains = of_student, chain_of(teacher, message, 1)
        parts = self._layers.cut(*self._choose(*chains, limit, in_flight))
        return replace(_placement(parts, student, teacher, chains, message), rows=rows, recompute=self._recompute)

    def _choose(
        self, of_student: Chain, of_teacher: Chain, limit: float, in_flight: Sequence[int]
    ) -> tuple[list[int], list[int] | None]:
        if self._layers.source is None:
            return self._cut(of_student, of_teacher, limit, in_flight)
        seconds, edge, weights = list(of_student.seconds), list(of_student.edge), list(of_student.weights)
        place = 0
        for number, followers in enumerate(self._layers.followers()):
            edge[number] += of_teacher.edge[min(place, len(of_teacher.edge) - 1)]
            seconds[number] += sum(of_teacher.seconds[follower] for follower in followers)
            weights[number] += sum(of_teacher.weights[follower] for follower in followers)
            place += len(followers)
        nothing = Chain([0.0] * self._stages)
        both = replace(of_student, seconds=seconds, edge=edge, weights=weights)
        return self._cut(both, nothing, limit, in_flight)[0], None

    def _cut(
        self, student: Chain, teacher: Chain, limit: float, in_flight: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        try:
            return joint_cut(student, teacher, self._stages, limit, in_flight, SPARE)
        except ValueError as error:
            whole = sum(student.weights) + sum(teacher.weights)
            way_out = "more stages or smaller microbatches" if self._recompute else (
                'more stages, smaller microbatches, or recompute=True (or "selective")'
            )  # fmt: skip
            raise ValueError(
                f"No cut into {self._stages} stages keeps max_memory={limit:,.0f} bytes per rank: weights, gradients "
                f"and optimizer state take {whole:,.0f} bytes in all, and a microbatch {sum(student.held):,.0f}. Use "
                f"{way_out}."
            ) from error


class Placer(Cutter):
    """Measures every layer once, on one rank each, and finds the cut whose slowest rank is the fastest.

    Args:
        layers: of both networks.
        stages: P.
        comm: this rank's connections.
        device: of this rank.
        context: of a forward in the run's precision.
        recompute: whether each backward of the student begins with its forward again.
        keeps_inputs: whether until then a stage holds what goes in and out of it only (`Chain.passed`).
        selective: as of `Meter`.
    """

    def __init__(
        self,
        layers: Layers,
        stages: int,
        comm: Comm,
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
        recompute: bool = False,
        keeps_inputs: bool = False,
        selective: bool = False,
    ) -> None:
        super().__init__(layers, stages, recompute, keeps_inputs)
        self._comm, self._context = comm, context
        self._meter = Meter(device, selective)
        self._tensors = {name: tensors_of(network) for name, network in layers.networks.items()}

    def find(
        self,
        sample: Sample | None,
        limit: float = math.inf,
        in_flight: Sequence[int] = (),
        small: Sample | None = None,
    ) -> Placement | ValueError | None:
        """The stages, on rank 0; by parameters if there is nothing to measure with.

        Args:
            sample: one microbatch of each network's input, view by view, on rank 0; None if there is none.
            limit: bytes per rank for weights, gradients, optimizer state and activations.
            in_flight: microbatches per stage whose activations are held at once.
            small: as `sample`, of fewer rows, to learn what of the seconds does not depend on these.

        Returns:
            On rank 0 the plan, or an error for every rank to raise: no cut keeps the limit. None elsewhere.
        """
        first = self._layers.cut(*self._layers.by_parameters(self._stages))
        if not self._comm.share(sample is not None, 0):
            return named(first)
        samples = [sample, small] if self._comm.share(small is not None, 0) else [sample]
        costs = [self._of_all(first, one, enough) for one, enough in zip(samples, ENOUGH_FOR_ALL, strict=False)]
        message = self._meter.message(self._comm)
        if sample is None:
            return None
        (student, teacher), *others = costs
        try:
            found = self.place(student, teacher, message, rows_of(sample), limit, in_flight)
        except ValueError as error:
            return error
        for less, fewer in zip(others, samples[1:], strict=True):
            assert fewer is not None
            chains = chain_of(less[0], message, 2), chain_of(less[1], message, 1)
            parts = self._layers.cut(*found.sizes)
            found = found.with_fixed(replace(_placement(parts, *less, chains, message), rows=rows_of(fewer)))
        return found

    def _of_all(
        self, parts: Partition, sample: Sample | None, enough: float
    ) -> tuple[list[LayerCost], list[LayerCost]]:
        """Costs of the layers of student and teacher, on rank 0."""
        mine = [
            self._measure(network, parts, (sample or {}).get(network), enough) for network in ("student", "teacher")
        ]
        gathered = self._comm.gather(mine) or []
        student, teacher = ([cost for rank in gathered for cost in rank[place]] for place in (0, 1))
        return student, teacher

    def _measure(self, network: str, parts: Partition, views: list[Any] | None, enough: float) -> list[LayerCost]:
        """Measure this rank's share of a network's layers, on what the ranks before it made of the sample."""
        sizes = [len(stage) for stage in getattr(parts, network)]
        start = sum(sizes[: self._comm.stage])
        apart = self._layers.apart()
        costs: list[LayerCost] = []

        def once(views: list[Any]) -> tuple[list[Any], list[LayerCost]]:
            found = []
            for number in range(start, start + sizes[self._comm.stage]):
                (layer,) = apart.runs(network, number)
                tensors = self._tensors_of(network, number)
                try:
                    with self._context():
                        if network == "teacher":
                            views, cost = self._meter.teacher(layer.module, tensors, views)
                        else:
                            views, cost = self._meter.student(layer.module, tensors, views, number == 0)
                except ValueError as error:
                    if (known := too_few_values(error, f"the {network}", {layer.name: layer.module})) is not None:
                        raise known from error
                    raise
                found.append(cost)
            return views, found

        def run(views: list[Any]) -> list[Any] | None:
            nonlocal costs
            views, costs = fastest(lambda: once(views), enough)
            return views if self._comm.stage < self._stages - 1 else None

        self._comm.chain(run, views)
        return costs

    def _tensors_of(self, network: str, number: int) -> list[Tensor]:
        layer = getattr(self._layers, network)[number]
        known = self._tensors[network]
        return list({id(known[name]): known[name] for name in layer.state_names if name in known}.values())


def rows_of(sample: Sample) -> int:
    """Of a microbatch, by the first view of the student."""
    return len(tree.flatten(sample["student"])[0][0])


def chain_of(
    costs: Sequence[LayerCost], message: MessageCost, messages: int, recompute: bool = False, keeps_inputs: bool = False
) -> Chain:
    """What the layers cost where a cut means so many messages per microbatch; the rest is as in `Placer`."""
    sent = [0, *(cost.sent for cost in costs[:-1])]
    return Chain(
        [cost.seconds + recompute * cost.forward for cost in costs],
        [messages * message.seconds(size) for size in sent],
        [float(cost.parameters + 3 * cost.trained) for cost in costs],
        [float(cost.held) for cost in costs],
        [*(float(cost.received) for cost in costs), float(costs[-1].sent)] if keeps_inputs else (),
    )


def _placement(
    parts: Partition,
    student: Sequence[LayerCost],
    teacher: Sequence[LayerCost],
    chains: tuple[Chain, Chain],
    message: MessageCost,
) -> Placement:
    names = named(parts)
    ends = [list(itertools.accumulate(sizes, initial=0)) for sizes in names.sizes]
    stages = [[slice(a, b) for a, b in itertools.pairwise(of)] for of in ends]

    def sums(column: Sequence[float], slices: Sequence[slice]) -> tuple[float, ...]:
        return tuple(float(sum(column[places])) for places in slices)

    def of_both(column: Callable[[Chain], Sequence[float]]) -> tuple[float, ...]:
        pairs = zip(*(sums(column(chain), slices) for chain, slices in zip(chains, stages, strict=True)), strict=True)
        return tuple(map(sum, pairs))

    messages = [
        sum(chain.edge[place] for chain, of in zip(chains, ends, strict=True) for place in of[stage : stage + 2]
            if 0 < place < len(chain.edge))
        for stage in range(names.stages)
    ]  # fmt: skip
    passed = tuple(float(student[of.start].received + student[of.stop - 1].sent) for of in stages[0])
    single = [message.seconds(student[place - 1].sent) for place in ends[0][1:-1]]
    return Placement(
        names.student,
        names.teacher,
        t=sums([cost.forward for cost in teacher], stages[1]),
        f=sums([cost.forward for cost in student], stages[0]),
        b=sums([cost.inputs for cost in student], stages[0]),
        w=sums([cost.weights for cost in student], stages[0]),
        first=sums([cost.first for cost in student], stages[0]),
        rest=sums([cost.rest for cost in student], stages[0]),
        messages=tuple(messages),
        message=sum(single) / len(single),
        weights=of_both(lambda chain: chain.weights),
        held=sums([cost.held for cost in student], stages[0]),
        passed=passed,
        teacher_held=tuple(float(max((cost.held for cost in teacher[of]), default=0)) for of in stages[1]),
        pending=tuple(_pending(student[of], stage == 0) for stage, of in enumerate(stages[0])),
    )


def _pending(layers: Sequence[LayerCost], first: bool) -> float:
    """Bytes of a stage between the two parts of a split backward: one graph, which stays if a layer needs it."""
    held = sum(cost.held for cost in layers)
    if first:  # there is no first part, so all stays
        return float(held + layers[-1].sent)
    return float(sum(cost.pending for cost in layers) + held * any(cost.keeps_graph for cost in layers))
