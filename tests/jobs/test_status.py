"""How far a run is: from the files it leaves, and from the lines that its driver prints for those far away."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from jobs import manage, record, submissions
from jobs.record import Record, open_record
from jobs.show import runs_table, status_lines
from jobs.status import Status, hide, marker, run_status, told
from jobs.submissions import Submission
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.store import Store
from pipeline.tracking import Recorder

STAGES = [("corpus", "corpus"), ("pretrain", "pretrain"), ("finetune", "finetune")]
KEY = "b" * 32


def begin(home: Path, name: str = "toy") -> record.OpenRecord:
    """A run in the middle of pretraining, held by this process."""
    opened = open_record(home, name, "plan", stages=STAGES, params={})
    opened.started("corpus", "a" * 32)
    opened.ended("corpus", "a" * 32, "built", 1.0)
    opened.started("pretrain", KEY)
    return opened


def train(home: Path, steps: int, total: int) -> Recorder:
    recorder = Recorder(Store(home).journal("pretrain", KEY))
    for step in range(steps):
        recorder.metrics({"train/loss": 1.0}, step=step)
        time.sleep(0.002)
    recorder.progress(steps, total)
    return recorder


def quiet(text: str) -> None:
    del text


def test_a_run_that_trains_tells_its_stage_step_and_time_left(tmp_path: Path):
    with begin(tmp_path) as opened:
        train(tmp_path, 20, 100)
        seen = run_status(tmp_path, opened.record.run)
    assert asdict(seen) | {"eta_seconds": None} == {
        "run": opened.record.run,
        "state": "running",
        "stage": "pretrain",
        "step": 20,
        "steps": 100,
        "eta_seconds": None,
        "job_id": None,
        "error": None,
    }
    assert seen.eta_seconds is not None
    assert 80 * 0.002 * 0.5 < seen.eta_seconds < 80 * 0.002 * 20


def test_what_ended_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with suppress(UsageError), begin(tmp_path) as opened:
        raise UsageError("labels.csv: no column 'label'")
    status_lines(run_status(tmp_path, opened.record.run), None)
    shown = capsys.readouterr().out
    assert "error  labels.csv: no column 'label'" in shown
    assert f"gristmill resume {opened.record.run}, or gristmill run CONFIG if the config was wrong" in shown


def test_ids_of_runs_are_never_folded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-run-with-a-long-name-20261122-063120-5f0c"
    row = {"run": name, "job_id": None, "state": "lost", "started_ms": 0, "to": "http://head.example:8265"}
    runs_table([row])
    assert name in capsys.readouterr().out


def test_a_pause_in_training_does_not_spoil_the_time_left(tmp_path: Path):
    journal = Store(tmp_path).journal("pretrain", KEY)
    with begin(tmp_path) as opened:
        train(tmp_path, 3, 100)
        times = [0, 1000, 2000, 3000, 90_000, 91_000, 92_000]  # killed for a while after step 3
        lines = [json.dumps({"step": n, "timestamp_ms": t, "metrics": {}}) for n, t in enumerate(times)]
        journal.write_text("\n".join([*lines, '{"torn']))
        assert run_status(tmp_path, opened.record.run).eta_seconds == 97.0


def test_a_stage_without_progress_or_steps_is_still_named(tmp_path: Path):
    with begin(tmp_path) as opened:
        seen = run_status(tmp_path, opened.record.run)
    assert (seen.stage, seen.step, seen.steps, seen.eta_seconds) == ("pretrain", None, None, None)


def test_a_run_that_nobody_holds_is_lost(tmp_path: Path):
    opened = begin(tmp_path)
    train(tmp_path, 3, 10)
    opened.release()  # as the kernel does when a process is killed
    seen = run_status(tmp_path, opened.record.run)
    assert (seen.state, seen.stage, seen.step, seen.eta_seconds) == ("lost", "pretrain", None, None)


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "preempted"])
def test_a_run_that_ended_says_how(tmp_path: Path, state: str):
    with begin(tmp_path) as opened:
        opened.finish(state)  # pyright: ignore[reportArgumentType]
    assert run_status(tmp_path, opened.record.run).state == state


ANNOUNCE = """
import sys, time
from pathlib import Path
from jobs.record import open_record
from jobs.status import announce
home = Path(sys.argv[1])
opened = open_record(home, "toy", "plan", stages=[("corpus", "corpus")], params={})
try:
    with announce(home, opened.record.run), opened as run:
        run.started("corpus", "a" * 32)
        print("a line of the stage")
        time.sleep(2.5)
        if sys.argv[2:]:
            raise ValueError
        run.ended("corpus", "a" * 32, "built", 1.0)
        run.finish("succeeded")
