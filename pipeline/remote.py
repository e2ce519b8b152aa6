"""Published folders and small files in a store that other machines reach too, by URL: file, memory, s3 or gs.

A folder is uploaded files first and `manifest.json` last, and deleted the other way round. On an object store a PUT is
atomic, so whoever finds a manifest finds all of its files; a folder without one does not exist.

Every function raises EnvironmentProblem with the URL and the remedy where the store cannot be used: no package, no
credentials, no bucket, no answer. A store that has answered before is waited for, half a minute, before that.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pipeline import publish
from pipeline.errors import DamagedArtifact, EnvironmentProblem
from pipeline.faults import fault_point
from pipeline.filesystems import Place, ask, place
from pipeline.publish import MANIFEST, Manifest

PULLING = ".tmp-pull-"
"""What folders that are being downloaded are called; apart from what a builder of the same artifact may sweep away."""
THREADS = 4
"""Files on their way at once; with the parts of large files, that takes about 256 MiB of memory."""


def push(folder: Path, url: str) -> bool:
    """Upload a published folder, its manifest last. False where the same files are there already: nothing is sent.

    Other files under the same URL are first made to be no artifact, so that no reader takes the new ones for theirs.
    """
    own = publish.read_manifest(folder)
    if own is None:
        raise DamagedArtifact(f"{folder}: no valid {MANIFEST}, so there is no artifact to upload")
    there = manifest(url)
    if there is not None and (there.digest, there.files) == (own.digest, own.files):
        return False
    if there is not None:
        delete_file(f"{url}/{MANIFEST}")
    put_files(folder, own.files, url)
    fault_point("remote.push")
    put_file(folder / MANIFEST, f"{url}/{MANIFEST}")
    return True


def pull(url: str, folder: Path) -> Manifest:
    """Make `folder` what the published folder at `url` is, every byte checked, whole or not at all.

    Only files that `folder` does not have yet are downloaded; those that a pull had brought before it was killed, or
    the store did not answer any more, are not downloaded again. Raises DamagedArtifact with the URL, the digests and
    the remedy. One pull of a folder at a time: the caller holds a lock, and sweeps what killed ones left (`PULLING`).
    """
    while True:
        data = _manifest_bytes(url)
        try:
            return _pull(url, data, folder)
        except DamagedArtifact:
            if _manifest_bytes(url) == data:
                raise  # else it was replaced while it was being read


def _manifest_bytes(url: str) -> bytes:
    data = read(f"{url}/{MANIFEST}")
    if data is None or publish.parse_manifest(data) is None:
        raise DamagedArtifact(f"{url}: no valid {MANIFEST}, so there is no artifact here. Run again: it is built anew.")
    return data


def _pull(url: str, data: bytes, folder: Path) -> Manifest:
    found = publish.parse_manifest(data)
    assert found is not None
    publish.verify_self(found, url)
    for name in found.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedArtifact(f"{url}/{MANIFEST}: names a file outside its folder: {name!r}. Delete {url}.")
    here = {name for name, entry in found.files.items() if _digest(folder / name) == entry["blake3"]}
    if here == found.files.keys() and publish.read_manifest(folder) == found:
        return found

    arrived = folder.with_name(f"{PULLING}{folder.name}")  # also what a pull that was cut off had brought
    try:
        _bring(url, found, found.files.keys() - here, arrived)
    except (DamagedArtifact, OSError):  # OSError: a full disk, say
        shutil.rmtree(arrived, ignore_errors=True)
        raise
    fault_point("remote.pull")
    with publish.replacing(folder, PULLING) as scratch:
        for name in found.files:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            if name in here:
                _link(folder / name, scratch / name)
            else:
                (arrived / name).rename(scratch / name)
        shutil.rmtree(arrived, ignore_errors=True)
        publish.seal(scratch, found.files, data)
    return found


def _bring(url: str, found: Manifest, names: Iterable[str], folder: Path) -> None:
    """Have the named files of an artifact in `folder`, checked; those that are right there already are not fetched."""

    def bring(name: str) -> None:
        if _digest(folder / name) != found.files[name]["blake3"]:
            get_file(f"{url}/{name}", folder / name)
            publish.verify_file(folder, name, found, url)

    _side_by_side(bring, names)


def _digest(path: Path) -> str | None:
    return publish.file_digest(path) if path.is_file() else None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def manifest(url: str) -> Manifest | None:
    """The manifest of a published folder: one small request. None where there is no complete artifact."""
    data = read(f"{url}/{MANIFEST}")
    return None if data is None else publish.parse_manifest(data)


def manifests(url: str, *, without: Collection[str] = ()) -> list[tuple[float, Manifest]]:
    """The published folders directly under `url`, with the time of their upload in seconds since 1970."""
    found: list[tuple[float, Manifest]] = []

    def look(name: str) -> None:
        where = place(f"{url}/{name}/{MANIFEST}")
        with suppress(FileNotFoundError):
            if entry := manifest(f"{url}/{name}"):
                found.append((ask(where, lambda: where.fs.modified(where.path)).timestamp(), entry))

    _side_by_side(look, [name for name in names(url) if name not in without])
    return found


def names(url: str) -> list[str]:
    """The folders directly under `url`, published or not, sorted; none where there is no such URL."""
    where = place(url)
    try:
        entries = ask(where, lambda: where.fs.ls(where.path, detail=True))
    except FileNotFoundError:
        return []
    found = {PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory"}
    return sorted(name for name in found if not name.startswith("."))


def delete(url: str) -> None:
    """Delete a folder, if it is there; its manifest first, so that a kill in mid-delete leaves no half of one."""
    where = place(url)
    assert "/" in where.path.strip("/"), f"{url}: a whole bucket is not ours to delete"
    delete_file(f"{url}/{MANIFEST}")
    fault_point("remote.delete")
    with suppress(FileNotFoundError):
        ask(where, lambda: where.fs.rm(where.path, recursive=True))


def copy(url: str, target: str) -> None:
    """Give a published folder a second place in the same store, if it is not there; no byte of it comes through here.

    Raises DamagedArtifact where there is none at `url`.
    """
    found = publish.parse_manifest(_manifest_bytes(url))
    assert found is not None
    if manifest(target) is not None:
        return
    _side_by_side(lambda name: _copy_file(f"{url}/{name}", f"{target}/{name}"), found.files)
    _copy_file(f"{url}/{MANIFEST}", f"{target}/{MANIFEST}")


def _copy_file(url: str, target: str) -> None:
    source, where = place(url), place(target)
    try:
        ask(where, lambda: where.fs.cp_file(source.path, where.path))
    except FileNotFoundError as error:
        raise DamagedArtifact(f"{url}: no such file. Delete its folder and run again.") from error


def put(data: bytes, url: str) -> None:
    """Upload a small file: a reader sees the old one or the new one, whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        path.write_bytes(data)
        put_file(path, url)


