"""What a network's forward does, step by step, found out by running it once on tensors without memory.

The forward itself is run, so control flow over shapes, flags and options is followed as Python follows it; every torch
function and every call of a layer is recorded. A recording holds for one mode and one set of input shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from lightning_tspipe import tree
from lightning_tspipe.taps import Tapped

EXTRA_STATE = "_extra_state"
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
# containers of torch whose own forward is only about their children
CONTAINERS = (nn.Sequential, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)


class Signature:
    """What a recording depends on; a constant for `tree`.

    Args:
        modes: `training` of every submodule.
        autocast: the type of autocast; "" if it is off.
        structure: of (args, kwargs).
        shapes: shape and type of each tensor.
    """

    __slots__ = ("_hash", "_parts", "shapes", "structure")

    def __init__(self, modes: bytes, autocast: str, structure: tree.Structure, shapes: Shapes) -> None:
        self._parts, self.structure, self.shapes = (modes, autocast, structure, shapes), structure, shapes
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Signature) and self._parts == other._parts)

    def __reduce__(self) -> Any:
        return Signature, self._parts


class Step(NamedTuple):
    """One call of a layer or of a torch function; numbers stand for values."""

    target: str | Callable[..., Any]  # a layer's qualified name, or a function
    layer: str | None  # the layer that begins here, if one does
    inputs: tuple[int, ...]
    structure: tree.Structure  # of (args, kwargs)
    outputs: tuple[int, ...]
    mutated: frozenset[int]
    grad: bool
    autocast: bool


@dataclass
class Recording:
    """All steps of a forward.

    Args:
        steps: in order.
        inputs: the values of the forward's arguments.
        named: parameters and buffers that a function uses, by value.
        constants: tensors that are neither, such as plain attributes of a module.
        storages: for each value, which memory it is in; equal numbers are views of each other.
        sizes: bytes of each value.
        outputs, structure: what the forward returns, as `Tapped` if the network has taps.
    """

    steps: list[Step] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    named: dict[int, str] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    storages: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    structure: tree.Structure = ()


class NotFollowed(Exception):
    """A submodule's forward cannot be followed; it has to be one layer."""

    def __init__(self, name: str, arguments: tuple[Any, Any] | None = None) -> None:
        super().__init__(name)
        self.name, self.arguments = name, arguments


