"""Deferred batch normalization: running statistics move once per batch, by the statistics of the whole batch.

Source: Kim et al., "torchgpipe", https://arxiv.org/abs/2004.09910, "Deferred batch normalization". Each microbatch is
normalized by its own statistics; what a validation uses is then the same for every number of microbatches.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

Slot = tuple[int, int]  # batch, view
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
TOO_FEW = "Expected more than 1 value per channel"  # how torch begins


class Joint(NamedTuple):
    """How a sum is taken over data-parallel replicas, with gradients, and how many there are."""

    total: Callable[[Tensor], Tensor]
    replicas: int


class _Part(NamedTuple):
    rows: int
    mean: Tensor
    var: Tensor  # unbiased


class DeferredBatchNorm:
    """Takes over the running statistics of the batch norms of one network while it is in a pipeline.

    Args:
        modules: modules to search for batch norms; others are left alone.
        joint: the data-parallel replicas whose microbatches are normalized together; None normalizes each by itself.
    """

    def __init__(self, modules: Iterable[nn.Module], joint: Joint | None = None) -> None:
        self._joint = joint
        found = [m for root in modules for m in root.modules() if isinstance(m, Norm)]
        self._norms = [norm for norm in found if norm.track_running_stats or joint is not None]
        self._parts: dict[Slot, dict[int, list[_Part]]] = defaultdict(lambda: defaultdict(list))
        self._slot: Slot = (0, 0)
        # All that a forward changes: a list that is empty when it begins, so that torch.compile can follow it.
        self._fresh: list[tuple[int, _Part]] = []
        for index, norm in enumerate(self._norms):
            norm.forward = partial(self._forward, norm, index)  # type: ignore[method-assign]

    @property
    def slot(self) -> Slot:
        """The batch and view whose forwards run now."""
        return self._slot

    @slot.setter
    def slot(self, slot: Slot) -> None:
        self._file()
        self._slot = slot

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What runs in this context runs again, and was counted the first time."""
        self._file()
        try:
            yield
        finally:
            self._fresh.clear()

    def _file(self) -> None:
        for index, part in self._fresh:
            self._parts[self._slot][index].append(part)
        self._fresh.clear()

    def restore(self) -> None:
        """Give the batch norms their own forward back."""
        for norm in self._norms:
            del norm.forward

    @torch.no_grad()
    def commit(self, batch: int) -> None:
        """Move the running statistics by those of a whole batch, view after view as the networks would."""
        self._file()
        for slot in sorted(slot for slot in self._parts if slot[0] == batch):
            for index, parts in self._parts.pop(slot).items():
                _update(self._norms[index], parts)

    def discard(self, batch: int) -> None:
        """Forget a batch that is not trained on after all."""
        self._file()
        for slot in [slot for slot in self._parts if slot[0] == batch]:
            del self._parts[slot]

    def _forward(self, norm: Norm, index: int, inputs: Tensor) -> Tensor:
        if not norm.training:
            return type(norm).forward(norm, inputs)
        if self._joint is not None:
            output, part = _joint(norm, inputs, self._joint)
            if norm.track_running_stats:
                self._fresh.append((index, part))
            return output
        assert norm.running_mean is not None and norm.running_var is not None
        # with momentum 1 the kernel leaves the statistics of this microbatch in the two buffers, at no extra cost
        mean, var = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
        output = nn.functional.batch_norm(inputs, mean, var, norm.weight, norm.bias, True, 1.0, norm.eps)
        self._fresh.append((index, _Part(inputs.numel() // inputs.shape[1], mean, var)))
        return output


def _joint(norm: Norm, inputs: Tensor, joint: Joint) -> tuple[Tensor, _Part]:
    """Normalize by mean and variance over all replicas, in two passes for the sake of precision."""
    x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    dims, shape = [dim for dim in range(x.ndim) if dim != 1], [1, -1, *[1] * (x.ndim - 2)]
    rows = x.numel() // x.shape[1]
    sums = joint.total(torch.cat([x.sum(dims), x.new_full((1,), rows)]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centered = x - mean.reshape(shape)
    var = joint.total(centered.square().sum(dims)) / count
    output = centered * torch.rsqrt(var + norm.eps).reshape(shape)
    if norm.affine:
        output = output * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    unbiased = var.detach() * count / (count - 1).clamp(min=1)
    return output.to(inputs.dtype), _Part(rows * joint.replicas, mean.detach(), unbiased)


def _update(norm: Norm, parts: list[_Part]) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    wide = torch.promote_types(norm.running_mean.dtype, torch.float32)  # half precision would lose what is added
    parts = [_Part(part.rows, part.mean.to(wide), part.var.to(wide)) for part in parts]
    total = sum(part.rows for part in parts)
    if len(parts) == 1:
        mean, var = parts[0].mean, parts[0].var
    else:
        # weighed by Python numbers: a tensor of them would be a copy to the device that the host waits for
        mean = torch.stack([part.mean * (part.rows / total) for part in parts]).sum(0)
        inner = torch.stack([part.var * (part.rows - 1) for part in parts]).sum(0)
        outer = torch.stack([(part.mean - mean) ** 2 * part.rows for part in parts]).sum(0)
        var = (inner + outer) / max(total - 1, 1)
    norm.num_batches_tracked += 1
    factor = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.to(wide)
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, var)):
        buffer.copy_(buffer.to(wide) * (1 - factor) + value * factor)


def too_few_values(error: BaseException | None, owner: str, layers: Mapping[str, nn.Module]) -> ValueError | None:
    """An error with cause and fix in place of torch's, where a batch norm got one value per channel; else None.

    Args:
        error: what torch raised.
        owner: whose layers they are, in words.
        layers: where to look for the batch norm, by name; if there is one only, it need not be found.
    """
    if error is None or not str(error).startswith(TOO_FEW):
        return None
    names = {id(m): f"{name}.{key}".strip(".") for name, layer in layers.items() for key, m in layer.named_modules()}
    frames = traceback.walk_tb(error.__traceback__)
    seen = [value for frame, _ in frames for value in frame.f_locals.values() if isinstance(value, Norm)]
    name = next((names[id(norm)] for norm in seen if id(norm) in names), next(iter(layers), ""))
    return ValueError(
        f"The batch norm {name!r} of {owner} got a microbatch with one value per channel, which has no variance "
        f"({error}). Use fewer microbatches (`TSPipeStrategy(microbatches=...)`), or a larger batch; if it is the last "
        "one that is too small, `drop_last=True` in the loader."
    )
