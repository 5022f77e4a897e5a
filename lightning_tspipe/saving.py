"""The strategy's side of checkpoints: what Lightning asks for, from the parts that all ranks hold."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.trainer.states import TrainerStatus
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tspipe import _lightning, sharded
from lightning_tspipe.checkpoint import KEY, Groups, Shards, by_names
from lightning_tspipe.comm import Comm
from lightning_tspipe.files import AtomicCheckpointIO
from lightning_tspipe.fitting import Fitting
from lightning_tspipe.memory import all_taken, forget_graphs, lend, without_memory
from lightning_tspipe.processes import ProcessStrategy
from lightning_tspipe.randomness import Generators
from lightning_tspipe.recording import tensors_of

log = logging.getLogger(__name__)


class CheckpointStrategy(ProcessStrategy):
    """Saves and loads one ordinary Lightning checkpoint, or a folder of shards (`sharded`)."""

    _comm: Comm | None = None
    _shards: Shards | None = None
    _fitting: Fitting | None = None
    _seed = 0
    _chosen: int | None = None  # microbatches per batch
    _teacher_chosen: int | None = None
    _state_dict_type: Literal["full", "sharded"] = "full"

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
        if self._shards is None:  # after fit, when it is whole again
            return super().lightning_module_state_dict()
        return self._shards.own_state_dict() if self._is_sharded else self._shards.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = _lightning.plain_optimizer(optimizer)
        if self._shards is None or self._fitting is None:
            state = super().optimizer_state(optimizer)
            return by_names(state, self._groups) if self._is_sharded else state
        if self._is_sharded:
            return self._shards.own_optimizer_state(optimizer, self._groups)
        return self._shards.optimizer_state(optimizer, self._groups)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        assert self._shards is not None
        mine = {name for group in self._groups for name in group if self._shards.is_mine(name)}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            is_sharded = isinstance(saved, sharded.OptimizerShards)
            state = saved.read(mine) if is_sharded else saved
            self._shards.load_optimizer_state(optimizer, state, self._groups, copy=not is_sharded)
            _lightning.optimizers_to_device([optimizer], self.root_device)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if not self._is_lost:  # what should have taken its place was not saved
            super().remove_checkpoint(filepath)

    @property
    def _is_lost(self) -> bool:
        """Whether the whole is gone, so that callbacks which save at an exception have nothing to save."""
        return self._failed and self.world_size > 1

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._is_lost:
            log.warning("%s is not saved: every rank has its own stage only, and one is lost", filepath)
            return
        if "optimizer_states" in checkpoint:
            numbers = {"microbatches": self._chosen, "teacher_microbatches": self._teacher_chosen}
            checkpoint[KEY] = {"seed": self._seed, **numbers, **self._random_states()}
        path = Path(filepath)
        if not self._is_sharded:
            if self.is_global_zero and sharded.is_sharded(path):
                shutil.rmtree(path)
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError('storage_options are for a CheckpointIO, which state_dict_type="sharded" does not use')
        if self.is_global_zero:
            sharded.prepare(path)
        path = Path(self.broadcast(filepath))
        if self._replicas is None or self._replicas.index == 0:
            alone = self._comm is None and self._replicas is not None
            group = None if self._comm is None else self._comm.control
            sharded.save(checkpoint, path, self.global_rank, group, alone)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = sharded.find(Path(checkpoint_path))
        if sharded.is_sharded(path):
            checkpoint = sharded.load(path, weights_only)
        else:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._resumed = checkpoint.get(KEY, {})
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        if self._shards is None:
            forget_graphs(self.lightning_module)
        # before the set-up nobody knows which part of the file this rank needs
        with lend(tensors_of(self.lightning_module).values() if self._shards is None else ()):
            if self._shards is not None or not self._lends(checkpoint["state_dict"], strict):
                super().load_model_state_dict(checkpoint, strict)

    def _lends(self, shards: Any, strict: bool) -> bool:
        """Load parameters that are on disk, but read nothing yet.

        Returns:
            Whether each found its place. It does not if code of the user's does more than pass on what it gets.
        """
        if not isinstance(shards, sharded.WeightShards):
            return False
        assert self.lightning_module is not None
        state = shards.lent([name for name, _ in self.lightning_module.named_parameters(remove_duplicate=False)])
        try:
            super().load_model_state_dict({"state_dict": state}, strict)
        except Exception:  # what is wrong with the values themselves is said when they are read
            return False
        return all_taken(state.values())

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """As in FSDPStrategy: values come in `setup`. Unasked, what `configure_model` builds has none before either."""
        module = self.lightning_module
        configures = module is not None and module.trainer.state.status == TrainerStatus.RUNNING
        empty = configures if empty_init is None else empty_init
        memory = without_memory(pl.LightningModule) if empty else nullcontext()
        with memory, self.precision_plugin.tensor_init_context():
            yield

    @property
    def _is_sharded(self) -> bool:
        return self._state_dict_type == "sharded"

    def _random_states(self) -> dict[str, Any]:
        """Where the generators of the rank that loads and of the one that runs `loss` are."""
        state = Generators(self.root_device).state()
        if self._comm is None:  # there is one rank, or the fit is over
            last = self.broadcast(state, self._topology.stages - 1)
        else:
            last = (self._comm.gather(state) or [None])[-1]
        ahead = self._ahead if self._fitting is None else self._fitting.ahead()
        return {"first": state, "last": last, "ahead": ahead}

    def _restore_random_states(self) -> list[Any]:
        """Called before the loader is iterated, which draws the order of one that shuffles.

        Returns:
            The states to put back before each of the first fetches, if a pass is resumed in its middle.
        """
        for name, mine in (("last", self._topology.is_last), ("first", self._topology.stage == 0)):
            if mine and name in self._resumed:
                Generators(self.root_device).restore(self._resumed[name])
        ahead = self._resumed.get("ahead")
        return [] if ahead is None else [*ahead, self._resumed["first"]]
