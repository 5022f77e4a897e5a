"""The processes of a strategy: how they start, who is who, and the few collectives that Lightning asks for."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_tspipe import _lightning
from lightning_tspipe.board import World
from lightning_tspipe.files import AtomicCheckpointIO
from lightning_tspipe.launching import make_launcher

log = logging.getLogger(__name__)


class ProcessStrategy(ParallelStrategy):
    """One process per device, started as Lightning's ddp family starts them."""

    _num_nodes = 1
    _start_method: Literal["popen", "spawn", "fork", "forkserver"]
    _backend: str | None
    _timeout: timedelta
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
        return {"num_replicas": 1, "rank": 0}

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
        if self._world is None and self.world_size > 1:
            self._world = World(self.global_rank, self.world_size, self._timeout)

    @override
    def barrier(self, name: str | None = None) -> None:
        if self._world is not None and not self._failed:
            self._world.any()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._world is None or self._failed else self._world.broadcast(obj, src)

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        self._checkpoint_io = self._checkpoint_io or AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._is_lost:
            log.warning("%s is not saved: every rank has its own stage only, and one is lost", filepath)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if not self._is_lost:  # what should have taken its place was not saved
            super().remove_checkpoint(filepath)

    @property
    def _is_lost(self) -> bool:
        """Whether the whole is gone, so that callbacks which save at an exception have nothing to save."""
        return self._failed and self.world_size > 1

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor  # one pipeline is one replica: every rank already has the value

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor.unsqueeze(0) if self.world_size > 1 else tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return bool(self.broadcast(decision))
