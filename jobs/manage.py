"""Runs by name, wherever they are: on this machine, or as jobs of a cluster. What `status`, `list`, `cancel` do."""

import difflib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from jobs import record, submissions
from jobs.follow import wait_until_ended
from jobs.ray_jobs import Job, Jobs, Unreachable, target
from jobs.record import Record
from jobs.status import ENDED, Status, recorded, run_of_job, run_status, told
from jobs.stopping import CANCEL
from jobs.submissions import Submission
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.store import Store

Say = Callable[[str], None]

TRAINED = ("pretrain", "finetune")


@dataclass(frozen=True)
class Found:
    """What a person named: a run of this home, a job of a cluster, or a run of this home that a job worked on."""

    run: str | None = None
    job_id: str | None = None
    to: str | None = None
    submission: Submission | None = None

    @property
    def name(self) -> str:
        return self.run or self.job_id or ""


def find(home: Path, name: str | None, to: str | None = None) -> Found:
    """The run or job of that name, or the newest one. Raises UsageError with the nearest names where there is none."""
    name = name or _newest(home, to)
    old = submissions.recall(home, name)
    known = record.load(home, name) if (record.folder(home, name) / record.RECORD).is_file() else None
    if known is not None:
        old = submissions.recall(home, job) if (job := known.job_id) else None
        return Found(known.run, old and old.job_id, to or (old and old.to), old)
    if old is None and to is None:
        raise UsageError(_unknown(home, name))
    there = old and _record_of(home, old)
    return Found(there.run if there else None, name, to or (old and old.to), old)


def _newest(home: Path, to: str | None) -> str:
    if to is not None:
        raise UsageError("with --to, name the job; `gristmill list --to ...` shows them")
    runs = [(r.started_ms, r.run) for r in record.list_records(home)]
    jobs = [(s.submitted_ms, s.job_id) for s in submissions.all_of(home)]
    if not runs and not jobs:
        raise UsageError(f"nothing has run in {home} yet: gristmill run CONFIG")
    return max(runs + jobs)[1]


def _unknown(home: Path, name: str) -> str:
    names = [r.run for r in record.list_records(home)] + [s.job_id for s in submissions.all_of(home)]
    near = difflib.get_close_matches(name, names, cutoff=0.3) or names[:3]
    hint = f"Nearest: {', '.join(near)}. " if near else "Nothing has run there yet. "
    return f"no run or job {name!r} in {home}. {hint}For a job of another home, say where it is: --to http://head:8265"


def _record_of(home: Path, old: Submission) -> Record | None:
    """The record that a job works on, if its home can be read from here."""
    return run_of_job(Path(old.home or home), old.job_id)


def status(home: Path, found: Found, say: Say) -> Status:
    """How far it is: as the record says, if it can be read and is sure; else as the cluster says."""
    if found.job_id is None:
        return run_status(home, found.name)
    if (seen := _of_record(home, found)) and seen.state != "lost":
        _note(home, found.submission, seen.state)
        return seen
    ended = found.submission and found.submission.ended
    try:
        jobs = Jobs(target(found.to or "", home, say))
        if job := jobs.find(found.job_id):
            _note(home, found.submission, job.state)
            return _of_job(home, found, jobs, job)
    except Unreachable:
        if seen is None and ended is None:
            raise
    return seen or Status(run=found.run, state=ended or "lost", job_id=found.job_id)


def _of_record(home: Path, found: Found) -> Status | None:
    """What the run of a job says, where it can be read from here: `lost` may also mean that it is being restarted."""
    there = found.submission and _record_of(home, found.submission)
    return run_status(Path(found.submission.home or home), there.run) if found.submission and there else None


def _of_job(home: Path, found: Found, jobs: Jobs, job: Job) -> Status:
    there = found.submission and _record_of(home, found.submission)
    if found.submission and there:
        return recorded(Path(found.submission.home or home), there, job.state)
    said = told(jobs.log(job.id)) or {}
    known = {f.name for f in fields(Status)}
    seen = Status(**{"run": None, **{k: v for k, v in said.items() if k in known}, "state": job.state})
    stage = {} if job.state == "running" else {"step": None, "steps": None, "eta_seconds": None}
    return replace(seen, job_id=job.id, **stage)


def _note(home: Path, old: Submission | None, state: str) -> None:
    if old and state in ENDED:
        submissions.note_end(home, old, state)


