"""The processes of a strategy: how they start, who is who, and the few collectives that Lightning asks for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_tspipe import _lightning
from lightning_tspipe.board import World
from lightning_tspipe.launching import make_launcher
from lightning_tspipe.replicas import Replicas
from lightning_tspipe.topology import Topology


class ProcessStrategy(ParallelStrategy):
    """One process per device, started as Lightning's ddp family starts them."""

    _num_nodes = 1
    _start_method: Literal["popen", "spawn", "fork", "forkserver"]
    _backend: str | None
    _timeout: timedelta
    _replicas: Replicas | None = None
    _stages: int | Literal["auto"]
    _topology = Topology(0, 1, 1)  # before it is known
    _failed = False
    _world: World | None = None  # all ranks, once they are connected

    @property
    def is_distributed(self) -> bool:
        """Lightning asks a strategy that it does not know of for this, before it syncs logged values."""
        return True

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return len(self.parallel_devices or ())

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self._topology.replicas, "rank": self._topology.replica}

    @override
    def _configure_launcher(self) -> None:
        self._launcher = make_launcher(self, self._start_method)

    def set_world_ranks(self) -> None:
        """Called by Lightning before and after the processes have started."""
        _lightning.set_world_ranks(self)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        self._backend = self._backend or ("nccl" if self.root_device.type == "cuda" else "gloo")
        self._failed = False
        if not dist.is_initialized():
            self._world = None
        _lightning.init_process_group(self, self._backend, self._timeout)
        stages = self.world_size if self._stages == "auto" else self._stages
        self._topology = Topology(self.global_rank, self.world_size, stages)
        if self._world is None and self.world_size > 1:
            self._world = World(self._topology, self._timeout)

    def describe(self, rank: int) -> str:
        """A rank by its numbers, for messages; also where no process has been set up."""
        return f"rank {rank} (stage {rank if self._stages == 'auto' else rank % self._stages})"

    @override
    def barrier(self, name: str | None = None) -> None:
        if self._world is not None and not self._failed:
            self._world.any()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._world is None or self._failed else self._world.broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        # one pipeline is one replica, of which every rank already has the value
        return tensor if self._replicas is None else self._replicas.reduce(tensor, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self._replicas is not None:
            return self._replicas.gather(tensor, sync_grads)
        return tensor.unsqueeze(0) if self.world_size > 1 else tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._replicas is None:
            return bool(self.broadcast(decision))
        votes = int(self._replicas.reduce(float(decision), "sum"))
        return bool(self.broadcast(votes == self._replicas.count if all else votes > 0))
