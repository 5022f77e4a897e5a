"""Forward and backward of one microbatch on one device."""

from __future__ import annotations

import copy
import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tspipe import split, tree
from lightning_tspipe._nodes import backward
from lightning_tspipe.arguments import Call
from lightning_tspipe.batchnorm import DeferredBatchNorm, Joint, too_few_values
from lightning_tspipe.layers import Entry, Layer
from lightning_tspipe.reach import reach
from lightning_tspipe.selective import Recompute, Selective
from lightning_tspipe.steps import Options, call_all, chain
from lightning_tspipe.taps import Tapped
from lightning_tspipe.trace import Carried, Segment

Network = Literal["student", "teacher"]
Work = tuple[int, int]  # batch, microbatch
NOTHING = nullcontext()


class _Saved(NamedTuple):
    inputs: list[Tensor]
    outputs: list[Tensor]
    views: list[Any] | None  # what the forward was given, if it has to run again


class Stage:
    """One rank's layers of student and teacher.

    Args:
        student, teacher: the layers, in order; either may be empty (what comes in goes out).
        index: which stage this is.
        first: whether the inputs are the batch itself, which needs no gradient.
        device: where the layers are.
        seed: base of the random numbers of dropout and the like: they depend on (seed, batch, microbatch, layer) only.
        joint: over what replicas batch norms take their statistics (`DeferredBatchNorm`).
        recompute: whether a student's forward keeps its inputs only, and runs again in the backward; "selective":
            only what is cheap does (`Selective`).
        compile_options: keyword arguments of torch.compile, which the layers then go through; None leaves them alone.
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
        recompute: Recompute = False,
        compile_options: Options | None = None,
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
        self._in_place = {network: bool(found) and in_place(found[0]) for network, found in self._layers.items()}
        self._recompute, self._is_compiled = recompute is True, compile_options is not None
        self._selective = Selective()
        self._checked = False  # that no layer of the student changes its buffers
        self._told = compile_options is not None  # what of a backward is not split; `check_compile` has said it then
        self._current: tuple[int, ...] = ()  # what the random numbers depend on
        names = {"student": [layer.name for layer in student], "teacher": [layer.name for layer in teacher]}
        self._names = names
        self._chains = {
            network: _chain(layers, names[network], compile_options, self._begin_layer)
            for network, layers in self._layers.items()
        }
        of_student = {True: self._checkpoint, "selective": self._selectively}
        self._runs: dict[Network, Callable[[Any], Any]] = {
            "student": of_student.get(recompute, partial(self._pass, "student")),
            "teacher": partial(self._pass, "teacher"),
        }
        self._seeds_itself = {
            network: bool(layers) and compile_options is None and not isinstance(layers[0], Segment)
            for network, layers in self._layers.items()
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
        layers = self._layers[network]
        if not isinstance(inputs, Call) or not layers or isinstance(layers[0], Entry | Segment):
            output = self._chains[network](inputs)
        else:
            output = call_all(layers[1:], layers[0](*inputs.args, **inputs.kwargs))  # outside of work, not seeded
        return output.value if isinstance(output, Tapped) else output

    def teacher_forward(self, work: Work, views: list[Any]) -> list[Any]:
        """Run the teacher on one microbatch of each view; nothing is kept for a backward."""
        with torch.no_grad():
            return self._forward("teacher", work, views)

    def student_forward(self, work: Work, views: list[Any]) -> list[Any]:
        """Run the student on one microbatch of each view and keep what `backward` needs.

        Returns:
            The outputs, cut off from the graph.
        """
        leaves, structure = tree.flatten(views)
        if not self._first:
            leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        views = tree.unflatten(leaves, structure)
        with NOTHING if torch.is_grad_enabled() else torch.enable_grad():
            outputs = self._forward("student", work, views)
        results, structure = tree.flatten(outputs)
        inputs = [] if self._first else differentiable(leaves)
        self._saved[work] = _Saved(inputs, differentiable(results), views if self._recompute else None)
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
            backward(outputs, given)
        return _gradients(saved.inputs)

    def backward_inputs(self, work: Work, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The first part of `backward`, with the same arguments and results; `backward_weights` does the rest."""
        saved, outputs, given = self._take(work, gradients, in_parts=not self._first)
        if outputs:
            self._weights[work] = rest = split.backward_inputs(outputs, given, saved.inputs)
            if rest.early and not self._told:
                self._told = True
                self._tell_of(rest.early)
        return _gradients(saved.inputs)

    def _tell_of(self, early: Sequence[Tensor]) -> None:
        """Warn that the backward of some layers is not split."""
        found = {id(tensor) for tensor in early}
        pairs = zip(self._names["student"], self._layers["student"], strict=True)
        names = [name for name, layer in pairs if any(id(own) in found for own in layer.parameters())]
        warnings.warn(
            f"Stage {self._index} splits its backward, but not that of {', '.join(map(repr, names))}, or not all of "
            f"it: autograd has the gradients of {len(early)} of the weights there only together with those of the "
            "inputs. They are computed in the first part, which another rank waits for. The gradients are the same.",
            stacklevel=2,
        )

    def _take(
        self, work: Work, gradients: Sequence[Tensor | None], in_parts: bool = False
    ) -> tuple[_Saved, list[Tensor], list[Tensor]]:
        """What a forward has saved, its outputs that get a gradient, and those gradients; seeds the generator again.

        A checkpoint runs again for every call of autograd. A backward in parts makes many of them, so for it the
        forward runs here, once, and keeps what all parts need.
        """
        saved = self._saved.pop(work)
        outputs = saved.outputs
        pairs = [
            (index, given)
            for index, given in enumerate(gradients)
            if given is not None and outputs[index].requires_grad
        ]
        if pairs:
            self._seed_for("student", work)
        if pairs and in_parts and saved.views is not None:
            with torch.enable_grad(), self.norms["student"].unseen():
                again = [self._pass("student", view) for view in saved.views]
            outputs = differentiable(tree.flatten(again)[0])
            self._seed_for("student", work)
        return saved, [outputs[index] for index, _ in pairs], [given for _, given in pairs]

    def backward_weights(self, work: Work) -> None:
        """What `backward_inputs` has put off."""
        if (rest := self._weights.pop(work, None)) is not None:
            self._seed_for("student", work)
            rest()

    def _forward(self, network: Network, work: Work, views: list[Any]) -> list[Any]:
        outputs: list[Any] = []
        self._seed_for(network, work, again=self._seeds_itself[network])
        norms, run = self.norms[network], self._runs[network]
        for view, inputs in enumerate(views):
            norms.slot = work[0], view
            output = run(inputs)
            outputs.append(output)
            self._check_structure(network, view, output)
        return outputs

    def _pass(self, network: Network, inputs: Any) -> Any:
        """All layers, one after the other, on one view."""
        layers = self._layers[network]
        try:
            return self._chains[network](tree.map_tensors(inputs, torch.clone) if self._in_place[network] else inputs)
        except ValueError as error:
            named = dict(zip(self._names[network], layers, strict=False))  # what was followed is one
            if (known := too_few_values(error, f"the {network}", named)) is not None:
                raise known from error
            raise

    def _selectively(self, inputs: Any) -> Any:
        with self._selective:
            return self._pass("student", inputs)

    def _checkpoint(self, inputs: Any) -> Any:
        """The student's pass, which keeps its inputs only; torch runs it again in the backward, with equal numbers."""
        leaves, structure = tree.flatten(inputs)
        before = None if self._checked else _buffers(self._layers["student"])
        again = False

        def run(*leaves: Tensor) -> Any:
            nonlocal again
            with self.norms["student"].unseen() if again else NOTHING:
                again = True
                return self._pass("student", tree.unflatten(leaves, structure))

        # torch ends the second run by an exception when it has all it needs; what is compiled must not be left so
        output = checkpoint(run, *leaves, use_reentrant=False, early_stop=not self._is_compiled)
        if before is not None:
            self._refuse_changed(before)
            self._checked = True
        return output

    def _refuse_changed(self, before: dict[tuple[nn.Module, str], Tensor]) -> None:
        for (module, name), buffer in _buffers(self._layers["student"]).items():
            old = before.get((module, name), buffer)
            if old.shape != buffer.shape or not bool(((old == buffer) | ((old != old) & (buffer != buffer))).all()):
                raise ValueError(
                    f"recompute=True runs the student's layers twice, but a {type(module).__name__} of stage "
                    f"{self._index} changes its buffer {name!r} in its forward, which would then count twice. Use "
                    "recompute=False, or a layer that changes no buffer."
                )

    def _check_structure(self, network: Network, view: int, output: Any) -> None:
        if isinstance(output, Carried):
            return  # its constants are of our making, and depend on the shapes
        structure = tree.LEAF if type(output) is Tensor else tree.flatten(output)[1]
        if (known := self._structures.get((network, view))) is None:
            self._structures[network, view] = copy.copy(structure)
        elif known != structure:
            raise ValueError(
                f"The {network} changed the structure of its output between batches (stage {self._index}): "
                f"first {known}, now {structure}. Return the same nesting of tensors, with the same constants, for "
                "every batch."
            )

    def _seed_for(self, network: Network, work: Work, again: bool = False) -> None:
        """Random numbers of their own for this work, so that neither order nor lookahead nor recomputation shows.

        Args:
            network, work: what begins.
            again: whether the first layer seeds the generator again before anything draws (`_begin_layer`).
        """
        if self._outside is None:
            self._outside = self._generator.get_state()
        self._current = (self._seed, 0 if network == "student" else 1, *work)
        if not again:
            self._generator.manual_seed(hash((*self._current, self._index)) & (2**62 - 1))

    def _begin_layer(self, name: str) -> None:
        """Each layer has its own random numbers within a work, so that they do not depend on where the cuts are."""
        if self._outside is not None:
            self._generator.manual_seed(hash((*self._current, _number(name))) & (2**62 - 1))

    def leave(self) -> None:
        """Put the generator back to where it was before this stage's work; called before other code runs."""
        if self._outside is not None:
            self._generator.set_state(self._outside)
            self._outside = None


