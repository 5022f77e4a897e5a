"""Modules that are built without memory, and how their tensors get values on the ranks that hold them.

As in Lightning's FSDPStrategy, parameters are on the device meta until the strategy is set up. Buffers are made as
usual, like those of accelerate's `init_empty_weights`
(https://huggingface.co/docs/accelerate/package_reference/big_modeling): they are small, and many (masks, positions,
frequencies) are in no file and could not be made again.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_tspipe.recording import tensors_of

MARK = "_tspipe_memory"  # the attribute of a tensor that says one of what follows, if it is not usual
OWN, EMPTY = "own", "empty"  # only what `state_of` gives
LENT = "lent"  # its memory is that of a state dict, so perhaps of a file of which nothing has been read yet
GIVEN = "given"  # it took the place of a parameter, so its values count
RELEASED = "released"  # another rank holds it
DROPPED = "dropped"  # it has no memory, and a constructor wanted to give it values, outside of `reset_parameters`
UNREAD = "_tspipe_unread"  # the attribute of a lent tensor whose values are still on disk, or of a stand-in for these
_TRIM_THRESHOLD, _MOST_KEPT = -1, 64 << 20  # M_TRIM_THRESHOLD of glibc's malloc.h, and how far it rises by itself
_RESETS = ("reset_parameters", "_reset_parameters")  # nn.MultiheadAttention has it under a private name only


def state_of(tensor: Tensor) -> str:
    """Whose memory a tensor has: `EMPTY` if it has none, `RELEASED`, `LENT` or `OWN`."""
    mark = vars(tensor).get(MARK)
    if tensor.is_meta:
        return mark if mark in (RELEASED, LENT) else EMPTY
    return LENT if mark == LENT else OWN


def swap(tensor: Tensor, value: Tensor, mark: str | None = None) -> Tensor:
    """Replace what a tensor object holds; optimizers and modules that refer to the object see the new value.

    Returns:
        What holds the old value now.
    """
    replacement: Tensor = value
    if isinstance(tensor, nn.Parameter):
        replacement = nn.Parameter(value, requires_grad=tensor.requires_grad)
    vars(replacement).update(vars(tensor))  # attributes are swapped, too, also those of the user
    for attribute in (MARK, UNREAD):
        vars(replacement).pop(attribute, None)
    if mark is not None:
        vars(replacement)[MARK] = mark
    torch.utils.swap_tensors(tensor, replacement)  # type: ignore[no-untyped-call]
    return replacement


def made_up(tensor: Tensor, device: torch.device) -> Tensor:
    """Small random numbers, or zeros of integers, in place of a tensor without memory."""
    value = torch.empty_like(tensor, device=device)
    return value.uniform_(0.01, 0.1) if tensor.is_floating_point() else value.zero_()


@dataclass(eq=False)
class Unread:
    """Where the values of a tensor are.

    Args:
        read: gives those of several keys, by key.
        key: this one's.
        is_taken: whether a tensor has it.
    """

    read: Callable[[Collection[str]], Mapping[str, Tensor]]
    key: str
    is_taken: bool = False

    def __deepcopy__(self, memo: Any) -> Unread:
        return self


def stand_in(like: Tensor, read: Callable[[Collection[str]], Mapping[str, Tensor]], key: str) -> Tensor:
    """For `lend`: a tensor that is in a state dict in place of one on disk."""
    tensor = torch.empty_like(like, device="meta")
    vars(tensor)[UNREAD] = Unread(read, key)
    return tensor


def all_taken(values: Iterable[Any]) -> bool:
    """Whether each stand-in of a state dict has found its tensor."""
    return all(vars(v)[UNREAD].is_taken for v in values if isinstance(v, Tensor) and UNREAD in vars(v))


def read_lent(tensors: Iterable[Tensor]) -> None:
    """Give those whose values are still on disk memory of their own with these values."""
    wanted: dict[Any, dict[str, list[Tensor]]] = {}
    for tensor in tensors:
        if (unread := vars(tensor).get(UNREAD)) is not None:
            wanted.setdefault(unread.read, {}).setdefault(unread.key, []).append(tensor)
    for read, places in wanted.items():
        values = read(places.keys())
        for key, those in places.items():
            for tensor in those:
                swap(tensor, values[key].to(tensor.dtype))


def forget_graphs(module: nn.Module) -> None:
    """Detach what modules keep of their own computations, whose graphs hold parameters that are to be swapped.

    `torch.nn.utils.weight_norm` keeps the weight so, from its making on, and makes it anew in each forward.
    """
    for child in module.modules():
        for name, value in vars(child).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(child)[name] = value.detach()


def release(tensor: Tensor) -> None:
    """Give back its memory; shape, type and the identity of the object stay."""
    swap(tensor, torch.empty_like(tensor, device="meta"), RELEASED)


def trim() -> None:
    """Give what was freed back to the system, which glibc does by itself only for large blocks and at the top."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:  # other C libraries have none
        function(0)


