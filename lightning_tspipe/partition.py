"""From two networks to stages: flattened layers, the cuts, and which rank owns which parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_tspipe.arguments import run_network
from lightning_tspipe.recording import extra_states_of, has_hooks, tensors_of
from lightning_tspipe.taps import TapError, run_tapped
from lightning_tspipe.trace import Segment, Traced

Balance = str | Sequence[int] | Mapping[str, Sequence[int]]
BALANCES = ("auto", "parameters")
NAMES_LAYERS = "pipeline_layers"  # the method by which a network names its layers
UNEVEN = 1.5  # a largest stage of so many times the mean is a reason to look into the layers of a Sequential
SLACK = 1.05  # how much larger the largest stage may be so that less travels
CPU = torch.device("cpu")
NO_TAPS: Mapping[str, Sequence[str]] = {}


@dataclass(frozen=True)
class Layer:
    """One indivisible layer.

    Args:
        name: its qualified name within the network.
        module: what it calls; of a network that was followed, the submodule that begins it.
        states: of a network that was followed, names in its state dict; None means those of `module`.
        parameters: how many there are; None means those of `module`.
    """

    name: str
    module: nn.Module
    states: tuple[str, ...] | None = None
    parameters: int | None = None

    @property
    def num_parameters(self) -> int:
        """How many numbers it trains."""
        return sum(p.numel() for p in self.module.parameters()) if self.parameters is None else self.parameters

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of its parameters, buffers and other states in the network's state dict."""
        if self.states is not None:
            return self.states
        names = (*tensors_of(self.module), *extra_states_of(self.module))
        return tuple(f"{self.name}.{name}" if self.name else name for name in names)


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


def layers_of(network: nn.Module, prefix: str = "") -> list[Layer]:
    """The layers that a network has by its structure.

    They are those that its `pipeline_layers()` names; else nested `nn.Sequential` are flattened, and anything else, and
    a Sequential with hooks, is one layer.
    """
    if not prefix and hasattr(network, NAMES_LAYERS):
        return _named_layers(network)
    if not _is_plain(network) or has_hooks(network):
        return [Layer(prefix, network)]
    return [
        layer
        for name, child in network.named_children()
        for layer in layers_of(child, f"{prefix}.{name}" if prefix else name)
    ]


def _is_plain(network: nn.Module) -> bool:
    return isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward


def _named_layers(network: Any) -> list[Layer]:
    names = {id(module): name for name, module in network.named_modules()}
    result = []
    for number, module in enumerate(network.pipeline_layers()):
        if isinstance(module, nn.Module) and id(module) in names and module is not network:
            result.append(Layer(names[id(module)], module))
        elif not isinstance(module, nn.Module) and callable(module):
            result.append(Layer(f"pipeline_layers[{number}]", Function(module)))
        else:
            raise ValueError(
                f"pipeline_layers() of {type(network).__name__} gives a {type(module).__name__} at place {number}: "
                "give submodules of the network, or functions, that its forward calls one after the other."
            )
    owned = {id(tensor) for layer in result for tensor in tensors_of(layer.module).values()}
    for name, tensor in tensors_of(network).items():
        if id(tensor) not in owned:
            raise ValueError(
                f"{name!r} of {type(network).__name__} is in none of the modules that pipeline_layers() gives, so no "
                "stage would have it. Put it into one of them."
            )
    return result


class Entry(nn.Module):
    """The first layer of a network, or a whole one with taps, called with the arguments that an input stands for."""

    def __init__(self, layer: nn.Module, taps: Sequence[str] = ()) -> None:
        super().__init__()
        self.layer, self._taps = layer, taps

    def forward(self, value: Any) -> Any:
        """Call it."""
        return run_tapped(self.layer, value, self._taps) if self._taps else run_network(self.layer, value)


class Function(nn.Module):
    """A function without parameters as a layer."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, value: Any) -> Any:
        """Call it."""
        return self._function(value)


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
    """Cut both networks into contiguous stages.

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
    cuts = _explicit_cuts(balance)
    taps = {name: names for name, names in taps.items() if names}
    traced: dict[str, Traced] = {}

    def find(name: str, network: nn.Module, follow: bool) -> list[Layer]:
        if name in taps and stages == 1:
            cuts.pop(name, None)  # of the layers that it is not taken apart into
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

    student_layers = find("student", student, False)
    student_stages = _cut("student", student_layers, stages, cuts.get("student"), traced.get("student"))
    teacher_layers = find("teacher", teacher, source is not None and "student" in traced)
    if source is None:
        teacher_stages = _cut("teacher", teacher_layers, stages, cuts.get("teacher"), traced.get("teacher"))
    else:
        if isinstance(balance, Mapping) and "teacher" in balance:
            raise ValueError(
                "balance has cuts for the teacher, but a momentum teacher follows the student's cuts, so that its "
                "update needs no message. Give cuts for the student alone."
            )
        teacher_stages = _follow(student_stages, student, teacher_layers, source)
    networks = {"student": student, "teacher": teacher}
    entered = frozenset(name for name, network in networks.items() if not _is_plain(network))
    result = Partition(student_stages, teacher_stages, traced, entered, taps if stages == 1 else NO_TAPS)
    _refuse_shared(result)
    return result


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


