"""Memory that two processes share: messages arrive in order whatever they weigh, and an end is noticed at once.

Where no process has to end, two threads stand for the processes.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import queue
import random
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tspipe import edge
from lightning_tspipe.edge import Edge, connect

SMALL = {"T": 256, "F": 1024}, {"B": 256}


def pair(timeout: float = 5.0, rings: tuple[dict[str, int], dict[str, int]] = SMALL) -> list[Edge | str]:
    """What both ends get."""
    down, up = rings
    texts: list[queue.Queue[str]] = [queue.Queue(), queue.Queue()]
    found: list[Edge | str] = ["", ""]

    def run(place: int, *kinds: dict[str, int]) -> None:
        found[place] = connect(place == 0, *kinds, texts[1 - place].put, texts[place].get, timeout)

    threads = [threading.Thread(target=run, args=args, daemon=True) for args in ((0, down, up), (1, up, down))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


@pytest.fixture
def ends() -> Any:
    """Two connected ends, which have let go of everything afterwards."""
    before = descriptors()
    found = pair()
    yield found
    for end in found:
        assert isinstance(end, Edge)
        end.close()
        end.close()
    assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def maps() -> list[str]:
    """The memory of this process, a line each."""
    return Path("/proc/self/maps").read_text().splitlines()


def test_messages_of_any_size_arrive_in_order_around_the_end_of_a_ring(ends: Any) -> None:
    """A hundred times as much as a ring holds; several tensors, types and sizes, empty ones too."""
    first, second = ends
    draw = random.Random(0)
    waiting: list[list[Tensor]] = []
    for number in range(1000):
        if waiting and (draw.random() < 0.5 or len(waiting) > 2):
            sent = waiting.pop(0)
            received = [torch.zeros_like(tensor) for tensor in sent]
            assert second.ends["T"].exchange(received)
            assert [tensor.tolist() for tensor in received] == [tensor.tolist() for tensor in sent]
        else:
            kinds = [draw.choice([torch.uint8, torch.bfloat16, torch.float64]) for _ in range(draw.randrange(3))]
            waiting.append([torch.randint(99, (draw.randrange(4), 1)).add(number % 9).to(kind) for kind in kinds])
            assert first.ends["T"].exchange(waiting[-1])


def test_what_finds_no_room_is_said_to_go_elsewhere(ends: Any) -> None:
    first, second = ends
    sender, receiver = first.ends["T"], second.ends["T"]
    here = [sender.exchange([torch.full((7,), float(number), dtype=torch.float64)]) for number in range(6)]
    assert here == [True] * 3 + [False] * 3  # 64 bytes each with their size; an eighth of the ring is for marks
    buffer = torch.zeros(7, dtype=torch.float64)
    for number, expected in enumerate(here):
        assert receiver.exchange([buffer]) == expected
        assert not expected or buffer.tolist() == [number] * 7
    assert sender.exchange([buffer])  # there is room again
    assert receiver.exchange([buffer])


def test_kinds_and_directions_do_not_wait_for_each_other(ends: Any) -> None:
    first, second = ends
    ways = [(first, second, "T"), (first, second, "F"), (second, first, "B")]
    for number in range(3):
        for place, (source, _, kind) in enumerate(ways):
            assert source.ends[kind].exchange([torch.tensor([number, place])])
    for place, (_, target, kind) in reversed(list(enumerate(ways))):
        for number in range(3):
            assert target.ends[kind].exchange([buffer := torch.zeros(2, dtype=torch.int64)])
            assert buffer.tolist() == [number, place]


def test_only_who_sleeps_is_woken(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there before it is asked for costs no call of the kernel at either end."""
    first, second = ends
    wakes: list[int] = []
    write = os.eventfd_write
    monkeypatch.setattr(os, "eventfd_write", lambda *args: (wakes.append(1), write(*args)))
    buffer = torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        assert first.ends["T"].exchange([buffer])
    with monkeypatch.context() as patch:
        patch.delattr(os, "eventfd_read")
        for _ in range(3):
            assert second.ends["T"].exchange([buffer])
    assert wakes == []
    threading.Timer(0.1, lambda: [first.ends["T"].exchange([buffer]) for _ in range(3)]).start()
    for _ in range(3):
        assert second.ends["T"].exchange([buffer])
    assert wakes in ([1], [1, 1])  # one more if the receiver was quick to sleep again


def test_no_wake_up_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that wait for each other's answers, thousands of times: nobody has to look for himself."""
    monkeypatch.setattr(edge, "LOOK_S", 100.0)
    rounds, context = 5000, multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def play(end: Any, inward: str, outward: str) -> None:
        buffer = torch.zeros(1, dtype=torch.int64)
        for number in range(rounds):
            assert end.ends[outward].exchange([torch.tensor([number])])
            assert end.ends[inward].exchange([buffer])
            assert buffer.item() == number

    def child() -> None:
        play(connect(True, *SMALL, there.send, there.recv, 5.0), "B", "T")

    process = context.Process(target=child)
    process.start()
    end = connect(False, *reversed(SMALL), here.send, here.recv, 5.0)
    play(end, "T", "B")
    process.join(10)
    assert process.exitcode == 0
    end.close()  # type: ignore[union-attr]


