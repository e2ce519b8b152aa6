"""MLflow shows exactly what the record and the journals hold, whatever was killed or away meanwhile."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.mlflow_client import connect
from jobs.mlflow_points import unsent
from jobs.record import open_record
from jobs.track_mlflow import Mirror, sync, sync_all
from jobs.ui import command, environment, stop
from pipeline.errors import EnvironmentProblem
from pipeline.identity import knob
from pipeline.stage import Context
from tests.jobs.commands import gristmill
from tests.jobs.conftest import Corpus, Export, Pretrain, Run, run_in
from tests.jobs.mlflow_seen import (
    child_named,
    everything_in,
    everything_in_store,
    journal_points,
    points,
    wait_for_first_answer,
)

FIRST_NEW_ROW_IN = (
    *(
        "experiments",
        "runs",
        "params",
        "tags",
        "runs",
        "params",
        "tags",
        "metrics",
        "inputs",
        "runs",
        "metrics",
        "logged_models",
        "inputs",
    ),
    *("runs", "inputs", "logged_models", "inputs", "registered_models", "model_versions", "registered_model_aliases"),
)
"""Where one sync after another is killed, in the order in which a sync first writes to these tables."""
VICTIM = """
import os, signal, sys
from pathlib import Path
import mlflow.pyfunc, sqlalchemy
import jobs.mlflow_registry, jobs.mlflow_stages
from jobs.track_mlflow import sync