def _explicit_cuts(balance: Balance) -> dict[str, Sequence[int]]:
    if isinstance(balance, str):
        if balance not in BALANCES:
            raise ValueError(
                f"balance={balance!r} is unknown: choose from {', '.join(map(repr, BALANCES))}, or give the numbers of "
                'layers of the stages, such as {"student": [2, 3], "teacher": [4, 4]}.'
            )
        return {}
    if isinstance(balance, Mapping):
        if unknown := set(balance) - {"student", "teacher"}:
            raise ValueError(f"balance has the keys {sorted(unknown)}: only 'student' and 'teacher' have a meaning")
        return dict(balance)
    return {"student": balance, "teacher": balance}


def _cut(
    network: str, layers: list[Layer], stages: int, sizes: Sequence[int] | None, traced: Traced | None = None
) -> tuple[tuple[Layer, ...], ...]:
    if stages > len(layers):
        raise ValueError(
            f"The {network} has {len(layers)} layer(s) for {stages} stages. Use fewer devices, or a network of more "
            "layers (what a layer is: docs/models.md)."
        )
    if sizes is None:
        alive = [] if traced is None else traced.alive
        sizes = balance_by_cost([layer.num_parameters for layer in layers], stages, alive)
    elif len(sizes) != stages or sum(sizes) != len(layers) or min(sizes) < 1:
        raise ValueError(
            f"balance gives the {network} {list(sizes)} layers: {len(sizes)} stage(s) with {sum(sizes)} layers in all, "
            f"but there are {stages} stages and {len(layers)} layers. Give {stages} numbers of at least 1 that add up "
            f"to {len(layers)}."
        )
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return tuple(tuple(layers[start : start + size]) for start, size in zip(starts, sizes, strict=True))


def balance_by_cost(costs: Sequence[float], stages: int, alive: Sequence[float] = ()) -> list[int]:
    """Numbers of layers per stage such that the most expensive stage is as cheap as possible.

    Exact, by dynamic programming over prefixes; among equals the one with the smallest sum of squares. With `alive` the
    most expensive stage may cost 5 % more if less travels between the stages for that.

    Args:
        costs: one non-negative number per layer.
        stages: at most ``len(costs)``.
        alive: what travels if a stage begins at a layer.
    """
    sizes = _cheapest(costs, stages, None, alive)
    if not alive:
        return sizes
    ends = list(itertools.accumulate(sizes, initial=0))
    return _cheapest(costs, stages, SLACK * max(sum(costs[a:b]) for a, b in itertools.pairwise(ends)), alive)


def _cheapest(costs: Sequence[float], stages: int, bound: float | None, alive: Sequence[float]) -> list[int]:
    """The cut with the smallest largest stage; with a bound, the one below it where the least travels."""
    count = len(costs)
    prefix = list(itertools.accumulate(costs, initial=0.0))
    # (stages, layers) -> (objective, sum of squares as tie-break, layers of the last stage)
    best = {(0, 0): (0.0, 0.0, 0)}
    for stage in range(1, stages + 1):
        for end in range(stage, count - (stages - stage) + 1):
            found = None
            for start in range(end - 1, stage - 2, -1):
                mine = prefix[end] - prefix[start]
                if bound is not None and mine > bound:
                    break  # and more layers cost more
                if bound is None and found is not None and mine > found[0]:
                    break
                if (stage - 1, start) in best:
                    before, squares, _ = best[stage - 1, start]
                    now = max(before, mine) if bound is None else before + (alive[start] if start else 0)
                    option = now, squares + mine * mine, end - start
                    found = option if found is None else min(found, option)
            if found is not None:
                best[stage, end] = found
    sizes: list[int] = []
    end = count
    for stage in range(stages, 0, -1):
        sizes.insert(0, best[stage, end][2])
        end -= sizes[0]
    return sizes


def _follow(
    student_stages: tuple[tuple[Layer, ...], ...], student: nn.Module, teacher_layers: list[Layer], source: nn.Module
) -> tuple[tuple[Layer, ...], ...]:
    """Put every teacher layer on the stage of its source; a layer without parameters goes where its namesake is."""
    prefix = next(name for name, module in student.named_modules() if module is source)
    stage_of = {layer.name: stage for stage, layers in enumerate(student_stages) for layer in layers}
    result: list[list[Layer]] = [[] for _ in student_stages]
    current = 0
    for layer in teacher_layers:
        wanted = f"{prefix}.{layer.name}".strip(".")
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
