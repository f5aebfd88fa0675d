"""Ports for servers that are started a moment later."""

import contextlib
import random
import socket


def free_port() -> int:
    """One that nobody listens at, below those that the system gives to outgoing connections, which could take it."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
