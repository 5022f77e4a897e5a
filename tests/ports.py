"""Ports for process groups: below the range from which the system takes ports for outgoing connections."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on, and that no connection is going to be given.

    A port that ``bind(0)`` returns may be taken by any outgoing connection before it is bound again.
    """
    source = random.SystemRandom()  # the tests seed the other one
    while True:
        port = source.randrange(15000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
