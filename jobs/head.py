"""A Ray head of this machine's own: started when something is first submitted to `local`, found again, ended by name.

It listens on loopback only, Ray's own core included, and lets nobody in without the token of this home.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from jobs.launch_ray import LOOPBACK_ONLY, SETTINGS, token_settings
from pipeline.errors import EnvironmentProblem

HEAD, LOCK = "head.json", "head.lock"
START_SECONDS, STOP_SECONDS = 90.0, 20.0
CLOCK_SECONDS = 60.0
"""How far two readings of one process's start may lie apart: they move when the clock of the machine is set."""

NOT_FOR_THE_HEAD = {"RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}


@dataclass(frozen=True)
class Head:
    """A head that was started. `pid` leads a process group; with `began` and `temp` it is not mistaken for another."""

    address: str
    pid: int
    began: float
    temp: str
    """Ray's sessions, sockets and logs: a folder that only this user can read."""

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            ours = self.temp in process.cmdline() and abs(process.create_time() - self.began) < CLOCK_SECONDS
            return ours and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


def find(home: Path) -> Head | None:
    """The head of this home that is alive, or None."""
    head = _recorded(home)
    return head if head and head.alive else None


def ensure(home: Path, say: Callable[[str], None]) -> Head:
    """The head of this home, started if there is none. Two callers get the same one. Raises EnvironmentProblem."""
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / LOCK):
        head, process = find(home), None
        if head is None:
            say("starting a Ray head on this machine; `gristmill head stop` ends it")
            _clear(home)
            head, process = _start(home)
        _wait(head, process, (home / "ray-token").read_text().strip())
        return head


def stop(home: Path) -> Head | None:
    """End the head of this home with what it started, jobs too, and nothing else. None where none was alive."""
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / LOCK):
        return _clear(home)


def _recorded(home: Path) -> Head | None:
    try:
        return Head(**json.loads((home / HEAD).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _clear(home: Path) -> Head | None:
    """End what is left of the recorded head, and drop its record and logs. The head, if anything of it was alive."""
    head = _recorded(home)
    if head is None:
        return None
    had_members = _end(head)
    shutil.rmtree(head.temp, ignore_errors=True)
    (home / HEAD).unlink(missing_ok=True)
    return head if had_members else None


def _start(home: Path) -> "tuple[Head, subprocess.Popen[bytes]]":
    temp = tempfile.mkdtemp(prefix="gristmill-ray-")  # short: it holds sockets, whose paths may have 107 bytes
    dashboard, client, metrics = _free_ports(3)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_THE_HEAD}
    environment |= {**SETTINGS, **token_settings(home), **LOOPBACK_ONLY, "DASHBOARD_METRIC_PORT": str(metrics)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    with (Path(temp) / "start.log").open("w") as log:
        process = subprocess.Popen(  # noqa: S603 - our own words
            _command(temp, dashboard, client),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=temp,
            start_new_session=True,
        )
    head = Head(f"http://127.0.0.1:{dashboard}", process.pid, psutil.Process(process.pid).create_time(), temp)
    scratch = home / f".tmp-{HEAD}"
    scratch.write_text(json.dumps(asdict(head)))
    scratch.replace(home / HEAD)  # before it answers: one that is given up on can still be stopped
    return head, process


def _command(temp: str, dashboard: int, client: int) -> list[str]:
    settings = {
        "--node-ip-address": "127.0.0.1",
        "--port": "0",
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": str(dashboard),
        "--dashboard-agent-listen-port": "0",
        "--ray-client-server-port": str(client),
        "--include-dashboard": "true",
        "--temp-dir": temp,
    }
    words = [word for setting in settings.items() for word in setting]
    # --block: the process stays, the others are its children, and they end with it
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--no-monitor", *words]


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait(head: Head, process: "subprocess.Popen[bytes] | None", token: str) -> None:
    """Return when jobs can be submitted. `process` is that of a head that was started here."""
    until = time.monotonic() + START_SECONDS
    while not _answers(head.address, token):
        if not head.alive:
            raise EnvironmentProblem(f"the Ray head ended at once{_how(process)}. {_last_words(head)}")
        if time.monotonic() > until:
            raise EnvironmentProblem(f"the Ray head did not answer within {START_SECONDS:.0f} s. {_last_words(head)}")
        time.sleep(0.2)


def _how(process: "subprocess.Popen[bytes] | None") -> str:
    code = process.poll() if process else None
    if code is None:
        return ""
    return f", with exit code {code}" if code >= 0 else f", by {signal.Signals(-code).name}"


def _answers(address: str, token: str) -> bool:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})  # noqa: S310 - http
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _last_words(head: Head) -> str:
    log = Path(head.temp) / "start.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return (
        f"It said: {lines[-1]} (all of it: {log})" if lines else f"It said nothing; Ray's own logs are in {head.temp}"
    )


def _end(head: Head) -> bool:
    """End the leader, which ends the others, and kill who is left. Whether there was anyone."""
    members = list(_members(head))
    if head.alive:
        psutil.Process(head.pid).terminate()
    _, left = psutil.wait_procs(members, timeout=STOP_SECONDS if head.alive else 0)
    for process in left:
        process.kill()  # psutil compares start times first: never a process that got the number since
    psutil.wait_procs(left, timeout=5)
    return bool(members)


def _members(head: Head) -> Iterator[psutil.Process]:
    """The leader, what descends from it (drivers of jobs too), and what is left of its group after its death."""
    if head.alive:
        leader = psutil.Process(head.pid)
        yield from (leader, *leader.children(recursive=True))
    elif not psutil.pid_exists(head.pid):  # or the number, and so the group, is another's by now
        yield from (process for process in psutil.process_iter(["create_time"]) if _in_group(process, head))


def _in_group(process: psutil.Process, head: Head) -> bool:
    try:
        since = process.info["create_time"] - head.began  # pyright: ignore[reportAttributeAccessIssue]
        return os.getpgid(process.pid) == head.pid and since > -CLOCK_SECONDS
    except ProcessLookupError:
        return False
