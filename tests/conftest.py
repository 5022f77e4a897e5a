"""Keeps pytest's own process clean, from which most tests fork or start scripts; and the process that forks ranks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Before torch is imported. Lightning gives a process all cores without it, and sums then come out in another order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests.scripts.hiding import LARGE, Hide, tell_apart

HIDE = Hide(LARGE)  # while tests are collected: less to import, and less memory for every fork to copy
gc.disable()  # until then, too: nothing that is imported is garbage

# So that who is woken waits until the other one sleeps. Else a process gives way in the middle of a call of gloo, and
# gloo's own thread then tries for the lock of that call, a million times in a second.
if hasattr(os, "SCHED_BATCH"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

import torch.distributed as dist  # noqa: E402

from tests.scripts.zygote import Zygote  # noqa: E402

LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def pytest_collection_finish() -> None:
    """Most tests fork: what is there by now is not for a child's garbage collector, which would copy all its memory."""
    HIDE.end()
    tell_apart()
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """A test that trains in pytest's process fails: scripts that are started later would believe in a launcher."""
    before = {name: os.environ.get(name) for name in (*LAUNCH, "OMP_NUM_THREADS")}
    yield
    after = {name: os.environ.get(name) for name in before}
    for name, value in before.items():  # so that the culprit alone fails
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    assert after == before, "this test must run in a process of its own (tests.multiproc.result_of): it set variables"
    assert not dist.is_initialized(), "this test must run in a process of its own: it left torch.distributed running"


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Forks ranks that see no GPU."""
    server = Zygote()
    yield server
    server.close()
