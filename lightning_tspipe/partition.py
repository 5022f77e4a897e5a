"""From two networks to stages: flattened layers, the cuts, and which rank owns which parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_tspipe.balance import balance_by_cost
from lightning_tspipe.layers import NAMES_LAYERS, Entry, Layer, is_plain, layers_of
from lightning_tspipe.taps import TapError
from lightning_tspipe.trace import Segment, Traced

Balance = str | Sequence[int] | Mapping[str, Sequence[int]]
BALANCES = ("auto", "parameters")
UNEVEN = 1.5  # a largest stage of so many times the mean is a reason to look into the layers of a Sequential
CPU = torch.device("cpu")
NO_TAPS: Mapping[str, Sequence[str]] = {}


@dataclass(frozen=True)
class Partition:
    """The layers of student and teacher, stage by stage.

    Args:
        traced: the networks that were followed.
        entered: networks of structure whose first layer takes what their forward would.
        taps: of networks that are one layer, the names of submodules whose results are given with the output.
    """

    student: tuple[tuple[Layer, ...], ...]
    teacher: tuple[tuple[Layer, ...], ...]
    traced: Mapping[str, Traced] = field(default_factory=dict)
    entered: frozenset[str] = frozenset()
    taps: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def owners(self) -> dict[str, int]:
        """The stage of every entry of the state dict of both networks, by qualified name (``student.0.weight``)."""
        return {
            f"{network}.{name}": stage
            for network in ("student", "teacher")
            for stage, layers in enumerate(getattr(self, network))
            for layer in layers
            for name in layer.state_names
        }

    def runs(self, network: str, stage: int) -> tuple[Layer, ...]:
        """What a stage calls, one after the other."""
        stages: tuple[tuple[Layer, ...], ...] = getattr(self, network)
        if not stages[stage]:
            return ()
        if network not in self.traced:
            first, *rest = stages[stage]
            if network in self.taps:
                return (Layer(first.name, Entry(first.module, self.taps[network])),)
            if network not in self.entered or stage or not stages[0]:
                return stages[stage]
            return (Layer(first.name, Entry(first.module)), *rest)
        start = sum(map(len, stages[:stage]))
        segment = Segment(self.traced[network], start, start + len(stages[stage]))
        return (Layer(stages[stage][0].name, segment),)


@dataclass(frozen=True)
class Layers:
    """The layers of both networks, before they are cut.

    Args:
        student, teacher: in order.
        networks: the networks by name.
        traced: those that were followed.
        source: the student's submodule that a momentum teacher follows; None for a frozen teacher.
        taps: as in `Partition`.
    """

    student: list[Layer]
    teacher: list[Layer]
    networks: Mapping[str, nn.Module]
    traced: Mapping[str, Traced]
    source: nn.Module | None
    taps: Mapping[str, Sequence[str]]

    def by_parameters(self, stages: int) -> tuple[list[int], list[int] | None]:
        """Sizes such that the largest stage has as few parameters as possible; None: the teacher's follow."""
        sizes = []
        for name in ("student",) if self.source is not None else ("student", "teacher"):
            layers: list[Layer] = getattr(self, name)
            _check_count(name, layers, stages)
            alive = self.traced[name].alive if name in self.traced else []
            sizes.append(balance_by_cost([layer.num_parameters for layer in layers], stages, alive))
        return sizes[0], sizes[1] if self.source is None else None

    def cut(self, student: Sequence[int], teacher: Sequence[int] | None = None) -> Partition:
        """Stages of these numbers of layers; those of a momentum teacher are its source's.

        Raises:
            ValueError: numbers that do not add up, shared parameters, a momentum teacher that cannot follow.
        """
        stages = len(student)
        student_stages = _cut("student", self.student, stages, student)
        if self.source is None:
            assert teacher is not None
            teacher_stages = _cut("teacher", self.teacher, stages, teacher)
        else:
            teacher_stages = _follow(student_stages, self.networks["student"], self.teacher, self.source)
        result = self._partition(student_stages, teacher_stages)
        _refuse_shared(result)
        return result

    def apart(self) -> Partition:
        """Each layer as a stage of its own."""
        student, teacher = (tuple((layer,) for layer in layers) for layers in (self.student, self.teacher))
        return self._partition(student, teacher)

    def _partition(self, student: tuple[tuple[Layer, ...], ...], teacher: tuple[tuple[Layer, ...], ...]) -> Partition:
        entered = frozenset(name for name, network in self.networks.items() if not is_plain(network))
        return Partition(student, teacher, self.traced, entered, self.taps)

    def followers(self) -> list[list[int]]:
        """For each student layer the momentum teacher's layers, by number, that are on its stage wherever it is cut."""
        assert self.source is not None
        stages = tuple((layer,) for layer in self.student)
        number = {id(layer): n for n, layer in enumerate(self.teacher)}
        followed = _follow(stages, self.networks["student"], self.teacher, self.source)
        return [[number[id(layer)] for layer in stage] for stage in followed]


