"""Messages between forked ranks: trees arrive as they were, in order, whenever their receive was posted."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from lightning_tspipe import channel as channel_file
from lightning_tspipe import comm as comm_file
from lightning_tspipe import edge, tree
from lightning_tspipe.board import World
from lightning_tspipe.channel import HEADER_BYTES
from lightning_tspipe.comm import Comm
from lightning_tspipe.errors import PipelineError
from lightning_tspipe.topology import Topology
from tests.multiproc import result_of
from tests.ports import free_port

CPU = torch.device("cpu")


def ranks(body: Callable[[Comm], Any], count: int = 2, ends: bool = True) -> list[Any]:
    """What a function of the connections returns on each rank; None for a rank that was killed."""

    def child(rank: int, port: int, pipe: Any) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
        dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=20))
        topology, timeout = Topology(rank, count, count), timedelta(seconds=20)
        comm = Comm(topology, CPU, "gloo", World(topology, timeout))
        try:
            pipe.send(body(comm))
            if ends:
                comm.drain()
                dist.barrier()
        except BaseException:
            pipe.send(traceback.format_exc())
        finally:
            os._exit(0)

    def driver() -> list[Any]:
        context, port, processes, results = multiprocessing.get_context("fork"), free_port(), [], []
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        for rank in range(count):
            processes.append(context.Process(target=child, args=(rank, port, pipes[rank][1])))
            processes[-1].start()
            pipes[rank][1].close()
        for reader, _ in pipes:
            results.append(None)
            with suppress(EOFError):
                results[-1] = reader.recv()
        for process in processes:
            process.join()
        return results

    return list(result_of(driver, timeout=40))


def nested(number: float) -> Any:
    return {
        "whole": torch.full((2, 3), number, dtype=torch.float64),
        "pair": (torch.tensor([int(number)]), torch.empty(0, 4)),
        "flags": [torch.tensor([True, False]), 7, None],
        "half": torch.full((5,), number, dtype=torch.bfloat16),
        "waves": torch.full((2,), complex(number, 1)),
        "views": [torch.full((2,), complex(number, 1)).conj(), torch.full((2,), complex(number, 1)).conj().imag],
        "turned": torch.arange(6.0).add(number).reshape(2, 3).t(),
        "rare": [torch.tensor(int(number), dtype=kind) for kind in (torch.int16, torch.uint16, torch.bool)],
        "tiny": torch.full((3,), number).to(torch.float8_e4m3fn),
    }


def same(one: Any, other: Any) -> bool:
    (leaves, structure), (others, expected) = tree.flatten(one), tree.flatten(other)
    return structure == expected and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
        for a, b in zip(leaves, others, strict=True)
    )


@pytest.mark.parametrize("posted", [0, 1, 5])
def test_trees_arrive_as_they_were_and_in_order(posted: int) -> None:
    """With none, one or all receives posted before the first message is there; shapes are announced once."""

    def body(comm: Comm) -> Any:
        if comm.stage == 0:
            begun = comm.messages["line"]  # by which memory was shared
            for number in range(5):
                comm.outward["F"].send(
                    "tree" if number % 2 else "vector", nested(number) if number % 2 else vector(number)
                )
            return {**comm.messages, "line": comm.messages["line"] - begun}
        found = []
        channel = comm.inward["F"]
        for number in range(posted):
            channel.post("tree" if number % 2 else "vector")
        for number in range(5):
            if number >= posted:
                channel.post("tree" if number % 2 else "vector")
            found.append(channel.take("tree" if number % 2 else "vector"))
        return [same(value, nested(number) if number % 2 else vector(number)) for number, value in enumerate(found)]

    def vector(number: int) -> Any:
        return [torch.arange(4.0) + number]

    sent, equal = ranks(body)
    assert equal == [True] * 5
    leaves = len(tree.flatten(nested(0))[0])
    assert sent["F"] == 3 * 1 + 2 * leaves
    assert sent["line"] == 2  # one announcement per key


def test_receives_wait_in_order_until_their_shapes_are_known() -> None:
    """A later message of known shape must not take the place of an earlier one whose shape comes late."""

    def body(comm: Comm) -> Any:
        short, long = [torch.tensor([1.0])], [torch.arange(3.0)]
        for end in (comm.outward, comm.inward):
            if "B" in end:
                end["B"].know("short", tree.flatten(short)[1], (((1,), torch.float32),))
        if comm.stage == 1:
            comm.outward["B"].know("long", tree.flatten(long)[1], (((3,), torch.float32),))
            comm.outward["B"].send("long", long)
            comm.outward["B"].send("short", short)
            return None
        channel = comm.inward["B"]
        channel.post("long")
        channel.post("short")
        channel.know("long", tree.flatten(long)[1], (((3,), torch.float32),))
        return [channel.take("long")[0].tolist(), channel.take("short")[0].tolist()]

    assert ranks(body)[0] == [[0.0, 1.0, 2.0], [1.0]]


def test_posted_receives_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound only two per channel are posted, and all messages arrive all the same."""
    monkeypatch.setattr(channel_file, "POSTED_BYTES", 100)
    monkeypatch.setattr(edge, "USED", False)

    def body(comm: Comm) -> Any:
        if comm.stage == 0:
            for number in range(8):
                comm.outward["T"].send("x", [torch.full((20,), float(number))])
            return None
        channel, found, most = comm.inward["T"], [], 0
        channel.post("x")
        found.append(int(channel.take("x")[0][0]))
        for _ in range(7):
            channel.post("x")
        for _ in range(7):
            most = max(most, len(channel._posted))
            found.append(int(channel.take("x")[0][0]))
        return found, most

    found, most = ranks(body)[1]
    assert found == list(range(8))
    assert most == 2


