"""The ends of connections: lines for small objects, channels for trees of tensors, and what they share on a rank."""

from __future__ import annotations

import math
import pickle
import struct
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
HEADER = f"q{HEADER_BYTES - 8}s"  # bytes of an object, and as many of them as fit
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
        self.count("line", 1, buffer.nbytes)
        self._kept.append((work, buffer, peer))

    def count(self, kind: str, tensors: int, size: int) -> None:
        """Note what is sent: how many tensors, and their bytes together."""
        self.messages[kind] += tensors
        self.sent += size

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
        inline = payload[: HEADER_BYTES - 8]
        head = torch.frombuffer(bytearray(struct.pack(HEADER, len(payload), inline)), dtype=torch.uint8)
        if self._near is None or not self._links.exchange(self._near, [head], self._peer):
            self._links.keep(self._isend(head), head, self._peer)
        else:
            self._links.count("line", 1, HEADER_BYTES)
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
        size, payload = struct.unpack(HEADER, self._head().numpy().tobytes())
        if size > HEADER_BYTES - 8:
            tail = torch.empty(size - (HEADER_BYTES - 8), dtype=torch.uint8)
            self._links.wait(self._irecv(tail), self._peer)
            payload += tail.numpy().tobytes()
        return pickle.loads(payload)  # what follows the object is not looked at

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
    size: int  # bytes
    like: tuple[Tensor, ...] | None  # the same shapes without memory, if such messages go through what is shared


class _Receive(NamedTuple):
    buffers: list[Tensor]
    works: list[dist.Work]


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
        self._posted: deque[_Receive] = deque()  # by the group
        self._waiting: deque[Hashable] = deque()  # keys of what comes after these and is not posted yet
        self._posted_bytes = 0
        self._sent: deque[tuple[Sequence[dist.Work], Sequence[Tensor]]] = deque()
        self._old = 0

    def know(self, key: Hashable, structure: tree.Structure, shapes: Shapes) -> None:
        """Both ends know what this key looks like, so it needs no announcement."""
        if key in self._known:
            return
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        near = self._near is not None and size <= self._near.limit
        like = tuple(_empty_as(*shape) for shape in shapes) if near else None
        self._known[key] = _Known(structure, shapes, size, like)
        self._flush()

    def knows(self, key: Hashable) -> bool:
        """Whether this end knows what the key looks like."""
        return key in self._known

    def send(self, key: Hashable, value: Any) -> None:
        """Send without waiting; the tensors must not be changed until `retire`."""
        leaves, structure = tree.flatten(value)
        if (known := self._known.get(key)) is None:
            shapes = shapes_of(leaves)
            self.know(key, structure, shapes)
            self._line.send((structure, shapes))
            known = self._known[key]
        # a loop over shapes costs less than a comparison of tuples that are made for it, and it runs per message
        same = len(leaves) == len(known.shapes) and known.structure == structure
        for leaf, (shape, dtype) in zip(leaves, known.shapes, strict=False):
            same = same and leaf.dtype is dtype and leaf.shape == shape
        if not same:
            raise ValueError(
                f"A network changed the shape of its output ({self._kind}) between batches of equal inputs: first "
                f"{known[:2]}, now {(structure, shapes_of(leaves))}. Outputs must have the same shapes for the same "
                "input shapes."
            )
        buffers = list(map(self._links.to_wire, leaves))
        self._links.count(self._kind, len(buffers), known.size)
        if known.like is not None and self._links.exchange(self._near, buffers, self._peer):
            self._sent.append(((), ()))  # they were copied
        else:
            self._sent.append((self._start(self._group.send, buffers, known.like is not None), buffers))

    def post(self, key: Hashable) -> None:
        """Post the receive of the next message; one through shared memory needs none.

        It is put off while its shapes are not known yet, or while many bytes wait already.
        """
        known = self._known.get(key)
        if known is None or known.like is None:
            self._waiting.append(key)
            self._flush()

    def take(self, key: Hashable) -> Any:
        """Wait for the next message, whose receive `post` was asked for."""
        if (known := self._known.get(key)) is None:
            self.know(key, *self._line.take())
            known = self._known[key]
        if known.like is None:
            return self._take_posted(known)
        buffers = [torch.empty_like(each) for each in known.like]
        if not self._links.exchange(self._near, buffers, self._peer):
            for work in self._start(self._group.recv, buffers, overflow=True):
                self._links.wait(work, self._peer)
        return tree.unflatten(buffers, known.structure)

    def _take_posted(self, known: _Known) -> Any:
        receive = self._posted[0]
        for work in receive.works:
            self._links.wait(work, self._peer)
        self._posted.popleft()
        self._posted_bytes -= known.size
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
        """Post what can be; what turns out to come through shared memory need not wait here."""
        while self._waiting and (known := self._known.get(self._waiting[0])) is not None:
            if known.like is None:
                if len(self._posted) >= POSTED and self._posted_bytes > POSTED_BYTES:
                    return
                buffers = [self._links.buffer(*shape) for shape in known.shapes]
                self._posted_bytes += known.size
                self._posted.append(_Receive(buffers, self._start(self._group.recv, buffers)))
            self._waiting.popleft()

    def _start(self, call: Any, buffers: list[Tensor], overflow: bool = False) -> list[dist.Work]:
        """Start to send or receive by the group; what has found no room elsewhere has an order of its own."""
        tag = self._tag + len(KINDS) * overflow
        return [self._links.start(call, buffer, self._peer, self._place, tag) for buffer in buffers]


def _empty_as(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A pattern for `torch.empty_like`, which takes half of the time of `torch.empty`; it has no memory itself."""
    pattern = torch.empty(shape, dtype=dtype)
    pattern.untyped_storage().resize_(0)
    return pattern