def test_who_was_not_woken_looks_for_himself(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ends
    monkeypatch.setattr(edge, "LOOK_S", 0.05)
    monkeypatch.setattr(os, "eventfd_write", lambda *_: None)
    threading.Timer(0.1, lambda: first.ends["T"].exchange([torch.tensor([7])])).start()
    buffer = torch.zeros(1, dtype=torch.int64)
    assert second.ends["T"].exchange([buffer])
    assert buffer.item() == 7


def test_a_receiver_sleeps_until_the_message_comes(ends: Any) -> None:
    first, second = ends
    threading.Timer(0.1, lambda: first.ends["T"].exchange([torch.tensor([7])])).start()
    buffer = torch.zeros(1, dtype=torch.int64)
    assert second.ends["T"].exchange([buffer])
    assert buffer.item() == 7


def test_a_sender_waits_only_where_not_even_the_mark_fits() -> None:
    """That takes as many unread messages as a ring has words."""
    first, second = pair(timeout=0.05)
    assert isinstance(first, Edge)
    assert isinstance(second, Edge)
    sender, receiver = first.ends["T"], second.ends["T"]
    word = torch.zeros(1, dtype=torch.float64)
    here = [sender.exchange([word]) for _ in range(18)]
    assert here == [True] * 14 + [False] * 4
    with pytest.raises(TimeoutError):
        sender.exchange([word])
    assert [receiver.exchange([word]) for _ in range(18)] == here
    assert sender.exchange([word])
    for end in (first, second):
        end.close()


def test_no_message_in_time() -> None:
    slow = pair(timeout=0.05)
    for end in slow:
        assert isinstance(end, Edge)
    with pytest.raises(TimeoutError, match=r"Timed out waiting 0\.05 s"):
        slow[1].ends["T"].exchange([torch.zeros(1)])  # type: ignore[union-attr]
    for end in slow:
        end.close()  # type: ignore[union-attr]


def test_a_neighbour_that_lets_go_is_noticed_after_its_last_message(ends: Any) -> None:
    """Even while a child of it, such as a worker of a loader, still has the socket."""
    first, second = ends
    kept = os.dup(first._other.fileno())
    first.ends["T"].exchange([torch.tensor([5])])
    first.close()
    buffer = torch.zeros(1, dtype=torch.int64)
    assert second.ends["T"].exchange([buffer])
    assert buffer.item() == 5
    with pytest.raises(ConnectionError, match="closed by peer"):
        second.ends["T"].exchange([buffer])
    os.close(kept)


def test_a_killed_process_is_noticed_and_leaves_nothing() -> None:
    """By the one that waits for it, within the timeout by far; what it had written is read all the same."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        end = connect(True, *SMALL, there.send, there.recv, 5.0)
        assert isinstance(end, Edge)
        end.ends["T"].exchange([torch.tensor([3])])
        end.ends["B"].exchange([torch.zeros(1)])
        os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=child)
    process.start()
    end = connect(False, *reversed(SMALL), here.send, here.recv, 20.0)
    assert isinstance(end, Edge)
    end.ends["B"].exchange([torch.zeros(1)])
    buffer = torch.zeros(1, dtype=torch.int64)
    assert end.ends["T"].exchange([buffer])
    assert buffer.item() == 3
    with pytest.raises(ConnectionError):
        end.ends["T"].exchange([buffer])
    process.join(5)
    assert process.exitcode == -signal.SIGKILL
    # the memory is in no folder: what has no name needs nobody to remove it
    assert {line.split()[5] for line in maps() if "tspipe" in line} == {"/memfd:tspipe"}
    end.close()
    del end
    assert not [line for line in maps() if "tspipe" in line]


def test_two_jobs_at_once_do_not_meet() -> None:
    jobs = [pair() for _ in range(2)]
    for number, (first, _) in enumerate(jobs):
        first.ends["T"].exchange([torch.tensor([number])])  # type: ignore[union-attr]
    for number, (_, second) in enumerate(jobs):
        second.ends["T"].exchange([buffer := torch.zeros(1, dtype=torch.int64)])  # type: ignore[union-attr]
        assert buffer.item() == number
    for end in (*jobs[0], *jobs[1]):
        end.close()  # type: ignore[union-attr]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Elsewhere(socket.socket):
    """As if the name were one of another machine."""

    def connect(self, name: Any) -> None:
        super().connect(f"{name} elsewhere")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.setattr(os, "posix_fallocate", full), "No space left"),
        (lambda patch: patch.setattr(os, "memfd_create", full), "No space left"),
        (lambda patch: patch.delattr(os, "eventfd"), "not Linux"),
        (lambda patch: patch.setattr(edge, "USED", False), "switched off"),
        (lambda patch: patch.setattr(edge.mmap, "mmap", full), "No space left"),
        (lambda patch: patch.setattr(socket, "socket", Elsewhere), "refused"),
        (lambda patch: patch.setattr(os, "getuid", lambda: -5), "another user"),
    ],
    ids=["no memory", "no files", "no Linux", "off", "no map", "another machine", "another user"],
)
def test_where_nothing_can_be_shared_both_ends_say_why(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], reason: str
) -> None:
    change(monkeypatch)
    before = descriptors()
    found = pair()
    assert all(isinstance(end, str) and end for end in found)
    assert any(reason in str(end) for end in found)
    monkeypatch.undo()
    assert descriptors() == before