except ValueError:
    pass
"""


def announced(home: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ANNOUNCE, str(home), *arguments],
        env={k: v for k, v in os.environ.items() if k != "GRISTMILL_JOB_ID"} | {"PYTHONPATH": "."} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def test_a_driver_of_a_job_tells_its_status_whenever_it_changes(tmp_path: Path):
    log = announced(tmp_path, GRISTMILL_JOB_ID="toy-1")
    assert 2 <= log.count("::gristmill-status ") <= 3
    assert hide(log) == "a line of the stage\n"
    [run] = record.list_records(tmp_path)
    expected = Status(run=run.run, state="succeeded", job_id=told(log)["job_id"])  # pyright: ignore[reportOptionalSubscript]
    assert told(log) == asdict(expected)


def test_a_driver_that_fails_tells_that_at_last(tmp_path: Path):
    log = announced(tmp_path, "fail", GRISTMILL_JOB_ID="toy-1")
    assert (told(log) or {})["state"] == "failed"
    assert (told(log) or {})["stage"] == "corpus"


def test_a_driver_on_its_own_prints_none_of_it(tmp_path: Path):
    assert announced(tmp_path) == "a line of the stage\n"


def test_the_newest_whole_line_counts_and_all_are_hidden():
    older, newer = (Status(run="r", state="running", step=step) for step in (1, 2))
    log = f"a\n{marker(older)}half a line {marker(newer)}and its other half\n::gristmill-status {{torn"
    assert told(log) == asdict(newer)
    assert hide(log) == "a\nhalf a line and its other half\n::gristmill-status {torn"
    assert told("nothing\n") is None


def ended(home: Path, name: str, state: str = "failed") -> Record:
    with begin(home, name) as opened:
        opened.finish(state)  # pyright: ignore[reportArgumentType]
    return opened.record


def submitted(home: Path, job: str, **more: object) -> Submission:
    made = Submission(job_id=job, key=job, to="http://127.0.0.1:9", name="toy", folder=".", submitted_ms=1)
    made = replace(made, **more)  # pyright: ignore[reportArgumentType]
    config = home / "any.yaml"
    config.write_text("name: toy\n")
    submissions.remember(home, made, config)
    return made


def test_runs_and_jobs_are_found_by_name_and_the_newest_without(tmp_path: Path):
    submitted(tmp_path, "toy-job")
    run = ended(tmp_path, "toy")
    assert manage.find(tmp_path, run.run).run == run.run
    assert manage.find(tmp_path, "toy-job").to == "http://127.0.0.1:9"
    assert manage.find(tmp_path, None).run == run.run
    with pytest.raises(UsageError, match="Nearest: toy-job"):
        manage.find(tmp_path, "toy-jib")
    with pytest.raises(UsageError, match="nothing has run"):
        manage.find(tmp_path / "empty", None)


def test_runs_and_jobs_are_listed_the_newest_first(tmp_path: Path):
    submitted(tmp_path, "old", ended="succeeded")
    submitted(tmp_path, "older", ended="failed", submitted_ms=0)
    run = ended(tmp_path, "toy")
    rows = manage.rows(tmp_path, None, quiet)
    assert [row["run"] or row["job_id"] for row in rows] == [run.run, "old", "older"]
    assert [row["state"] for row in rows] == ["failed", "succeeded", "failed"]


def test_a_job_whose_cluster_is_away_shows_what_was_last_known(tmp_path: Path):
    submitted(tmp_path, "job", ended="succeeded")
    submitted(tmp_path, "unseen")
    said: list[str] = []
    assert manage.status(tmp_path, manage.find(tmp_path, "job"), said.append).state == "succeeded"
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        manage.status(tmp_path, manage.find(tmp_path, "unseen"), said.append)
    states = {row["job_id"]: row["state"] for row in manage.rows(tmp_path, None, said.append)}
    assert states == {"job": "succeeded", "unseen": "unknown"}
    assert "does not answer" in said[-1]


def test_a_local_run_is_cancelled_through_a_file(tmp_path: Path):
    opened = begin(tmp_path)
    wish = opened.folder / manage.CANCEL

    def driver() -> None:
        while not wish.exists():
            time.sleep(0.02)
        opened.finish("cancelled")
        opened.release()

    thread = threading.Thread(target=driver)
    thread.start()
    seen = manage.cancel(tmp_path, manage.find(tmp_path, None), 20, quiet)
    thread.join()
    assert seen.state == "cancelled"
    assert not wish.exists()


def test_a_run_that_does_not_stop_in_time_is_said_to(tmp_path: Path):
    with begin(tmp_path) as opened, pytest.raises(EnvironmentProblem, match="has not within 0 s"):
        manage.cancel(tmp_path, manage.find(tmp_path, opened.record.run), 0.3, quiet)


class Head(BaseHTTPRequestHandler):
    """As much of a Ray head as `cancel` speaks to, with a list of what it says of its job: None for one it forgot.

    Before the second time it breaks the connection. The last of the list is said for ever.
    """

    says: ClassVar[list[str | None]]
    told = 0

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})
        elif self.path.endswith("/logs"):
            self._answer({"logs": ""})
        else:
            self._tell_of_the_job(type(self))

    def do_POST(self) -> None:
        self._answer({"stopped": True})

    def log_message(self, format: str, *args: object) -> None: ...

    def _tell_of_the_job(self, head: "type[Head]") -> None:
        head.told += 1
        if head.told == 2:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif status := head.says[min(head.told, len(head.says)) - 1]:
            self._answer({"type": "SUBMISSION", "submission_id": "job", "status": status, "entrypoint": ""})
        else:
            self.send_error(404)

    def _answer(self, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def head_that_says(*says: str | None) -> Iterator[manage.Found]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Once", (Head,), {"says": says}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield manage.Found(job_id="job", to=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("after", "state"), [("STOPPED", "cancelled"), (None, "lost")])
def test_a_job_is_cancelled_through_a_lost_connection_and_is_gone_when_its_cluster_forgets_it(
    tmp_path: Path, after: str | None, state: str
):
    with head_that_says("RUNNING", "RUNNING", "RUNNING", after) as job:
        assert manage.cancel(tmp_path, job, 20, quiet).state == state


def test_a_job_that_does_not_stop_is_waited_for_as_long_as_asked(tmp_path: Path):
    began = time.monotonic()
    with head_that_says("RUNNING") as job, pytest.raises(EnvironmentProblem, match="has not yet"):
        manage.cancel(tmp_path, job, 1, quiet)
    assert time.monotonic() - began < 30


def test_a_run_that_has_ended_needs_no_cancelling(tmp_path: Path):
    said: list[str] = []
    run = ended(tmp_path, "toy")
    assert manage.cancel(tmp_path, manage.find(tmp_path, run.run), 0, said.append).state == "failed"
    assert not (record.folder(tmp_path, run.run) / manage.CANCEL).exists()
    assert "runs no more: failed" in said[0]


def test_only_what_is_neither_alive_nor_done_is_resumed():
    found = manage.Found(run="r")
    for state in ("failed", "cancelled", "preempted", "lost"):
        manage.check_resumable(found, Status(run="r", state=state))
    for state, why in (("running", "r is running"), ("pending", "r is pending"), ("succeeded", "has succeeded")):
        with pytest.raises(UsageError, match=why):
            manage.check_resumable(found, Status(run="r", state=state))


def test_the_step_to_resume_from_is_that_of_the_newest_checkpoint(tmp_path: Path):
    run = ended(tmp_path, "toy")
    assert manage.resumed_from(tmp_path, run.run) is None
    for name in ("step-00000020", "step-00000100", ".tmp-step-00000120", "step-7"):
        (Store(tmp_path).work("pretrain", KEY) / name).mkdir(parents=True)
    assert manage.resumed_from(tmp_path, run.run) == 100
