"""Run a function in forked processes, with a hard time limit and nothing left behind."""

import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def limit_threads() -> None:
    """Give this process and all that it forks one thread each; call it before torch is imported."""
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"


def run_forked(function: Callable[..., Any], num_processes: int, *args: Any, timeout_s: float) -> list[Any]:
    """Call ``function(rank, *args)`` in ``num_processes`` forked processes.

    Every process leads a process group of its own; when the call ends, for whatever reason, all groups are killed.

    Args:
        function: What each process runs; its result must be picklable and hold no tensors.
        num_processes: How many processes to fork.
        args: Handed to every process unchanged.
        timeout_s: Seconds after which the run has failed.

    Returns:
        The results, in rank order.

    Raises:
        RuntimeError: A process raised (its traceback is the message), died, or ran past the limit.
    """
    if multiprocessing.parent_process() is None and _num_threads() > 1:
        raise RuntimeError("this process has started threads; forking it now could deadlock its children")
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []
    readers: dict[Connection, int] = {}
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        for rank in range(num_processes):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(function, rank, args, writer))
            process.start()
            writer.close()
            processes.append(process)
            readers[reader] = rank
        while readers:
            ready = wait(list(readers), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {sorted(readers.values())} ran past the limit of {timeout_s} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = readers.pop(connection)
                results[rank] = _receive(connection, rank)
        return [results[rank] for rank in range(num_processes)]
    finally:
        for process in processes:  # killed before they are joined: an unreaped process keeps its id to itself
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # for one that has no group of its own yet
        for process in processes:
            process.join()


def _receive(connection: Connection, rank: int) -> Any:
    try:
        succeeded, outcome = connection.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a result") from None
    if not succeeded:
        raise RuntimeError(f"rank {rank} failed:\n{outcome}")
    return outcome


def _child(function: Callable[..., Any], rank: int, args: tuple[Any, ...], connection: Connection) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        outcome = (True, function(rank, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    connection.send(outcome)


def status(key: str) -> int:
    """Bytes of this process, by a line of https://man7.org/linux/man-pages/man5/proc_pid_status.5.html (Linux)."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _num_threads() -> int:
    """Threads of this process, those of native libraries included (1 where the system does not tell)."""
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else 1
