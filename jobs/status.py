"""How far a run is: worked out from what it leaves on disk, and, for a job elsewhere, told through lines of its log."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.pace import seconds_left
from jobs.record import JOB_ID, Record, StageRecord, is_live, list_records, load
from pipeline.store import Store
from pipeline.tracking import progress_path, read_progress

MARK = "::gristmill-status "
_MARKED = re.compile(rf"{MARK}([^\n]*)\n")

ENDED = ("succeeded", "failed", "cancelled", "preempted", "lost")


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a run is. `state` is pending, running, succeeded, failed, cancelled, preempted or lost.

    `lost` says that it is running, and no process holds it. `step` of `steps` is the progress of the stage that runs,
    in that stage's own units (optimizer steps in training), where it tells; `eta_seconds` is for that stage too.
    `error` is what ended it.
    """

    run: str | None
    state: str
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    eta_seconds: float | None = None
    job_id: str | None = None
    error: str | None = None


def run_status(home: Path, run: str) -> Status:
    """The status of a run of this home. Raises UsageError where there is none of that name."""
    record = load(home, run)
    lost = record.status == "running" and not is_live(home, run)
    return recorded(home, record, "lost" if lost else record.status)


def recorded(home: Path, record: Record, state: str) -> Status:
    """What the record and the files beside it say of a run that is in `state`."""
    error = (record.result or {}).get("error") if state == record.status else None
    seen = Status(run=record.run, state=state, job_id=record.job_id, error=error)
    stage = next((stage for stage in record.stages if stage.status in ("running", "failed")), None)
    if stage is None or state == "succeeded":
        return seen
    done, total, left = _progress(home, stage) if state == "running" else (None, None, None)
    return Status(**{**asdict(seen), "stage": stage.name, "step": done, "steps": total, "eta_seconds": left})


def _progress(home: Path, stage: StageRecord) -> tuple[int | None, int | None, float | None]:
    """Progress of a running stage: done, total, and the seconds that are left."""
    journal = Store(home).journal(stage.kind, stage.key or "")
    seen = read_progress(journal)
    if not seen or not seen["total"]:
        return None, None, None
    done, total = int(seen["done"]), int(seen["total"])
    elapsed = None if stage.started_ms is None else max(0.0, time.time() - stage.started_ms / 1000)
    left = seconds_left(journal, done, total, elapsed)
    return done, total, round(left, 1) if left is not None and progress_path(journal).exists() else None


def run_of_job(home: Path, job_id: str) -> Record | None:
    """The run that a job of this home works on, or None while it has none."""
    return next((record for record in list_records(home) if record.job_id == job_id), None)


@contextmanager
def announce(home: Path, run: str) -> Iterator[None]:
    """While the block runs, print the run's status to stdout whenever it changes, for whoever reads the job's log.

    Does nothing unless GRISTMILL_JOB_ID is set. Put it around everything that opens and finishes the record's stages:
    the last line is printed as the block ends, and says what the record then says.
    """
    if JOB_ID not in os.environ:
        yield
        return
    announcer = _Announcer(home, run)
    announcer.start()
    try:
        yield
    finally:
        announcer.finish()


class _Announcer(threading.Thread):
    """Looks every 2 s at first, and less often in a run of hours, so that its lines stay a small part of the log."""

    SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 30.0
    LOOKS_PER_AGE = 600

    def __init__(self, home: Path, run: str) -> None:
        super().__init__(name=f"announce-{run}", daemon=True)
        self._home, self._run_name = home, run
        self._stopping = threading.Event()
        self._said: Status | None = None
        self._began = time.monotonic()

    def run(self) -> None:
        while True:
            self._say()
            age = time.monotonic() - self._began
            if self._stopping.wait(min(self.LONGEST_SECONDS, max(self.SHORTEST_SECONDS, age / self.LOOKS_PER_AGE))):
                return

    def finish(self) -> None:
        self._stopping.set()
        self.join()
        self._say()

    def _say(self) -> None:
        record = load(self._home, self._run_name)
        status = recorded(self._home, record, record.status)  # this process holds it, so it is not lost
        if status != self._said:
            sys.stdout.flush()
            os.write(sys.stdout.fileno(), marker(status).encode())  # in one write, so that no other falls into it
            self._said = status


def marker(status: Status) -> str:
    """The line of a log that tells a status."""
    return f"{MARK}{json.dumps(asdict(status))}\n"


def told(log: str) -> dict[str, Any] | None:
    """The newest status that a log tells, as JSON, or None. A line that is not whole counts for nothing."""
    for text in reversed(_MARKED.findall(log)):
        try:
            return json.loads(text)
        except ValueError:
            continue
    return None


def hide(log: str) -> str:
    """A log as a person reads it: without the lines that tell a status."""
    return _MARKED.sub("", log)
