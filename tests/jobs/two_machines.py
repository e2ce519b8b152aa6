"""Two machines on this one, each with a network and a disk of its own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Machine:
    """A network namespace, and a folder that no other machine sees."""

    name: str
    address: str
    disk: Path
    hidden: tuple[Path, ...]

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command to run it there."""
        mounts = [f"mount -t tmpfs none {folder}" for folder in self.hidden]
        mounts += [f"mkdir -p {self.disk}/ray /tmp/ray", f"mount --bind {self.disk}/ray /tmp/ray"]
        return ("ip", "netns", "exec", self.name, "sh", "-c", f'{" && ".join(mounts)} && exec "$0" "$@"')

    def switch_off(self) -> None:
        """Kill all that runs there."""
        inside = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in map(int, inside.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


NETWORK = f"10.231.{os.getpid() % 250}"
"""Tests run beside each other in processes of their own."""


@contextmanager
def switch(name: str) -> Iterator[str]:
    """A network between machines; this process is at the address that it gives."""
    ip("link", "add", name, "type", "bridge")
    try:
        ip("addr", "add", f"{NETWORK}.1/24", "dev", name)
        ip("link", "set", name, "up")
        yield f"{NETWORK}.1"
    finally:
        ip("link", "del", name)


@contextmanager
def machine(bridge: str, number: int, disk: Path, hidden: tuple[Path, ...]) -> Iterator[Machine]:
    name, address = f"{bridge}-{number}", f"{NETWORK}.{number}"
    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", bridge, "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")
        yield Machine(name, address, disk, hidden)
    finally:
        ip("netns", "del", name)


@contextmanager
def two_machines(tmp_path: Path) -> Iterator[tuple[str, list[Machine]]]:
    """The address of this process, and two machines that reach it and each other."""
    disks = [tmp_path / "disk-2", tmp_path / "disk-3"]
    for disk in disks:
        disk.mkdir()
    with ExitStack() as stack:
        bridge = f"gm{os.getpid() % 10**6}"
        try:
            here = stack.enter_context(switch(bridge))
            both = [
                stack.enter_context(machine(bridge, number, disk, tuple(other for other in disks if other != disk)))
                for number, disk in enumerate(disks, 2)
            ]
        except (OSError, subprocess.CalledProcessError) as refused:
            pytest.skip(f"no network namespaces here: {getattr(refused, 'stderr', None) or refused}")
        yield here, both
