"""What the same stage of all data-parallel replicas does together: gradients are averaged, statistics joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.batchnorm import Joint
from lightning_tspipe.board import World
from lightning_tspipe.topology import Topology

BITS = 8  # of what signals may ask
BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel
OPERATIONS = {"mean": dist.ReduceOp.SUM, "avg": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN,
              "max": dist.ReduceOp.MAX, "prod": dist.ReduceOp.PRODUCT}  # fmt: skip


class Replicas:
    """This rank's connections to the ranks that hold the same stage.

    Args:
        topology: who is who.
        device: where gradients live.
        backend: "gloo" or "nccl".
        world: all ranks of the job, and how long an exchange may take.
    """

    def __init__(self, topology: Topology, device: torch.device, backend: str, world: World) -> None:
        self.count, self.index, self._device, self._board = topology.replicas, topology.replica, device, world.board
        world.any()  # the groups below would wait for a rank that has failed by now
        for stage in range(topology.stages):  # every process takes part in making every group
            ranks = list(topology.peers(stage))
            data, control = (dist.new_group(ranks, timeout=world.timeout, backend=name) for name in (backend, "gloo"))
            if stage == topology.stage:
                self.group, self._control = cast(dist.ProcessGroup, data), cast(dist.ProcessGroup, control)
                self._first = ranks[0]
        others = [rank for rank in topology.peers(topology.stage) if rank != topology.rank]
        self._other = others[0] if len(others) == 1 else None
        self._works: list[dist.Work] = []
        self._buckets: list[tuple[list[Tensor], Tensor]] = []
        self._votes = torch.empty(0)
        self._parameters: Sequence[Tensor] = ()

    @property
    def joint(self) -> Joint:
        """For batch norms that take their statistics over all replicas."""
        return Joint(self.total, self.count)

    def start(self, parameters: Sequence[Tensor], asked: int) -> None:
        """Start to average gradients; `finish` waits for it.

        Args:
            parameters: this rank's, the same on every replica.
            asked: what signals have asked of this replica, as bits.
        """
        self._parameters = parameters
        votes = [bool(asked >> bit & 1) for bit in range(BITS)]
        self._votes = torch.tensor([*votes, *(p.grad is not None for p in parameters)], dtype=torch.int32)
        self._works = [self._all_reduce(self._votes, self._control)]
        self._buckets = []
        for members in _buckets(parameters):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self._works.append(self._all_reduce(flat, self.group))
            self._buckets.append((members, flat))

    @torch.no_grad()
    def finish(self) -> int:
        """Wait until the gradients are averaged; a parameter without one on every replica has none.

        Returns:
            What signals have asked of any replica, as bits.
        """
        for work in self._works:
            self._wait(work)
        votes = self._votes.tolist()
        used = votes[BITS:]
        asked = sum(1 << bit for bit, count in enumerate(votes[:BITS]) if count)
        has = {id(p): bool(count) for p, count in zip(self._parameters, used, strict=True)}
        for members, flat in self._buckets:
            parts = torch.split(flat / self.count, [p.numel() for p in members])
            for parameter, part in zip(members, parts, strict=True):
                if not has[id(parameter)]:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part.view_as(parameter))
        self._works, self._buckets, self._parameters = [], [], ()
        return asked

    def reduce(self, value: Any, operation: str | None) -> Tensor:
        """Mean ("mean", "avg"), "sum", "min", "max" or "prod" over the replicas; None means the sum."""
        name = (operation or "sum").lower()
        result = torch.as_tensor(value, device=self._device).clone()
        whole = not result.is_floating_point()
        self._wait(self._all_reduce(result, self.group, OPERATIONS[name]))
        if name not in ("mean", "avg"):
            return result
        return (result / self.count).to(result.dtype) if whole else result / self.count

    def gather(self, tensor: Tensor, sync_grads: bool) -> Tensor:
        """The tensors of all replicas, shape (replicas, ...); their gradients are summed if `sync_grads`."""
        with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
            result: Tensor = _Gather.apply(tensor.contiguous(), self)
        return result

    def collect(self, tensor: Tensor) -> Tensor:
        """`gather` without gradients."""
        result = tensor.new_empty((self.count, *tensor.shape))
        # as bytes, since not every type is taken
        parts = [tree.as_bytes(part) for part in result]
        mine = tree.as_bytes(tensor)
        self._wait(self._started(lambda: dist.all_gather(parts, mine, self.group, async_op=True)))
        return result

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the replicas; gradients are summed too."""
        result: Tensor = _Total.apply(tensor, self)
        return result

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give every replica the values of the first one. Not for hot paths."""
        for tensor in tensors:
            host = tensor.detach().cpu().contiguous()
            flat = tree.as_bytes(host)
            self._wait(self._started(lambda flat=flat: dist.broadcast(flat, self._first, self._control, async_op=True)))
            if self.index:
                tensor.copy_(host)

    def _all_reduce(self, tensor: Tensor, group: Any, operation: Any = dist.ReduceOp.SUM) -> dist.Work:
        return self._started(lambda: dist.all_reduce(tensor, operation, group, async_op=True))

    def _started(self, call: Any) -> dist.Work:
        try:
            work: dist.Work = call()
        except RuntimeError as error:
            raise self._board.explain(self._other, error) from error
        return work

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._board.explain(self._other, error) from error


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        return replicas.reduce(tensor, "sum")

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return ctx.replicas.reduce(gradient.contiguous(), "sum"), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        return replicas.collect(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return ctx.replicas.reduce(gradient.contiguous(), "sum")[ctx.replicas.index], None


def _buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters of one type together, up to a size, the last ones first: their gradients are the first to be there."""
    buckets: list[list[Tensor]] = []
    size = 0
    for parameter in reversed(parameters):
        bytes_ = parameter.numel() * parameter.element_size()
        if not buckets or buckets[-1][0].dtype != parameter.dtype or size + bytes_ > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += bytes_
    return buckets
