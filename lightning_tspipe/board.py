"""Which rank has failed, and why; and the waits of all ranks for each other that end when one of them does."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_tspipe.errors import PipelineError
from lightning_tspipe.topology import Topology

LINGER = timedelta(seconds=5)
HEARSAY = timedelta(seconds=2)
CONNECT = timedelta(seconds=30)


class FailureBoard:
    """Where the first rank that fails says why, for the others to repeat; it lives on rank 0.

    Args:
        topology: who is who.
        port: of the board; None on rank 0, which opens it.
    """

    def __init__(self, topology: Topology, port: int | None = None) -> None:
        here, host = port is None, os.environ["MASTER_ADDR"]
        self._store = TCPStore(host, port or 0, is_master=here, wait_for_workers=False, timeout=CONNECT)
        self._topology = topology

    @property
    def port(self) -> int:
        """Where the others find it."""
        return int(self._store.port)

    def report(self, text: str) -> None:
        """Tell the others why this rank stops; only the first report counts."""
        with suppress(Exception):  # the store died with rank 0: the others find out in the same way
            self._store.compare_set("failure", "", text)
            self._store.set(f"seen {self._topology.rank}", "")

    def explain(self, peer: int | None, error: object = "") -> PipelineError:
        """The error to raise when the connection to `peer` (None: to one of several) is gone, as `error` says."""
        died = "{} died without a word: it was killed, ran out of memory, or its script ended. "
        died += "See its own output." + (f" The connection said: {error}" if str(error) else "")
        try:
            if peer is None:  # the ranks beside the dead one know its name
                with suppress(Exception):
                    self._store.wait(["failure"], HEARSAY)
            if not self._store.check(["failure"]):
                self._store.compare_set("failure", "", died.format(self._name(peer)))
                self._store.set(f"seen {peer}", "")
            text = self._store.get("failure").decode()
            self._store.set(f"seen {self._topology.rank}", "")
        except Exception:  # the board is gone: rank 0 is the dead one, or has ended since because of it
            text = died.format(self._name(None if peer is None else 0))
        return PipelineError(f"Rank {self._topology.rank} stops because the pipeline lost a rank: {text}")

    def _name(self, rank: int | None) -> str:
        return "another rank" if rank is None else self._topology.describe(rank)

    def guard(self, peer: int, call: Callable[..., Any], *args: Any) -> Any:
        """Call what needs a peer; a lost connection is a `PipelineError`."""
        try:
            return call(*args)
        except RuntimeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # by a signal handler, such as the one for dead workers of a loader
            raise self.explain(peer, error) from error

    def linger(self) -> None:
        """On rank 0, whose end takes the board away: wait until every other rank has read it or is dead."""
        if self._topology.rank:
            return
        with suppress(Exception):  # it took too long: they will say that rank 0 died
            self._store.wait([f"seen {rank}" for rank in range(1, self._topology.world_size)], LINGER)


def let_go(exception: BaseException) -> None:
    """Forget what the frames of this package hold, as a debugger would see it: a connection that is held stays open."""
    for frame, _ in traceback.walk_tb(exception.__traceback__):
        if str(frame.f_globals.get("__name__")).startswith(f"{__package__}."):
            with suppress(RuntimeError):  # it is still running
                frame.clear()


class World:
    """All ranks of a job: what few calls of Lightning need from all of them, by way of the host.

    Messages go from rank to rank, since a collective would not say whose connection is gone. With NCCL it would not
    even end.

    Args:
        topology: who is who.
        timeout: how long a message may take.
    """

    def __init__(self, topology: Topology, timeout: timedelta) -> None:
        self.rank, self.size, self.timeout = topology.rank, topology.world_size, timeout
        self._group: Any = dist.group.WORLD
        if dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._board = FailureBoard(topology) if self.rank == 0 else None
        port = self.broadcast(None if self._board is None else self._board.port, 0)
        self._board = self._board or FailureBoard(topology, port)

    @property
    def board(self) -> FailureBoard:
        """Where a rank says why it fails."""
        assert self._board is not None
        return self._board

    def any(self, flags: int = 0) -> int:
        """The union of every rank's bits (8 at most); all ranks wait for each other."""
        own, others = torch.tensor([flags], dtype=torch.uint8), range(1, self.size)
        if self.rank:
            self._wait([self._send(own, 0), self._receive(own, 0)])
            return int(own)
        found = [torch.zeros(1, dtype=torch.uint8) for _ in others]
        self._wait([self._receive(flag, peer) for flag, peer in zip(found, others, strict=True)])
        for flag in found:
            own |= flag
        self._wait([self._send(own, peer) for peer in others])
        return int(own)

    def broadcast(self, value: Any, source: int) -> Any:
        """A rank's value on every rank."""
        size = torch.zeros(1, dtype=torch.int64)
        if self.rank != source:
            self._wait([self._receive(size, source)])
            payload = torch.empty(int(size), dtype=torch.uint8)
            self._wait([self._receive(payload, source)])
            return pickle.loads(payload.numpy().tobytes())
        payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size[0] = len(payload)
        others = [peer for peer in range(self.size) if peer != source]
        self._wait([self._send(part, peer) for peer in others for part in (size, payload)])
        return value

    def close(self) -> None:
        """Let go of the connections."""
        self._group = None

    def _send(self, tensor: Tensor, peer: int) -> tuple[Any, int]:
        return self._guard(peer, self._group.send, [tensor], peer, 0), peer

    def _receive(self, tensor: Tensor, peer: int) -> tuple[Any, int]:
        return self._guard(peer, self._group.recv, [tensor], peer, 0), peer

    def _wait(self, works: list[tuple[Any, int]]) -> None:
        for work, peer in works:
            self._guard(peer, work.wait)

    def _guard(self, peer: int, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args) if self._board is None else self._board.guard(peer, call, *args)
