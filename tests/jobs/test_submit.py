"""Jobs of a cluster as a user meets them: a Ray head of this machine, started by the first submission to `local`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import psutil
import pytest
from filelock import FileLock

from jobs.head import Head, find
from jobs.record import load
from jobs.submissions import recall
from jobs.submit_ray import variables
from tests.jobs.sent_folder import CANARIES, HERE, furnish

SMALL = ["labels=null", "pretrain.steps=3", "pretrain.checkpoint_seconds=60", "pretrain.samples=0"]
LONG = [*SMALL, "pretrain.steps=100000", "pretrain.validate_every=100000", "pretrain.checkpoint_seconds=5"]


@dataclass(frozen=True)
class Client:
    """A person's shell: a folder with a config and things that must not leave it, and secrets in its environment."""

    home: Path
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "jobs.cli", *arguments]

    @property
    def variables(self) -> dict[str, str]:
        own = {"GRISTMILL_HOME": str(self.home), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, **self.environment}

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.variables | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )

    def json(self, *arguments: str) -> Any:
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def submit(self, key: str, settings: list[str], *more: str) -> Any:
        sets = [word for setting in settings for word in ("--set", setting)]
        return self.json("submit", "smoke.yaml", "--to", "local", "--inline", "--key", key, *sets, *more)

    @property
    def head(self) -> Head:
        there = find(self.home)
        assert there is not None, "something was submitted first"
        return there

    def get(self, path: str) -> str:
        token = (self.home / "ray-token").read_text()
        request = urllib.request.Request(self.head.address + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.read().decode()

    def plain_job(self, job: str, code: str) -> None:
        """A job that is no pipeline: it starts at once."""
        token = (self.home / "ray-token").read_text()
        body = json.dumps({"entrypoint": f"exec {sys.executable} -c '{code}'", "submission_id": job}).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.head.address}/api/jobs/", body, headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            assert answer.status == 200


def until(condition: Any, seconds: float = 90.0) -> Any:
    limit = time.monotonic() + seconds
    while not (seen := condition()):
        assert time.monotonic() < limit, "it never came to that"
        time.sleep(1)
    return seen


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """All processes of a test session share one head and home; the last to leave ends the one and clears the other."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    home, folder, users = shared / "submit-home", shared / "submit-folder", shared / "submit-users"
    mine = users / str(os.getpid())
    with FileLock(shared / "submit.lock"):
        users.mkdir(exist_ok=True)
        mine.touch()
        if not folder.exists():
            furnish(folder)
    client = Client(home, folder, CANARIES)
    yield client
    with FileLock(shared / "submit.lock"):
        mine.unlink()
        if not any(users.iterdir()):
            client("head", "stop")
            rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(client: Client) -> subprocess.CompletedProcess[str]:
    """A small pipeline, submitted and watched to its end, with one secret of the cluster and one from a file.

    Once for all processes of a test session: a second time nothing is built, for all of it is there.
    """
    seen = client.home / "finished"
    with FileLock(client.home.parent / "submit-finished.lock"):
        if not seen.exists():
            sets = [word for setting in SMALL for word in ("--set", setting)]
            secrets = ["--env", "MLFLOW_TRACKING_PASSWORD", "--env", f"HF_TOKEN=file:{client.folder}/secret"]
            done = client("submit", "smoke.yaml", "--to", "local", "--watch", "--json", *sets, *secrets)
            seen.write_text(json.dumps([done.args, done.returncode, done.stdout, done.stderr]))
        return subprocess.CompletedProcess(*json.loads(seen.read_text()))


@pytest.mark.slow
def test_a_watched_job_ends_with_its_log_and_its_exit_code(client: Client, finished: subprocess.CompletedProcess[str]):
    assert finished.returncode == 0, finished.stderr
    *log, last = finished.stdout.splitlines()
    ended = json.loads(last)
    assert ended["state"] == "succeeded"
    assert ended["exit_code"] == 0
    assert any(line.startswith("built  pretrain") for line in log)
    assert not any("::gristmill" in line for line in log)
    run = json.loads(log[-1])["run"]
    expected = {"run": run, "state": "succeeded", "job_id": ended["job_id"]}
    empty = {"stage": None, "step": None, "steps": None, "eta_seconds": None, "error": None}
    assert client.json("status", run) == client.json("status", ended["job_id"]) == expected | empty
    assert (run, "succeeded") in [(row["run"], row["state"]) for row in client.json("list")]
    assert client("resume", run).returncode == 2
    assert client("logs", run).stdout.splitlines() == log


def content(path: Path) -> bytes:
    """Nothing of what is no file, or was replaced since it was listed: other jobs go on."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        return b""


