"""Where artifacts live: `store/<kind>/<key>/`, found by key, verified on every read, built by one process at a time.

With a remote, a shared store by URL has the same folders and files; what is missing here is fetched from there.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import publish, remote
from pipeline.errors import DamagedArtifact, EnvironmentProblem, Preempted
from pipeline.filesystems import checked
from pipeline.publish import MANIFEST, Manifest
from pipeline.shelf import SharedShelf, Shelf
from pipeline.tracking import progress_path, read_progress, system_path

log = logging.getLogger("gristmill")

STOP = "stop"
WAIT_POLL_SECONDS = 1.0
"""How often a run that waits for another to build looks whether it should stop."""


@dataclass(frozen=True)
class Store:
    """Under `home`: `store/` finished artifacts, `work/` what a killed stage goes on from, `journal/` metrics.

    `remote` is the URL of a store that several machines share, laid out alike. Locks stay local: two clusters that
    build one key into one remote both do the work, and since equal inputs give equal bytes it does not matter whose
    stay. Raises UsageError where `remote` is not the URL of a store, or has credentials in it.
    """

    home: Path
    remote: str | None = None
    run: str = ""
    """Whose requests to stop count: two runs may need one artifact, which one of them builds."""

    def __post_init__(self) -> None:
        if self.remote is not None:
            object.__setattr__(self, "remote", checked(self.remote))

    def here(self) -> "Store":
        """The same store as this machine sees it: with a remote, a machine may name its own home in GRISTMILL_CACHE."""
        cache = os.environ.get("GRISTMILL_CACHE")
        return replace(self, home=Path(cache)) if self.remote and cache else self

    def path(self, kind: str, key: str) -> Path:
        return self.home / "store" / kind / key

    def work(self, kind: str, key: str) -> Path:
        """A folder that outlives a kill, for checkpoints of a stage that is not finished."""
        return self.home / "work" / kind / key

    def journal(self, kind: str, key: str) -> Path:
        return self.home / "journal" / kind / f"{key}.jsonl"

    def url(self, path: Path) -> str:
        """Where the remote keeps what this store keeps at `path`. Only for a store with a remote."""
        assert self.remote is not None
        return f"{self.remote}/{path.relative_to(self.home).as_posix()}"

    # Artifacts

    def find(self, kind: str, key: str) -> Manifest | None:
        """The manifest of a finished artifact, here or in the remote, or None."""
        folder = self.path(kind, key)
        found = publish.read_manifest(folder)
        return remote.manifest(self.url(folder)) if found is None and self.remote else found

    def open(self, kind: str, key: str) -> Path:
        """The folder of a finished artifact, every byte checked; fetched if it is not here. Raises DamagedArtifact."""
        self.fetch(kind, key)
        return self.path(kind, key)

    def fetch(self, kind: str, key: str) -> Manifest:
        """As `open`, for the manifest. A copy that is damaged here is mended from the remote, which is told."""
        folder = self.path(kind, key)
        if self.remote is None:
            return publish.verify(folder)
        if publish.read_manifest(folder) is not None:
            try:
                return publish.verify(folder)
            except DamagedArtifact as damage:
                if remote.manifest(self.url(folder)) is None:
                    raise
                log.warning("%s Fetching it from %s instead.", damage, self.url(folder))
        return self._pull(folder, kind, key)

    def manifests(self, kind: str) -> list[Manifest]:
        """The manifests of every finished artifact of a kind, here and in the remote, the newest first."""
        folder = self.home / "store" / kind
        found = {
            path.parent.name: (path.stat().st_mtime, manifest)
            for path in folder.glob(f"*/{MANIFEST}")
            if (manifest := publish.read_manifest(path.parent))
        }
        elsewhere = remote.manifests(self.url(folder), without=found) if self.remote else []
        dated = [*found.values(), *elsewhere]
        return [manifest for _, manifest in sorted(dated, key=lambda one: one[0], reverse=True)]

    @contextmanager
    def writing(self, kind: str, key: str, meta: Mapping[str, Any]) -> Iterator[Path]:
        """A scratch folder that becomes the artifact if the block ends without an error. Hold the lock meanwhile.

        With a remote it is uploaded before this returns. What the stage kept to go on from is then deleted.
        """
        with publish.publishing(self.path(kind, key), meta) as scratch:
            yield scratch
        self._push(kind, key)
        self._drop(self.work(kind, key))

    def share(self, kind: str, key: str) -> None:
        """Upload an artifact that is here, if the remote has none of this key."""
        own = publish.read_manifest(self.path(kind, key))
        if self.remote is None or own is None:
            return
        there = remote.manifest(self.url(self.path(kind, key)))
        if there is None:
            self._push(kind, key)
        elif there.digest != own.digest:
            where = self.url(self.path(kind, key))
            log.warning("%s has other bytes than are here. Both are whole; each machine goes on with its own.", where)

    def drop_remote(self, kind: str, key: str) -> None:
        """Delete the remote copy of an artifact that is to be built anew: it would keep the new one out."""
        if self.remote is not None:
            remote.delete(self.url(self.path(kind, key)))

    def _push(self, kind: str, key: str) -> None:
        """The journal goes first, so that whoever finds the artifact finds all of its points."""
        if self.remote is not None:
            self.push_journal(kind, key)
            remote.push(self.path(kind, key), self.url(self.path(kind, key)))

    def _pull(self, folder: Path, kind: str, key: str) -> Manifest:
        with _held(self.home / "locks" / f"{kind}-{key}.pull.lock", f"{kind} {key[:8]} is being fetched"):
            publish.sweep(folder, remote.PULLING)
            return remote.pull(self.url(folder), folder)

    def forget_work(self, kind: str, key: str) -> None:
        """Delete what a builder that was killed after it published had kept to go on from."""
        work, lock = self.work(kind, key), self._lock(kind, key)
        if work.exists() or (self.remote is not None and remote.names(self.url(work))):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(lock).acquire(timeout=0):  # else somebody is at work there
                self._drop(work)

    def _drop(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if self.remote is not None:
            try:
                remote.delete(self.url(folder))
            except EnvironmentProblem as problem:  # nobody needs what is left there
                log.warning("not deleted: %s", problem)

    # What an unfinished stage goes on from

    def shelf(self, kind: str, key: str, below: str = "") -> Shelf:
        """Where the checkpoints of a stage lie: its work folder, or a folder below it.

        With a remote they lie there, and none of them counts before the points of the journal up to it are there too.
        """
        return self._shelf(kind, key, self.work(kind, key) / below)

    def kept(self, kind: str, key: str) -> Shelf:
        """Where a stage's checkpoints are kept for good."""
        return self._shelf(kind, key, self.home / "kept" / kind / key)

    def _shelf(self, kind: str, key: str, folder: Path) -> Shelf:
        if self.remote is None:
            return Shelf(folder)
        pull, push = partial(self._pull, kind=kind, key=key), partial(self.push_journal, kind, key)
        return SharedShelf(folder, self.url(folder), pull, push)

    # A request to stop, for whoever runs the stage on behalf of this run

    def request_stop(self, kind: str, key: str) -> None:
        """Ask the stage of this key, wherever this run has it built, to stop at its next checkpoint."""
        path = self._request(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("stop\n")
        if self.remote is not None:  # there, it is for all machines, and any of them can take it back
            remote.put_file(path, self.url(path))
            path.unlink()

    def stop_requested(self, kind: str, key: str) -> bool:
        """Whether somebody asked. A remote that does not answer is no request."""
        path = self._request(kind, key)
        if self.remote is None:
            return path.exists()
        try:
            return remote.exists(self.url(path))
        except EnvironmentProblem as problem:
            log.warning("no word of a stop: %s", problem)
            return False

    def clear_stop(self, kind: str, key: str) -> None:
        """Take a request back, or note that it was met."""
        path = self._request(kind, key)
        path.unlink(missing_ok=True)
        if self.remote is not None:
            remote.delete_file(self.url(path))

    def _request(self, kind: str, key: str) -> Path:
        return self.work(kind, key) / f"{STOP}-{self.run}"

    # Journals

    def push_journal(self, kind: str, key: str) -> None:
        """Upload the journal and the progress of a stage as they are now."""
        path = self.journal(kind, key)
        if self.remote is None or not path.exists():
            return
        for journal in (path, system_path(path)):
            if journal.exists():
                remote.put_file(journal, self.url(journal))
        progress = progress_path(path)
        if progress.exists():
            remote.put_file(progress, self.url(progress))
        else:
            remote.delete_file(self.url(progress))

    def pull_journal(self, kind: str, key: str) -> None:
        """Bring the journal and the progress of a stage up to what the remote knows.

        Of two journals the one with more whole lines stands, so none is lost that is only here; a kill leaves the old.
        """
        if self.remote is None:
            return
        path = self.journal(kind, key)
        for mine in (path, system_path(path)):
            with _fetched(self.url(mine), mine) as journal:
                if journal is not None and _lines(journal) > _lines(mine):
                    _take_over(journal, mine)
        progress = progress_path(path)
        with _fetched(self.url(progress), progress) as newer:
            if newer is None:
                progress.unlink(missing_ok=True)
            elif _said_at(newer) > _said_at(progress):
                newer.replace(progress)

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Only one process builds an artifact; another waits, and says so. The kernel frees a dead holder's lock.

        Raises Preempted where this run is asked to stop while it waits.
        """
        stop_requested = partial(self.stop_requested, kind, key)
        with _held(self._lock(kind, key), f"{kind} {key[:8]} is being built", stop_requested):
            publish.sweep(self.path(kind, key))
            yield

    def _lock(self, kind: str, key: str) -> Path:
        return self.home / "locks" / f"{kind}-{key}.lock"


@contextmanager
def _held(path: Path, what: str, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if not _is_acquired(lock, 0):
        log.warning("%s by another process; waiting for it", what)
        while not _is_acquired(lock, WAIT_POLL_SECONDS):
            if stop_requested():
                raise Preempted(f"stopped on request, while {what} by another process")
    try:
        yield
    finally:
        lock.release()


def _is_acquired(lock: FileLock, seconds: float) -> bool:
    """Whether a lock was free within that time; it is then held."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


@contextmanager
def _fetched(url: str, path: Path) -> Iterator[Path | None]:
    """A file of the remote under a passing name beside `path`, or None where there is none."""
    aside = path.with_name(f"{publish.SCRATCH_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield aside if remote.get_file(url, aside) else None
    finally:
        aside.unlink(missing_ok=True)


def _take_over(newer: Path, path: Path) -> None:
    """Make `path` what `newer` is: by appending where that will do, since somebody may have it open to write to."""
    new, old = newer.read_bytes(), path.read_bytes() if path.exists() else None
    if old is None or not new.startswith(old):
        newer.replace(path)
        return
    with path.open("ab") as file:
        file.write(new[len(old) : new.rfind(b"\n") + 1])


def _lines(journal: Path) -> int:
    """How many lines are whole."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _said_at(progress: Path) -> float:
    said = read_progress(progress)
    return said["time"] if said else 0.0
