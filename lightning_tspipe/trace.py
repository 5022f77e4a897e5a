"""From any module to a chain of layers, and the part of its forward that a stage runs.

A layer begins where a submodule with parameters or buffers is called, and lasts until the next one begins. What a later
layer uses of earlier ones (residuals, skips, masks) travels with the microbatch: the values that are alive at a cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tspipe import tree
from lightning_tspipe.arguments import arguments_of
from lightning_tspipe.batchnorm import too_few_values
from lightning_tspipe.memory import made_up, swap
from lightning_tspipe.recording import NotFollowed, Recorder, Recording, Signature, extra_states_of, tensors_of
from lightning_tspipe.steps import Options, Steps
from lightning_tspipe.taps import TapError, uncalled

MOST_RECORDINGS = 64  # of one network that are kept


class Carried(NamedTuple):
    """What travels between two stages of a network that was followed: the values alive at the cut."""

    signature: Signature
    tensors: tuple[Tensor, ...]


class _Plan(NamedTuple):
    """The part of a recording that one stage runs."""

    inputs: tuple[int, ...]
    copied: frozenset[int]  # inputs that a step writes into
    steps: Steps
    outputs: tuple[int, ...]


class Traced:
    """A network whose forward was followed.

    Args:
        network: the network.
        examples: inputs of it; shapes and types count, values do not.
        device: where it is going to run.
        taps: names of submodules whose results are given with the output, as `Tapped`.

    Raises:
        ValueError: the forward cannot be followed; the text says what to do.
        TapError: a tap is not seen.
    """

    def __init__(
        self, network: nn.Module, examples: Sequence[Any], device: torch.device, taps: Sequence[str] = ()
    ) -> None:
        self.network, self._device = network, device
        self._recorder = Recorder(network, device, taps)
        self._modules = list(network.modules())
        self._recordings: dict[Signature, Recording] = {}
        self._plans: dict[Signature, dict[tuple[int, int], _Plan]] = {}
        self._layer_of: dict[str, int] = {}  # by name of a parameter or buffer
        self.options: Options | None = None  # how to compile what stages run, if at all
        self.begins: Callable[[str], None] | None = None  # hears the name of each layer that is about to run
        first: dict[int, str] = {}
        self._alias = {name: first.setdefault(id(tensor), name) for name, tensor in tensors_of(network).items()}
        recordings = self._follow(examples)
        for name in set(taps) - self._recorder.called:
            raise TapError(uncalled(network, name, self._recorder.is_layer))
        order = _order(recordings)
        joined = [pair for recording in recordings for pair in self._joined(recording, order)]
        starts = [not any(low < place <= high for low, high in joined) for place in range(len(order))]
        number = -1
        self.names: list[str] = []
        self._layers: dict[str, int] = {}  # by name of the submodule that begins it
        for name, starts_here in zip(order, starts, strict=True):
            number += starts_here
            self._layers[name] = number
            if starts_here:
                self.names.append(name)
        self._own(recordings)
        self.alive = [0] * len(self.names)  # bytes alive where a layer begins
        for recording in recordings[:1]:
            self._weigh(recording)

    def _follow(self, examples: Sequence[Any]) -> list[Recording]:
        """Recordings in both modes, or in the one that works."""
        training = [module.training for module in self._modules]
        result: list[Recording] = []
        problems: list[ValueError] = []
        try:
            for mode in (True, False):
                self.network.train(mode)
                try:
                    result += [self._record(self.signature(example)) for example in examples]
                except ValueError as problem:  # some networks run in one mode only
                    problems.append(problem)
        finally:
            for module, flag in zip(self._modules, training, strict=True):
                module.training = flag
        if not result:
            raise problems[0]
        return result

    def signature(self, value: Any) -> Signature:
        """What a recording for this input depends on."""
        leaves, structure = tree.flatten(tuple(arguments_of(self.network, value)))
        kind = self._device.type
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
        shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
        modes = bytes(module.training for module in self._modules)
        return Signature(modes, autocast, structure, shapes)

    def _record(self, signature: Signature) -> Recording:
        """Follow the forward; a submodule that cannot be followed becomes one layer."""
        if signature in self._recordings:
            return self._recordings[signature]
        while True:
            try:
                recording = self._recorder.record(signature)
                break
            except NotFollowed as problem:
                if not problem.name:
                    raise _cannot(self.network, problem.__cause__) from problem.__cause__
                if problem.name not in self._recorder.whole:
                    self._recorder.whole.add(problem.name)
                elif problem.arguments is not None and problem.name not in self._recorder.shapes:
                    module = self._recorder.modules[problem.name]
                    try:
                        self._recorder.shapes[problem.name] = _shapes_by_trial(module, *problem.arguments)
                    except Exception as error:
                        raise _cannot(self.network, error, problem.name) from error
                else:
                    raise _cannot(self.network, problem.__cause__, problem.name) from problem.__cause__
        if len(self._recordings) >= MOST_RECORDINGS:
            oldest = next(iter(self._recordings))
            del self._recordings[oldest]
            self._plans.pop(oldest, None)
        self._recordings[signature] = recording
        return recording

    def _joined(self, recording: Recording, order: list[str]) -> Iterator[tuple[int, int]]:
        """Pairs of places in the order between which there must be no cut."""
        place_of = {name: place for place, name in enumerate(order)}
        place, made = 0, dict.fromkeys(recording.inputs, 0)
        for step in recording.steps:
            if step.layer is not None:
                now = place_of[step.layer]
                if now < place:
                    yield now, place  # called again, or in another order in another mode
                place = max(place, now)
            for value in (*step.inputs, *step.outputs):
                made.setdefault(value, place)
            for value in step.mutated:  # a change that others see must be made where they are
                if value in recording.named:
                    yield made[value], place
                for other, storage in recording.storages.items():
                    if other != value and storage == recording.storages[value] and other in made:
                        yield max(made[value], made[other]), place

    def _own(self, recordings: list[Recording]) -> None:
        """Give every parameter and buffer to the layer that uses it first."""
        for recording in recordings:
            layer = 0
            for step in recording.steps:
                layer = max(layer, self._layers.get(step.layer or "", 0))
                if isinstance(step.target, str):
                    for name in tensors_of(self._recorder.modules[step.target]):
                        self._claim(f"{step.target}.{name}", layer)
                for value in step.inputs:
                    if value in recording.named:
                        self._claim(recording.named[value], layer)
        last = 0
        for name in self._alias:  # what no recording used is where its neighbour is
            last = self._layer_of.setdefault(self._alias[name], last)

    def _claim(self, name: str, layer: int) -> None:
        name = self._alias[name]
        self._layer_of[name] = min(layer, self._layer_of.get(name, layer))

    def _weigh(self, recording: Recording) -> None:
        made, last = self._lives(recording)
        for value in last:
            for layer in range(made[value] + 1, min(last[value], len(self.names) - 1) + 1):
                self.alive[layer] += recording.sizes[value]

    def states(self, layer: int) -> dict[str, Tensor]:
        """The parameters and buffers of a layer by qualified name."""
        tensors = tensors_of(self.network)
        return {name: tensors[name] for name, alias in self._alias.items() if self._layer_of[alias] == layer}

    def extra_states(self, layer: int) -> list[str]:
        """The other states of a layer's submodules."""
        result = []
        for key in extra_states_of(self.network):
            path = key.rpartition(".")[0]
            while path and path not in self._layers:
                path = path.rpartition(".")[0]
            if self._layers.get(path, 0) == layer:
                result.append(key)
        return result

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """The submodules that these layers call."""
        return [module for module, layers in self._homes if any(start <= layer < stop for layer in layers)]

    @cached_property
    def _homes(self) -> list[tuple[nn.Module, set[int]]]:
        """What is called whole, with the layers of its tensors."""
        return [
            (module, {self._layer_of[self._alias[f"{name}.{key}".lstrip(".")]] for key in tensors_of(module)})
            for name, module in self._recorder.modules.items()
            if self._recorder.is_layer(module) or next(module.children(), None) is None
        ]

    # --- the part of one stage

    def _place_steps(self, recording: Recording) -> list[int]:
        """The layer of each step."""
        layer, result = 0, []
        for step in recording.steps:
            if step.layer is not None:
                wanted = self._layers.get(step.layer)
                if wanted is None:
                    states = [self._layer_of[self._alias[f"{step.layer}.{name}"]]
                              for name in tensors_of(self._recorder.modules[step.layer])]  # fmt: skip
                    wanted = min(states, default=layer)
                if wanted < layer:
                    raise ValueError(
                        f"The forward of {type(self.network).__name__} calls {step.layer!r} later than it did for the "
                        "example that its stages were cut by. Give `example_input_array` the shape that it is trained "
                        "on, or name the stages by a method `pipeline_layers`."
                    )
                layer = wanted
            result.append(layer)
        return result

    def _lives(self, recording: Recording) -> tuple[dict[int, int], dict[int, int]]:
        """For each value the layer that makes it and the last one that uses it."""
        made = dict.fromkeys(recording.inputs, 0)
        made |= {value: self._layer_of[self._alias[name]] for value, name in recording.named.items()}
        last: dict[int, int] = {}
        for step, layer in zip(recording.steps, self._place_steps(recording), strict=True):
            for value in (*step.inputs, *step.outputs):
                if value not in recording.constants:
                    made.setdefault(value, layer)
                    last[value] = layer
        for value in recording.outputs:
            if value not in recording.constants:
                made.setdefault(value, 0)
                last[value] = len(self.names)
        return made, last

    def plan(self, signature: Signature, start: int, stop: int) -> tuple[Recording, _Plan]:
        """The steps of the layers from `start` to before `stop`, and what goes in and out."""
        recording = self._record(signature)
        plans = self._plans.setdefault(signature, {})
        if (start, stop) not in plans:
            made, last = self._lives(recording)
            layers = self._place_steps(recording)
            inputs = recording.inputs if start == 0 else self._alive_at(start, made, last)
            outputs = recording.outputs if stop == len(self.names) else self._alive_at(stop, made, last)
            mine = [step for step, layer in zip(recording.steps, layers, strict=True) if start <= layer < stop]
            steps = Steps(mine, self._recorder.modules, outputs, self._device.type, self.options, self._begin)
            written = frozenset(value for step in mine for value in step.mutated)
            plans[start, stop] = _Plan(inputs, written & set(inputs), steps, outputs)
        return recording, plans[start, stop]

    def _alive_at(self, layer: int, made: Mapping[int, int], last: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(sorted(value for value in last if made[value] < layer <= last[value]))

    def _begin(self, layer: str) -> None:
        if self.begins is not None:
            self.begins(layer)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as it is now."""
        path, _, attribute = name.rpartition(".")
        tensor = getattr(self._recorder.modules[path], attribute)
        assert isinstance(tensor, Tensor)
        return tensor

    def module(self, target: str) -> nn.Module:
        """A submodule by name."""
        module: nn.Module = self._recorder.modules[target]
        return module


class Segment(nn.Module):
    """The layers of one stage, which call the submodules of the network itself.

    Args:
        traced: the network.
        start, stop: from which layer to before which one.
    """

    def __init__(self, traced: Traced, start: int, stop: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(traced.modules(start, stop))
        self._traced, self._start, self._stop = traced, start, stop

    def compile_with(self, options: Options | None) -> None:
        """Have torch.compile make what is called from now on for shapes and modes that are new."""
        self._traced.options = options

    def tell(self, begins: Callable[[str], None]) -> None:
        """Let `begins` hear of each layer that is about to run, by name."""
        self._traced.begins = begins

    def forward(self, value: Any) -> Any:
        """From the network's input, or what the stage before gave, to the network's output or what the next one takes.

        Args:
            value: the input as the hook gave it on the first stage, else `Carried`.
        """
        traced = self._traced
        if self._start == 0:
            signature = traced.signature(value)
            tensors: Iterable[Tensor] = tree.flatten(tuple(arguments_of(traced.network, value)))[0]
        else:
            signature, tensors = value
        recording, plan = traced.plan(signature, self._start, self._stop)
        values = dict(zip(plan.inputs, tensors, strict=True)) | recording.constants
        for number in plan.copied:
            values[number] = values[number].clone()

        def get(number: int) -> Tensor:
            if number not in values:
                values[number] = traced.tensor(recording.named[number])
            return values[number]

        plan.steps.run(values, get)
        # a parameter that travels is copied, since the optimizer may change it before the message has left
        results = [get(n).clone() if n in recording.named else get(n) for n in plan.outputs]
        if self._stop < len(traced.names):
            return Carried(signature, tuple(results))
        return tree.unflatten(results, recording.structure)


def _order(recordings: list[Recording]) -> list[str]:
    """The submodules that begin layers, in the order of their first calls over all recordings."""
    order: list[str] = []
    for recording in recordings:
        place = 0
        for step in recording.steps:
            if step.layer is not None:
                if step.layer not in order:
                    order.insert(place, step.layer)
                place = max(place, order.index(step.layer) + 1)
    return order


def _shapes_by_trial(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a module returns that cannot run without values: a copy of it is run on random ones.

    Returns:
        A function of the tensors that go in, whose results have the shape of one of them if it was so in the trial, and
        else the trial's with the rows of the first.
    """
    leaves, structure = tree.flatten((args, kwargs))
    with torch.random.fork_rng(), torch.no_grad():
        trial = [torch.rand(leaf.shape).to(leaf.dtype) for leaf in leaves]
        args, kwargs = tree.unflatten(trial, structure)
        module = copy.deepcopy(module)
        for tensor in tensors_of(module).values():
            if tensor.is_meta:
                swap(tensor, made_up(tensor, torch.device("cpu")))
        found, structure = tree.flatten(module.cpu()(*args, **kwargs))
    shapes = [leaf.shape for leaf in leaves]
    like = [shapes.index(leaf.shape) if leaf.shape in shapes else None for leaf in found]

    def run(inputs: list[Tensor]) -> Any:
        made = []
        for leaf, place in zip(found, like, strict=True):
            shape = inputs[place].shape if place is not None else (
                (inputs[0].shape[0], *leaf.shape[1:]) if leaf.shape[:1] == shapes[0][:1] else leaf.shape
            )  # fmt: skip
            made.append(torch.empty(shape, dtype=leaf.dtype, device=inputs[0].device))
        return tree.unflatten(made, structure)

    return run


def _cannot(network: nn.Module, cause: BaseException | None, name: str = "") -> ValueError:
    where = f" (in its submodule {name!r})" if name else ""
    too_few = too_few_values(cause, f"the {type(network).__name__}", {name: network.get_submodule(name)})
    return too_few or ValueError(
        f"The forward of {type(network).__name__} cannot be cut into stages{where}: {type(cause).__name__}: {cause}. "
        "Write the network as an nn.Sequential, or give it a method `pipeline_layers()` that returns the list of "
        "modules that its forward calls one after the other."
    )