def put_files(folder: Path, names: Iterable[str], url: str) -> None:
    """Upload the named files of a folder, some at once. In what order they appear is not said."""
    _side_by_side(lambda name: put_file(folder / name, f"{url}/{name}"), names)


def put_file(path: Path, url: str) -> None:
    """Upload a file: a reader sees the old one or the new one, whole. Raises DamagedArtifact if `path` is missing."""
    where = place(url)
    if not path.is_file():
        raise DamagedArtifact(f"{path}: no such file, so it cannot be uploaded to {url}")
    try:
        ask(where, lambda: _send(where, path))
    except FileNotFoundError as error:
        raise EnvironmentProblem(f"{url}: the place to write to is gone ({error}). Create it again") from error


def _send(where: Place, path: Path) -> None:
    if where.scheme != "file":
        where.fs.put_file(str(path), where.path, **where.writing)
        return
    aside = Path(f"{where.path}.{uuid.uuid4().hex[:8]}.tmp")  # a copy can be cut short, where a PUT cannot
    try:
        where.fs.put_file(str(path), str(aside))
        publish.fsync(aside)
        aside.replace(where.path)
    finally:
        aside.unlink(missing_ok=True)


def get_file(url: str, path: Path) -> bool:
    """Download a file beside `path`, then put it in its place. False, and nothing done, where the store has none."""
    where = place(url)
    aside = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        ask(where, lambda: where.fs.get_file(where.path, str(aside)))
        aside.replace(path)
    except FileNotFoundError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def read(url: str) -> bytes | None:
    """A small file in one request. None where the store has none."""
    where = place(url)
    try:
        return ask(where, lambda: where.fs.cat_file(where.path, **where.reading))
    except (FileNotFoundError, NotADirectoryError):
        return None


def delete_file(url: str) -> None:
    """Delete one file. One that is not there is fine."""
    where = place(url)
    with suppress(FileNotFoundError, NotADirectoryError):
        ask(where, lambda: where.fs.rm_file(where.path))


def exists(url: str) -> bool:
    """Whether there is a file or folder of this URL; asked once, since who polls will ask again."""
    where = place(url)
    return ask(where, lambda: where.fs.exists(where.path), waits=())


def _side_by_side(function: Callable[[str], None], items: Iterable[str]) -> None:
    """Call a function for every item, some at once. The first error ends it, and is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = [pool.submit(function, item) for item in items]
        try:
            for one in waiting:
                one.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
