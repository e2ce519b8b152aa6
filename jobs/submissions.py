"""What this home remembers of the jobs it submitted: where each went, and with what config."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SUBMISSION, CONFIG = "submission.json", "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One submitted job. `to` is `local` or an address; `key` what its id was derived from, without a suffix.

    `folder` is where the config's relative paths start on this machine, `home` is GRISTMILL_HOME on the cluster where
    it was given. `env` are names and paths, never values.
    """

    job_id: str
    key: str
    to: str
    name: str
    folder: str
    submitted_ms: int
    home: str | None = None
    env: Sequence[str] = ()
    inline: bool = False
    ended: str | None = None
    """The state in which it was seen to have ended; it is not asked for again."""


def remember(home: Path, submission: Submission, config: Path) -> None:
    """Keep a submission and its resolved config."""
    place = folder(home, submission.job_id)
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, place / CONFIG)
    _save(place, submission)


def note_end(home: Path, submission: Submission, state: str) -> None:
    """Keep in what state a job was seen to have ended."""
    if submission.ended != state:
        _save(folder(home, submission.job_id), replace(submission, ended=state))


def _save(place: Path, submission: Submission) -> None:
    scratch = place / f".tmp-{SUBMISSION}-{os.getpid()}"
    scratch.write_text(json.dumps(asdict(submission), indent=2))
    scratch.replace(place / SUBMISSION)


def recall(home: Path, job: str) -> Submission | None:
    """The submission of that id, or None where this home made none."""
    try:
        return Submission(**json.loads((folder(home, job) / SUBMISSION).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def all_of(home: Path) -> list[Submission]:
    """Every submission of this home, the newest first."""
    names = [path.parent.name for path in (home / "submissions").glob(f"*/{SUBMISSION}")]
    found = [submission for name in names if (submission := recall(home, name))]
    return sorted(found, key=lambda submission: -submission.submitted_ms)


def config_of(home: Path, submission: Submission) -> Path:
    """The resolved config that the job was given."""
    return folder(home, submission.job_id) / CONFIG


def folder(home: Path, job: str) -> Path:
    return home / "submissions" / job