def rows(home: Path, to: str | None, say: Say) -> list[dict[str, Any]]:
    """`{"run", "job_id", "name", "state", "started_ms", "to"}` of every run and job, the newest first.

    With `to`: every job of that cluster, whoever submitted it.
    """
    if to is not None:
        return [
            _row(None, job.id, job.name, job.state, job.started_ms, to) for job in Jobs(target(to, home, say)).all()
        ]
    records = record.list_records(home)
    mine = submissions.all_of(home)
    states = _states(home, mine, say)
    of_job = {job: run for run in reversed(records) if (job := run.job_id)}
    found = [_row_of_job(home, old, states[old.job_id], of_job.pop(old.job_id, None)) for old in mine]
    seen = {row["run"] for row in found}
    found += [_row_of_run(home, run) for run in records if run.run not in seen]
    return sorted(found, key=lambda row: -row["started_ms"])


def _row(run: str | None, job_id: str | None, name: str, state: str, started_ms: int, to: str | None) -> dict[str, Any]:
    return {"run": run, "job_id": job_id, "name": name, "state": state, "started_ms": started_ms, "to": to}


def _row_of_run(home: Path, run: Record) -> dict[str, Any]:
    state = run_status(home, run.run).state
    return _row(run.run, run.job_id, run.name, state, run.started_ms, None)


def _row_of_job(home: Path, old: Submission, state: str | None, run: Record | None) -> dict[str, Any]:
    if state is None:
        state = run_status(home, run.run).state if run else "lost"
    return _row(run.run if run else None, old.job_id, old.name, state, old.submitted_ms, old.to)


def _states(home: Path, mine: Sequence[Submission], say: Say) -> Mapping[str, str | None]:
    """The state of each submission: None where the cluster has forgotten it. Each cluster is asked once, if need be."""
    states: dict[str, str | None] = {old.job_id: old.ended for old in mine}
    for to in {old.to for old in mine if old.ended is None}:
        waiting = [old for old in mine if old.to == to and old.ended is None]
        try:
            jobs = {job.id: job for job in Jobs(target(to, home, say)).all()}
        except EnvironmentProblem as problem:
            if to != "local":
                say(str(problem))
                states |= {old.job_id: "unknown" for old in waiting}
            continue
        for old in waiting:
            if job := jobs.get(old.job_id):
                states[old.job_id] = job.state
                _note(home, old, job.state)
    return states


def cancel(home: Path, found: Found, seconds: float, say: Say) -> Status:
    """Ask it to write a checkpoint and stop, and wait until it has. Raises EnvironmentProblem where it does not."""
    before = status(home, found, say)
    if before.state in ENDED:
        say(f"{found.name} runs no more: {before.state}")
        return before
    if found.job_id is None:
        _cancel_here(home, found.name, seconds)
    else:
        jobs = Jobs(target(found.to or "", home, say))
        jobs.stop(found.job_id)
        if not wait_until_ended(jobs, found.job_id, seconds):
            raise EnvironmentProblem(f"{found.job_id} was told to stop and has not yet; `gristmill status` shows when")
    return status(home, found, say)


def _cancel_here(home: Path, run: str, seconds: float) -> None:
    wish = record.folder(home, run) / CANCEL
    wish.touch()
    until = time.monotonic() + seconds
    while record.is_live(home, run) and record.load(home, run).status == "running":
        if time.monotonic() > until:
            raise EnvironmentProblem(
                f"{run} was asked to stop and has not within {seconds:.0f} s; `gristmill status {run}` shows when. "
                f"Killing its process is safe too: that costs what was done since the last checkpoint"
            )
        time.sleep(0.2)
    wish.unlink(missing_ok=True)  # or it would stop the run again once it is resumed


def check_resumable(found: Found, seen: Status) -> None:
    """Raises UsageError for what is alive, or done."""
    if seen.state in ("running", "pending"):
        raise UsageError(
            f"{found.name} is {seen.state}; there is nothing to resume. Follow it: gristmill status {found.name}"
        )
    if seen.state == "succeeded":
        raise UsageError(f"{found.name} has succeeded; there is nothing to resume")


def resumed_from(home: Path, run: str) -> int | None:
    """The step of the newest checkpoint of the training that a run was in, or None where it has none."""
    for stage in record.load(home, run).stages:
        if stage.kind in TRAINED and stage.key and stage.status not in ("built", "reused"):
            return max(Store(home, _remote(home, run)).shelf(stage.kind, stage.key).steps(), default=None)
    return None


def _remote(home: Path, run: str) -> str | None:
    """The shared store of a run, if it has one."""
    path = record.folder(home, run) / "resolved.yaml"
    resolved: dict[str, Any] = YAML(typ="safe").load(path) if path.exists() else {}
    return resolved.get("cluster", {}).get("store") or os.environ.get("GRISTMILL_STORE")
