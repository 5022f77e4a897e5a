"""From two networks to stages: flattened layers, the cuts, and which rank owns which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Balance = str | Sequence[int] | Mapping[str, Sequence[int]]
BALANCES = ("auto", "parameters")
EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Layer:
    """One indivisible layer: its qualified name within the network, and the module."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Partition:
    """The layers of student and teacher, stage by stage."""

    student: tuple[tuple[Layer, ...], ...]
    teacher: tuple[tuple[Layer, ...], ...]

    def owners(self) -> dict[str, int]:
        """The stage of every entry of the state dict of both networks, by qualified name (``student.0.weight``)."""
        return {
            f"{network}.{layer.name}.{name}" if layer.name else f"{network}.{name}": stage
            for network in ("student", "teacher")
            for stage, layers in enumerate(getattr(self, network))
            for layer in layers
            for name in _state_names(layer.module)
        }


def layers_of(network: nn.Module, prefix: str = "") -> list[Layer]:
    """Flatten nested `nn.Sequential` into layers; anything else, and a Sequential with hooks, is one layer."""
    plain = isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward
    if not plain or has_hooks(network):
        return [Layer(prefix, network)]
    return [
        layer
        for name, child in network.named_children()
        for layer in layers_of(child, f"{prefix}.{name}" if prefix else name)
    ]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks of its own (torch has no public name for them)."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def partition(
    student: nn.Module, teacher: nn.Module, stages: int, balance: Balance = "auto", source: nn.Module | None = None
) -> Partition:
    """Cut both networks into contiguous stages.

    Args:
        student, teacher: the networks.
        stages: how many stages, at least 1.
        balance: "auto" or "parameters" (the largest stage has as few parameters as possible), the numbers of layers of
            the stages for both networks, or ``{"student": [...], "teacher": [...]}``.
        source: the student's submodule that a momentum teacher follows: its stages are then the teacher's, so that the
            momentum update needs no message. None for a frozen teacher.

    Raises:
        ValueError: more stages than layers, unknown balance, cuts that do not add up, shared parameters.
    """
    student_layers, teacher_layers = layers_of(student), layers_of(teacher)
    cuts = _explicit_cuts(balance)
    student_stages = _cut("student", student_layers, stages, cuts.get("student"))
    if source is None:
        teacher_stages = _cut("teacher", teacher_layers, stages, cuts.get("teacher"))
    else:
        if isinstance(balance, Mapping) and "teacher" in balance:
            raise ValueError(
                "balance has cuts for the teacher, but a momentum teacher follows the student's cuts, so that its "
                "update needs no message. Give cuts for the student alone."
            )
        teacher_stages = _follow(student_stages, student, teacher_layers, source)
    result = Partition(student_stages, teacher_stages)
    _refuse_shared(result)
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


def _cut(network: str, layers: list[Layer], stages: int, sizes: Sequence[int] | None) -> tuple[tuple[Layer, ...], ...]:
    if stages > len(layers):
        raise ValueError(
            f"The {network} has {len(layers)} layer(s) for {stages} stages. Use fewer devices, or write it as an "
            "nn.Sequential of more layers (nested ones are flattened; any other module is one layer)."
        )
    if sizes is None:
        sizes = balance_by_cost([sum(p.numel() for p in layer.module.parameters()) for layer in layers], stages)
    elif len(sizes) != stages or sum(sizes) != len(layers) or min(sizes) < 1:
        raise ValueError(
            f"balance gives the {network} {list(sizes)} layers: {len(sizes)} stage(s) with {sum(sizes)} layers in all, "
            f"but there are {stages} stages and {len(layers)} layers. Give {stages} numbers of at least 1 that add up "
            f"to {len(layers)}."
        )
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return tuple(tuple(layers[start : start + size]) for start, size in zip(starts, sizes, strict=True))


def balance_by_cost(costs: Sequence[float], stages: int) -> list[int]:
    """Numbers of layers per stage such that the most expensive stage is as cheap as possible.

    Exact, by dynamic programming over prefixes; among equals the one with the smallest sum of squares.

    Args:
        costs: one non-negative number per layer.
        stages: at most ``len(costs)``.
    """
    count = len(costs)
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best = {
        (0, 0): (0.0, 0.0, 0)
    }  # (stages, layers) -> (largest, sum of squares as tie-break, layers of the last stage)
    for stage in range(1, stages + 1):
        for end in range(stage, count - (stages - stage) + 1):
            options = []
            for start in range(stage - 1, end):
                if (stage - 1, start) in best:
                    largest, squares, _ = best[stage - 1, start]
                    mine = prefix[end] - prefix[start]
                    options.append((max(largest, mine), squares + mine * mine, end - start))
            best[stage, end] = min(options)
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


def _state_names(module: nn.Module) -> list[str]:
    return [*tensors_of(module), *extra_states_of(module)]


def _refuse_shared(result: Partition) -> None:
    for network in ("student", "teacher"):
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


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by qualified name, shared ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def extra_states_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every submodule with a state of its own making (`get_extra_state`), by the state's key in the state dict."""
    return {
        f"{name}.{EXTRA_STATE}".lstrip("."): child
        for name, child in module.named_modules()
        if type(child).get_extra_state is not nn.Module.get_extra_state
    }
