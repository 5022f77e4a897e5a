"""Messages between two processes of one machine through memory that both have: no thread in between, one copy each way.

The memory is a file without a name, so nothing is left of it however the processes end, and the size of ``/dev/shm``
does not matter. Each kind of message has a ring of bytes in it::

    ring   | .... | size | bytes of the tensors ... | size | bytes ... | -1 | .............. |
                  ^ read up to here by one process                         ^ written by the other

Before the ring, one process counts its messages and the other the bytes that it has read, so a message that is there
already is taken without a call of the kernel. Neither process spins: one that has to wait says so there and sleeps, and
only then the other one wakes it, by a counter of the kernel (eventfd). A message that finds no room leaves a -1 in its
place and comes by way of gloo, so no send waits. The file and the counters are handed over through a socket that stays
open: the end of a process closes it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import ParamSpec, TypeVar

from torch import Tensor

USED = True  # False: gloo alone, to compare with
PART = 4  # no message takes more than this part of a ring
MARKS = 8  # this part of a ring is left for the marks of messages that find no room
ELSEWHERE = -1
WORD = 8  # everything begins at a multiple of it
CONNECT_S = 30.0
WRITER, READER = 0, 8  # words of a ring's head, each process's on a line of the cache of its own
HEAD = 2 * READER * WORD
LOOK_S = 1.0  # who sleeps looks for himself that often, though he should be woken

P = ParamSpec("P")
T = TypeVar("T")


def _words(size: int) -> int:
    """Bytes rounded up to whole words."""
    return -(-size // WORD) * WORD


class _End:
    """What a process has of one ring.

    Args:
        memory: of all rings.
        start, size: where this one is, behind its `HEAD`.
        woken_by: wakes this process.
        wakes: wakes the other one.
        other: a socket to the other process.
        timeout: in seconds, how long one message may take.
    """

    _mine, _theirs = 0, 0  # where in the head each process counts; next to that is whether it sleeps

    def __init__(
        self, memory: mmap.mmap, start: int, size: int, woken_by: int, wakes: int, other: socket.socket, timeout: float
    ) -> None:
        self.limit, self._marks = size // PART, size // MARKS
        self._size, self._place, self._wakes, self._woken_by = size, 0, wakes, woken_by
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory, start + HEAD))
        # while there is a view of it, the memory stays where it is
        self._head = memoryview(memory)[start : start + HEAD].cast("q")
        self._numbers = memoryview(memory)[start + HEAD : start + HEAD + size].cast("q")
        self._timeout = timeout
        self._poll = select.poll()
        self._poll.register(woken_by, select.POLLIN)
        self._poll.register(other, select.POLLRDHUP)
        self._lock = threading.Lock()
        self._lock.acquire()

    def exchange(self, tensors: Sequence[Tensor]) -> bool:
        """Write or read one message; False if it goes by another way."""
        raise NotImplementedError

    def _fence(self) -> None:
        """Let every write so far be seen before what follows reads or writes: a lock that is given back does that."""
        self._lock.release()
        self._lock.acquire()

    def _tell(self, count: int) -> None:
        """Count up, and wake the other process if it sleeps."""
        head, sleeps = self._head, self._theirs + 1
        self._fence()
        head[self._mine] = count
        self._fence()
        if head[sleeps]:
            head[sleeps] = 0
            os.eventfd_write(self._wakes, 1)

    def _wait(self, seen: int) -> int:
        """Sleep until the other process has counted further than this, and give its count.

        It looks once more when it has said that it sleeps: either it sees the new count, or the other one sees that.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            self._head[self._mine + 1] = 1
            self._fence()
            if self._head[self._theirs] != seen:
                break
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError(f"Timed out waiting {self._timeout:g} s for a message")
            if self._poll.poll(min(left, LOOK_S) * 1e3):
                try:
                    os.eventfd_read(self._woken_by)
                except BlockingIOError:  # all that has happened is that the other one closed its socket
                    if self._head[self._theirs] == seen:
                        raise ConnectionError("Connection closed by peer") from None
        self._head[self._mine + 1] = 0
        return self._head[self._theirs]

    def _copy(self, tensors: Sequence[Tensor], read: bool) -> None:
        """Copy tensors to where the ring is, or back, one after the other, and around its end."""
        at = self._place % self._size
        for tensor in tensors:
            address, left = tensor.data_ptr(), tensor.nbytes
            while left:
                there, room = self._address + at, self._size - at
                count = min(left, room)
                if read:
                    ctypes.memmove(address, there, count)
                else:
                    ctypes.memmove(there, address, count)
                address, left, at = address + count, left - count, at + count if count < room else 0


