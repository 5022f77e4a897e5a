"""The ends of connections: lines for small objects, channels for trees of tensors, and what they share on a rank."""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.board import FailureBoard
from lightning_tspipe.data import Shapes, shapes_of
from lightning_tspipe.edge import Edge, Receiver, Sender

HEADER_BYTES = 2048
POSTED = 2  # receives that each channel may always have posted at once
POSTED_BYTES = 16 * 2**20  # more of them only while they take less memory than this
# teacher, student, gradients, loss and logged values, sums on their way up and down, targets
KINDS = ("T", "F", "B", "L", "U", "D", "Y")
LINES = ("header", "verdict", "relay", "eval", "share", "report", *KINDS)


class Links:
    """What all ends of one rank share; peers are named by their stages.

    Args:
        ranks: of the pipeline, by stage.
        device: where activations live.
        staged: whether they go through host memory.
        board: where a rank says why it fails.
    """

    control: dist.ProcessGroup

    def __init__(self, ranks: tuple[int, ...], device: torch.device, staged: bool, board: FailureBoard) -> None:
        self.ranks, self.device, self.board, self._staged = ranks, device, board, staged
        self.messages: dict[str, int] = dict.fromkeys((*KINDS, "line"), 0)
        self.sent = 0  # bytes
        self._kept: deque[tuple[dist.Work, Tensor, int]] = deque()
        self._edges: dict[int, Edge] = {}  # by stage

    def place(self, group: dist.ProcessGroup, peer: int) -> int:
        """The place of a peer in a group."""
        return dist.get_group_rank(group, self.ranks[peer])

    def near(self, kind: str, peer: int) -> Sender | Receiver | None:
        """The end of this kind's shared memory, None if there is none."""
        return self._edges[peer].ends.get(kind) if peer in self._edges else None

    def exchange(self, near: Sender | Receiver | None, buffers: list[Tensor], peer: int) -> bool:
        """Write to shared memory or read from there; False if there was no room, so that they go by gloo after all."""
        assert near is not None
        try:
            return near.exchange(buffers)
        except (ConnectionError, TimeoutError) as error:
            raise self.board.explain(self.ranks[peer], error) from error

    def start(self, call: Any, tensor: Tensor, peer: int, place: int, tag: int) -> dist.Work:
        """Start one send or receive with the peer at a place in its group; a lost connection is a `PipelineError`."""
        return cast(dist.Work, self.board.guard(self.ranks[peer], call, [tree.as_bytes(tensor)], place, tag))

    def wait(self, work: dist.Work, peer: int) -> None:
        """Wait for one message; a lost connection becomes a `PipelineError`."""
        self.board.guard(self.ranks[peer], work.wait)

    def keep(self, work: dist.Work, buffer: Tensor, peer: int) -> None:
        """Keep the send of a line until it is certain to have been received."""
        self.count("line", [buffer])
        self._kept.append((work, buffer, peer))

    def count(self, kind: str, buffers: Sequence[Tensor]) -> None:
        """Note what is sent."""
        self.messages[kind] += len(buffers)
        for buffer in buffers:
            self.sent += buffer.nbytes

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor to receive into."""
        if self._staged:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def to_wire(self, tensor: Tensor) -> Tensor:
        """The tensor in the form that is sent."""
        tensor = tree.plain(tensor)
        return self.buffer(tuple(tensor.shape), tensor.dtype).copy_(tensor) if self._staged else tensor

    def from_wire(self, tensor: Tensor) -> Tensor:
        """A received tensor on this rank's device."""
        return tensor.to(self.device, non_blocking=True) if self._staged else tensor


class Line:
    """Small Python objects from one rank to another, by way of the host; the receiver may post early."""

    def __init__(self, links: Links, name: str, peer: int) -> None:
        self._links, self._peer, self._tag = links, peer, 1 + LINES.index(name)
        self._near = links.near(f"{name} line", peer)
        self._posted: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, message: object) -> None:
        """Send without waiting."""
        payload = tree.pickled(message)
        head = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        head[:8] = torch.tensor([len(payload)]).view(torch.uint8)
        inline = payload[: HEADER_BYTES - 8]
        head[8 : 8 + len(inline)] = torch.frombuffer(bytearray(inline), dtype=torch.uint8)
        if self._near is None or not self._links.exchange(self._near, [head], self._peer):
            self._links.keep(self._isend(head), head, self._peer)
        else:
            self._links.count("line", [head])
        if rest := payload[HEADER_BYTES - 8 :]:
            tail = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
            self._links.keep(self._isend(tail), tail, self._peer)

    def post(self) -> None:
        """Post the receive of the next message."""
        if self._near is not None:
            return
        head = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._posted.append((self._irecv(head), head))

    def take(self) -> Any:
        """Wait for the next message, posting its receive if `post` did not."""
        head = self._head()
        size = int(head[:8].view(torch.int64)[0])
        payload = head[8 : 8 + size]
        if size > HEADER_BYTES - 8:
            tail = torch.empty(size - (HEADER_BYTES - 8), dtype=torch.uint8)
            self._links.wait(self._irecv(tail), self._peer)
            payload = torch.cat([payload, tail])
        return pickle.loads(payload.numpy().tobytes())

    def _head(self) -> Tensor:
        if self._near is None and not self._posted:
            self.post()
        if self._posted:
            work, head = self._posted.popleft()
        else:
            head = torch.empty(HEADER_BYTES, dtype=torch.uint8)
            if self._links.exchange(self._near, [head], self._peer):
                return head
            work = self._irecv(head)
        self._links.wait(work, self._peer)
        return head

    def _isend(self, tensor: Tensor) -> dist.Work:
        return self._links.start(self._links.control.send, tensor, self._peer, self._peer, self._tag)

    def _irecv(self, tensor: Tensor) -> dist.Work:
        return self._links.start(self._links.control.recv, tensor, self._peer, self._peer, self._tag)


