"""Everything that sends and receives: activations, gradients, headers, and what few calls need from all ranks.

Each directed edge and kind of message is a `Channel` of its own with one order of messages. On gloo the kinds are
told apart by tags; NCCL has no tags, so each edge and kind gets a communicator. No send is waited for where it is made:
every one is kept, with its buffer, until it is certain that the receiver has it.
"""

from __future__ import annotations

import itertools
import pickle
from collections import deque
from collections.abc import Hashable, Iterable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.board import World
from lightning_tspipe.data import Shapes, shapes_of
from lightning_tspipe.topology import Topology

HEADER_BYTES = 2048
POSTED = 2  # receives that each channel may always have posted at once
POSTED_BYTES = 16 * 2**20  # more of them only while they take less memory than this
# teacher, student, gradients, loss and logged values, sums on their way up and down, targets
KINDS = ("T", "F", "B", "L", "U", "D", "Y")
LINES = ("header", "verdict", "relay", "eval", "share", "report", *KINDS)


class Line:
    """Small Python objects from one rank to another, by way of the host; the receiver may post early."""

    def __init__(self, comm: Comm, name: str, peer: int) -> None:
        self._comm, self._peer, self._tag = comm, peer, 1 + LINES.index(name)
        self._posted: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, message: object) -> None:
        """Send without waiting."""
        payload = tree.pickled(message)
        head = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        head[:8] = torch.tensor([len(payload)]).view(torch.uint8)
        inline = payload[: HEADER_BYTES - 8]
        head[8 : 8 + len(inline)] = torch.frombuffer(bytearray(inline), dtype=torch.uint8)
        self._comm.keep(self._isend(head), head, self._peer)
        if rest := payload[HEADER_BYTES - 8 :]:
            tail = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
            self._comm.keep(self._isend(tail), tail, self._peer)

    def post(self) -> None:
        """Post the receive of the next message."""
        head = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._posted.append((self._irecv(head), head))

    def take(self) -> Any:
        """Wait for the next message, posting its receive if `post` did not."""
        if not self._posted:
            self.post()
        work, head = self._posted.popleft()
        self._comm.wait(work, self._peer)
        size = int(head[:8].view(torch.int64)[0])
        payload = head[8 : 8 + size]
        if size > HEADER_BYTES - 8:
            tail = torch.empty(size - (HEADER_BYTES - 8), dtype=torch.uint8)
            self._comm.wait(self._irecv(tail), self._peer)
            payload = torch.cat([payload, tail])
        return pickle.loads(payload.numpy().tobytes())

    def _isend(self, tensor: Tensor) -> dist.Work:
        return self._comm.start(self._comm.control.send, tensor, self._peer, self._peer, self._tag)

    def _irecv(self, tensor: Tensor) -> dist.Work:
        return self._comm.start(self._comm.control.recv, tensor, self._peer, self._peer, self._tag)


class _Receive:
    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.buffers: list[Tensor] = []
        self.works: list[dist.Work] | None = None


class Channel:
    """Trees of tensors of one kind from one rank to another, in one order.

    Shapes are announced once per key by way of the host and remembered on both ends.
    """

    def __init__(self, comm: Comm, kind: str, peer: int, group: dist.ProcessGroup) -> None:
        self._comm, self._peer, self._group, self._kind = comm, peer, group, kind
        self._tag = 1 + KINDS.index(kind)
        self._place = comm.place(group, peer)
        self._line = Line(comm, kind, peer)
        self._known: dict[Hashable, tuple[tree.Structure, Shapes]] = {}
        self._receives: deque[_Receive] = deque()
        self._waiting: deque[_Receive] = deque()  # those of `_receives` that are not posted yet
        self._posted_bytes = 0
        self._sent: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self._old = 0

    def know(self, key: Hashable, structure: tree.Structure, shapes: Shapes) -> None:
        """Both ends know what this key looks like, so it needs no announcement."""
        self._known.setdefault(key, (structure, shapes))
        self._flush()

    def knows(self, key: Hashable) -> bool:
        """Whether this end knows what the key looks like."""
        return key in self._known

    def send(self, key: Hashable, value: Any) -> None:
        """Send without waiting; the tensors must not be changed until `retire`."""
        leaves, structure = tree.flatten(value)
        meta = (structure, shapes_of(leaves))
        if key not in self._known:
            self._known[key] = meta
            self._line.send(meta)
        elif self._known[key] != meta:
            raise ValueError(
                f"A network changed the shape of its output ({self._kind}) between batches of equal inputs: first "
                f"{self._known[key]}, now {meta}. Outputs must have the same shapes for the same input shapes."
            )
        buffers = [self._comm.to_wire(leaf) for leaf in leaves]
        works = [self._comm.start(self._group.send, b, self._peer, self._place, self._tag) for b in buffers]
        self._comm.messages[self._kind] += len(works)
        self._comm.sent += sum(buffer.nbytes for buffer in buffers)
        self._sent.append((works, buffers))

    def post(self, key: Hashable) -> None:
        """Post the receive of the next message.

        It is put off while its shapes are not known yet, or while many bytes wait already.
        """
        receive = _Receive(key)
        self._receives.append(receive)
        self._waiting.append(receive)
        self._flush()

    def take(self) -> Any:
        """Wait for the oldest posted message."""
        receive = self._receives[0]
        if receive.works is None:
            self._known[receive.key] = self._line.take()
            self._flush()
        assert receive.works is not None
        for work in receive.works:
            self._comm.wait(work, self._peer)
        self._receives.popleft()
        self._posted_bytes -= sum(buffer.nbytes for buffer in receive.buffers)
        self._flush()
        leaves = [self._comm.from_wire(buffer) for buffer in receive.buffers]
        return tree.unflatten(leaves, self._known[receive.key][0])

    def retire(self, count: int) -> None:
        """Let go of the `count` oldest sends, which the receiver is known to have."""
        for _ in range(min(count, len(self._sent))):
            for work in self._sent.popleft()[0]:
                self._comm.wait(work, self._peer)
        self._old = min(self._old, len(self._sent))

    def end_step(self) -> None:
        """Let go of what was sent before the last call."""
        self.retire(self._old)
        self._old = len(self._sent)

    def _flush(self) -> None:
        while self._waiting and (receive := self._waiting[0]).key in self._known:
            if len(self._receives) - len(self._waiting) >= POSTED and self._posted_bytes > POSTED_BYTES:
                return
            self._waiting.popleft()
            receive.buffers = [self._comm.buffer(*shape) for shape in self._known[receive.key][1]]
            self._posted_bytes += sum(buffer.nbytes for buffer in receive.buffers)
            receive.works = [
                self._comm.start(self._group.recv, b, self._peer, self._place, self._tag) for b in receive.buffers
            ]


