"""The one way anything is kept: a folder that is complete and checksummed, or does not exist.

Write into `.tmp-*` beside the target, fsync the files, write `manifest.json` last, fsync the folder, rename, fsync the
parent. A kill at any moment leaves either the whole artifact or a `.tmp-*` folder that nobody reads. One that comes
while a version is replaced may leave the old one aside, where `sweep` puts it back.
"""

import errno
import json
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from pipeline.errors import DamagedArtifact
from pipeline.faults import fault_point

MANIFEST = "manifest.json"
SCHEMA = 1
SCRATCH_PREFIX = ".tmp-"
UMASK = os.umask(0o077)  # there is no way to ask without setting it
os.umask(UMASK)
WINDOW_BYTES = 32 << 20
_ASIDE = re.compile(r"(.+)-[0-9a-f]{8}-old\d+")
WRITTEN_AT_A_TIME = 16
"""Files that are brought to the disk side by side: each waits for it, not for a core."""


@dataclass(frozen=True)
class Manifest:
    """What a published folder holds. `digest` covers the files only, so equal bytes have equal digests."""

    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]
    digest: str


@contextmanager
def publishing(target: Path, meta: Mapping[str, Any]) -> Iterator[Path]:
    """A scratch folder that becomes `target` if, and only if, the block ends without an error.

    `meta` is read when the block ends, so it may gather notes while the block runs. An existing target is replaced.
    """
    with replacing(target) as scratch:
        yield scratch
        files = digests(scratch)
        seal(scratch, files, manifest_bytes(meta, files))


def manifest_bytes(meta: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The `manifest.json` of a folder with these files."""
    record = {"schema": SCHEMA, **meta, "digest": combined(files), "files": files}
    return json.dumps(record, indent=2, sort_keys=True).encode()


@contextmanager
def replacing(target: Path, prefix: str = SCRATCH_PREFIX) -> Iterator[Path]:
    """A scratch folder that takes the place of `target` if the block, which has to `seal` it, ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f"{prefix}{target.name}-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
        fault_point("publish.rename")
        _move(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seal(folder: Path, names: Collection[str], manifest: bytes) -> None:
    """Bring the named files to the disk, and the manifest after them; others may read what they may by the umask."""
    for name in names:  # safetensors gives what it writes to its writer alone
        (folder / name).chmod(0o666 & ~UMASK)
    with ThreadPoolExecutor(WRITTEN_AT_A_TIME) as pool:
        list(pool.map(fsync, [folder / name for name in names]))
    fault_point("publish.manifest")
    (folder / MANIFEST).write_bytes(manifest)
    fsync(folder / MANIFEST)
    fsync(folder)


def _move(scratch: Path, target: Path) -> None:
    aside: list[Path] = []
    while True:
        try:
            scratch.rename(target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # a damaged or older version, or one that another process has just put there, steps aside first, since rename
        # cannot replace a full folder
        old = scratch.with_name(f"{scratch.name}-old{len(aside)}")
        with suppress(FileNotFoundError):
            aside.append(target.rename(old))
        fault_point("publish.aside")
    for old in aside:
        shutil.rmtree(old)
    fsync(target.parent)


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The BLAKE3 of a file, hex. Mapped a window at a time: what is mapped counts as this process's memory."""
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, WINDOW_BYTES):
            length = min(WINDOW_BYTES, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as window:
                hasher.update(window)
    return hasher.hexdigest()


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {"blake3", "bytes"}}` of every file in a folder but its manifest."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST)
    return {p.relative_to(folder).as_posix(): entry(p) for p in paths}


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"blake3": file_digest(path), "bytes": path.stat().st_size}


def combined(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for many files: 32 hex digits over their names and digests."""
    return blake3("".join(f"{n}\0{files[n]['blake3']}\n" for n in sorted(files)).encode()).hexdigest()[:32]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a published folder, or None where there is no complete artifact."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_manifest(data: bytes) -> Manifest | None:
    """The manifest that a `manifest.json` holds, or None where it is torn or not one."""
    try:
        record = json.loads(data)
        files, digest = record.pop("files"), record.pop("digest")
        combined(files)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if record.pop("schema", None) != SCHEMA:
        return None
    return Manifest(record, files, digest)


def verify(folder: Path) -> Manifest:
    """Read every file of an artifact against its manifest. Raises DamagedArtifact with path, digests and remedy."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise DamagedArtifact(
            f"{folder}: no valid {MANIFEST}, so there is no artifact here. Delete the folder and run again."
        )
    for name in manifest.files:
        verify_file(folder, name, manifest, folder)
    verify_self(manifest, folder)
    return manifest


def verify_file(folder: Path, name: str, manifest: Manifest, source: Path | str) -> None:
    """Check one file of `folder` against a manifest; `source` is where the error says it came from."""
    path, expected = folder / name, manifest.files[name]["blake3"]
    actual = file_digest(path) if path.is_file() else "no such file"
    if actual != expected:
        raise DamagedArtifact(
            f"{source}/{name}: damaged. blake3 expected {expected}, actual {actual}. "
            f"Delete {source} and run again: it is rebuilt from its inputs."
        )


def verify_self(manifest: Manifest, source: Path | str) -> None:
    """Check that a manifest agrees with its own digest."""
    if combined(manifest.files) != manifest.digest:
        raise DamagedArtifact(
            f"{source}/{MANIFEST}: damaged: it does not match its own digest {manifest.digest}. "
            f"Delete {source} and run again."
        )


def sweep(target: Path, prefix: str = SCRATCH_PREFIX) -> None:
    """Clear up what interrupted writers of `target` left beside it. Call it only under the lock that guards it."""
    for orphan in target.parent.glob(f"{prefix}{target.name}-*"):
        clear(orphan, prefix)


def clear(orphan: Path, prefix: str = SCRATCH_PREFIX) -> None:
    """Remove what an interrupted writer left; but what it moved aside, and put nothing in the place of, goes back."""
    moved = _ASIDE.fullmatch(orphan.name.removeprefix(prefix))
    if moved and read_manifest(orphan):
        with suppress(OSError):  # there is a new version
            orphan.rename(orphan.with_name(moved[1]))
    shutil.rmtree(orphan, ignore_errors=True)
