"""Forward and backward of one microbatch on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tspipe import split, tree
from lightning_tspipe.arguments import Call
from lightning_tspipe.batchnorm import DeferredBatchNorm, Joint
from lightning_tspipe.layers import Entry, Layer
from lightning_tspipe.reach import reach
from lightning_tspipe.taps import Tapped
from lightning_tspipe.trace import Carried, Segment

Network = Literal["student", "teacher"]
Work = tuple[int, int]  # batch, microbatch


@dataclass(frozen=True)
class _Saved:
    inputs: list[Tensor]
    outputs: list[Tensor]


class Stage:
    """One rank's layers of student and teacher.

    Args:
        student, teacher: the layers, in order; either may be empty (what comes in goes out).
        index: which stage this is.
        first: whether the inputs are the batch itself, which needs no gradient.
        device: where the layers are.
        seed: base of the random numbers of dropout and the like: they depend on (seed, batch, microbatch, stage) only.
        joint: over what replicas batch norms take their statistics (`DeferredBatchNorm`).
    """

    def __init__(
        self,
        student: Sequence[Layer],
        teacher: Sequence[Layer],
        index: int,
        first: bool,
        device: torch.device,
        seed: int,
        joint: Joint | None = None,
    ) -> None:
        self._layers: dict[Network, list[nn.Module]] = {
            "student": [layer.module for layer in student],
            "teacher": [layer.module for layer in teacher],
        }
        self._index, self._first, self._seed, self.device = index, first, seed, device
        self._generator = torch.default_generator
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index or 0]
        self._outside: Tensor | None = None  # the generator's state outside of this stage's work
        self._saved: dict[Work, _Saved] = {}
        self._weights: dict[Work, split.WeightBackward] = {}  # backwards of which the first part has run
        self._structures: dict[tuple[Network, int], tree.Structure] = {}
        self.norms: dict[Network, DeferredBatchNorm] = {
            network: DeferredBatchNorm(layers, joint) for network, layers in self._layers.items()
        }

    def close(self) -> None:
        """Give the layers back as they were."""
        self.leave()
        for norms in self.norms.values():
            norms.restore()
        self._saved.clear()
        self._weights.clear()

    def run(self, network: Network, inputs: Any) -> Any:
        """One forward outside of training: the whole batch, no microbatches, no gradient kept, no taps."""
        for layer in self._layers[network]:
            if isinstance(inputs, Call) and not isinstance(layer, Entry | Segment):
                inputs = layer(*inputs.args, **inputs.kwargs)
            else:
                inputs = layer(inputs)
        return inputs.value if isinstance(inputs, Tapped) else inputs

    @torch.no_grad()
    def teacher_forward(self, work: Work, views: list[Any]) -> list[Any]:
        """Run the teacher on one microbatch of each view; nothing is kept for a backward."""
        return self._forward("teacher", work, views)

    def student_forward(self, work: Work, views: list[Any]) -> list[Any]:
        """Run the student on one microbatch of each view and keep what `backward` needs.

        Returns:
            The outputs, cut off from the graph.
        """
        leaves, structure = tree.flatten(views)
        if not self._first:
            leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        with torch.enable_grad():
            outputs = self._forward("student", work, tree.unflatten(leaves, structure))
        results, structure = tree.flatten(outputs)
        self._saved[work] = _Saved(
            [] if self._first else differentiable(leaves), [out for out in results if out.is_floating_point()]
        )
        return list(tree.unflatten([out.detach() for out in results], structure))

    def needs_gradient(self, work: Work) -> list[bool]:
        """For each floating point output of a microbatch: whether a parameter or an input of this stage made it."""
        return [output.requires_grad for output in self._saved[work].outputs]

    def reach(self, work: Work, reached: Sequence[bool]) -> tuple[list[bool], list[Tensor]]:
        """`reach.reach` of a microbatch's graph, before its backward."""
        return reach(self._saved[work].outputs, self._saved[work].inputs, reached)

    def backward(self, work: Work, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Run the full backward of one microbatch; parameter gradients add up in ``.grad``.

        Args:
            work: the microbatch, whose forward has run.
            gradients: one per floating point output of this stage, of the output's shape.

        Returns:
            One gradient per floating point input, zeros where an input was not used; none on the first stage.
        """
        saved, outputs, given = self._take(work, gradients)
        if outputs:
            torch.autograd.backward(outputs, given)
        return _gradients(saved.inputs)

    def backward_inputs(self, work: Work, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The first part of `backward`, with the same arguments and results; `backward_weights` does the rest."""
        saved, outputs, given = self._take(work, gradients)
        if outputs:
            self._weights[work] = split.backward_inputs(outputs, given, saved.inputs)
        return _gradients(saved.inputs)

    def _take(self, work: Work, gradients: Sequence[Tensor | None]) -> tuple[_Saved, list[Tensor], list[Tensor]]:
        """What a forward has saved, its outputs that get a gradient, and those gradients; seeds the generator again."""
        saved = self._saved.pop(work)
        pairs = [(o, g) for o, g in zip(saved.outputs, gradients, strict=True) if o.requires_grad and g is not None]
        if pairs:
            self._seed_for("student", work)
        return saved, [output for output, _ in pairs], [gradient for _, gradient in pairs]

    def backward_weights(self, work: Work) -> None:
        """What `backward_inputs` has put off."""
        if (rest := self._weights.pop(work, None)) is not None:
            self._seed_for("student", work)
            rest()

    def _forward(self, network: Network, work: Work, views: list[Any]) -> list[Any]:
        layers = self._layers[network]
        outputs: list[Any] = []
        self._seed_for(network, work)
        for view, inputs in enumerate(views):
            self.norms[network].slot = (work[0], view)
            # an in-place first layer would write into a tensor that others still need
            output = tree.map_tensors(inputs, torch.clone) if layers and writes_in_place(layers[0]) else inputs
            for layer in layers:
                output = layer(output)
            outputs.append(output)
            self._check_structure(network, view, output)
        return outputs

    def _check_structure(self, network: Network, view: int, output: Any) -> None:
        if isinstance(output, Carried):
            return  # its constants are of our making, and depend on the shapes
        structure = tree.flatten(output)[1]
        known = self._structures.setdefault((network, view), copy.copy(structure))
        if known != structure:
            raise ValueError(
                f"The {network} changed the structure of its output between batches (stage {self._index}): "
                f"first {known}, now {structure}. Return the same nesting of tensors, with the same constants, for "
                "every batch."
            )

    def _seed_for(self, network: Network, work: Work) -> None:
        """Random numbers of their own for this work, so that neither order nor lookahead nor recomputation shows."""
        if self._outside is None:
            self._outside = self._generator.get_state()
        name = 0 if network == "student" else 1
        self._generator.manual_seed(hash((self._seed, name, *work, self._index)) & (2**62 - 1))

    def leave(self) -> None:
        """Put the generator back to where it was before this stage's work; called before other code runs."""
        if self._outside is not None:
            self._generator.set_state(self._outside)
            self._outside = None


def _gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]


def differentiable(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a gradient message has a place for: floating point ones."""
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def writes_in_place(layer: nn.Module) -> bool:
    """Whether a layer may write into its input."""
    first: Callable[[], Any] = lambda: next(layer.children(), None)  # noqa: E731
    return bool(getattr(layer, "inplace", False)) or bool(getattr(first(), "inplace", False))
