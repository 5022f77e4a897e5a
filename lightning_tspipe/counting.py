"""What each layer would cost, counted from shapes: nothing has memory and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lightning_tspipe import split, tree
from lightning_tspipe.measure import LayerCost
from lightning_tspipe.partition import Layers
from lightning_tspipe.recording import Fake, give_fakes, memory_of, tensors_of, unchanged
from lightning_tspipe.selective import noting, selectively
from lightning_tspipe.stage import own_input

CPU = torch.device("cpu")  # where the tensors without memory claim to be; operations and shapes are the same elsewhere
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def _attention(*shapes: Any, **_: Any) -> Any:
    return sdpa_flop_count(*shapes[:3])  # type: ignore[no-untyped-call]


def _attention_backward(*shapes: Any, **_: Any) -> Any:
    return sdpa_backward_flop_count(*shapes[:4])  # type: ignore[no-untyped-call]


FORMULAS = {  # torch has those of GPUs only
    getattr(torch.ops.aten, ATTENTION): _attention,
    getattr(torch.ops.aten, f"{ATTENTION}_backward"): _attention_backward,
}


def counted(
    layers: Layers,
    sample: dict[str, list[Any]],
    rate: float,
    context: Callable[[], AbstractContextManager[Any]],
    selective: bool = False,
) -> tuple[list[LayerCost], list[LayerCost]]:
    """Costs of the student's layers and of the teacher's, one microbatch each.

    Seconds are those of the matrix products and convolutions alone, as torch's `FlopCounterMode` counts them.

    Args:
        layers: of networks with or without memory.
        sample: one microbatch of each network's input, view by view; shapes and types count.
        rate: operations per second, a multiplication and an addition being two.
        context: of a forward in the run's precision.
        selective: whether the student's forwards keep no outputs of cheap functions (`Selective`).
    """
    with torch.enable_grad(), context():
        for name, traced in layers.traced.items():
            for view in sample[name]:
                traced.plan(traced.signature(view), 0, 1)  # a forward that must be followed first
    modules = list({id(m): m for network in layers.networks.values() for m in network.modules()}.values())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that nobody counts
    try:
        with Fake(allow_non_fake_inputs=True), unchanged(modules), context():
            fakes: dict[int, Tensor] = {}
            for module in modules:
                for _ in give_fakes(module, fakes, CPU, trained=True):
                    pass
            student, teacher = (_costs(layers, name, sample[name], rate, selective) for name in ("student", "teacher"))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return student, teacher


def _costs(layers: Layers, network: str, views: list[Any], rate: float, selective: bool) -> list[LayerCost]:
    apart, known = layers.apart(), tensors_of(layers.networks[network])
    values, times = _different(views)
    costs: list[LayerCost] = []
    kept: dict[int, Tensor] = {}  # what autograd keeps, by memory; it lives on, so that nothing else gets that place

    def total(numbers: Iterable[int]) -> int:
        return sum(map(mul, times, numbers))

    for number, layer in enumerate(getattr(layers, network)):
        tensors = list({id(known[name]): known[name] for name in layer.state_names if name in known}.values())
        (runs,) = apart.runs(network, number)
        with torch.set_grad_enabled(network == "student"):
            found = [_Pass(runs.module, value, tensors, number == 0, kept, selective) for value in values]
        forward, inputs, both = (total(one.flops[place] for one in found) / rate for place in range(3))
        received, values = values, [one.output for one in found]
        costs.append(
            LayerCost(
                forward, inputs, both - inputs, inputs, both - inputs,
                held=total(one.held for one in found),
                pending=total(one.pending for one in found),
                keeps_graph=any(one.keeps_graph for one in found),
                sent=total(map(_bytes, values)),
                parameters=_bytes(tensors),
                trained=_bytes([tensor for tensor in tensors if tensor.requires_grad]),
                received=total(map(_bytes, received)),
            )
        )  # fmt: skip
    return costs


def _different(views: list[Any]) -> tuple[list[Any], list[int]]:
    """One view of each shape, without memory, and how many views have that shape."""
    found: dict[Any, tuple[Any, int]] = {}
    for view in views:
        leaves, structure = tree.flatten(view)
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        found[key] = view, found.get(key, (view, 0))[1] + 1
    values = [tree.map_tensors(view, lambda leaf: torch.empty_like(leaf, device=CPU)) for view, _ in found.values()]
    return values, [count for _, count in found.values()]


class _Pass:
    """One view through one layer and back.

    Attributes:
        output: what the layer gives.
        flops: operations of the forward, of the backward for inputs, and of the whole backward.
        held: bytes that autograd keeps between them, without parameters and what a layer before has kept already.
        pending, keeps_graph: as of `LayerCost`, for this view.
    """

    def __init__(
        self,
        layer: Any,
        value: Any,
        tensors: Sequence[Tensor],
        first: bool,
        kept: dict[int, Tensor],
        selective: bool,
    ) -> None:
        leaves, structure = tree.flatten(value)
        floats = torch.is_grad_enabled() and not first
        leaves = [leaf.detach().requires_grad_(floats and leaf.is_floating_point()) for leaf in leaves]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        parameters = {memory_of(tensor) for tensor in tensors}
        self.held = 0

        def note(tensor: Tensor) -> Tensor:
            place = memory_of(tensor)
            if place not in parameters and place not in kept:
                kept[place] = tensor.detach()
                self.held += tensor.untyped_storage().nbytes()
            return tensor

        value = tree.unflatten(leaves, structure)
        with _counting() as forward, noting(note, selective):
            output = layer(own_input(layer, value))
        results = [leaf for leaf in tree.flatten(output)[0] if leaf.requires_grad]
        given = [torch.ones_like(leaf) for leaf in results]
        backward = []
        for sources in (wanted, [*wanted, *trained]):
            with _counting() as counter:
                if results and sources:
                    torch.autograd.grad(results, sources, given, retain_graph=True, allow_unused=True)
            backward.append(counter.get_total_flops())
        self.flops = forward.get_total_flops(), *backward
        self.pending, self.keeps_graph = 0, False
        if results:
            with selectively(selective):
                again = layer(own_input(layer, value))
            results = [leaf for leaf in tree.flatten(again)[0] if leaf.requires_grad]
            rest = split.backward_inputs(results, given, wanted)
            memory = {memory_of(tensor): tensor.untyped_storage().nbytes() for tensor in rest.kept}
            self.pending = sum(size for place, size in memory.items() if place not in parameters)
            self.keeps_graph = rest.keeps_graph
            for tensor in (*wanted, *trained):
                tensor.grad = None
        self.output = tree.map_tensors(output, torch.Tensor.detach)


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        yield counter


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree.flatten(value)[0])
