"""The one way anything is kept: a folder that is complete and checksummed, or does not exist.

Write into `.tmp-*` beside the target, fsync the files, write `manifest.json` last, fsync the folder, rename, fsync the
parent. A kill at any moment leaves either the whole artifact or a `.tmp-*` folder that nobody reads.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from pipeline.errors import DamagedArtifact
from pipeline.faults import fault_point

MANIFEST = "manifest.json"
SCHEMA = 1
SCRATCH_PREFIX = ".tmp-"


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
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f"{SCRATCH_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
        _seal(scratch, meta)
        fault_point("publish.rename")
        _move(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _seal(folder: Path, meta: Mapping[str, Any]) -> None:
    files = digests(folder)
    for name in files:
        _fsync(folder / name)
    record = {"schema": SCHEMA, **meta, "digest": combined(files), "files": files}
    fault_point("publish.manifest")
    with (folder / MANIFEST).open("w") as out:
        json.dump(record, out, indent=2, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    _fsync(folder)


def _move(scratch: Path, target: Path) -> None:
    if target.exists():  # a damaged or older version: step aside first, since rename cannot replace a full folder
        aside = scratch.with_name(f"{scratch.name}-old")
        target.rename(aside)
        scratch.rename(target)
        shutil.rmtree(aside)
    else:
        scratch.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The BLAKE3 of a file, hex; memory-mapped, so a file of any size costs no memory."""
    hasher = blake3(max_threads=blake3.AUTO)
    if path.stat().st_size:  # an empty file cannot be mapped
        hasher.update_mmap(path)
    return hasher.hexdigest()


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {"blake3", "bytes"}}` of every file in a folder but its manifest."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST)
    return {p.relative_to(folder).as_posix(): {"blake3": file_digest(p), "bytes": p.stat().st_size} for p in paths}


def combined(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for many files: 32 hex digits over their names and digests."""
    return blake3("".join(f"{n}\0{files[n]['blake3']}\n" for n in sorted(files)).encode()).hexdigest()[:32]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a published folder, or None where there is no complete artifact."""
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
        files, digest = record.pop("files"), record.pop("digest")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
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
    for name, expected in manifest.files.items():
        path = folder / name
        actual = file_digest(path) if path.is_file() else "no such file"
        if actual != expected["blake3"]:
            raise DamagedArtifact(
                f"{path}: damaged. blake3 expected {expected['blake3']}, actual {actual}. "
                f"Delete {folder} and run again: it is rebuilt from its inputs."
            )
    if combined(manifest.files) != manifest.digest:
        raise DamagedArtifact(
            f"{folder / MANIFEST}: damaged: it does not match its own digest {manifest.digest}. "
            f"Delete {folder} and run again."
        )
    return manifest


def sweep(target: Path) -> None:
    """Remove what interrupted writers of `target` left beside it. Call it only under the lock that guards it."""
    for orphan in target.parent.glob(f"{SCRATCH_PREFIX}{target.name}-*"):
        shutil.rmtree(orphan, ignore_errors=True)
