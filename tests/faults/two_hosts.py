"""Two hosts on one machine: network namespaces with names of their own, and a link between them that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

LINK = "link0"
"""The name of the link's end in either namespace."""


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        name: Also its host name.
        space: What the system calls it.
        address: In the network of the two.
    """

    name: str
    space: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, on this host."""
        begin = f"hostname {self.name}; exec " + '"$@"'
        return ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", begin, "sh", *command]

    @property
    def environment(self) -> dict[str, str]:
        """What a rank here needs to use the link."""
        return {"GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"}

    def cut(self) -> None:
        """Cut the link, without a word to either end."""
        _ip("-n", self.space, "link", "set", LINK, "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts, alpha and beta, that reach each other."""
    hosts = tuple(
        Host(name, f"partita-{os.getpid()}-{name}", f"10.213.77.{number}")
        for number, name in enumerate(("alpha", "beta"), start=1)
    )
    with contextlib.ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.space)
            stack.callback(_ip, "netns", "del", host.space)
        ends = [f"pt{os.getpid() % 100_000}{end}" for end in "ab"]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end in zip(hosts, ends, strict=True):
            _ip("link", "set", end, "netns", host.space)
            _ip("-n", host.space, "link", "set", end, "name", LINK)
            _ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", LINK)
            for device in ("lo", LINK):
                _ip("-n", host.space, "link", "set", device, "up")
        yield hosts[0], hosts[1]


@cache
def why_not() -> str | None:
    """Why this machine cannot play two hosts, if it cannot."""
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    try:
        with two_hosts():
            return None
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces cannot be created here: {error}"
