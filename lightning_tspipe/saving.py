"""The strategy's side of checkpoints: what Lightning asks for, from the parts that all ranks hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tspipe import _lightning
from lightning_tspipe.checkpoint import KEY, Generators, Groups, Shards
from lightning_tspipe.comm import Comm
from lightning_tspipe.files import AtomicCheckpointIO
from lightning_tspipe.fitting import Fitting
from lightning_tspipe.processes import ProcessStrategy


class CheckpointStrategy(ProcessStrategy):
    """Saves and loads one ordinary Lightning checkpoint."""

    _comm: Comm | None = None
    _shards: Shards | None = None
    _fitting: Fitting | None = None
    _seed = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: Groups = []
        self._resumed: Mapping[str, Any] = {}  # what a checkpoint holds of ours
        self._ahead: list[Any] | None = None  # `LeadingFeed.ahead` when the last fit ended

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        _lightning.wrap_checkpoint_io(self._checkpoint_io, AtomicCheckpointIO)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return super().lightning_module_state_dict() if self._shards is None else self._shards.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = _lightning.plain_optimizer(optimizer)
        if self._shards is None or self._fitting is None:  # after fit, when it is whole again
            return super().optimizer_state(optimizer)
        return self._shards.optimizer_state(optimizer, self._groups)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        assert self._shards is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self._shards.load_optimizer_state(optimizer, state, self._groups)
            _lightning.optimizers_to_device([optimizer], self.root_device)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if "optimizer_states" in checkpoint:
            checkpoint[KEY] = {"seed": self._seed, **self._random_states()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(*args, **kwargs)
        self._resumed = checkpoint.get(KEY, {})
        return checkpoint

    def _random_states(self) -> dict[str, Any]:
        """Where the generators of the rank that loads and of the one that runs `loss` are."""
        state = Generators(self.root_device).state()
        if self._comm is None:  # there is one rank, or the fit is over
            last = self.broadcast(state, self.world_size - 1)
        else:
            last = (self._comm.gather(state) or [None])[-1]
        ahead = self._ahead if self._fitting is None else self._fitting.ahead()
        return {"first": state, "last": last, "ahead": ahead}

    def _restore_random_states(self) -> list[Any]:
        """Called before the loader is iterated, which draws the order of one that shuffles.

        Returns:
            The states to put back before each of the first fetches, if a pass is resumed in its middle.
        """
        for name, rank in (("last", self.world_size - 1), ("first", 0)):
            if rank == self.global_rank and name in self._resumed:
                Generators(self.root_device).restore(self._resumed[name])
        ahead = self._resumed.get("ahead")
        return [] if ahead is None else [*ahead, self._resumed["first"]]