def die_after_a_row_in(table):
    state = {"written": False, "committed": False}
    def on_statement(connection, cursor, statement, *rest):
        if state["committed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        state["written"] |= statement.startswith(f"INSERT INTO {table} ")
    def on_commit(connection):
        state["committed"] = state["written"]
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", on_statement)
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", on_commit)

home, run, uri, *tables = sys.argv[1:]
for table in tables:
    child = os.fork()
    if child == 0:
        die_after_a_row_in(table)
        sync(Path(home), run, uri)
        os._exit(0)
    print(table, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_sync_that_is_killed_after_any_new_row_is_made_good_by_the_next(
    home: Path, uri: str, run_toy: Run, database: Path
) -> None:
    record = run_toy([Export(base=Pretrain(corpus=Corpus(), steps=1100))], register_name="clf")
    command = [sys.executable, "-c", VICTIM, str(home), record.run, uri, *FIRST_NEW_ROW_IN]
    victim = subprocess.run(command, capture_output=True, text=True, check=True)
    assert victim.stdout.splitlines() == [f"{table} {-signal.SIGKILL}" for table in FIRST_NEW_ROW_IN], victim.stderr
    sync(home, record.run, uri)
    survived = everything_in(home)
    assert [run["status"] for run in survived["runs"]] == ["FINISHED"] * 4

    shutil.copy(database, home / "untouched.db")
    untouched = f"sqlite:///{home}/untouched.db"
    sync(home, record.run, untouched)
    assert everything_in_store(untouched) == survived


@pytest.fixture
def refusing_uri() -> str:
    return free_port()[1]


@pytest.fixture
def hanging_uri() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Broken(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500, "broken")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        del args


@pytest.fixture
def broken_uri() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["refusing_uri", "hanging_uri", "broken_uri"])
def test_a_dead_server_neither_delays_nor_breaks_a_run_and_is_named_once(
    kind: str,
    request: pytest.FixtureRequest,
    home: Path,
    run_toy: Run,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # who waited for the server would wait for long
    record, dead = run_toy(), request.getfixturevalue(kind)
    mirror = Mirror(home, record.run, dead)
    mirror.INTERVAL_SECONDS = 0.05
    with caplog.at_level(logging.WARNING, "gristmill"):
        began = time.monotonic()
        mirror.start()
        time.sleep(0.5)
        assert mirror.finish(1.5) is None
        assert time.monotonic() - began < 20
    (warning,) = caplog.messages
    assert f"{unsent(home, record)} points kept in" in warning
    assert unsent(home, record) > 80, "two numbers of 40 steps each, and what the machine did"
    assert f"gristmill sync {record.run}" in warning


def test_what_a_dead_server_missed_is_all_there_later(home: Path, uri: str, refusing_uri: str, run_toy: Run) -> None:
    record = run_toy()
    Mirror(home, record.run, refusing_uri).start().finish(10)
    sync(home, record.run, uri)
    key = str(record.stage("pretrain").key)
    shown = child_named(home, "2-pretrain")["points"]["train/loss"]
    assert shown == journal_points(home, "pretrain", key, "train/loss")


@dataclass(frozen=True, kw_only=True)
class PausedInTheMiddle(Pretrain):
    """Half of the steps, then a wait until somebody makes a file, then the other half."""

    resume: str = knob("")

    @property
    def kind(self) -> str:
        return "pretrain"

    def run(self, ctx: Context) -> None:
        for step in range(self.steps):
            if step == self.steps // 2:
                wait_until(Path(self.resume).exists)
            ctx.tracker.metrics({"train/loss": 1 / (step + 1)}, step=step)
        (ctx.out / "weights").write_text("some")
        ctx.notes["model"] = {"role": "base"}


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


@contextmanager
def serving(home: Path, uri: str, port: int) -> "Iterator[subprocess.Popen[bytes]]":
    """MLflow's server over a store, as `gristmill ui` starts it. It answers when the block begins."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command(home, uri, "127.0.0.1", port),
        env=environment(uri),
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    )
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        wait_for_first_answer(port)
        yield process
    finally:
        stop(process)


@pytest.mark.slow
def test_a_server_killed_in_mid_run_shows_all_of_an_undisturbed_run_once_it_is_back_and_synced(
    home: Path, uri: str, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, address = free_port()
    went_down = home / "went-down"
    targets = [Export(base=PausedInTheMiddle(corpus=Corpus(), resume=str(went_down)))]

    def kill_once_it_has_points(server: "subprocess.Popen[bytes]") -> None:
        wait_until(lambda: bool(losses_in(uri)))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        went_down.touch()

    with serving(home, uri, port) as server:
        killer = threading.Thread(target=kill_once_it_has_points, args=(server,))
        killer.start()
        record = run_in(home, targets, register_name="clf", follow=partial(quick_mirror, home, address))
        killer.join()
    assert record.status == "succeeded"
    assert "points kept in" in caplog.text
    key = str(record.stage("pretrain").key)
    wanted = journal_points(home, "pretrain", key, "train/loss")
    assert 0 < len(losses_in(uri)) < len(wanted) == 40

    with serving(home, uri, port):
        sync(home, record.run, address)
        shown = everything_in_store(address)
    shutil.copy(database, home / "undisturbed.db")
    sync(home, record.run, f"sqlite:///{home}/undisturbed.db")
    assert shown == everything_in_store(f"sqlite:///{home}/undisturbed.db")
    assert next(r for r in shown["runs"] if r["name"] == "2-pretrain")["points"]["train/loss"] == wanted


def losses_in(uri: str) -> list[tuple[int, int, float]]:
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "attributes.run_name = '2-pretrain'")
    return [point for run in runs for point in points(client, run.info.run_id, "train/loss")]


def quick_mirror(home: Path, address: str, run: str) -> Mirror:
    mirror = Mirror(home, run, address)
    mirror.INTERVAL_SECONDS, mirror.REST_PER_WORK = 0.1, 0
    return mirror


def free_port() -> tuple[int, str]:
    """A port that nobody listens on, and the address of a server there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return port, f"http://127.0.0.1:{port}"


def test_a_dead_server_of_one_run_keeps_no_other_from_its_own(
    home: Path, uri: str, refusing_uri: str, run_toy: Run
) -> None:
    with open_record(home, "toy", "p", stages=[], params={}, tracking_uri=refusing_uri) as dead:
        dead.finish("succeeded")
    record = run_toy()
    failed, reached = sync_all(home, uri)
    assert (failed["run"], failed["tracking_uri"]) == (dead.record.run, refusing_uri)
    assert failed["error"].startswith(f"MLflow at {refusing_uri}")
    assert (reached["run"], set(reached)) == (record.run, {"run", "tracking_uri", "mlflow_run_id"})
    told = gristmill(home, "sync")
    assert (told.returncode, told.stdout) == (3, f"{record.run}: in line with {uri}\n")
    assert told.stderr.startswith(f"{dead.record.run}: MLflow at {refusing_uri}")


def test_artifacts_that_may_not_be_put_where_the_server_wants_them_are_an_environment_problem(
    home: Path, uri: str, run_toy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "none"))
    connect(uri).create_experiment("toy", "s3://bucket/artifacts")
    with pytest.raises(EnvironmentProblem, match=r"MLflow at sqlite.*credentials"):
        sync(home, run_toy().run, uri)


def test_a_server_that_refuses_is_an_environment_problem(home: Path, refusing_uri: str, run_toy: Run) -> None:
    with pytest.raises(EnvironmentProblem, match="MLflow at http://127"):
        sync(home, run_toy().run, refusing_uri)