def test_large_messages_and_full_memory_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes any until all are sent: some fit into the memory, some find no room, some are too large for it."""
    monkeypatch.setattr(comm_file, "DOWN", {**comm_file.DOWN, "T": 4096})
    sizes = [(50, 200, 0)[number % 3] for number in range(60)]

    def body(comm: Comm) -> Any:
        if comm.stage == 0:
            for number, size in enumerate(sizes):
                comm.outward["T"].send(size, [torch.full((size,), number), torch.tensor(number)])
        dist.barrier()
        if comm.stage == 0:
            known = comm.outward["T"]._known.values()  # of batches that differ there may be thousands
            assert not any(each.untyped_storage().nbytes() for shapes in known for each in shapes.like or ())
            return len([works for works, _ in comm.outward["T"]._sent if works])
        channel = comm.inward["T"]
        for size in sizes:
            channel.post(size)
        return [[leaf.tolist() for leaf in channel.take(size)] for size in sizes]

    by_gloo, found = ranks(body)
    assert found == [[[number] * size, number] for number, size in enumerate(sizes)]
    assert 25 < by_gloo < 55  # 20 are too large


@pytest.mark.parametrize("full", [False, True])
def test_without_shared_memory_gloo_carries_all(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """Which is said once per pair of stages, and nothing else changes."""
    said: list[str] = []
    monkeypatch.setattr(comm_file.log, "info", lambda text, *values: said.append(text % values))
    if full:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b" "))

    def body(comm: Comm) -> Any:
        comm.send_header("header")
        if comm.stage == 0:
            comm.outward["T"].send("x", [torch.tensor(5)])
            return said
        header = comm.lines_in["header"].take()
        if comm.stage == 1:
            comm.inward["T"].post("x")
            return header, int(comm.inward["T"].take("x")[0])
        return header

    said, second, third = ranks(body, 3)
    assert (second, third) == (("header", 5), "header")
    assert [text.partition(" (")[0] for text in said] == [f"Stages 0 and {n} share no memory" for n in (1, 2) if full]
    assert all("No space left" in text for text in said)


def test_another_shape_under_the_same_key_is_refused() -> None:
    def body(comm: Comm) -> Any:
        if comm.stage:
            comm.inward["F"].post("x")
            return comm.inward["F"].take("x")[0].shape
        comm.outward["F"].send("x", [torch.zeros(2, 3)])
        with pytest.raises(ValueError, match="changed the shape of its output"):
            comm.outward["F"].send("x", [torch.zeros(2, 4)])
        return True

    assert ranks(body) == [True, (2, 3)]


def test_lines_carry_objects_of_any_length() -> None:
    messages = ["", {"a": (1, torch.float32)}, "x" * (HEADER_BYTES - 100), b"y" * (3 * HEADER_BYTES), None]

    def body(comm: Comm) -> Any:
        if comm.stage == 0:
            for message in messages:
                comm.send_header(message)
            return messages
        line = comm.lines_in["header"]
        line.post()
        return [line.take() for _ in messages]

    assert ranks(body, 3) == [messages] * 3


def test_reports_of_all_ranks_go_through_shared_memory() -> None:
    """Also from ranks that are no neighbours of the first one; gloo would take longer than all else of a look."""

    def body(comm: Comm) -> Any:
        begun = len(comm._kept)  # what was said to share it
        for number in range(2):
            comm.report((comm.stage, number))
        return [comm.reports() for _ in range(2)], len(comm._kept) - begun

    first, *others = ranks(body, 3)
    assert first == ([[(1, 0), (2, 0)], [(1, 1), (2, 1)]], 0)
    assert others == [([[], []], 0)] * 2


def test_share_gather_and_chain() -> None:
    def body(comm: Comm) -> Any:
        shared = comm.share({"x": torch.full((2,), float(comm.stage)), "name": comm.stage}, 1)
        gathered = comm.gather([comm.stage, torch.tensor(comm.stage)])
        chained = comm.chain(lambda value: value * 10 + comm.stage, torch.tensor(5))
        assert same(comm.share(nested(comm.stage), 2), nested(2))
        return shared["x"].tolist(), shared["name"], gathered and [part[0] for part in gathered], int(chained)

    first, *others = ranks(body, 3)
    assert first == ([1.0, 1.0], 1, [0, 1, 2], 5012)
    assert others == [([1.0, 1.0], 1, None, 5012)] * 2


class TestFailure:
    """A lost connection becomes an error that names the rank."""

    @pytest.mark.parametrize("shared", [True, False])
    def test_a_killed_rank_is_named(self, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
        monkeypatch.setattr(edge, "USED", shared)

        def body(comm: Comm) -> Any:
            if comm.stage == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                comm.lines_in["relay"].take()
            except PipelineError as error:
                return str(error)
            return "no error"

        first, killed = ranks(body, ends=False)
        assert killed is None
        assert first.startswith("Rank 0 stops because the pipeline lost a rank: rank 1 (stage 1) died")
        assert "The connection said: " in first

    def test_the_first_report_counts(self) -> None:
        def body(comm: Comm) -> Any:
            if comm.stage == 0:
                comm.board.report("the cause")
                comm.board.report("an effect")
            dist.barrier()
            return str(comm.board.explain(1 - comm.stage))

        for rank, text in enumerate(ranks(body)):
            assert text == f"Rank {rank} stops because the pipeline lost a rank: the cause"
