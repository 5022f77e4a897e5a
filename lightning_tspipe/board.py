"""The news that a rank has failed, and why."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_tspipe.errors import PipelineError
from lightning_tspipe.topology import Topology

LINGER = timedelta(seconds=5)
HEARSAY = timedelta(seconds=2)


class FailureBoard:
    """Where the first rank that fails says why, for the others to repeat; it lives on rank 0."""

    def __init__(self, topology: Topology, timeout: timedelta) -> None:
        rank, self._topology = topology.rank, topology
        host = os.environ["MASTER_ADDR"]
        address: list[Any] = [None]
        if rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            address = [self._store.port]
        dist.broadcast_object_list(address, src=0)
        if rank != 0:
            self._store = TCPStore(host, address[0], is_master=False, wait_for_workers=False, timeout=timeout)
        self._rank = rank
        self.failed = False

    def report(self, text: str) -> None:
        """Tell the others why this rank stops; only the first report counts."""
        self.failed = True
        with suppress(Exception):  # the store died with rank 0: the others find out in the same way
            self._store.compare_set("failure", "", text)
            self._store.set(f"seen {self._rank}", "")

    def explain(self, peer: int | None, error: object = "") -> PipelineError:
        """The error to raise when the connection to `peer` (None: to one of several) is gone, as `error` says."""
        died = "{} died without a word: it was killed, or ran out of memory. See its own output."
        died += f" The connection said: {error}" if str(error) else ""
        try:
            if peer is None:  # the ranks beside the dead one know its name
                with suppress(Exception):
                    self._store.wait(["failure"], HEARSAY)
            if not self._store.check(["failure"]):
                self._store.compare_set("failure", "", died.format(self._name(peer)))
                self._store.set(f"seen {peer}", "")
            text = self._store.get("failure").decode()
            self._store.set(f"seen {self._rank}", "")
        except Exception:
            text = died.format(self._name(0))
        self.failed = True
        return PipelineError(f"Rank {self._rank} stops because the pipeline lost a rank: {text}")

    def _name(self, rank: int | None) -> str:
        return "another rank" if rank is None else self._topology.describe(rank)

    def linger(self) -> None:
        """On rank 0, whose end takes the board away: wait until every other rank has read it or is dead."""
        if self._rank:
            return
        with suppress(Exception):  # it took too long: they will say that rank 0 died
            self._store.wait([f"seen {rank}" for rank in range(1, self._topology.world_size)], LINGER)