@pytest.mark.slow
def test_no_secret_is_in_what_ray_keeps(client: Client, finished: subprocess.CompletedProcess[str]):
    """Neither the client's nor the cluster's own: not in jobs, logs or unpacked folders, nor in what the home keeps."""
    job = json.loads(finished.stdout.splitlines()[-1])["job_id"]
    secrets = [*CANARIES.values(), (client.home / "ray-token").read_text()]
    told = [client.get("/api/jobs/"), client.get(f"/api/jobs/{job}"), client.get(f"/api/jobs/{job}/logs")]
    kept = [client.home / "submissions", client.home / "records", Path(client.head.temp)]
    files = [Path(root, name) for folder in kept for root, _, names in os.walk(folder) for name in names]
    held = {path: content(path) for path in files}
    assert sum(map(bool, held.values())) > 50
    for secret in secrets:
        assert not [text for text in told if secret in text]
        assert not [path for path, what in held.items() if secret.encode() in what], secret
    assert set(json.loads(told[1])["runtime_env"]["env_vars"]) == set(variables(recall(client.home, job)))  # pyright: ignore[reportArgumentType]


def listening(process: psutil.Process) -> list[str]:
    """The addresses it listens on; none if it has ended, as a worker of another job may."""
    try:
        return [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_everything_of_the_head_listens_on_loopback_alone(client: Client, finished: subprocess.CompletedProcess[str]):
    del finished
    leader = psutil.Process(client.head.pid)
    places = [place for process in (leader, *leader.children(recursive=True)) for place in listening(process)]
    assert len(places) > 5
    assert set(places) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_a_job_is_submitted_once_cancelled_at_a_checkpoint_and_gone_on_with(client: Client):
    first = client.submit("long", LONG)
    assert first == {"job_id": "long", "state": first["state"], "to": "local", "new": True}
    rmtree(client.home / "submissions" / "long")  # as if the answer had been lost
    assert client.submit("long", LONG)["new"] is False

    training = until(lambda: (seen := client.json("status", "long"))["stage"] == "pretrain" and seen["step"] and seen)
    assert training["state"] == "running"
    assert (training["stage"], training["steps"], training["job_id"]) == ("pretrain", 100_000, "long")
    assert training["eta_seconds"] > 0
    assert client("resume", "long").returncode == 2

    stopped = client.json("cancel", training["run"])
    assert (stopped["state"], stopped["job_id"]) == ("cancelled", "long")
    assert load(client.home, training["run"]).status == "cancelled"
    assert client("logs", "long", "-f").returncode == 6

    again = client.json("resume", training["run"])
    assert (again["job_id"], again["new"]) == ("long-2", True)
    assert again["resumed_from_step"] > 0
    until(lambda: f"going on from step {again['resumed_from_step']}" in client("logs", "long-2").stdout)
    assert client.json("status", "long-2")["run"] == training["run"]
    assert client.json("cancel", "long-2")["state"] == "cancelled"


@pytest.mark.slow
def test_a_variable_that_the_cluster_lacks_ends_the_job_at_once(client: Client):
    sets = [word for setting in SMALL for word in ("--set", setting)]
    done = client("submit", "smoke.yaml", "--to", "local", "--watch", "--env", "NOT_THERE", *sets)
    assert done.returncode == 3
    assert "NOT_THERE is not set in the environment of the cluster" in done.stdout


TALK = """
import time
for i in range(400):
    print(i, chr(228) * 500, flush=True)
    if i % 40 == 0: print(chr(58) * 2 + "gristmill-status {}", flush=True)
    time.sleep(0.015)
raise SystemExit(7)
"""


@pytest.mark.slow
def test_a_log_through_a_connection_that_breaks_every_second_is_whole(client: Client, finished: object):
    del finished
    client.plain_job("talk", TALK)
    port = int(client.head.address.rpartition(":")[2])
    with Cutter(port) as cutter:
        done = client("logs", "talk", "-f", "--to", f"http://127.0.0.1:{cutter.port}", **token(client))
    assert done.returncode == 7, done.stderr
    whole = json.loads(client.get("/api/jobs/talk/logs"))["logs"]
    expected = [line for line in whole.splitlines() if "::gristmill-status" not in line]
    assert done.stdout.splitlines() == expected
    assert len(expected) > 400
    assert cutter.cut_in_the_middle == Cutter.CUTS


@pytest.mark.slow
def test_ctrl_c_lets_go_of_a_job_that_goes_on(client: Client, finished: object):
    del finished
    client.plain_job("sleeper", "import time; print(1, flush=True); time.sleep(100)")
    with subprocess.Popen(
        client.command("logs", "sleeper", "-f", "--to", "local"),
        env=client.variables,
        cwd=client.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any(line == "1\n" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "gristmill logs sleeper -f" in said
    assert json.loads(client.get("/api/jobs/sleeper"))["status"] == "RUNNING"
    assert client.json("cancel", "sleeper", "--to", "local")["state"] == "cancelled"


@pytest.mark.slow
def test_a_token_that_is_wrong_or_missing_is_one_line_and_exit_code_3(client: Client, finished: object):
    del finished
    address = client.head.address
    wrong = client("list", "--to", address, RAY_AUTH_TOKEN="wrong")
    missing = Client(client.home / "empty", client.folder)("list", "--to", address, HOME=str(client.home / "empty"))
    for done, why in ((wrong, "refuses the token"), (missing, "asks for a token")):
        assert done.returncode == 3
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def token(client: Client) -> dict[str, str]:
    return {"RAY_AUTH_TOKEN": (client.home / "ray-token").read_text()}


class Cutter:
    """A slow TCP proxy on loopback: cuts all connections every second, and the first long answers in their middle."""

    CHUNK, PAUSE_SECONDS = 1 << 16, 0.01
    MIDDLE_BYTES, CUTS = 20_000, 3

    def __init__(self, to: int) -> None:
        self._to, self._open, self._over = to, set[socket.socket](), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._cuts = iter(range(self.CUTS))
        self.cut_in_the_middle = 0

    def __enter__(self) -> "Cutter":
        for work in (self._accept, self._cut_all):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._open |= {here, there}
                threading.Thread(target=self._ask, args=(here, there), daemon=True).start()
                threading.Thread(target=self._answer, args=(there, here), daemon=True).start()

    def _ask(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self.CHUNK):
                sink.sendall(data)
        self._end(source, sink)

    def _answer(self, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(self.CHUNK):
                time.sleep(self.PAUSE_SECONDS)
                middle = self.MIDDLE_BYTES - passed
                if len(data) > middle and next(self._cuts, None) is not None:
                    sink.sendall(data[: max(0, middle)])
                    self.cut_in_the_middle += 1
                    break
                sink.sendall(data)
                passed += len(data)
        self._end(source, sink)

    def _end(self, *connections: socket.socket) -> None:
        for one in connections:
            self._cut(one)
            self._open.discard(one)

    def _cut_all(self) -> None:
        while not self._over.wait(1.0):
            for one in list(self._open):
                self._cut(one)

    def _cut(self, one: socket.socket) -> None:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_a_head_that_is_not_there_is_one_line_and_exit_code_3_in_seconds(tmp_path: Path):
    client = Client(tmp_path, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        silent = client("list", "--to", f"http://127.0.0.1:{mute.getsockname()[1]}")
        refused = client("list", "--to", "http://127.0.0.1:9")
        bare = client("list", "--to", "http://head.invalid:8265", HOME=str(tmp_path))
        assert time.monotonic() - began < 40
    for done, why in ((refused, "does not answer"), (silent, "does not answer"), (bare, "RAY_AUTH_TOKEN_PATH")):
        assert done.returncode == 3
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
