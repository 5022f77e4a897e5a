"""What code that names no process group talks to, for a while.

A loss of a library calls `torch.distributed` on the default group, the world. Only the last ranks of the pipelines run
the loss, so that there it has to be the group of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def world_is(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let a group be `torch.distributed`'s default one; None leaves it as it is.

    This is the process's, not the thread's: the backward of a loss on a GPU runs in a thread of its own.
    """
    world = dist.group.WORLD if group is not None else None
    try:
        if group is not None:
            dist.group.WORLD = group
        yield
    finally:
        if group is not None:
            dist.group.WORLD = world
