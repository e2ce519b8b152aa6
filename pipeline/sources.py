"""Which files a path of the config means, under names that do not depend on where they lie."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from pipeline.errors import DataError
from pipeline.publish import combined, file_digest

KINDS = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
SAVED_DATASET = "saved dataset"
CACHED_FROM_BYTES = 64 << 20
_UNKNOWN = "cannot be looked up: {}. Correct the path or its permissions"


@dataclass(frozen=True)
class Source:
    """One thing to read: a file, or the folder of a dataset that `save_to_disk` wrote."""

    name: str
    path: Path
    kind: str
    compression: str = ""
    span: tuple[int, int] | None = None
    """The bytes to read, where they are not all: from the start of a line to the end of one."""

    @property
    def files(self) -> list[Path]:
        """The files whose bytes are its content."""
        return sorted(_files_of(self.path)) if self.kind == SAVED_DATASET else [self.path]

    @property
    def is_from_start(self) -> bool:
        """Whether its first line is the first of a file."""
        return self.span is None or self.span[0] == 0

    @property
    def n_bytes(self) -> int:
        if self.span is not None:
            return self.span[1] - self.span[0]
        return sum(file.stat().st_size for file in self.files)


def find(path: str, *, splits: bool = False) -> list[Source]:
    """The sources that a file, a folder, a glob or a saved dataset names, sorted by name.

    Folders are searched without following links to folders, so a loop of links is harmless; what is not of a known
    kind is passed over there. Raises DataError where nothing can be read, and for a saved dataset of several splits
    unless `splits` asks for all of them.
    """
    given = place(path)
    try:
        paths = _distinct(given, splits)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {_UNKNOWN.format(error)}") from error
    if not paths:
        raise DataError(f"{given.absolute()}: {_nothing(given)}")
    base = os.path.commonpath([p.absolute().parent for p in paths])
    return sorted((_source(p, base) for p in paths), key=lambda s: s.name)


def place(path: str) -> Path:
    """Where a path of a config leads to. Raises DataError for the home of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: {_UNKNOWN.format(error)}") from error


def _distinct(given: Path, splits: bool) -> list[Path]:
    """What to read, each file once even where links lead to it by several names."""
    if given.is_dir():
        found = _in_folder(given, splits)
    else:
        found = [given] if given.is_file() else [p for p in _matches(given) if kind_of(p)]
    return list({p.resolve(): p for p in sorted(found, reverse=True)}.values())


def _in_folder(folder: Path, splits: bool) -> list[Path]:
    if _is_saved_dataset(folder):
        return [folder]
    saved = [place for place in sorted(folder.iterdir()) if _is_saved_dataset(place)]
    if (folder / "dataset_dict.json").is_file() and not splits:
        names = ", ".join(place.name for place in saved)
        raise DataError(
            f"{folder}: a saved dataset with the splits {names}. Give the folder of one; "
            "labels.split: files takes all of them"
        )
    files = [file for file in _walk(folder) if kind_of(file)]
    return files or (saved if splits else [])


def _nothing(given: Path) -> str:
    if given.is_dir():
        return f"no readable file in this folder. Known kinds are {_known()}"
    return "no such file or folder. A relative path starts at the current folder; correct the path"


def _known() -> str:
    return f"{' '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)}"


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, onerror=_raise, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(root, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # not a link to itself, nor a pipe that never ends


def _raise(error: OSError) -> None:
    raise error


def _matches(pattern: Path) -> list[Path]:
    """Files that fit a glob. `**` does not follow links here, unlike in the glob module."""
    fixed = [i for i, part in enumerate(pattern.parts) if glob.has_magic(part)]
    if not fixed:
        return []
    root, rest = Path(*pattern.parts[: fixed[0]]), Path(*pattern.parts[fixed[0] :])
    return [p for p in root.glob(str(rest)) if p.is_file() and not _is_hidden(p.relative_to(root), rest)]


def _is_hidden(path: Path, pattern: Path) -> bool:
    """Whether a part of the path begins with a dot, and none of the pattern that does so names it."""
    named = [part for part in pattern.parts if part.startswith(".")]
    hidden = [part for part in path.parts if part.startswith(".")]
    return not all(any(fnmatch(part, name) for name in named) for part in hidden)


def _files_of(saved: Path) -> Iterator[Path]:
    """The files of a saved dataset, without what `datasets` caches beside them when somebody works with it."""
    return (p for p in saved.iterdir() if p.is_file() and not fnmatch(p.name, "cache-*.arrow"))


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def kind_of(path: Path) -> tuple[str, str] | None:
    """Kind and compression of a file by its name, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in KINDS else None


def _source(path: Path, base: str) -> Source:
    name = path.absolute().relative_to(base).as_posix()
    if path.is_dir():
        return Source(name, path, SAVED_DATASET)
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file. Known kinds are {_known()}; rename or convert it")
    return Source(name, path, *kind)


def digests(path: str, *, splits: bool = False) -> dict[str, str]:
    """`{place and kind: BLAKE3}` of every file that `path` means, in the order they are read.

    What a file is called does not count, only how it is read: a renamed or moved file is the same data. Raises
    DataError where one cannot be read.
    """
    files = [(source, file) for source in find(path, splits=splits) for file in source.files]
    return {f"{i:06d} {source.kind}{source.compression}": _digest(file) for i, (source, file) in enumerate(files)}


def folder_digests(folder: str, patterns: Sequence[str]) -> dict[str, str]:
    """`{name: BLAKE3}` of the files of a folder that a pattern means. Raises DataError where there is none."""
    files = {file.name: file for pattern in patterns for file in sorted(Path(folder).glob(pattern))}
    if not files:
        raise DataError(f"{Path(folder).absolute()}: holds none of {', '.join(patterns)}")
    return {name: _digest(file) for name, file in files.items()}


def digest(path: str, *, splits: bool = False) -> str:
    """One digest for all that `path` means."""
    return combined({name: {"blake3": value} for name, value in digests(path, splits=splits).items()})


def described(path: str, digest: str, context: str) -> dict[str, str]:
    """What an experiment tracker wants to know of outside data."""
    return {"name": Path(path).name, "source": str(Path(path).absolute()), "digest": digest, "context": context}


def _digest(file: Path) -> str:
    try:
        stat = file.stat()
        if stat.st_size < CACHED_FROM_BYTES:  # cheap to hash, and may be rewritten within one tick of the clock
            return file_digest(file)
        return _cached_digest(file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{file.absolute()}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=4096)
def _cached_digest(file: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    del size, mtime_ns, ctime_ns
    return file_digest(file)