def find_layers(
    student: nn.Module,
    teacher: nn.Module,
    stages: int,
    cuts: Mapping[str, Sequence[int]],
    source: nn.Module | None = None,
    examples: Callable[[str], Sequence[Any]] | None = None,
    device: torch.device = CPU,
    taps: Mapping[str, Sequence[str]] = NO_TAPS,
) -> Layers:
    """The layers that both networks have; arguments as in `partition`, `cuts` as `explicit_cuts` gives them."""
    taps = {name: names for name, names in taps.items() if names}
    traced: dict[str, Traced] = {}

    def find(name: str, network: nn.Module, follow: bool) -> list[Layer]:
        if name in taps and stages == 1:
            return [Layer("", network)]
        plain = layers_of(network)
        if name in taps and hasattr(network, NAMES_LAYERS):
            raise TapError(
                f"The {name} has taps and names its layers by {NAMES_LAYERS}(): what its layers return on the way is "
                "not seen. Remove that method, so that its forward is followed, or let the layers hand the features "
                "on as a part of the output."
            )
        if stages == 1 or not (follow or name in taps or _needs_following(network, plain, stages, cuts.get(name))):
            return plain
        if examples is None:
            raise ValueError(
                f"The {name} is no nn.Sequential, or has taps: an example of its input is needed to cut it."
            )
        traced[name] = Traced(network, examples(name), device, taps.get(name, ()))
        return _traced_layers(traced[name])

    of_student = find("student", student, False)
    of_teacher = find("teacher", teacher, source is not None and "student" in traced)
    networks = {"student": student, "teacher": teacher}
    return Layers(of_student, of_teacher, networks, traced, source, taps if stages == 1 else NO_TAPS)


def partition(
    student: nn.Module,
    teacher: nn.Module,
    stages: int,
    balance: Balance = "auto",
    source: nn.Module | None = None,
    examples: Callable[[str], Sequence[Any]] | None = None,
    device: torch.device = CPU,
    taps: Mapping[str, Sequence[str]] = NO_TAPS,
) -> Partition:
    """Cut both networks into contiguous stages, without measuring.

    Args:
        student, teacher: the networks.
        stages: how many stages, at least 1.
        balance: "auto" or "parameters" (the largest stage has as few parameters as possible), the numbers of layers of
            the stages for both networks, or ``{"student": [...], "teacher": [...]}``.
        source: the student's submodule that a momentum teacher follows: its stages are then the teacher's, so that the
            momentum update needs no message. None for a frozen teacher.
        examples: gives inputs of "student" and "teacher", for a network whose forward has to be followed.
        device: where they are going to run.
        taps: names of submodules of "student" and "teacher" whose results are given with the output, as `taps.Tapped`.

    Raises:
        ValueError: more stages than layers, unknown balance, cuts that do not add up, shared parameters, a network that
            cannot be cut.
        TapError: a tap that is not seen.
    """
    cuts = explicit_cuts(balance, source is not None)
    layers = find_layers(student, teacher, stages, cuts, source, examples, device, taps)
    return layers.cut(*chosen(layers, stages, cuts))


def chosen(
    layers: Layers, stages: int, cuts: Mapping[str, Sequence[int]]
) -> tuple[Sequence[int], Sequence[int] | None]:
    """The user's cuts, completed by parameters; cuts of a network with taps mean nothing on one stage."""
    cuts = {name: sizes for name, sizes in cuts.items() if name not in layers.taps}
    for name in ("student", "teacher"):
        if name in cuts:
            _check_sizes(name, getattr(layers, name), stages, cuts[name])
    if "student" in cuts and (layers.source is not None or "teacher" in cuts):
        return cuts["student"], cuts.get("teacher")
    student, teacher = layers.by_parameters(stages)
    return cuts.get("student", student), cuts.get("teacher", teacher)


def _needs_following(network: nn.Module, plain: list[Layer], stages: int, sizes: Sequence[int] | None) -> bool:
    """Whether the layers that a network has by its structure are too few, or too uneven, and it has others."""
    if hasattr(network, NAMES_LAYERS) or all(next(layer.module.children(), None) is None for layer in plain):
        return False
    if len(plain) == 1 or stages > len(plain):
        return True
    if sizes is not None:
        return sum(sizes) != len(plain)
    costs = [layer.num_parameters for layer in plain]
    largest = max(costs)
    return largest * stages > UNEVEN * sum(costs)


