"""Connections between ranks beside their collectives: where a rank listens, and how others reach it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

CONNECT_S = 5.0
"""Seconds for which a rank tries each address of another."""


def addresses(is_local: bool) -> list[str]:
    """Addresses of this machine for other machines, first those that the launcher has set."""
    if is_local:
        return ["127.0.0.1"]
    named = [os.environ.get(name, "") for name in ("MASTER_ADDR", "NCCL_HOST_IP")]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        named.append(json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())[0][0].rpartition(":")[0])
    named.append(os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0])
    found = []
    for name in (*named, socket.gethostname()):
        if name:
            with contextlib.suppress(OSError):
                found += [str(one[4][0]) for one in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys(address for address in found if not address.startswith("127.")))


def places(is_local: bool) -> list[str]:
    """Where to listen, the best place first: on the loopback, or in the network that the machines share, else in all."""
    return ["127.0.0.1"] if is_local else [*addresses(False), "0.0.0.0"]


def listen(*, is_local: bool) -> socket.socket:
    """A listening socket on a free port, on the loopback unless ranks run on other machines.

    Raises:
        OSError: This machine has no such address.
    """
    *best, last = places(is_local)
    for address in best:
        with contextlib.suppress(OSError):
            return socket.create_server((address, 0), family=family_of(address))
    return socket.create_server((last, 0), family=family_of(last))


def family_of(address: str) -> socket.AddressFamily:
    """The family of a numeric address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def connect(hosts: Sequence[str], port: int) -> socket.socket | None:
    """A connection to the first of `hosts` that accepts one; None if none does."""
    for address in hosts:
        with contextlib.suppress(OSError):
            channel = socket.create_connection((address, port), CONNECT_S)
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel.settimeout(None)
            return channel
    return None
