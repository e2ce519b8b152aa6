"""Submit a run as a job of a Ray cluster: the same command twice while the first is alive is one job."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from jobs.launch_ray import SETTINGS
from jobs.ray_jobs import LOCAL, Job, Jobs, remote, target
from jobs.record import COMMIT, DIRTY, JOB_ID, code_state, now_ms, slug
from jobs.shipment import CONFIG, Shipment, packed, read_config
from jobs.submissions import Submission, config_of, recall, remember
from pipeline.errors import UsageError
from pipeline.identity import fingerprint
from pipeline.pipeline_config import PipelineConfig

DIGEST_DIGITS = 10
STOP_SECONDS = 120
"""What a job is given between SIGTERM and SIGKILL, to write a checkpoint. Ray's own default is 3 s.

A little less than `gristmill cancel` waits.
"""

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(=file:.+)?")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a person asks for. `home` and the paths in `env` are the cluster's."""

    to: str
    key: str | None = None
    home: str | None = None
    env: Sequence[str] = ()
    inline: bool = False

    def __post_init__(self) -> None:
        if self.key is not None and not KEY.fullmatch(self.key):
            raise UsageError(
                f"--key {self.key}: letters, digits and ._- only, 64 at most; it becomes the id of the job"
            )
        if self.home is not None and not (self.home.startswith("~") or PurePosixPath(self.home).is_absolute()):
            raise UsageError(
                f"--home {self.home}: give an absolute path of the cluster; the job's own folder is deleted"
            )
        for text in self.env:
            if not ENV.fullmatch(text):
                raise UsageError(
                    f"--env {text.partition('=')[0]}: give a name that the cluster's environment has, or "
                    f"NAME=file:PATH with a path of the cluster. A value would be readable in Ray's dashboard"
                )


@dataclass(frozen=True)
class Submitted:
    """A job that is on its way. `new` is False where an earlier submission of the same is still alive."""

    submission: Submission
    jobs: Jobs
    new: bool


def submit(path: Path, overrides: list[str], order: Order, home: Path, say: Callable[[str], None]) -> Submitted:
    """Submit a config, with relative paths from the current folder. Raises GristmillError before anything is sent."""
    return send(read_config(path, overrides), Path.cwd(), order, home, say)


def again(old: Submission, home: Path, say: Callable[[str], None], to: str | None = None) -> Submitted:
    """Submit what an earlier job was given, to where it went."""
    order = Order(to=to or old.to, key=old.key, home=old.home, env=old.env, inline=old.inline)
    return send(read_config(config_of(home, old), []), Path(old.folder), order, home, say)


def send(config: PipelineConfig, folder: Path, order: Order, home: Path, say: Callable[[str], None]) -> Submitted:
    """Pack, connect, and submit under the first id that is free, unless one of them is alive."""
    if order.to == LOCAL:
        order = replace(order, home=str(home))
    else:
        remote(order.to, home)  # an address or token that is wrong is told before the packing
    with packed(config, folder, home) as shipment:
        say(f"packed {shipment.n_files} files, {shipment.n_bytes / 1e6:.1f} MB")
        jobs = Jobs(target(order.to, home, say, start=True))
        submission = _submission(config, folder, order, shipment)
        number, last = 1, None
        while True:
            submission = replace(submission, job_id=_id(submission.key, number))
            job = jobs.find(submission.job_id)
            if job is None and _submit(jobs, submission, shipment):
                _told_anew(say, last, submission)
                remember(home, submission, shipment.archive.with_name(CONFIG))
                return Submitted(submission, jobs, new=True)
            if job is not None and not job.ended:
                say(f"{job.id} is already {job.state}; not submitted again")
                if recall(home, job.id) is None:  # the answer to the first submission was lost, or another home made it
                    remember(home, submission, shipment.archive.with_name(CONFIG))
                return Submitted(submission, jobs, new=False)
            if job is not None:
                number, last = number + 1, job


def _told_anew(say: Callable[[str], None], last: Job | None, submission: Submission) -> None:
    if last is not None:
        say(f"{last.id} has {_ended(last)}; submitted anew as {submission.job_id}")


def _ended(job: Job) -> str:
    return {"failed": "failed", "succeeded": "succeeded"}.get(job.state, f"been {job.state}")


def _submission(config: PipelineConfig, folder: Path, order: Order, shipment: Shipment) -> Submission:
    key = order.key or f"{slug(config.name)}-{_digest(order, shipment)}"
    return Submission(
        job_id=key,
        key=key,
        to=order.to.rstrip("/"),
        name=config.name,
        folder=str(folder),
        submitted_ms=now_ms(),
        home=order.home,
        env=list(order.env),
        inline=order.inline,
    )


def _digest(order: Order, shipment: Shipment) -> str:
    """Of what is shipped and how it is run: another home or another variable is another job."""
    how = {"home": order.home, "env": list(order.env), "inline": order.inline}
    return fingerprint({"shipment": shipment.digest, **how})[:DIGEST_DIGITS]


def _id(key: str, number: int) -> str:
    return key if number == 1 else f"{key}-{number}"


def _submit(jobs: Jobs, submission: Submission, shipment: Shipment) -> bool:
    """Whether it was taken. Not so where another client was quicker with the same id."""
    runtime_env = {"working_dir": str(shipment.archive), "env_vars": variables(submission)}
    metadata = {"name": submission.name, "key": submission.key}
    return jobs.submit(submission.job_id, entrypoint(submission), runtime_env, metadata)


def variables(submission: Submission) -> dict[str, str]:
    """All that a job's environment gets from here. Ray shows it to whoever sees the dashboard: no secrets."""
    commit, dirty = code_state(Path(submission.folder))
    code = {COMMIT: commit, DIRTY: str(int(dirty))} if commit else {}  # the shipment is no checkout
    return {JOB_ID: submission.job_id, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **code, **SETTINGS}


def entrypoint(submission: Submission) -> str:
    """The command that the cluster runs: with its own `python`, in the unpacked shipment."""
    home = ["--home", submission.home] if submission.home else []
    env = [word for name in submission.env for word in ("--env", name)]
    inline = ["--inline"] if submission.inline else []
    # exec: no shell in between that a signal would end first
    return "exec " + shlex.join(
        ["python", "-m", "jobs.supervise", "--tree-signalled", *home, *env, "--", "run", CONFIG, "--json", *inline]
    )
