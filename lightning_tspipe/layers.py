"""What a layer is, and the layers that a network has by its structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_tspipe.arguments import run_network
from lightning_tspipe.recording import extra_states_of, has_hooks, tensors_of
from lightning_tspipe.taps import run_tapped

NAMES_LAYERS = "pipeline_layers"  # the method by which a network names its layers


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


def layers_of(network: nn.Module, prefix: str = "") -> list[Layer]:
    """The layers that a network has by its structure.

    They are those that its `pipeline_layers()` names; else nested `nn.Sequential` are flattened, and anything else, and
    a Sequential with hooks, is one layer.
    """
    if not prefix and hasattr(network, NAMES_LAYERS):
        return _named_layers(network)
    if not is_plain(network) or has_hooks(network):
        return [Layer(prefix, network)]
    return [
        layer
        for name, child in network.named_children()
        for layer in layers_of(child, f"{prefix}.{name}" if prefix else name)
    ]


def is_plain(network: nn.Module) -> bool:
    """Whether a network is a Sequential whose forward is that of `nn.Sequential`."""
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