class _Known(NamedTuple):
    structure: tree.Structure
    shapes: Shapes
    near: bool  # whether such messages go through shared memory


class _Receive:
    __slots__ = ("buffers", "key", "works")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.buffers: list[Tensor] = []
        self.works: list[dist.Work] | None = None


class Channel:
    """Trees of tensors of one kind from one rank to another, in one order.

    Shapes are announced once per key by way of the host and remembered on both ends. What is small goes through memory
    that both processes have, if they have any: both ends know that from the shapes. All else goes by the group.

    Args:
        links: of this rank.
        kind: of `KINDS`.
        peer: the stage at the other end.
        group: where both ends are members.
    """

    def __init__(self, links: Links, kind: str, peer: int, group: dist.ProcessGroup) -> None:
        self._links, self._peer, self._group, self._kind = links, peer, group, kind
        self._near = links.near(kind, peer)
        self._tag = 1 + KINDS.index(kind)
        self._place = links.place(group, peer)
        self._line = Line(links, kind, peer)
        self._known: dict[Hashable, _Known] = {}
        self._receives: deque[_Receive] = deque()
        self._waiting: deque[_Receive] = deque()  # those of `_receives` that are not posted yet
        self._posted_bytes = 0
        self._sent: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self._old = 0

    def know(self, key: Hashable, structure: tree.Structure, shapes: Shapes) -> None:
        """Both ends know what this key looks like, so it needs no announcement."""
        if key in self._known:
            return
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        self._known[key] = _Known(structure, shapes, self._near is not None and size <= self._near.limit)
        self._flush()

    def knows(self, key: Hashable) -> bool:
        """Whether this end knows what the key looks like."""
        return key in self._known

    def send(self, key: Hashable, value: Any) -> None:
        """Send without waiting; the tensors must not be changed until `retire`."""
        leaves, structure = tree.flatten(value)
        shapes = shapes_of(leaves)
        if key not in self._known:
            self.know(key, structure, shapes)
            self._line.send((structure, shapes))
        known = self._known[key]
        if known.structure != structure or known.shapes != shapes:
            raise ValueError(
                f"A network changed the shape of its output ({self._kind}) between batches of equal inputs: first "
                f"{known[:2]}, now {(structure, shapes)}. Outputs must have the same shapes for the same input shapes."
            )
        buffers = [self._links.to_wire(leaf) for leaf in leaves]
        self._links.count(self._kind, buffers)
        if known.near and self._links.exchange(self._near, buffers, self._peer):
            self._sent.append(([], []))  # they were copied
        else:
            self._sent.append((self._start(self._group.send, buffers, known.near), buffers))

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
            self.know(receive.key, *self._line.take())
        assert receive.works is not None
        known = self._known[receive.key]
        if known.near:
            receive.buffers = self._buffers(known)
            if not self._links.exchange(self._near, receive.buffers, self._peer):
                receive.works = self._start(self._group.recv, receive.buffers, overflow=True)
        for work in receive.works:
            self._links.wait(work, self._peer)
        self._receives.popleft()
        if not known.near:
            self._posted_bytes -= sum(buffer.nbytes for buffer in receive.buffers)
        self._flush()
        return tree.unflatten([self._links.from_wire(buffer) for buffer in receive.buffers], known.structure)

    def retire(self, count: int) -> None:
        """Let go of the `count` oldest sends, which the receiver is known to have."""
        for _ in range(min(count, len(self._sent))):
            for work in self._sent.popleft()[0]:
                self._links.wait(work, self._peer)
        self._old = min(self._old, len(self._sent))

    def end_step(self) -> None:
        """Let go of what was sent before the last call."""
        self.retire(self._old)
        self._old = len(self._sent)

    def _flush(self) -> None:
        while self._waiting and (known := self._known.get((receive := self._waiting[0]).key)) is not None:
            if not known.near:
                if len(self._receives) - len(self._waiting) >= POSTED and self._posted_bytes > POSTED_BYTES:
                    return
                receive.buffers = self._buffers(known)
                self._posted_bytes += sum(buffer.nbytes for buffer in receive.buffers)
            self._waiting.popleft()
            receive.works = self._start(self._group.recv, receive.buffers)

    def _buffers(self, known: _Known) -> list[Tensor]:
        return [self._links.buffer(*shape) for shape in known.shapes]

    def _start(self, call: Any, buffers: list[Tensor], overflow: bool = False) -> list[dist.Work]:
        """Start to send or receive by the group; what has found no room elsewhere has an order of its own."""
        tag = self._tag + len(KINDS) * overflow
        return [self._links.start(call, buffer, self._peer, self._place, tag) for buffer in buffers]
