"""MLflow shows exactly what the record and the journals hold, whatever was killed or away meanwhile."""

import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.track_mlflow import Mirror, sync
from pipeline.errors import EnvironmentProblem
from tests.jobs.conftest import Corpus, Export, Pretrain, Run
from tests.jobs.mlflow_seen import (
    child_named,
    everything_in,
    everything_in_store,
    journal_points,
)

FIRST_NEW_ROW_IN = (
    *(
        "experiments",
        "runs",
        "params",
        "tags",
        "runs",
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


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
    kind: str, request: pytest.FixtureRequest, home: Path, run_toy: Run, caplog: pytest.LogCaptureFixture
) -> None:
    record, dead = run_toy(), request.getfixturevalue(kind)
    mirror = Mirror(home, record.run, dead)
    mirror.INTERVAL_SECONDS = 0.05
    with caplog.at_level(logging.WARNING, "gristmill"):
        began = time.monotonic()
        mirror.start()
        assert time.monotonic() - began < 0.5
        time.sleep(0.5)
        assert mirror.finish(1.5) is None
        assert time.monotonic() - began < 4
    (warning,) = caplog.messages
    assert "80 points kept in" in warning
    assert f"gristmill sync {record.run}" in warning


def test_what_a_dead_server_missed_is_all_there_later(home: Path, uri: str, refusing_uri: str, run_toy: Run) -> None:
    record = run_toy()
    Mirror(home, record.run, refusing_uri).start().finish(10)
    sync(home, record.run, uri)
    key = str(record.stage("pretrain").key)
    shown = child_named(home, "2-pretrain")["points"]["train/loss"]
    assert shown == journal_points(home, "pretrain", key, "train/loss")


def test_a_server_that_refuses_is_an_environment_problem(home: Path, refusing_uri: str, run_toy: Run) -> None:
    with pytest.raises(EnvironmentProblem, match="MLflow at http://127"):
        sync(home, run_toy().run, refusing_uri)
