"""What each layer costs on this rank's device: seconds of its passes, bytes that it holds and sends."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tspipe import split, tree
from lightning_tspipe.comm import Comm
from lightning_tspipe.memory import made_up, swap
from lightning_tspipe.recording import memory_of, unchanged
from lightning_tspipe.selective import noting, selectively
from lightning_tspipe.stage import own_input

ROUNDS = 4  # of which the fastest counts, pass by pass
ENOUGH = 1.0  # seconds after which a layer is not run again
REPEATS = 3  # of all layers of a rank, one after the other
PING_BYTES = 4 << 20
PINGS = 10
SUMMED = ("forward", "inputs", "weights", "first", "rest", "held", "pending")  # over the views


@dataclass(frozen=True)
class LayerCost:
    """One layer and one microbatch.

    Args:
        forward, inputs, weights: seconds of a forward, and of a backward for inputs and for weights, in one piece.
        first, rest: seconds of the two parts of a split backward.
        held: bytes kept between forward and backward, parameters left out; of a teacher's layer, what its forward takes
            while it runs, input and output included.
        pending: bytes kept between the two parts of a split backward, those of a graph that stays left out.
        keeps_graph: whether it stays, which then holds `held` too.
        received, sent: bytes of what it takes and of what it gives.
        parameters: bytes of its parameters and buffers.
        trained: of these, bytes of what is trained.
    """

    forward: float
    inputs: float = 0.0
    weights: float = 0.0
    first: float = 0.0
    rest: float = 0.0
    held: int = 0
    sent: int = 0
    parameters: int = 0
    trained: int = 0
    received: int = 0
    pending: int = 0
    keeps_graph: bool = False

    @property
    def seconds(self) -> float:
        """Of all passes, the backward in one piece."""
        return self.forward + self.inputs + self.weights


@dataclass(frozen=True)
class MessageCost:
    """Seconds of a message between neighbours: `latency` + bytes x `per_byte`."""

    latency: float = 0.0
    per_byte: float = 0.0

    def seconds(self, size: float) -> float:
        """For a message of that many bytes."""
        return self.latency + size * self.per_byte


class Meter:
    """Measures layers one after the other; no weight, buffer, gradient or attribute is another one afterwards.

    Weights without memory get random ones meanwhile, and only one layer at a time is on the device.

    Args:
        device: where.
        selective: whether the student's forwards keep no outputs of cheap functions (`Selective`).
    """

    def __init__(self, device: torch.device, selective: bool = False) -> None:
        self._device, self._selective = device, selective
        self._counted: set[int] = set()  # memory of the last layer's outputs that is in `held` of a layer already

    def teacher(self, layer: nn.Module, tensors: Sequence[Tensor], views: list[Any]) -> tuple[list[Any], LayerCost]:
        """A teacher's layer: a forward without gradients.

        Args:
            layer: what is called.
            tensors: its parameters and buffers.
            views: its input, one per view.

        Returns:
            What it gives for each view, and what it costs for all of them.
        """

        def run(view: Any) -> tuple[Any, LayerCost]:
            best = math.inf
            for _ in _until(ENOUGH, ROUNDS):
                value = own_input(layer, view)
                start = self._now()
                output = layer(value)
                best = min(best, self._now() - start)
            with Peak() as peak:
                output = layer(own_input(layer, view))
            held = peak.most + sum(leaf.nbytes for leaf in tree.flatten(view)[0])
            # a layer may give a view of its own buffer (BERT's positions), which would hold what is to be swapped back
            return tree.map_tensors(output, torch.Tensor.detach), LayerCost(best, held=held)

        with torch.no_grad():
            return self._all(layer, run, tensors, views)

    def student(
        self, layer: nn.Module, tensors: Sequence[Tensor], views: list[Any], first: bool
    ) -> tuple[list[Any], LayerCost]:
        """A student's layer: a forward, and the two parts of a backward; `first`: its input needs no gradient."""
        trained = [tensor for tensor in tensors if tensor.requires_grad]

        def run(view: Any) -> tuple[Any, LayerCost]:
            best = [math.inf] * 5
            leaves, structure = tree.flatten(view)
            leaves = [leaf.detach().requires_grad_(leaf.is_floating_point() and not first) for leaf in leaves]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            keeps_graph, pending, forward_context = False, 0, selectively(self._selective)
            for _ in _until(ENOUGH, ROUNDS):
                value = own_input(layer, tree.unflatten(leaves, structure))
                start = self._now()
                with forward_context:
                    output = layer(value)
                best[0] = min(best[0], self._now() - start)
                results = [leaf for leaf in tree.flatten(output)[0] if leaf.requires_grad]
                given = [torch.ones_like(leaf) for leaf in results]
                for place, sources in ((1, wanted), (2, [*wanted, *trained])):
                    start = self._now()
                    if results and sources:
                        torch.autograd.grad(results, sources, given, retain_graph=True, allow_unused=True)
                    best[place] = min(best[place], self._now() - start)
                start = self._now()
                rest = split.backward_inputs(results, given, wanted) if results else None
                best[3] = min(best[3], self._now() - start)
                if rest is not None:
                    keeps_graph, pending = rest.keeps_graph, _bytes(rest.kept, tensors)
                start = self._now()
                if rest is not None:
                    rest()
                best[4] = min(best[4], self._now() - start)
                for tensor in (*wanted, *trained):
                    tensor.grad = None
            value = own_input(layer, tree.unflatten(leaves, structure))
            known = before | {tensor.untyped_storage().data_ptr() for tensor in tensors}
            saved: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    saved[storage.data_ptr()] = storage.nbytes()
                return tensor.detach()  # else a node that saves its own output would never be freed

            with noting(note, self._selective):
                output = layer(value)
            for leaf in tree.flatten(output)[0]:
                place = leaf.untyped_storage().data_ptr()
                if place in saved or place in known:
                    self._counted.add(place)
            forward, inputs, both, early, late = best
            inputs = min(inputs, both) if wanted else 0.0
            cost = LayerCost(
                forward,
                inputs,
                both - inputs,
                early,
                late,
                sum(saved.values()),
                pending=pending,
                keeps_graph=keeps_graph,
            )
            return tree.map_tensors(output, torch.Tensor.detach), cost

        before, self._counted = self._counted, set()
        gradients = [tensor.grad for tensor in trained]
        try:
            with torch.enable_grad():
                return self._all(layer, run, tensors, views, sum(tensor.nbytes for tensor in trained))
        finally:
            for tensor, gradient in zip(trained, gradients, strict=True):
                tensor.grad = gradient

    def _all(
        self,
        layer: nn.Module,
        run: Callable[[Any], tuple[Any, LayerCost]],
        tensors: Sequence[Tensor],
        views: list[Any],
        trained: int = 0,
    ) -> tuple[list[Any], LayerCost]:
        size = sum(tensor.nbytes for tensor in tensors)
        with self._borrowed(tensors), unchanged(layer.modules()):
            outputs, costs = zip(*(run(view) for view in views), strict=True)
        received, sent = (sum(leaf.nbytes for leaf in tree.flatten(list(of))[0]) for of in (views, outputs))
        total = {name: sum(getattr(cost, name) for cost in costs) for name in SUMMED}
        sizes: dict[str, Any] = {"received": received, "sent": sent, "parameters": size, "trained": trained}
        sizes["keeps_graph"] = any(cost.keeps_graph for cost in costs)
        return list(outputs), replace(costs[0], **total, **sizes)

    @contextmanager
    def _borrowed(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Parameters on the device, and buffers that may change."""
        old = [(tensor, swap(tensor, self._copy(tensor))) for tensor in tensors if not self._is_here(tensor)]
        try:
            yield
        finally:
            for tensor, value in old:
                torch.utils.swap_tensors(tensor, value)  # type: ignore[no-untyped-call]

    def _is_here(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) and tensor.device == self._device

    def _copy(self, tensor: Tensor) -> Tensor:
        return made_up(tensor, self._device) if tensor.is_meta else tensor.detach().to(self._device, copy=True)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def message(self, comm: Comm) -> MessageCost:
        """Sends messages from rank 0 to rank 1 and back; on rank 0, what one costs."""
        small, large = (self._round_trip(comm, size) for size in (1, PING_BYTES))
        return MessageCost(small, max(0.0, large - small) / PING_BYTES)

    def _round_trip(self, comm: Comm, size: int) -> float:
        """Half the seconds of the fastest of some round trips."""
        if comm.stage > 1:
            return 0.0
        value = [torch.zeros(size, dtype=torch.uint8, device=self._device)]
        key = ("ping", size)
        out, back = ("T", "B") if comm.stage == 0 else ("B", "T")
        sends, takes = comm.outward[out], comm.inward[back]
        for channel in (sends, takes):
            channel.know(key, tree.flatten(value)[1], ((tuple(value[0].shape), value[0].dtype),))
        best = math.inf
        for _ in range(PINGS):  # both ranks as often
            takes.post(key)
            start = self._now()
            if comm.stage == 0:
                sends.send(key, value)
                takes.take(key)
            else:
                sends.send(key, takes.take(key))
            best = min(best, self._now() - start)
            sends.retire(1)
        return best / 2


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of the tensors that are made within it.

    Attributes:
        most: the most of them that were there at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._here: set[int] = set()  # memory that is counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {memory_of(tensor) for tensor in tree.flatten([args, kwargs])[0]}
        for tensor in tree.flatten([output])[0]:
            place, storage = memory_of(tensor), tensor.untyped_storage()
            if place not in given and place not in self._here:
                self._here.add(place)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, place, storage.nbytes())
        self.most = max(self.most, self._now)
        return output

    def _gone(self, place: int, size: int) -> None:
        self._here.discard(place)
        self._now -= size


def _bytes(tensors: Iterable[Tensor], but: Iterable[Tensor]) -> int:
    """Of the memory of some tensors, each counted once, without that of others."""
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    for tensor in but:
        memory.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(memory.values())


def _until(enough: float, most: int) -> Iterator[int]:
    """Counts to `most`, and stops when that many seconds have passed."""
    begun = time.perf_counter()
    for number in range(most):
        if number and time.perf_counter() - begun > enough:
            return
        yield number


def fastest(measure: Callable[[], tuple[Any, list[LayerCost]]], enough: float = 2.0) -> tuple[Any, list[LayerCost]]:
    """Measure layers again after all others were, and take each one's fastest.

    The first time a layer's memory may be new to the process, which costs up to as much as the layer's own work.

    Args:
        measure: gives something, and what every layer costs.
        enough: seconds after which it is not called again.

    Returns:
        What it gave the last time, and what every layer costs.
    """
    values, costs = zip(*(measure() for _ in _until(enough, REPEATS)), strict=True)
    best = [min(of_layer, key=lambda cost: cost.seconds) for of_layer in zip(*costs, strict=True)]
    # later, an address of what is freed may be another layer's, which then would not count
    return values[-1], [replace(cost, held=first.held) for cost, first in zip(best, costs[0], strict=True)]
