"""The record of a run: what was asked, how far each stage came, how it ended. Trackers only mirror it."""

import difflib
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from pipeline.errors import Cancelled, Preempted, UsageError

StageStatus = Literal["pending", "running", "built", "reused", "failed"]
RunStatus = Literal["running", "succeeded", "failed", "cancelled", "preempted"]
EndStatus = Literal["succeeded", "failed", "cancelled", "preempted"]

JOB_ID = "GRISTMILL_JOB_ID"
"""Set in the environment of a driver that runs as a job of a cluster."""
COMMIT, DIRTY = "GRISTMILL_COMMIT", "GRISTMILL_DIRTY"
"""What code this is, for a driver that runs outside a checkout: a job, or a container image. DIRTY is 1 or 0."""
IMAGE = "GRISTMILL_IMAGE"
"""The container image that a driver runs in, by digest best of all."""
RECORD, LOCK = "record.json", "lock"
PATIENCE_SECONDS = 0.2
"""How long a held lock is waited for: longer than `is_live` holds one, so looking at a run never gets in its way."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of a run. `key` is None until its inputs are known."""

    name: str
    kind: str
    key: str | None = None
    status: StageStatus = "pending"
    started_ms: int | None = None
    finished_ms: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. `plan` is the digest of the resolved identity config; `params` its values, for people to compare."""

    run: str
    name: str
    plan: str
    started_ms: int
    status: RunStatus = "running"
    attempt: int = 1
    finished_ms: int | None = None
    commit: str | None = None
    dirty: bool = False
    image: str | None = None
    cpus: int = 0
    """Cores that the stages share."""
    job_id: str | None = None
    """The cluster's name for it, where it was submitted to one."""
    register_name: str | None = None
    register_names: dict[str, str] = field(default_factory=dict)
    """By export stage, what its model is called where that is not `register_name` with the task's name after it."""
    tracking_uri: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[StageRecord] = ()
    result: Mapping[str, Any] | None = None
    """The JSON of a run that succeeded; of another the "error" that ended it."""

    def stage(self, name: str) -> StageRecord:
        return next(stage for stage in self.stages if stage.name == name)


class OpenRecord:
    """A record in the hands of the process that runs it. Every change is on disk when the call returns.

    As a context manager it lets go of the run at the end; an exception fails the run, and Ctrl-C cancels it.
    """

    def __init__(self, folder: Path, lock: FileLock, record: Record) -> None:
        self.folder = folder
        self.record = record
        self._lock = lock
        save(folder, record)

    def started(self, name: str, key: str) -> None:
        """A stage is being built or checked. What this run has built already stays built."""
        old = self.record.stage(name)
        if old.key == key and old.status == "built":
            return
        since = old.started_ms if old.key == key else None
        self._put(StageRecord(name=name, kind=old.kind, key=key, status="running", started_ms=since or now_ms()))

    def ended(self, name: str, key: str, status: Literal["built", "reused"], seconds: float) -> None:
        """A stage is there. One that an earlier attempt of this run built stays built by this run."""
        old = self.record.stage(name)
        if old.key == key and old.status == "built" and status == "reused":
            return
        stage = replace(old, key=key, status=status, finished_ms=now_ms(), seconds=seconds)
        self._put(replace(stage, started_ms=old.started_ms or stage.finished_ms))

    def finish(self, status: EndStatus, result: Mapping[str, Any] | None = None) -> None:
        """The run is over; called again, the time of the first call stands. The lock stays until `release`."""
        finished_ms = self.record.finished_ms or now_ms()
        self._save(replace(self.record, status=status, finished_ms=finished_ms, result=result))

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> "OpenRecord":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self.record.status == "running":
            self._broken_off(ended_by(kind), str(error))
        self.release()

    def _broken_off(self, status: EndStatus, why: str) -> None:
        ended: StageStatus = "failed" if status == "failed" else "pending"
        for stage in [stage for stage in self.record.stages if stage.status == "running"]:
            self._put(replace(stage, status=ended, finished_ms=now_ms()))
        self.finish(status, {"error": why} if why else None)

    def _put(self, stage: StageRecord) -> None:
        self._save(replace(self.record, stages=[stage if s.name == stage.name else s for s in self.record.stages]))

    def _save(self, record: Record) -> None:
        save(self.folder, record)
        self.record = record


def ended_by(error: type[BaseException]) -> EndStatus:
    """What became of a run that an exception ended."""
    if issubclass(error, KeyboardInterrupt | Cancelled):
        return "cancelled"
    return "preempted" if issubclass(error, Preempted) else "failed"


