"""What a job takes along: the installed packages, the resolved config, and the input files it names; nothing else."""

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from blake3 import blake3

from jobs.models import SCHEME
from jobs.run import write_resolved
from pipeline import sources
from pipeline.assemble import assemble
from pipeline.config import flat, load
from pipeline.errors import UsageError
from pipeline.pipeline_config import PipelineConfig
from pipeline.publish import file_digest
from pipeline.stages.imported import MODEL_FILES, TOKENIZER_FILES

PACKAGES = ("model", "pipeline", "jobs")
NOT_CODE = {"__pycache__"}
NEVER = {".git", ".venv", "venv", "__pycache__", "node_modules"}
CONFIG = "config.yaml"
DATA, FILE, MODEL = "path", "deepspeed_config", "init_from"
"""Keys of a config, whatever section they are in, that name data (a file, a folder, a pattern), a single file, and the
folder of a model."""

LIMIT_BYTES = 100 << 20
"""The largest upload that Ray's dashboard accepts."""
SAME_TIME = (1980, 1, 1, 0, 0, 0)
LARGEST_SHOWN = 3


@dataclass(frozen=True)
class Shipment:
    """A zip to be unpacked where the driver starts. Equal contents have equal digests."""

    archive: Path
    digest: str
    n_files: int
    n_bytes: int
    """Of the zip."""


def read_config(path: Path, overrides: list[str]) -> PipelineConfig:
    """A config that may leave this machine. Raises UsageError where it is wrong, or where it holds a password."""
    config = load(PipelineConfig, path, overrides).config
    if config.init_from is None or Path(config.init_from).is_dir():  # a registered model is looked up where it runs
        assemble(config)
    for key, value in flat(asdict(config)):
        if isinstance(value, str) and _has_password(value):
            raise UsageError(f"{key}: a password in a config would be stored on the cluster. {_remedy(key)}")
    return config


def _has_password(value: str) -> bool:
    try:
        return "://" in value and urlsplit(value).password is not None
    except ValueError:  # no address after all
        return False


def _remedy(key: str) -> str:
    if key == "tracking.uri":
        return (
            "Leave user and password out of the address, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
            "in the cluster's environment (`--env MLFLOW_TRACKING_PASSWORD` makes sure that it is there)"
        )
    return "Leave it out, and give it to the cluster through its own environment"


@contextmanager
def packed(config: PipelineConfig, folder: Path, kept: Path, limit_bytes: int = LIMIT_BYTES) -> Iterator[Shipment]:
    """The shipment of a config whose relative paths start at `folder`, on disk until the block ends.

    `kept` is GRISTMILL_HOME, which never goes along. Raises UsageError with sizes where it is too large for Ray, and
    where an input is not there or cannot go along.
    """
    with tempfile.TemporaryDirectory(prefix="gristmill-") as scratch:
        resolved = Path(scratch) / CONFIG
        write_resolved(resolved, config)
        files = {CONFIG: resolved, **code(), **inputs(config, folder, kept)}
        archive = Path(scratch) / "job.zip"
        _zip(archive, files, limit_bytes)
        digest = blake3("".join(f"{name}\0{file_digest(files[name])}\n" for name in sorted(files)).encode()).hexdigest()
        yield Shipment(archive, digest, len(files), archive.stat().st_size)


def code() -> dict[str, Path]:
    """The files of the installed packages, by their names in the shipment."""
    found = {}
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None, package
        assert spec.submodule_search_locations, package
        root = Path(spec.submodule_search_locations[0])
        paths = (p for p in root.rglob("*") if p.is_file() and not NOT_CODE & set(p.parts) and p.suffix != ".pyc")
        found |= {f"{package}/{path.relative_to(root).as_posix()}": path for path in paths}
    return found


def inputs(config: PipelineConfig, folder: Path, kept: Path) -> dict[str, Path]:
    """The files that the config names by relative paths. Absolute ones are the cluster's, which must have them."""
    found = {}
    for key, value in flat(asdict(config)):
        if key.rpartition(".")[2] in (DATA, FILE, MODEL) and isinstance(value, str) and _is_relative(value):
            found |= _inputs_of(key, value, folder, kept)
    return found


def _is_relative(value: str) -> bool:
    return not value.startswith(("~", SCHEME)) and "://" not in value and not Path(value).is_absolute()


def _inputs_of(key: str, value: str, folder: Path, kept: Path) -> dict[str, Path]:
    if ".." in Path(value).parts:
        raise UsageError(
            f"{key}={value}: outside the current folder, so it cannot go along. Submit from a folder above it, or give "
            f"an absolute path that the cluster has"
        )
    paths = _files(key.rpartition(".")[2], folder / value)
    if not paths:
        raise UsageError(f"{key}={value}: no folder with a model in it, {folder / value}")
    for path in paths:
        if NEVER & set(path.relative_to(folder).parts) or path.is_relative_to(kept):
            raise UsageError(f"{key}={value}: means {path} too, which never goes along. Name the data more closely")
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _files(key: str, place: Path) -> list[Path]:
    if key == DATA:
        return [file for source in sources.find(str(place), splits=True) for file in source.files]
    if key == MODEL:
        return [file for pattern in (*MODEL_FILES, *TOKENIZER_FILES) for file in sorted(place.glob(pattern))]
    return [place]


def _zip(archive: Path, files: Mapping[str, Path], limit_bytes: int) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, SAME_TIME)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with files[name].open("rb") as source, out.open(entry, "w", force_zip64=True) as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
                    if archive.stat().st_size > limit_bytes:
                        raise UsageError(_too_large(files, limit_bytes))


def _too_large(files: Mapping[str, Path], limit_bytes: int) -> str:
    sizes = sorted(((path.stat().st_size, name) for name, path in files.items()), reverse=True)
    largest = ", ".join(f"{name} {_mib(size)}" for size, name in sizes[:LARGEST_SHOWN])
    return (
        f"{len(files)} files of {_mib(sum(size for size, _ in sizes))} are too much to send with a job: compressed "
        f"too they pass the {_mib(limit_bytes)} that Ray takes. The largest: {largest}. Put the data where every "
        f"machine of the cluster can read it and give that absolute path: --set corpus.path=/shared/corpus.txt"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):.1f} MiB"