class Sender(_End):
    """The end that writes."""

    _mine, _theirs = WRITER, READER
    _messages = 0
    _free_up_to = 0

    def exchange(self, tensors: Sequence[Tensor]) -> bool:
        """Write a message; it never waits for the other process to read one.

        Args:
            tensors: in host memory, contiguous, `limit` bytes together at most.

        Returns:
            Whether there was room; if not, the other process is told to look elsewhere.

        Raises:
            ConnectionError, TimeoutError: tens of thousands of messages wait, and the other process reads none.
        """
        size = sum([tensor.nbytes for tensor in tensors])
        words = _words(size)
        fits = self._has_room(WORD + words + self._marks)
        while not fits and not self._has_room(WORD):
            self._free_up_to = self._wait(self._free_up_to)
        self._numbers[self._place % self._size // WORD] = size if fits else ELSEWHERE
        self._place += WORD
        if fits:
            self._copy(tensors, read=False)
            self._place += words
        self._messages += 1
        self._tell(self._messages)
        return fits

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes are free, asking what was read since only if they are not known to be."""
        if self._place + size <= self._size + self._free_up_to:
            return True
        self._free_up_to = self._head[self._theirs]
        self._fence()
        return self._place + size <= self._size + self._free_up_to


class Receiver(_End):
    """The end that reads."""

    _mine, _theirs = READER, WRITER
    _ready = 0
    _taken = 0
    _told = 0

    def exchange(self, tensors: Sequence[Tensor]) -> bool:
        """Wait for the next message.

        Args:
            tensors: where it goes: in host memory, contiguous, as large as those that were sent.

        Returns:
            Whether it was there; if not, it comes by another way.

        Raises:
            ConnectionError: the other process has ended, or has let go, and there is no message left.
            TimeoutError: none came in time.
        """
        if self._taken == self._ready:
            self._ready = self._head[self._theirs]
            if self._taken == self._ready:
                self._ready = self._wait(self._taken)
            self._fence()
        self._taken += 1
        size = self._numbers[self._place % self._size // WORD]
        self._place += WORD
        if size != ELSEWHERE:
            assert size == sum([tensor.nbytes for tensor in tensors]), "the ends of an edge disagree about a message"
            self._copy(tensors, read=True)
            self._place += _words(size)
        if self._place - self._told >= self._size // 8:  # seldom, since it takes a line of the cache from the other one
            self._tell(self._place)
            self._told = self._place
        return size != ELSEWHERE


Rings = Mapping[str, tuple[type[Sender] | type[Receiver], int]]  # an end of each, and its bytes


class Edge:
    """What a process shares with one neighbour.

    Args:
        other: a socket to it.
        memory: descriptor of the file.
        counters: two descriptors per ring, to wake the reader and the writer; they are closed with this.
        rings: what this end is of each ring, and its bytes.
        timeout: in seconds, how long one message may take.
    """

    def __init__(
        self, other: socket.socket, memory: int, counters: Sequence[int], rings: Rings, timeout: float
    ) -> None:
        self._other, self._counters = other, counters
        self.ends: dict[str, Sender | Receiver] = {}
        mapped, start = mmap.mmap(memory, _total(rings)), 0
        for (kind, (end, size)), written, read in zip(rings.items(), counters[::2], counters[1::2], strict=True):
            woken_by, wakes = (read, written) if end is Sender else (written, read)
            self.ends[kind] = end(mapped, start, size, woken_by, wakes, other, timeout)
            start += HEAD + size

    def close(self) -> None:
        """Let go; the other process is woken if it waits, even while a child of this one still has the socket."""
        self.ends.clear()
        with self._other, suppress(OSError):  # it may have ended before
            self._other.shutdown(socket.SHUT_RDWR)
        _close(self._counters)
        self._counters = ()


def connect(
    first: bool,
    sends: Mapping[str, int],
    receives: Mapping[str, int],
    tell: Callable[[str], None],
    hear: Callable[[], str],
    timeout: float,
) -> Edge | str:
    """Share memory with a neighbour, which calls this too.

    Args:
        first: whether this process makes what is shared; the neighbour then does not.
        sends, receives: bytes of the ring of each kind of message, a multiple of 8; the neighbour has them exchanged.
        tell, hear: send the neighbour a text, and wait for one from it.
        timeout: in seconds, how long one message may take.

    Returns:
        What is shared, or else, in both processes, why nothing can be.
    """
    written: Rings = {kind: (Sender, size) for kind, size in sends.items()}
    read: Rings = {kind: (Receiver, size) for kind, size in receives.items()}
    rings = {**written, **read} if first else {**read, **written}
    if not first:
        if not (name := hear()):
            return "the neighbour cannot share any"
        near = _attempt(_knock, name)
        tell(near if isinstance(near, str) else "")
        if isinstance(near, str):
            return near
        edge = _attempt(_join, near, rings, timeout)
        tell(edge if isinstance(edge, str) else "")
        return edge
    door = _attempt(_listen)
    if isinstance(door, str):
        tell("")
        return door
    with door:
        tell(door.getsockname().decode())
        if refusal := hear():
            return refusal
        edge = _attempt(_share, door, rings, timeout)
        refusal = hear()
    if isinstance(edge, Edge) and refusal:
        edge.close()
        return refusal
    return edge


def _total(rings: Rings) -> int:
    return sum(HEAD + size for _, size in rings.values())


def _attempt(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | str:
    """What a step gives, or why the system refused it."""
    try:
        return step(*args, **kwargs)
    except OSError as error:
        return str(error) or type(error).__name__


def _socket() -> socket.socket:
    if not USED or not hasattr(os, "eventfd") or not hasattr(os, "memfd_create"):
        raise OSError("it is switched off, or this system is not Linux")
    found = socket.socket(socket.AF_UNIX)
    found.settimeout(CONNECT_S)
    return found


def _listen() -> socket.socket:
    door = _socket()
    door.bind(f"\0tspipe-{secrets.token_hex(16)}")  # no file has this name, and it goes with the socket
    door.listen(1)
    return door


def _knock(name: str) -> socket.socket:
    with ExitStack() as undo:
        near = undo.enter_context(_socket())
        near.connect(name)  # fails on another machine, and in another container
        _check_user(near)
        undo.pop_all()
    return near


def _check_user(other: socket.socket) -> None:
    _, user, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user != os.getuid():
        raise OSError("another user's process answered")


def _share(door: socket.socket, rings: Rings, timeout: float) -> Edge:
    other, _ = door.accept()
    with ExitStack() as undo:
        undo.enter_context(other)
        _check_user(other)
        descriptors = [os.memfd_create("tspipe")]
        undo.callback(_close, descriptors)
        os.posix_fallocate(descriptors[0], 0, _total(rings))  # memory that lacks must show here, not later
        descriptors.extend(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2 * len(rings)))
        edge = Edge(other, descriptors[0], descriptors[1:], rings, timeout)
        socket.send_fds(other, [b" "], descriptors)
        undo.pop_all()
    os.close(descriptors[0])
    return edge


def _join(other: socket.socket, rings: Rings, timeout: float) -> Edge:
    with ExitStack() as undo:
        undo.enter_context(other)
        count = 1 + 2 * len(rings)
        _, descriptors, _, _ = socket.recv_fds(other, 1, count, socket.MSG_CMSG_CLOEXEC)
        undo.callback(_close, descriptors)
        if len(descriptors) < count:
            raise OSError("the neighbour could not share any")
        edge = Edge(other, descriptors[0], descriptors[1:], rings, timeout)
        undo.pop_all()
    os.close(descriptors[0])
    return edge


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
