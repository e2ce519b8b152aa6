"""Where artifacts live: `store/<kind>/<key>/`, found by key, verified on every read, built by one process at a time."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import publish
from pipeline.publish import Manifest

log = logging.getLogger("gristmill")


@dataclass(frozen=True)
class Store:
    """Under `home`: `store/` finished artifacts, `work/` what a killed stage goes on from, `journal/` metrics."""

    home: Path

    def path(self, kind: str, key: str) -> Path:
        return self.home / "store" / kind / key

    def work(self, kind: str, key: str) -> Path:
        """A folder that outlives a kill, for checkpoints of a stage that is not finished."""
        return self.home / "work" / kind / key

    def journal(self, kind: str, key: str) -> Path:
        return self.home / "journal" / kind / f"{key}.jsonl"

    def find(self, kind: str, key: str) -> Manifest | None:
        """The manifest of a finished artifact, or None."""
        return publish.read_manifest(self.path(kind, key))

    def open(self, kind: str, key: str) -> Path:
        """The folder of a finished artifact, every byte checked. Raises DamagedArtifact."""
        publish.verify(self.path(kind, key))
        return self.path(kind, key)

    def manifests(self, kind: str) -> list[Manifest]:
        """The manifests of every finished artifact of a kind, the newest first."""
        paths = (self.home / "store" / kind).glob(f"*/{publish.MANIFEST}")
        newest_first = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [manifest for path in newest_first if (manifest := publish.read_manifest(path.parent))]

    @contextmanager
    def writing(self, kind: str, key: str, meta: Mapping[str, Any]) -> Iterator[Path]:
        """A scratch folder that becomes the artifact if the block ends without an error. Hold the lock meanwhile."""
        with publish.publishing(self.path(kind, key), meta) as scratch:
            yield scratch
        shutil.rmtree(self.work(kind, key), ignore_errors=True)

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Only one process builds an artifact; another waits, and says so. The kernel frees a dead holder's lock."""
        path = self.home / "locks" / f"{kind}-{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s %s is being built by another process; waiting for it", kind, key[:8])
            lock.acquire()
        try:
            publish.sweep(self.path(kind, key))
            yield
        finally:
            lock.release()