@functools.cache
def _number(name: str) -> int:
    """The same in every process, as a hash of a text is not."""
    return zlib.crc32(name.encode())


def _chain(
    layers: Sequence[nn.Module], names: Sequence[str], options: Options | None, begin: Callable[[str], None]
) -> Callable[[Any], Any]:
    """What calls the layers; a segment has torch.compile work on what it has recorded, not on itself."""
    if not layers or not isinstance(layers[0], Segment):
        return chain(layers, names, options, begin)
    layers[0].compile_with(options)
    layers[0].tell(begin)
    return layers[0]


def _buffers(layers: Sequence[nn.Module]) -> dict[tuple[nn.Module, str], Tensor]:
    """Copies of all buffers."""
    modules = (module for layer in layers for module in layer.modules())
    return {(m, name): buffer.detach().clone() for m in modules for name, buffer in m.named_buffers(recurse=False)}


def _gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) if (grad := leaf.grad) is None else grad for leaf in leaves]


def differentiable(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a gradient message has a place for: floating point ones."""
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def own_input(layer: nn.Module, value: Any) -> Any:
    """A copy for a layer that works in place, which would write into a tensor that others still need."""
    return tree.map_tensors(value, torch.clone) if in_place(layer) else value


def in_place(layer: nn.Module) -> bool:
    """Whether a layer writes into its input."""
    return any(getattr(part, "inplace", False) for part in (layer, next(layer.children(), None)))
