"""Per-stage weights and optimizer state <-> one whole module and one whole state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tspipe import tree
from lightning_tspipe.comm import Comm
from lightning_tspipe.memory import LENT, OWN, forget_graphs, materialize, release, state_of, swap, trim
from lightning_tspipe.recording import extra_states_of, tensors_of
from lightning_tspipe.replicas import Replicas

Groups = list[list[str]]
KEY = "tspipe"  # of what a checkpoint holds beyond a plain one: seed, number of microbatches, generators' states


class Shards:
    """Which rank owns which parameter and buffer of a module, and how to take it apart and make it whole.

    Args:
        module: the user's module.
        owners: owner by qualified name; names that are missing are everyone's, and the last rank's are the true ones.
        stage: this rank's.
        comm: this rank's connections; None for one stage.
        replicas: data-parallel replicas, of which the first one's values count; None if there are none.
    """

    def __init__(
        self,
        module: nn.Module,
        owners: Mapping[str, int],
        stage: int,
        comm: Comm | None,
        replicas: Replicas | None = None,
    ) -> None:
        self._module, self._owners, self._stage, self._comm = module, dict(owners), stage, comm
        self._replicas = replicas

    def is_mine(self, name: str) -> bool:
        """Whether this rank trains a parameter: it owns it, or it is of neither network and this is the last rank."""
        return self._owners.get(name, self._last) == self._stage

    @property
    def _last(self) -> int:
        return 0 if self._comm is None else self._comm.stages - 1

    def take_own(self, seed: int, follows: Mapping[int, Tensor]) -> None:
        """Let this rank hold its own tensors, and give back the memory of the others.

        Values are rank 0's, as in DDP: the processes may have built them differently. Tensors that were loaded into a
        module without memory are read by their owners instead, and those without values are made by them.

        Args:
            seed: of the job, for tensors that are made.
            follows: see `materialize`.
        """
        forget_graphs(self._module)
        tensors = {id(tensor): (name, tensor) for name, tensor in reversed(tensors_of(self._module).items())}
        unique = dict(tensors.values())
        sent = self._sent_by_first(unique)
        for name, tensor in unique.items():
            owner = self._owners.get(name)
            if self._comm is not None and name in sent and owner != 0:
                receivers = None if owner is None else [owner]
                value = self._comm.share(None if self._stage else tensor.detach(), 0, receivers)
                if self._stage and self._holds(name):
                    swap(tensor, value)  # nothing is written to pages that forked processes still share
            if not self._holds(name):
                release(tensor)
            elif state_of(tensor) == LENT:
                swap(tensor, tensor.detach().clone())
        materialize(self._module, self._holds, seed, follows)
        if self._replicas is not None:
            self._replicas.spread(tensor for tensor in unique.values() if not tensor.is_meta)
        trim()

    def _holds(self, name: str) -> bool:
        return self._owners.get(name, self._stage) == self._stage

    def _sent_by_first(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """The names of what rank 0 sends: what it has values of, but for what both sides have loaded."""
        if self._comm is None:
            return set()
        mine = {name: state_of(tensor) for name, tensor in tensors.items()}
        theirs = self._comm.gather({name: state for name, state in mine.items() if self._holds(name)})
        sent = [
            name
            for name, state in mine.items()
            if state == OWN or (state == LENT and any(states.get(name, LENT) != LENT for states in theirs or ()))
        ]
        return set(self._comm.share(sent, 0))

    def to(self, device: torch.device) -> None:
        """Move what this rank holds."""
        for tensor in tensors_of(self._module).values():
            if not tensor.is_meta and tensor.device != device:
                swap(tensor, tensor.detach().to(device))

    def restore(self, optimizers: Sequence[Optimizer], groups: Groups) -> None:
        """Give every rank every tensor, in host memory where it was another rank's.

        Optimizers get all their parameters back; rank 0's get the whole state too.
        """
        states = [self.optimizer_state(optimizer, groups) for optimizer in optimizers]
        self._restore_module()
        parameters = dict(self._module.named_parameters())
        for optimizer, state in zip(optimizers, states, strict=True):
            for group, names in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [parameters[name] for name in names]
            if state and self._comm is not None:
                optimizer.load_state_dict(state)

    def _restore_module(self) -> None:
        self.share_common()
        for name, tensor in tensors_of(self._module).items():
            if name in self._owners and self._comm is not None:
                value = self._comm.share(tensor.detach() if self.is_mine(name) else None, self._owners[name])
                if tensor.is_meta:
                    swap(tensor, value.to("cpu", copy=True))
        for name, child in extra_states_of(self._module).items():
            if self._comm is not None:
                mine = self.is_mine(name)
                state = self._comm.share(child.get_extra_state() if mine else None, self._owners.get(name, self._last))
                if not mine:
                    child.set_extra_state(state)

    def share_common(self) -> None:
        """Copy what belongs to neither network (a head, a temperature) from the last rank to the others.

        Buffers, such as running statistics, become those of the first replica.
        """
        if self._replicas is not None:
            self._replicas.spread(buffer for buffer in self._module.buffers() if not buffer.is_meta)
        if self._comm is None:
            return
        common = {name: t for name, t in tensors_of(self._module).items() if name not in self._owners}
        shared = self._comm.share({name: tensor.detach() for name, tensor in common.items()}, self._last)
        with torch.no_grad():
            for name, tensor in common.items():
                if tensor is not shared[name]:
                    tensor.copy_(shared[name])

    def state_dict(self) -> dict[str, Any]:
        """The whole module's state dict on rank 0, an empty one elsewhere; its keys are those of the plain module."""
        if self._replicas is not None and self._replicas.index:
            return {}
        names, mine = list(self._module.state_dict()), self.own_state_dict()
        parts = [mine] if self._comm is None else self._comm.gather(mine)
        if parts is None:
            return {}
        whole = {name: value for part in parts for name, value in part.items()}
        return {name: whole[name] for name in names}

    def own_state_dict(self) -> dict[str, Any]:
        """This rank's part of the state dict."""
        return {name: value for name, value in self._module.state_dict().items() if self.is_mine(name)}

    def take_groups(self, optimizer: Optimizer) -> Groups:
        """Leave only this rank's parameters in the optimizer's groups; returns the names of all, group by group."""
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        groups = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if self.is_mine(names.get(id(p), "?"))]
        return groups

    def trained(self) -> list[nn.Parameter]:
        """What this rank trains, in the order of the module."""
        return [p for name, p in self._module.named_parameters() if p.requires_grad and self.is_mine(name)]

    def places(self, groups: Groups) -> tuple[dict[int, int], int]:
        """Where each of this rank's parameters, by identity, is among all that the optimizer had; and their number."""
        order = [name for names in groups for name in names]
        parameters = dict(self._module.named_parameters())
        return {id(parameters[name]): i for i, name in enumerate(order) if self.is_mine(name)}, len(order)

    def optimizer_state(self, optimizer: Optimizer, groups: Groups) -> dict[str, Any]:
        """The state dict that the optimizer would have with all parameters; on rank 0, an empty one elsewhere."""
        if self._replicas is not None and self._replicas.index:
            return {}
        local = self.own_optimizer_state(optimizer, groups)
        parts = [local["state"]] if self._comm is None else self._comm.gather(local["state"])
        if parts is None:
            return {}
        whole = {name: state for part in parts for name, state in part.items()}
        order = [name for group in groups for name in group]
        numbers = iter(range(len(order)))
        return {
            **local,
            "state": {number: whole[name] for number, name in enumerate(order) if name in whole},
            "param_groups": [
                {**group, "params": [next(numbers) for _ in group["params"]]} for group in local["param_groups"]
            ],
        }

    def own_optimizer_state(self, optimizer: Optimizer, groups: Groups) -> dict[str, Any]:
        """The state dict by names, of this rank's parameters; its groups name all."""
        local = optimizer.state_dict()
        mine = [[name for name in group if self.is_mine(name)] for group in groups]
        state = {
            name: local["state"][index]
            for group, names in zip(local["param_groups"], mine, strict=True)
            for index, name in zip(group["params"], names, strict=True)
            if index in local["state"]
        }
        pairs = zip(local["param_groups"], groups, strict=True)
        return {**local, "state": state, "param_groups": [{**group, "params": names} for group, names in pairs]}

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], groups: Groups) -> None:
        """Load this rank's part of a whole state dict.

        Raises:
            ValueError: it was made with other parameter groups.
        """
        sizes, given = [len(names) for names in groups], [len(group["params"]) for group in state["param_groups"]]
        if sizes != given:
            raise ValueError(
                f"The checkpoint's optimizer has groups of {given} parameters, configure_optimizers gives groups of "
                f"{sizes}. Give the groups that the checkpoint was made with, or load the weights alone "
                "(`load_from_checkpoint`) and begin a new training."
            )
        order = [name for group in groups for name in group]
        mine = [name for name in order if self.is_mine(name)]
        keys = dict(zip(order, (key for group in state["param_groups"] for key in group["params"]), strict=True))
        found = {index: state["state"].get(keys[name]) for index, name in enumerate(mine)}
        # copied, since the file that these may still be in can change
        parts = {index: tree.map_tensors(part, torch.clone) for index, part in found.items() if part is not None}
        counter = iter(range(len(mine)))
        saved = [
            {**group, "params": [next(counter) for name in names if self.is_mine(name)]}
            for group, names in zip(state["param_groups"], groups, strict=True)
        ]
        optimizer.load_state_dict({**state, "state": parts, "param_groups": saved})


def by_names(state: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """The state dict of an optimizer that holds all parameters, by their names."""
    keys = (key for group in state["param_groups"] for key in group["params"])
    names = dict(zip(keys, (name for group in groups for name in group), strict=True))
    return {
        **state,
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [{**group, "params": part} for group, part in zip(state["param_groups"], groups, strict=True)],
    }
