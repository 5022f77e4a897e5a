"""What needs a number from all stages before the optimizer steps: the norm of the whole gradient, the loss scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_tspipe import _lightning
from lightning_tspipe.comm import Comm


class WholeGradient:
    """Lets a precision plugin clip by the norm over all stages, and skip a step everywhere if it must be anywhere.

    Args:
        precision: the plugin; `close` gives it its own methods back.
        comm: this rank's connections.
        places: for each of this rank's parameters, by identity, its place among all parameters of the optimizer.
        count: how many parameters the optimizer has on all ranks together.
    """

    def __init__(self, precision: Any, comm: Comm, places: dict[int, int], count: int) -> None:
        self._comm, self._places, self._count = comm, places, count
        self._indices = torch.tensor(list(places.values()), dtype=torch.long, device=comm.device)
        self._undo: list[Callable[[], None]] = []
        precision.clip_grad_by_norm = self.clip_by_norm
        precision.clip_grad_by_value = partial(_unless_empty, precision.clip_grad_by_value)
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            self._undo.append(partial(delattr, precision, name))
        scaler: Any = getattr(precision, "scaler", None)
        if scaler is not None:
            self._undo.append(_lightning.after_inf_check(scaler, self._found_anywhere))

    def close(self) -> None:
        """Give the plugin its own methods back."""
        for undo in self._undo:
            undo()

    @torch.no_grad()
    def clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Scale this rank's gradients as `torch.nn.utils.clip_grad_norm_` of all parameters would, bit by bit.

        The norm of each parameter's gradient goes to all ranks, which then sum in the same order.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._places]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.zeros(self._count, dtype=torch.float64, device=self._comm.device)
        if parameters:
            zero = norms.new_zeros(())
            mine = [zero if p.grad is None else torch.linalg.vector_norm(p.grad).double() for p in parameters]
            norms.index_copy_(0, self._indices, torch.stack(mine))
        norms = self._comm.total(norms)
        if grads:
            total = torch.linalg.vector_norm(norms.to(grads[0].dtype))
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, total)

    @torch.no_grad()
    def total_norm(
        self,
        own: Callable[..., Tensor],
        tensors: Any,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """The norm over all stages of the gradients that a user's own clipping gave to torch's `clip_grad_norm_`."""
        grads = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        mine = own(grads, norm_type, False, foreach)
        norms = torch.zeros(self._comm.stages, dtype=torch.float64, device=self._comm.device)
        norms[self._comm.stage] = mine
        total: Tensor = torch.linalg.vector_norm(self._comm.total(norms), float(norm_type))
        if error_if_nonfinite and not total.isfinite():
            raise RuntimeError(f"The norm of the gradients is {float(total)}, and error_if_nonfinite=True was given.")
        return total.to(mine.dtype) if grads else total

    def _found_anywhere(self, found: dict[torch.device, Tensor]) -> dict[torch.device, Tensor]:
        """How many ranks found an infinite gradient, from what this one found."""
        here = torch.zeros(1, device=self._comm.device)
        for value in found.values():
            here = here + value
        return {self._comm.device: self._comm.total(here)}


def _unless_empty(clip: Callable[[Optimizer, float], None], optimizer: Optimizer, clip_val: float) -> None:
    """A stage may have nothing to train, which torch's clipping by value does not take."""
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        clip(optimizer, clip_val)