def keep_freed() -> Callable[[], None]:
    """Let glibc keep the end of its heap, too, when that is freed; call it when blocks of a step's sizes were freed.

    Else a step gives memory back and takes it again page by page, and the pages are new to the processor's caches. What
    glibc takes from its heap are blocks no larger than one that it has freed, up to 32 MiB, and that stays as it is.
    `trim` gives memory back all the same. https://man7.org/linux/man-pages/man3/mallopt.3.html

    Returns:
        What ends that and gives back what is free.
    """
    function = getattr(ctypes.CDLL(None), "mallopt", None)
    if function is None:
        return trim
    function(_TRIM_THRESHOLD, 2**31 - 1)

    def end() -> None:
        function(_TRIM_THRESHOLD, _MOST_KEPT)
        trim()

    return end


@contextmanager
def without_memory(*keep: type[nn.Module]) -> Iterator[None]:
    """Parameters that modules register within have no memory, and `load_state_dict` gives them that of the state dict.

    One that takes the place of another keeps its values, so that what is loaded by assigning is not lost.

    Args:
        keep: modules whose own parameters are left alone.
    """

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if name in dict(module.named_parameters(recurse=False)):
            vars(parameter).setdefault(MARK, GIVEN)
        elif not isinstance(module, keep) and not is_lazy(parameter) and MARK not in vars(parameter):
            swap(parameter, torch.empty_like(parameter, device="meta"))

    handle = register_module_parameter_registration_hook(register)
    try:
        with lend():
            yield
    finally:
        handle.remove()


@contextmanager
def lend(also: Iterable[Tensor] = ()) -> Iterator[None]:
    """`load_state_dict` gives parameters without memory that of the state dict, which may be a file's, unread.

    Args:
        also: more tensors that shall have the state dict's memory in place of their own.
    """
    with warnings.catch_warnings():  # torch says that a copy to a tensor without memory does nothing
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter in the checkpoint")
        with _Lend(also):
            yield


class _Lend(TorchFunctionMode):
    """Sees the copies of `load_state_dict`."""

    def __init__(self, also: Iterable[Tensor]) -> None:
        super().__init__()
        self._also = {id(tensor) for tensor in also}
        self._places: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and self._borrows(*args[:2]):
            target, source = args[:2]
            if (unread := vars(source).get(UNREAD)) is not None:
                swap(target, torch.empty_like(target, device="meta"), LENT)
                vars(target)[UNREAD], unread.is_taken = unread, True
            elif target.is_meta or target.data_ptr() != source.data_ptr():  # one of tied parameters has it already
                value = source.detach().to(target.dtype)
                if value.data_ptr() in self._places:
                    value = value.clone()  # two networks that load one state dict must not train each other
                self._places.add(value.data_ptr())
                swap(target, value, LENT)
            return target
        is_empty = bool(args) and isinstance(args[0], nn.Parameter) and state_of(args[0]) == EMPTY
        if is_empty and _writes(func) and not _within_reset():
            vars(args[0])[MARK] = DROPPED
        return func(*args, **(kwargs or {}))

    def _borrows(self, target: Tensor, source: Tensor) -> bool:
        is_unread = UNREAD in vars(source)
        if (source.is_meta and not is_unread) or source.shape != target.shape:
            return False
        if id(target) in self._also or state_of(target) == LENT:
            return target.is_meta or is_unread or source.device == target.device
        return isinstance(target, nn.Parameter) and state_of(target) == EMPTY