class Fake(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Without a stand-in for CUDA where there is none: with it, autograd could not be used in forked processes."""

    avoid_device_init = False


class Recorder:
    """Records one network.

    Args:
        network: the network, whose parameters may be on any device, also on `meta`.
        device: where it is going to run.
        taps: names of the submodules whose results belong to what it gives.
    """

    def __init__(self, network: nn.Module, device: torch.device, taps: Sequence[str] = ()) -> None:
        self.network, self.device, self.taps = network, device, tuple(taps)
        self.names = {id(module): name for name, module in network.named_modules()}
        self.modules = dict(network.named_modules(remove_duplicate=False))
        self.tapped = {id(self.modules[name]) for name in self.taps}
        self.called: set[str] = set()  # taps that some recording has
        self.whole: set[str] = set()  # layers by decision
        self.shapes: dict[str, Callable[[list[Tensor]], Any]] = {}  # what layers return that run on no fake tensor
        self._own_forward = {name for name, module in self.modules.items() if "forward" in vars(module)}
        users: dict[int, set[int]] = {}
        for module in network.modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), set()).add(id(module))
        self._tied = {user for tied in users.values() if len(tied) > 1 for user in tied}

    def record(self, signature: Signature) -> Recording:
        """Run the forward on tensors of these shapes.

        Raises:
            NotFollowed: try again with this submodule in `whole` or `shapes`; the cause says why.
        """
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),  # for layers that have gone through torch.compile
            Fake(allow_non_fake_inputs=True),
            _silent(logging.getLogger(FakeTensorMode.__module__)),
            self._without_memory() as known,
        ):
            inputs = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in signature.shapes]
            args, kwargs = tree.unflatten(inputs, signature.structure)
            with _Follower(self, known, inputs) as follower, follower.calls():
                output = self.network(*args, **kwargs)
            recording: Recording = follower.finish(output)
            return recording

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module is called as a whole: it has no submodules, is torch's own, or must stay so."""
        name = self.names[id(module)]
        if name in self.whole or name in self._own_forward or has_hooks(module) or hasattr(module, "parametrizations"):
            return True
        if is_compiled(module):
            return True
        if next(module.children(), None) is None:
            return id(module) not in self._tied  # of a tied parameter there is one, which travels between stages
        return type(module).__module__.startswith("torch.nn.") and not isinstance(module, CONTAINERS)

    @contextmanager
    def _without_memory(self) -> Iterator[dict[int, str]]:
        """Give every module tensors without memory, by identity with their names; all is put back in the end."""
        fakes: dict[int, Tensor] = {}
        known: dict[int, str] = {}
        modules = list(self.network.modules())
        with unchanged(modules):
            for module in modules:
                name = self.names[id(module)]
                if name not in self._own_forward:
                    vars(module).pop("forward", None)  # the strategy's
                for key, fake in give_fakes(module, fakes, self.device):
                    known.setdefault(id(fake), f"{name}.{key}".lstrip("."))
            yield known
            for module in modules:
                for value in vars(module)["_buffers"].values():
                    if value is not None and id(value) not in known and not self.is_layer(module):
                        raise NotFollowed(self.names[id(module)])  # it assigns a new buffer: nobody else must


class _Follower(TorchFunctionMode):
    """Sees every torch function, and every call of a module, while the forward runs."""

    def __init__(self, recorder: Recorder, known: Mapping[int, str], inputs: list[Tensor]) -> None:
        super().__init__()
        self._recorder, self._known = recorder, known
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no identity is used twice
        self._within = 0  # a layer, of which nothing is recorded
        self._begins: str | None = None
        self._device_type = recorder.device.type
        self._entry = torch.is_autocast_enabled(self._device_type)
        self._noted: dict[int, Any] = {}  # what tapped submodules returned
        self._recording = Recording()
        self._recording.inputs = tuple(self._new(tensor) for tensor in inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._within:
            return func(*args, **(kwargs or {}))
        if func is Tensor.__iter__:
            return iter(self._record(torch.unbind, torch.unbind, args, {}))
        return self._record(func, func, args, kwargs or {})

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Hear of every call of a module."""
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self._recorder.names.get(id(module))
            if self._within or name is None:
                return original(module, *args, **kwargs)
            result = self._call(name, module, original, args, kwargs)
            if id(module) in self._recorder.tapped:
                self._noted[id(module)] = result
            return result

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def _call(self, name: str, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        recorder = self._recorder
        childless = next(module.children(), None) is None
        if recorder.is_layer(module):
            if tensors_of(module) or extra_states_of(module):
                self._begins = name
            self._within += 1
            try:
                run = recorder.shapes.get(name)
                if run is None:
                    return self._record(name, lambda *a, **k: original(module, *a, **k), args, kwargs)
                return self._record(name, lambda *a, **k: run(tree.flatten((a, k))[0]), args, kwargs)
            except NotFollowed:
                raise
            except Exception as error:
                raise NotFollowed(name, (args, kwargs)) from error
            finally:
                self._within -= 1
        if childless:
            self._begins = name
        try:
            return original(module, *args, **kwargs)
        except NotFollowed:
            raise
        except Exception as error:
            raise NotFollowed(name) from error

    def _record(self, target: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, structure = tree.flatten((args, kwargs))
        versions = [leaf._version for leaf in leaves]  # noqa: SLF001
        result = run(*args, **kwargs)
        mutated = [leaf for leaf, old in zip(leaves, versions, strict=True) if leaf._version != old]  # noqa: SLF001
        made = tree.flatten(result)[0]
        if not made and not mutated:
            return result
        begins, self._begins = self._begins, None
        inputs = tuple(self._value(leaf) for leaf in leaves)
        outputs = tuple(self._values[id(leaf)] if id(leaf) in self._values else self._new(leaf) for leaf in made)
        changed = frozenset(self._value(leaf) for leaf in mutated)
        autocast = torch.is_autocast_enabled(self._device_type) or not self._entry
        grad = torch.is_grad_enabled()
        self._recording.steps.append(Step(target, begins, inputs, structure, outputs, changed, grad, autocast))
        return result

    def finish(self, output: Any) -> Recording:
        """The recording, with what the forward returned."""
        if names := self._recorder.taps:
            ids = {name: id(self._recorder.modules[name]) for name in names}
            found = {name: self._noted[key] for name, key in ids.items() if key in self._noted}
            self._recorder.called.update(found)
            output = Tapped(output, found)
        leaves, self._recording.structure = tree.flatten(output)
        self._recording.outputs = tuple(self._value(leaf) for leaf in leaves)
        return self._recording

    def _value(self, tensor: Tensor) -> int:
        """The number of a value that a step uses: made by an earlier one, a parameter, a buffer, or a constant."""
        if (number := self._values.get(id(tensor))) is not None:
            return number
        number = self._new(tensor)
        if (name := self._known.get(id(tensor))) is not None:
            self._recording.named[number] = name
        elif isinstance(tensor, FakeTensor):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} comes from no function of torch")
        else:
            self._recording.constants[number] = tensor
        return number

    def _new(self, tensor: Tensor) -> int:
        number = self._values[id(tensor)] = len(self._alive)
        self._alive.append(tensor)
        self._recording.storages[number] = memory_of(tensor)
        self._recording.sizes[number] = tensor.numel() * tensor.element_size()
        return number


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """It reports what a tensor without memory cannot do, which is no error here."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def give_fakes(
    module: nn.Module, fakes: dict[int, Tensor], device: torch.device, trained: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Give a module tensors without memory in place of its own, within a `FakeTensorMode`.

    Args:
        module: whose own parameters and buffers are replaced.
        fakes: what is there already in place of a tensor, by that one's identity.
        device: on which they claim to be.
        trained: whether parameters are trained if those that they replace are.

    Yields:
        The name within the module, and what is there now.
    """
    for place in (vars(module)["_parameters"], vars(module)["_buffers"]):
        for key, value in place.items():
            if value is not None:
                place[key] = fakes.setdefault(id(value), _fake(value, device, trained and value.requires_grad))
                yield key, place[key]
    if isinstance(module, nn.RNNBase):
        weights = [fakes[id(weight)] for weight in module._flat_weights if weight is not None]  # noqa: SLF001
        vars(module)["_flat_weights"] = weights


def _fake(tensor: Tensor, device: torch.device, trained: bool) -> Tensor:
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, requires_grad=trained) if isinstance(tensor, nn.Parameter) else fake


def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor is in, also one without any; views of each other have the same."""
    place: int = tensor.untyped_storage()._cdata  # noqa: SLF001
    return place


@contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back the attributes of modules, and which parameters and buffers they have."""
    # what those attributes hold that are dicts too: parameters, buffers, hooks that transformers adds in a forward
    kept = [(m, dict(vars(m)), [(d, dict(d)) for d in vars(m).values() if isinstance(d, dict)]) for m in modules]
    try:
        yield
    finally:
        for module, state, contents in kept:
            vars(module).clear()
            vars(module).update(state)
            for place, old in contents:
                place.clear()
                place.update(old)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks of its own (torch has no public name for them)."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def is_compiled(module: Any) -> bool:
    """Whether a module has gone through torch.compile: as a wrapper around it, or in place (`nn.Module.compile`).

    Torch has no public name for either.
    """
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def has_extra_state(module: nn.Module) -> bool:
    """Whether a module has a state of its own making (`get_extra_state`)."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by qualified name, shared ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def extra_states_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every submodule with a state of its own making, by the state's key in the state dict."""
    return {
        f"{name}.{EXTRA_STATE}".lstrip("."): child for name, child in module.named_modules() if has_extra_state(child)
    }