class Comm:
    """All communication of one rank of one pipeline; peers are named by their stages.

    Args:
        topology: who is who.
        device: where activations live.
        backend: "gloo" or "nccl" for the activations; gloo on CUDA goes through host memory.
        world: all ranks of the job, and how long a message may take before it is given up.
    """

    def __init__(self, topology: Topology, device: torch.device, backend: str, world: World) -> None:
        self.stage, self.stages, self.device, self.board = topology.stage, topology.stages, device, world.board
        self._ranks = topology.pipeline(topology.replica)
        self.messages: dict[str, int] = dict.fromkeys((*KINDS, "line"), 0)
        self.sent = 0  # bytes
        # a receive of gloo that waits already saves the message a round trip; one of NCCL takes a part of the GPU
        self.post_ahead = 2 if backend == "nccl" else 24
        self._staged = device.type == "cuda" and backend == "gloo"
        self._kept: deque[tuple[dist.Work, Tensor, int]] = deque()
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

    def _warm_up(self, group: dist.ProcessGroup, source: int, target: int, tag: int) -> None:
        """Send one byte over an edge of this rank, all ranks edge after edge in the same order.

        NCCL connects two ranks at their first message and lets neither go on before. In a step both could wait so: one
        for the receive that it has posted early, the other for its own send that has to come before that.
        """
        peer, byte = source + target - self.stage, torch.zeros(1, dtype=torch.uint8)
        byte = byte if self._staged else byte.to(self.device)
        call = group.send if self.stage == source else group.recv
        self.wait(self.start(call, byte, peer, self.place(group, peer), tag), peer)

    def place(self, group: dist.ProcessGroup, peer: int) -> int:
        """The place of a peer in a group."""
        return dist.get_group_rank(group, self._ranks[peer])

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

    def start(self, call: Any, tensor: Tensor, peer: int, place: int, tag: int) -> dist.Work:
        """Start one send or receive with the peer at a place in its group; a lost connection is a `PipelineError`."""
        return cast(dist.Work, self.board.guard(self._ranks[peer], call, [tree.as_bytes(tensor)], place, tag))

    def wait(self, work: dist.Work, peer: int) -> None:
        """Wait for one message; a lost connection becomes a `PipelineError`."""
        self.board.guard(self._ranks[peer], work.wait)

    def keep(self, work: dist.Work, buffer: Tensor, peer: int) -> None:
        """Keep the send of a line until it is certain to have been received."""
        self.messages["line"] += 1
        self.sent += buffer.nbytes
        self._kept.append((work, buffer, peer))

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
        for kept in (self.inward, self.outward, self.lines_in, self.lines_out):
            kept.clear()
        for lines in (self._headers, self._verdicts, self._reports, self._kept):
            lines.clear()
        if hasattr(self, "control"):
            del self.control

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor to receive into."""
        if self._staged:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def to_wire(self, tensor: Tensor) -> Tensor:
        """The tensor in the form that is sent."""
        tensor = tensor.detach().contiguous()
        return self.buffer(tuple(tensor.shape), tensor.dtype).copy_(tensor) if self._staged else tensor

    def from_wire(self, tensor: Tensor) -> Tensor:
        """A received tensor on this rank's device."""
        return tensor.to(self.device, non_blocking=True) if self._staged else tensor

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
            vector = vector + below.take()[0]
        if (above := self.inward.get("D")) is not None:
            self.outward["U"].send(key, [vector])
            above.post(key)
            (vector,) = above.take()
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
        buffers = [leaf.detach().cpu().contiguous() for leaf in leaves]
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