def open_record(
    home: Path,
    name: str,
    plan: str,
    *,
    stages: Sequence[tuple[str, str]],
    params: Mapping[str, Any],
    register_name: str | None = None,
    register_names: Mapping[str, str] | None = None,
    tracking_uri: str = "",
    cpus: int = 0,
) -> OpenRecord:
    """Go on with the newest unfinished run of this plan that no live process holds, else begin a new one.

    `stages` are (name, kind), inputs first. The run is held until `release`, or until this process dies.
    """
    commit, dirty = code_state(Path.cwd())
    now = {
        "params": dict(params),
        "commit": commit,
        "dirty": dirty,
        "image": os.environ.get(IMAGE),
        "cpus": cpus,
        "job_id": os.environ.get(JOB_ID),
        "register_name": register_name,
        "register_names": dict(register_names or {}),
        "tracking_uri": without_password(tracking_uri),
    }
    for old in list_records(home):
        if old.name == name and _unfinished(old, plan) and (lock := _try_lock(home, old.run)):
            current = load(home, old.run)  # it may have ended between the listing and the lock
            if _unfinished(current, plan):
                return OpenRecord(folder(home, old.run), lock, _continued(current, stages, now))
            lock.release()
    run = _new_folder(home, name)
    new = Record(
        run=run,
        name=name,
        plan=plan,
        started_ms=now_ms(),
        stages=[StageRecord(name=n, kind=k) for n, k in stages],
        **now,
    )
    lock = FileLock(folder(home, run) / LOCK)
    lock.acquire(timeout=0)  # nobody else can know of a folder that has no record yet
    return OpenRecord(folder(home, run), lock, new)


def _unfinished(record: Record, plan: str) -> bool:
    return record.plan == plan and record.status != "succeeded"


def _continued(old: Record, stages: Sequence[tuple[str, str]], now: Mapping[str, Any]) -> Record:
    known = {stage.name: stage for stage in old.stages}
    kept = [known.get(name) or StageRecord(name=name, kind=kind) for name, kind in stages]
    open_again = [
        s if s.status in ("built", "reused") else replace(s, status="pending", finished_ms=None) for s in kept
    ]
    again = replace(old, status="running", attempt=old.attempt + 1, finished_ms=None, result=None, stages=open_again)
    return replace(again, **now)


def _new_folder(home: Path, name: str) -> str:
    """Claim a run id that no run has, of any home that shares a tracking server: name, time, and some random digits."""
    (home / "records").mkdir(parents=True, exist_ok=True)
    while True:
        run = f"{slug(name)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with suppress(FileExistsError):
            folder(home, run).mkdir()
            return run


def slug(name: str) -> str:
    """A name as a folder may have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


def _try_lock(home: Path, run: str) -> FileLock | None:
    lock = FileLock(folder(home, run) / LOCK)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=0.02)
    except Timeout:
        return None
    return lock


def is_live(home: Path, run: str) -> bool:
    """Whether a process holds this run now. The kernel lets go of a dead holder's lock."""
    lock = folder(home, run) / LOCK
    if not lock.exists():
        return False
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except Timeout:
        return True


def folder(home: Path, run: str) -> Path:
    """Where a run keeps its record, its resolved config and its lock."""
    return home / "records" / run


def save(folder: Path, record: Record) -> None:
    """Write the record: a reader sees the old one or the new one, whole."""
    scratch = folder / f".tmp-{RECORD}"
    with scratch.open("w") as out:
        json.dump(asdict(record), out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(folder / RECORD)


def load(home: Path, run: str) -> Record:
    """The record of a run. Raises UsageError with the nearest names where there is none."""
    path = folder(home, run) / RECORD
    if not path.is_file():
        runs = [record.run for record in list_records(home)]
        near = difflib.get_close_matches(run, runs, cutoff=0.3) or runs[:3]
        raise UsageError(
            f"no run {run!r} in {home}. " + (f"Nearest: {', '.join(near)}" if near else "Nothing has run yet.")
        )
    return _read(path)


def _read(path: Path) -> Record:
    values = json.loads(path.read_text())
    return Record(**{**values, "stages": [StageRecord(**stage) for stage in values["stages"]]})


def list_records(home: Path) -> list[Record]:
    """Every run of this home, newest first."""
    return sorted((_read(p) for p in (home / "records").glob(f"*/{RECORD}")), key=lambda r: -r.started_ms)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def without_password(uri: str) -> str:
    """A tracking URI as it may be shown and stored."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}"))


def code_state(folder: Path) -> tuple[str | None, bool]:
    """What code runs: as the environment says, or else as the checkout that the folder is in."""
    told = os.environ.get(COMMIT)
    return (told, os.environ.get(DIRTY) == "1") if told else git_state(folder)


def git_state(checkout: Path) -> tuple[str | None, bool]:
    """The commit of a checkout and whether files differ from it; (None, False) outside one."""
    commit = _git(checkout, "rev-parse", "HEAD")
    return (commit or None, bool(commit and _git(checkout, "status", "--porcelain")))


def _git(checkout: Path, *arguments: str) -> str:
    git = shutil.which("git")
    if git is None or not checkout.is_dir():
        return ""
    command = [git, "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    return done.stdout.strip() if done.returncode == 0 else ""
