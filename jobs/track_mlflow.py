"""MLflow as a mirror of the local record: a function that brings it in line, and a thread that calls it during a run.

Nothing a run needs is read from MLflow, so it may be slow, wrong or away; what it has missed is sent later.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from jobs.mlflow_client import CLASSIC_VIEW, alone, connect, reaching
from jobs.mlflow_points import unsent
from jobs.record import list_records, load, without_password
from pipeline.errors import EnvironmentProblem, UsageError

log = logging.getLogger("gristmill")

REDACTED = ":***@"
"""In a recorded URI; the environment then has the real one."""


@dataclass(frozen=True)
class Mirrored:
    """Where a run is seen in MLflow.

    `model_uris` are `models:/NAME/VERSION`, by the export stage of each classifier.
    """

    run_id: str
    experiment_id: str
    model_uris: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_uri(self) -> str | None:
        """The model of the run, or the last of several."""
        return list(self.model_uris.values())[-1] if self.model_uris else None


def sync(home: Path, run: str, uri: str) -> Mirrored:
    """Bring MLflow in line with the record of a run. May be called at any time, again and again, and killed in between.

    Raises UsageError where there is no such run, EnvironmentProblem where MLflow cannot be reached or refuses.
    """
    load(home, run)
    with reaching(uri), alone(home):
        from jobs.mlflow_notes import run_note
        from jobs.mlflow_registry import register
        from jobs.mlflow_runs import close, note, open_book, parent_status
        from jobs.mlflow_stages import mirror_stage

        book = open_book(connect(uri, create=True), home, load(home, run))
        for number, stage in enumerate(book.record.stages, 1):
            mirror_stage(book, number, stage)
        versions = register(book)
        if parent_status(book) != "RUNNING":
            note(book, run_note(book))
        close(book)
    models = {stage: f"models:/{version.name}/{version.version}" for stage, version in versions.items()}
    return Mirrored(book.parent.info.run_id, book.experiment.experiment_id, models)


def sync_all(home: Path, uri: str, run: str | None = None) -> list[dict[str, Any]]:
    """Mirror one run, or every run, the oldest first, to the tracking server it was made with.

    `uri` is for those whose own is not known or had a password. A row a run: `{"run", "tracking_uri"}` and
    "mlflow_run_id", or "error" where that server cannot be reached, which keeps no other run from its own.
    """
    records = [record for record in reversed(list_records(home)) if run in (None, record.run)]
    if run and not records:
        raise UsageError(f"{run!r} is no run of {home.resolve()}")
    kept = {record.run: record.tracking_uri for record in records}
    own = {name: uri if not known or REDACTED in known else known for name, known in kept.items()}
    return [{"run": name, "tracking_uri": without_password(to), **_told(home, name, to)} for name, to in own.items()]


def _told(home: Path, run: str, uri: str) -> dict[str, str]:
    try:
        return {"mlflow_run_id": sync(home, run, uri).run_id}
    except EnvironmentProblem as problem:
        return {"error": str(problem)}


def run_url(uri: str, experiment_id: str, run_id: str) -> str | None:
    """The page of a run, where the tracking URI is a server's."""
    return _page(uri, f"experiments/{experiment_id}/runs/{run_id}")


def version_url(uri: str, name: str, version: str) -> str | None:
    """The page of a registered model's version, where the tracking URI is a server's."""
    return _page(uri, f"models/{quote(name, safe='')}/versions/{version}")


def _page(uri: str, place: str) -> str | None:
    if not uri.startswith(("http://", "https://")):
        return None
    return f"{without_password(uri).rstrip('/')}/#/{place}?{CLASSIC_VIEW}"


class Mirror:
    """A background thread that keeps MLflow in line with a run. It never raises into the run or makes it wait.

    As a context manager it works until the block ends; if that is by an exception, it takes a last look at the record.
    """

    INTERVAL_SECONDS = 2.0
    LAST_LOOK_SECONDS = 10.0
    LONGEST_PAUSE_SECONDS = 60.0
    REST_PER_WORK = 20
    """It rests this many times as long as a sync took, so that it takes at most a twentieth of one core."""
    REST_PER_AGE = 0.01
    """And a hundredth of the time that the run has gone: who waits for hours does not look every two seconds."""

    def __init__(self, home: Path, run: str, uri: str) -> None:
        self._home, self._run, self._uri = home, run, uri
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"mirror-{run}", daemon=True)
        self._unreachable_since: str | None = None
        self._failures = 0
        self._final: Mirrored | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.finish(self.LAST_LOOK_SECONDS)

    def start(self) -> Self:
        self._thread.start()
        return self

    def finish(self, timeout_seconds: float) -> Mirrored | None:
        """Sync once more and stop. None if that failed or took longer; `sync` can make up for it at any time."""
        self._stop.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._warn("it did not answer in time")
        return self._final

    def _work(self) -> None:
        last, started = False, time.monotonic()
        while not last:
            last = self._stop.is_set()  # asked before the sync, which so sees all that was written before `finish`
            began = time.monotonic()
            mirrored = self._try()
            if last:
                self._final = mirrored
            else:
                now = time.monotonic()
                self._stop.wait(self.rest_seconds(now - began, now - started))

    def rest_seconds(self, took_seconds: float, age_seconds: float) -> float:
        """How long until the next sync, after one that took so long, in a run that has gone so long."""
        shares = self.REST_PER_WORK * took_seconds, self.REST_PER_AGE * age_seconds
        return min(max(self.INTERVAL_SECONDS, *shares) * 2**self._failures, self.LONGEST_PAUSE_SECONDS)

    def _try(self) -> Mirrored | None:
        try:
            mirrored = sync(self._home, self._run, self._uri)
        except EnvironmentProblem as problem:
            self._failures = min(self._failures + 1, 10)
            self._warn(str(problem))
            return None
        if self._failures:
            log.info("MLflow is reachable again; nothing was lost")
        self._failures, self._unreachable_since = 0, None
        return mirrored

    def _warn(self, reason: str) -> None:
        """Say it once for each time that MLflow is away."""
        if self._unreachable_since is not None:
            return
        self._unreachable_since = time.strftime("%H:%M")
        points = unsent(self._home, load(self._home, self._run))
        log.warning(
            "MLflow unreachable since %s; %s points kept in %s. Later: gristmill sync %s (%s)",
            self._unreachable_since,
            f"{points:,}",
            self._home / "journal",
            self._run,
            reason,
        )
