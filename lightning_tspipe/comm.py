"""Everything that sends and receives: activations, gradients, headers, and what few calls need from all ranks.

Each directed edge and kind of message is a `Channel` of its own with one order of messages. On gloo the kinds are
told apart by tags; NCCL has no tags, so each edge and kind gets a communicator. No send is waited for where it is made:
every one is kept, with its buffer, until it is certain that the receiver has it. Between processes of one machine that
train on CPUs, what is small is copied through memory that both have (`edge.py`) instead.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.board import World
from lightning_tspipe.channel import KINDS, LINES, Channel, Line, Links
from lightning_tspipe.data import shapes_of
from lightning_tspipe.edge import Edge, connect
from lightning_tspipe.topology import Topology

# bytes of shared memory for what goes to the next stage, to the one before, from the first to all, from all to the
# first, and from the first to the last
DOWN = {"T": 1 << 21, "F": 1 << 21, "D": 1 << 16}
UP = {"B": 1 << 21, "L": 1 << 16, "U": 1 << 16, "relay line": 1 << 16}
HEADERS, REPORTS, TARGETS = {"header line": 1 << 16}, {"report line": 1 << 16}, {"Y": 1 << 16}

log = logging.getLogger(__name__)


class Comm(Links):
    """All communication of one rank of one pipeline; peers are named by their stages.

    Args:
        topology: who is who.
        device: where activations live.
        backend: "gloo" or "nccl" for the activations; gloo on CUDA goes through host memory.
        world: all ranks of the job, and how long a message may take before it is given up.
    """

    def __init__(self, topology: Topology, device: torch.device, backend: str, world: World) -> None:
        staged = device.type == "cuda" and backend == "gloo"
        super().__init__(topology.pipeline(topology.replica), device, staged, world.board)
        self.stage, self.stages = topology.stage, topology.stages
        # a receive of gloo that waits already saves the message a round trip; one of NCCL takes a part of the GPU
        self.post_ahead = 2 if backend == "nccl" else 24
        self._old = 0
        self.inward: dict[str, Channel] = {}
        self.outward: dict[str, Channel] = {}
        world.any()  # the groups below would wait for a rank that has failed by now
        for replica in range(topology.replicas):  # every process takes part in making every group
            self._connect(topology.pipeline(replica), replica == topology.replica, backend, world.timeout)
        # this rank and no other, for the loss; every rank makes one, since groups are counted in the same order on all
        self.alone = _new_group((topology.rank,), backend, world.timeout, local=True)
        stage, stages = self.stage, self.stages
        self.lines_in = {name: Line(self, name, 0) for name in ("header", "verdict")} if stage else {}
        self.lines_out: dict[str, Line] = {}
        self._headers, self._verdicts, self._reports = (
            [] if stage else [Line(self, name, peer) for peer in range(1, stages)]
            for name in ("header", "verdict", "report")
        )
        if stage < stages - 1:
            self.lines_in["relay"] = Line(self, "relay", stage + 1)
            self.lines_out["eval"] = Line(self, "eval", stage + 1)
        if stage:
            self.lines_out |= {"relay": Line(self, "relay", stage - 1), "report": Line(self, "report", 0)}
            self.lines_in["eval"] = Line(self, "eval", stage - 1)

    def _connect(self, ranks: tuple[int, ...], mine: bool, backend: str, timeout: timedelta) -> None:
        """Make the groups of one pipeline, and this rank's channels if it is a part of it."""
        control = _new_group(ranks, "gloo", timeout)
        data = _new_group(ranks, "gloo", timeout) if backend == "gloo" else None
        if mine:
            self.control = control
            if self.device.type == "cpu" and backend == "gloo":
                self._share_memory(timeout)
        pairs = list(itertools.pairwise(range(len(ranks))))
        edges = [(kind, above, below) for kind in "TFD" for above, below in pairs]
        edges += [(kind, below, above) for kind in "BLU" for above, below in pairs]
        edges += [("Y", 0, len(ranks) - 1)]
        for kind, source, target in edges:
            group = data or _new_group((ranks[source], ranks[target]), backend, timeout)
            if mine and self.stage == target:
                self.inward[kind] = Channel(self, kind, source, group)
            if mine and self.stage == source:
                self.outward[kind] = Channel(self, kind, target, group)
            if mine and self.stage in (source, target):
                self._warm_up(group, source, target, 1 + KINDS.index(kind))

    def _share_memory(self, timeout: timedelta) -> None:
        """Share memory with others on this machine, all ranks pair after pair in the same order."""
        last = self.stages - 1
        for above, below in sorted({*itertools.pairwise(range(self.stages)), *((0, k) for k in range(1, self.stages))}):
            if self.stage not in (above, below):
                continue
            down = {**(DOWN if below == above + 1 else {}), **(HEADERS if above == 0 else {})}
            down |= TARGETS if (above, below) == (0, last) else {}
            up = {**(UP if below == above + 1 else {}), **(REPORTS if above == 0 else {})}
            own, others = (down, up) if self.stage == above else (up, down)
            peer = above + below - self.stage
            line = Line(self, "share", peer)
            found = connect(self.stage == above, own, others, line.send, line.take, timeout.total_seconds())
            if isinstance(found, Edge):
                self._edges[peer] = found
            else:
                log.info("Stages %d and %d share no memory (%s): they use gloo", above, below, found)

    def _warm_up(self, group: dist.ProcessGroup, source: int, target: int, tag: int) -> None:
        """Send one byte over an edge of this rank, all ranks edge after edge in the same order.

        NCCL connects two ranks at their first message and lets neither go on before. In a step both could wait so: one
        for the receive that it has posted early, the other for its own send that has to come before that.
        """
        peer, byte = source + target - self.stage, torch.zeros(1, dtype=torch.uint8)
        byte = byte if self._staged else byte.to(self.device)
        call = group.send if self.stage == source else group.recv
        self.wait(self.start(call, byte, peer, self.place(group, peer), tag), peer)

    def send_header(self, header: object) -> None:
        """Tell every other rank about a batch; the first one sends to each, so that no rank waits for another."""
        for line in self._headers:
            line.send(header)

    def first_says(self, value: Any) -> Any:
        """The first rank's value on every rank; it does not wait."""
        for line in self._verdicts:
            line.send(value)
        return self.lines_in["verdict"].take() if self.stage else value

    def report(self, numbers: object) -> None:
        """Tell rank 0 a little, for its `reports` to take a step later; nobody waits, and it may never take it."""
        for line in self._reports:
            line.post()
        if self.stage:
            self.lines_out["report"].send(numbers)

    def reports(self) -> list[Any]:
        """On rank 0, what every other rank has reported."""
        return [line.take() for line in self._reports]

    def end_step(self) -> None:
        """Let go of sends of the step before."""
        for channel in self.outward.values():
            channel.end_step()
        for _ in range(self._old):
            work, _, peer = self._kept.popleft()
            self.wait(work, peer)
        self._old = len(self._kept)

    def drain(self) -> None:
        """Wait for every send that is still under way."""
        self.end_step()
        self.end_step()

    def close(self) -> None:
        """Let go of every connection; peers that still wait for this rank are woken by that."""
        for end in (*self.inward.values(), *self.outward.values(), *self.lines_in.values()):
            vars(end).clear()  # a frame of an exception may still hold it
        for edge in self._edges.values():
            edge.close()
        for kept in (self._edges, self.inward, self.outward, self.lines_in, self.lines_out):
            kept.clear()
        for lines in (self._headers, self._verdicts, self._reports, self._kept):
            lines.clear()
        if hasattr(self, "control"):
            del self.control

    def total(self, vector: Tensor) -> Tensor:
        """The sum over all ranks of a vector on this rank's device; it goes up to rank 0 and down again."""
        key = tuple(vector.shape), vector.dtype
        own = [vector]
        for name in "UD":
            for channel in (self.inward.get(name), self.outward.get(name)):
                if channel is not None:
                    channel.know(key, tree.flatten(own)[1], shapes_of(own))
        if (below := self.inward.get("U")) is not None:
            below.post(key)
            vector = vector + below.take(key)[0]
        if (above := self.inward.get("D")) is not None:
            self.outward["U"].send(key, [vector])
            above.post(key)
            (vector,) = above.take(key)
        if (below_out := self.outward.get("D")) is not None:
            below_out.send(key, [vector])
        return vector.clone()  # what is under way must not be changed

    def share(self, value: Any, source: int, receivers: Iterable[int] | None = None) -> Any:
        """Give ranks, by default all, a rank's tree of tensors and constants; their own `value` is ignored.

        Not for hot paths. Ranks that are no receivers may leave the call out.
        """
        others = [peer for peer in (range(self.stages) if receivers is None else receivers) if peer != source]
        if self.stage not in (source, *others):
            return value
        tag = 1 + LINES.index("share")
        if self.stage != source:
            structure, shapes = Line(self, "share", source).take()
            buffers = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
            for work in [self.start(self.control.recv, buffer, source, source, tag) for buffer in buffers]:
                self.wait(work, source)
            return tree.unflatten([buffer.to(self.device) for buffer in buffers], structure)
        leaves, structure = tree.flatten(value)
        buffers = [tree.plain(leaf.cpu()) for leaf in leaves]
        for peer in others:
            Line(self, "share", peer).send((structure, shapes_of(leaves)))
        send = self.control.send
        for work, peer in [(self.start(send, b, peer, peer, tag), peer) for peer in others for b in buffers]:
            self.wait(work, peer)
        return value

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's tree on rank 0, in host memory; None elsewhere. Not for hot paths."""
        if self.stages == 1:
            return [value]
        if self.stage:
            Line(self, "eval", 0).send(_to_host(value))
            return None
        return [value, *(Line(self, "eval", source).take() for source in range(1, self.stages))]

    def chain(self, run: Any, value: Any) -> Any:
        """Pass a value through every rank's `run` in turn and give the last one's result to all. Not for hot paths."""
        if self.stage:
            value = tree.map_tensors(self.lines_in["eval"].take(), lambda leaf: leaf.to(self.device))
        value = run(value)
        if self.stage < self.stages - 1:
            self.lines_out["eval"].send(_to_host(value))
        return self.share(value, self.stages - 1)


def _new_group(ranks: tuple[int, ...], backend: str, timeout: timedelta, local: bool = False) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), backend=backend, timeout=timeout, use_local_synchronization=local)
    return cast(dist.ProcessGroup, group)  # for ranks outside of the group it is a number, which is never used


def _to_host(value: Any) -> Any:
    return tree.map_tensors(value, lambda leaf: leaf.detach().cpu())
