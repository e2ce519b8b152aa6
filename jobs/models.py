"""Where a model's files are: an export folder, a `models:/` URI, or the name of a registered model."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from blake3 import blake3

from jobs.mlflow_client import alone, connect, reaching
from jobs.record import without_password
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from pipeline.pipeline_config import PipelineConfig

CONFIGS = ("config.json", "model.json")
"""What a folder with a model holds: the first in the Hugging Face layout, the second in ours, beside an ONNX graph."""

SCHEME = "models:/"
PREFERRED_ALIASES = ("champion", "candidate")
URI = re.compile(r"(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?")


def locate(model: str, home: Path, uri: str) -> Path:
    """The folder with the files of a model, as `pipeline.export.read` takes it: given, or from the registry.

    A bare name means its champion, else its candidate, else its newest version. Files that a server keeps are brought
    to `home` once. Raises UsageError with the nearest names where there is no such model, EnvironmentProblem where the
    registry cannot be reached.
    """
    folder = Path(model)
    if _is_model(folder):
        return folder
    if folder.is_dir():
        raise UsageError(f"{model}: neither {' nor '.join(CONFIGS)}, so this folder is no exported model")
    wanted = _parsed(model)
    with reaching(uri), alone(home):
        client = connect(uri)
        return _files(client, _find(client, **wanted), home)


def with_start(config: "PipelineConfig", home: Path, uri: str) -> "PipelineConfig":
    """The config with a folder in place of the registered model that `init_from` may name; raises as `locate`."""
    start = config.init_from
    if start is None or Path(start).is_dir() or not start.startswith(SCHEME):
        return config
    return replace(config, init_from=str(locate(start, home, uri)))


def version_of(client: "MlflowClient", model: str) -> "ModelVersion":
    """The version that NAME, NAME@ALIAS, models:/NAME@ALIAS or models:/NAME/VERSION means. Raises UsageError."""
    return _find(client, **_parsed(model))


def check_registered(client: "MlflowClient", name: str) -> None:
    """Raises UsageError, with the nearest names, where no model is registered under this one."""
    parsed = _parsed(name)
    if name != parsed["name"]:
        raise UsageError(f"{name}: give the name alone, {parsed['name']}; --version says which of its versions")
    _find(client, **parsed)


def _parsed(model: str) -> dict[str, Any]:
    wanted = URI.fullmatch(model.removeprefix(SCHEME))
    if wanted is None:
        raise UsageError(f"{model!r} names no model: give a folder, NAME, models:/NAME@ALIAS or models:/NAME/VERSION")
    return wanted.groupdict()


def _find(client: "MlflowClient", name: str, alias: str | None, version: str | None) -> "ModelVersion":
    known = {registered.name: registered for registered in _registered(client)}
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.3) or sorted(known)[:5]
        nothing = (
            "Nothing is registered there: gristmill run CONFIG does it; GRISTMILL_HOME or MLFLOW_TRACKING_URI say where"
        )
        where = without_password(client.tracking_uri)
        remedy = f"Nearest: {', '.join(near)}" if near else nothing
        raise UsageError(f"{name!r} is neither an export folder nor a registered model of {where}. {remedy}")
    if alias:
        return _by_alias(client, known[name], alias)
    return _by_version(client, name, version) if version else _best(client, known[name])


def _registered(client: "MlflowClient") -> "Iterator[RegisteredModel]":
    page = client.search_registered_models()
    yield from page
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        yield from page


def _by_alias(client: "MlflowClient", model: "RegisteredModel", alias: str) -> "ModelVersion":
    if alias not in model.aliases:
        raise UsageError(f"{model.name} has no alias {alias!r}; it has: {', '.join(sorted(model.aliases)) or 'none'}")
    return client.get_model_version_by_alias(model.name, alias)


def _by_version(client: "MlflowClient", name: str, version: str) -> "ModelVersion":
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    if version not in versions:
        raise UsageError(f"{name} has no version {version}; it has: {', '.join(sorted(versions, key=int))}")
    return versions[version]


def _best(client: "MlflowClient", model: "RegisteredModel") -> "ModelVersion":
    for alias in PREFERRED_ALIASES:
        if alias in model.aliases:
            return _by_alias(client, model, alias)
    versions = client.search_model_versions(f"name = '{model.name}'")
    if not versions:
        raise UsageError(f"{model.name} is registered but has no version yet")
    return max(versions, key=lambda version: int(version.version))


def _files(client: "MlflowClient", version: "ModelVersion", home: Path) -> Path:
    location = client.get_model_version_download_uri(version.name, str(version.version))
    root = _local(location) or _fetched(location, _kept(client.tracking_uri, location, version, home), client)
    found = [folder for folder in sorted(root.glob("artifacts/*")) if _is_model(folder)]
    if not found:
        raise UsageError(f"models:/{version.name}/{version.version} at {root} holds no model that can be read")
    return found[0]


def _is_model(folder: Path) -> bool:
    return any((folder / config).is_file() for config in CONFIGS)


def _local(location: str) -> Path | None:
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def _kept(uri: str, location: str, version: "ModelVersion", home: Path) -> Path:
    """Where the files of a version are kept: another server, or a model made anew, may give the same name and number.

    The location holds an id that MLflow gives to no second model.
    """
    files = blake3(f"{without_password(uri)}\0{location}".encode()).hexdigest(length=8)
    return home / "models" / f"{version.name}-{version.version}-{files}"


def _fetched(location: str, target: Path, client: "MlflowClient") -> Path:
    """A copy of files that a server keeps; a folder of this name is always whole."""
    if target.is_dir():
        return target
    import shutil
    import tempfile

    from mlflow.artifacts import download_artifacts

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        got = download_artifacts(location, dst_path=scratch, tracking_uri=client.tracking_uri)
        shutil.move(got, target)
    return target