def _writes(func: Any) -> bool:
    """Whether a function is one of torch's that end with an underscore because they write into their first argument."""
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _within_reset() -> bool:
    """Whether the caller is in a method that `materialize` will call: that of a module with parameters of its own."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name in _RESETS else None
        if isinstance(owner, nn.Module) and any(True for _ in owner.parameters(recurse=False)):
            return True
        frame = frame.f_back
    return False


def dropped(module: nn.Module, follows: Collection[int] = ()) -> list[str]:
    """The names of parameters that will begin as `reset_parameters` has them, and not as a constructor wanted."""
    found = module.named_parameters()
    return [n for n, p in found if p.is_meta and id(p) not in follows and vars(p).get(MARK) == DROPPED]


def without_values(module: nn.Module, follows: Collection[int] = ()) -> Iterator[str]:
    """The names of tensors that nobody can give a value: their modules have no `reset_parameters`.

    Args:
        module: the whole.
        follows: identities of tensors that get the values of others.
    """
    for name, child in module.named_modules():
        for key, tensor in _direct(child).items():
            if state_of(tensor) == EMPTY and id(tensor) not in follows and _reset_of(child) is None:
                yield f"{name}.{key}".lstrip(".")


def materialize(module: nn.Module, is_mine: Callable[[str], bool], seed: int, follows: Mapping[int, Tensor]) -> None:
    """Give this rank's tensors without memory their values, by `reset_parameters` of the modules that have them.

    The random numbers depend on the seed and on the module's name only, so they are equal for every number of stages;
    the generator stays where it was.

    Args:
        module: the whole.
        is_mine: whether this rank holds the tensor of a qualified name.
        seed: of the job.
        follows: what tensors, by identity, get the values of another one, once that has its own.
    """
    modules = dict(module.named_modules())
    first: dict[int, str] = {}  # of modules that share a tensor the first one makes it
    for name, child in modules.items():
        for tensor in _direct(child).values():
            first.setdefault(id(tensor), name)
    state = torch.get_rng_state()
    try:
        for name, child in reversed(modules.items()):  # a module may change what its children have made
            tensors = {f"{name}.{key}".lstrip("."): tensor for key, tensor in _direct(child).items()}
            empty = {
                key: tensor
                for key, tensor in tensors.items()
                if tensor.is_meta and first[id(tensor)] == name and id(tensor) not in follows
            }
            if any(map(is_mine, empty)):
                _reset(child, empty, [t for t in tensors.values() if not t.is_meta], _seed_of(seed, name))
                for key, tensor in empty.items():
                    if not is_mine(key):
                        release(tensor)
    finally:
        torch.set_rng_state(state)
    for key, tensor in tensors_of(module).items():
        if tensor.is_meta and id(tensor) in follows and is_mine(key):
            swap(tensor, follows[id(tensor)].detach().clone())


def _reset(module: nn.Module, empty: Mapping[str, Tensor], loaded: list[Tensor], seed: int) -> None:
    kept = [tensor.detach().clone() for tensor in loaded]
    for tensor in empty.values():
        swap(tensor, torch.zeros_like(tensor, device="cpu"))
    torch.default_generator.manual_seed(seed)
    reset = _reset_of(module)
    assert reset is not None
    reset()
    with torch.no_grad():
        for tensor, value in zip(loaded, kept, strict=True):
            tensor.copy_(value)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def _reset_of(module: nn.Module) -> Callable[[], None] | None:
    for name in _RESETS:
        if callable(reset := getattr(module, name, None)):
            return reset  # type: ignore[no-any-return]
    return None


def _direct(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
