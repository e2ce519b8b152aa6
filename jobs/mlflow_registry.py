"""The registry: one version for each exported classifier, carrying the chain of artifacts it was made from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from jobs.mlflow_models import find_model, is_export
from jobs.mlflow_runs import KEY, RUN, Book, set_tags
from jobs.record import StageRecord
from pipeline.publish import Manifest
from pipeline.store import Store

REGISTERED = "gristmill.registered"
CANDIDATE = "candidate"
LONGEST_DESCRIPTION = 5000


@dataclass(frozen=True)
class Link:
    """One artifact of a chain."""

    kind: str
    key: str
    manifest: Manifest


def register(book: Book) -> ModelVersion | None:
    """A version for every exported classifier of a record that asks for one; the last of them, or None.

    A record proposes its version as `candidate` once: sending it again later takes the alias from nobody.
    """
    if not book.record.register_name:
        return None
    exports = [link for stage in book.record.stages if (link := _export(book, stage))]
    versions = [_register_one(book, name, link) for name, link in _named(book, exports)]
    return versions[-1] if versions else None


def _export(book: Book, stage: StageRecord) -> tuple[StageRecord, Link] | None:
    manifest = book.store.find(stage.kind, stage.key) if stage.key and stage.status in ("built", "reused") else None
    if manifest is None or not is_export(manifest):
        return None
    return stage, Link(stage.kind, str(stage.key), manifest)


def _named(book: Book, exports: list[tuple[StageRecord, Link]]) -> Iterator[tuple[str, Link]]:
    """The name is the record's own; where a pipeline has several tasks, each adds its label."""
    for stage, link in exports:
        several = sum(other.kind == stage.kind for other in book.record.stages) > 1
        label = stage.name.removeprefix(stage.kind) if several else ""
        yield f"{book.record.register_name}{label}", link


def _register_one(book: Book, name: str, export: Link) -> ModelVersion:
    model = find_model(book, export.key)
    assert model is not None, "an export is logged before it is registered"
    version = _find_version(book, name, export.key) or _create_version(book, name, export, model)
    _name_versions(book, model, version)
    tag = f"{REGISTERED}.{name}"
    if book.parent.data.tags.get(tag) != str(version.version):
        book.client.set_registered_model_alias(name, CANDIDATE, str(version.version))
        set_tags(book.client, book.parent.info.run_id, {tag: str(version.version)})
    return version


def _find_version(book: Book, name: str, key: str) -> ModelVersion | None:
    found = book.client.search_model_versions(f"name = '{name}' AND tags.`{KEY}` = '{key}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _create_version(book: Book, name: str, export: Link, model: LoggedModel) -> ModelVersion:
    try:
        book.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    links = list(chain(book.store, export))
    return book.client.create_model_version(
        name,
        model.artifact_location,
        model.source_run_id,
        tags={KEY: export.key, RUN: book.record.run, **_lineage_tags(links)},
        description=_describe(book, links),
        model_id=model.model_id,
        await_creation_for=0,
    )


def _name_versions(book: Book, model: LoggedModel, version: ModelVersion) -> None:
    """Say on the model which versions it became: the page of a model links to them from this tag."""
    known = json.loads(model.tags.get("mlflow.modelVersions", "[]"))
    entry = {"name": version.name, "version": version.version}
    if entry not in known:
        book.client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([*known, entry])})


def chain(store: Store, link: Link) -> Iterator[Link]:
    """An artifact and everything it was made from, nearest first, each once."""
    seen, waiting = {link.key}, [link]
    while waiting:
        link = waiting.pop(0)
        yield link
        for needed in link.manifest.meta.get("input_keys", {}).values():
            upstream = store.find(needed["kind"], needed["key"])
            if upstream and needed["key"] not in seen:
                seen.add(needed["key"])
                waiting.append(Link(needed["kind"], needed["key"], upstream))


def _lineage_tags(links: list[Link]) -> dict[str, str]:
    """The key of every artifact in the chain, by kind, and the content digest of what has no input: the raw data."""
    keys = {f"gristmill.{link.kind}.key": link.key for link in reversed(links)}
    digests = {
        f"gristmill.{x.kind}.digest": x.manifest.digest for x in reversed(links) if not x.manifest.meta["input_keys"]
    }
    return keys | digests


def _describe(book: Book, links: list[Link]) -> str:
    rows = [f"| {x.kind} | `{x.key}` | `{x.manifest.digest}` | {_run_of(book, x.key)} |" for x in links]
    title = f"Made by run `{book.record.run}` from commit `{book.record.commit or 'unknown'}`."
    table = "\n".join(["| made from | key | digest | run |", "|---|---|---|---|", *rows])
    return f"{title}\n\n{table}"[:LONGEST_DESCRIPTION]


def _run_of(book: Book, key: str) -> str:
    if key in book.children:
        return f"`{book.children[key].info.run_id}`"
    stage = next((stage for stage in book.record.stages if stage.key == key), None)
    maker = book.parent.data.tags.get(f"gristmill.reused_from.{stage.name}", "") if stage else ""
    return f"`{maker}`" if maker else ""