def _traced_layers(traced: Traced) -> list[Layer]:
    result = []
    for number, name in enumerate(traced.names):
        tensors = traced.states(number)
        states = (*tensors, *traced.extra_states(number))
        count = sum({id(t): t.numel() for t in tensors.values() if isinstance(t, nn.Parameter)}.values())
        result.append(Layer(name, traced.module(name), states, count))
    return result


def explicit_cuts(balance: Balance, follows: bool = False) -> dict[str, Sequence[int]]:
    """The cuts that a balance gives, by network; none for a word.

    Raises:
        ValueError: an unknown word or key, or cuts for a teacher that follows the student.
    """
    if isinstance(balance, str):
        if balance not in BALANCES:
            raise ValueError(
                f"balance={balance!r} is unknown: choose from {', '.join(map(repr, BALANCES))}, or give the numbers of "
                'layers of the stages, such as {"student": [2, 3], "teacher": [4, 4]}, or the path of a saved plan '
                "that ends with .json."
            )
        return {}
    if not isinstance(balance, Mapping):
        return {"student": balance} if follows else {"student": balance, "teacher": balance}
    if unknown := set(balance) - {"student", "teacher"}:
        raise ValueError(f"balance has the keys {sorted(unknown)}: only 'student' and 'teacher' have a meaning")
    if follows and "teacher" in balance:
        raise ValueError(
            "balance has cuts for the teacher, but a momentum teacher follows the student's cuts, so that its "
            "update needs no message. Give cuts for the student alone."
        )
    return dict(balance)


def _check_count(network: str, layers: list[Layer], stages: int) -> None:
    if stages > len(layers):
        raise ValueError(
            f"The {network} has {len(layers)} layer(s) for {stages} stages. Use fewer devices, or a network of more "
            "layers (what a layer is: docs/models.md)."
        )


def _check_sizes(network: str, layers: list[Layer], stages: int, sizes: Sequence[int]) -> None:
    _check_count(network, layers, stages)
    if len(sizes) != stages or sum(sizes) != len(layers) or min(sizes) < 1:
        raise ValueError(
            f"balance gives the {network} {list(sizes)} layers: {len(sizes)} stage(s) with {sum(sizes)} layers in all, "
            f"but there are {stages} stages and {len(layers)} layers. Give {stages} numbers of at least 1 that add up "
            f"to {len(layers)}."
        )


def _cut(network: str, layers: list[Layer], stages: int, sizes: Sequence[int]) -> tuple[tuple[Layer, ...], ...]:
    _check_sizes(network, layers, stages, sizes)
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return tuple(tuple(layers[start : start + size]) for start, size in zip(starts, sizes, strict=True))


def _follow(
    student_stages: tuple[tuple[Layer, ...], ...], student: nn.Module, teacher_layers: list[Layer], source: nn.Module
) -> tuple[tuple[Layer, ...], ...]:
    """Put every teacher layer on the stage of its source; a layer without parameters goes where its namesake is."""
    names = {id(module): name for name, module in student.named_modules()}
    stage_of = {layer.name: stage for stage, layers in enumerate(student_stages) for layer in layers}
    result: list[list[Layer]] = [[] for _ in student_stages]
    current = 0
    for layer in teacher_layers:
        wanted = _name_of(source, layer.name, names)
        found = {
            stage
            for name, stage in stage_of.items()
            if not name or name == wanted or f"{wanted}.".startswith(f"{name}.") or f"{name}.".startswith(f"{wanted}.")
        }
        if len(found) > 1 or (found and max(found) < current):
            raise ValueError(
                f"The teacher's layer {layer.name!r} follows student layers of the stages {sorted(found)}. Give the "
                "teacher the structure of the module that `ema_source()` returns, so that it is cut in the same places."
            )
        current = max(found | {current})
        result[current].append(layer)
    return tuple(map(tuple, result))


def _name_of(source: nn.Module, layer: str, names: Mapping[int, str]) -> str:
    """What the student calls a layer of the source; a slice, say, is no module of the student's, its layers are."""
    if id(source) not in names:
        first, _, layer = layer.partition(".")
        source = source.get_submodule(first)
    return f"{names.get(id(source), '')}.{layer}".strip(".")


def _refuse_shared(result: Partition) -> None:
    for network in {"student", "teacher"} - set(result.traced):
        seen: dict[int, tuple[int, str]] = {}
        for stage, layers in enumerate(getattr(result, network)):
            for layer in layers:
                for name, parameter in layer.module.named_parameters(remove_duplicate=False):
                    full = f"{network}.{layer.name}.{name}".replace("..", ".")
                    first_stage, first = seen.setdefault(id(parameter), (stage, full))
                    if first_stage != stage:
                        raise ValueError(
                            f"{first} (stage {first_stage}) and {full} (stage {stage}) are one shared parameter. Put "
                            "both layers on one stage with explicit cuts, or give each its own parameter."
                        )
