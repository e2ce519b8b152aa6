"""The registry: one version for each exported classifier, carrying the chain of artifacts it was made from."""

import json
from collections.abc import Sequence

from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from jobs.mlflow_models import find_model, is_export
from jobs.mlflow_notes import chain_note, registered_note
from jobs.mlflow_runs import Book, runs_anywhere, set_tags
from jobs.mlflow_tags import CANDIDATE, CHAMPION, COMMIT, DIRTY, KEY, REGISTERED, RUN, is_set_aside
from jobs.record import StageRecord
from pipeline.ancestry import Link, made_from

LONGEST_DESCRIPTION = 5000


def register(book: Book) -> dict[str, ModelVersion]:
    """A version for every exported classifier of a record that asks for them, by export stage.

    A record proposes its version as `candidate` once, and not where a run that ended after the export has registered
    one: sending it again later takes the alias from nobody. What is the champion already is not
    proposed, nor what was rolled back.
    """
    if not book.record.register_name:
        return {}
    exports = [link for stage in book.record.stages if (link := _export(book, stage))]
    return {stage.name: _register_one(book, _named(book, stage), stage, link) for stage, link in exports}


def _export(book: Book, stage: StageRecord) -> tuple[StageRecord, Link] | None:
    manifest = book.store.find(stage.kind, stage.key) if stage.key and stage.status in ("built", "reused") else None
    if manifest is None or not is_export(manifest):
        return None
    return stage, Link(stage.kind, str(stage.key), manifest)


def _named(book: Book, stage: StageRecord) -> str:
    """The name that was given; else the record's, to which each of several tasks adds its label."""
    several = sum(other.kind == stage.kind for other in book.record.stages) > 1
    label = stage.name.removeprefix(stage.kind) if several else ""
    return book.record.register_names.get(stage.name, f"{book.record.register_name}{label}")


def _register_one(book: Book, name: str, stage: StageRecord, export: Link) -> ModelVersion:
    model = find_model(book, export.key)
    assert model is not None, "an export is logged before it is registered"
    version = _find_version(book, name, export.key) or _create_version(book, name, export, model)
    _name_versions(book, model, version)
    tag = f"{REGISTERED}.{name}"
    if book.parent.data.tags.get(tag) != str(version.version):
        if _is_news(book, version, stage, tag):
            book.client.set_registered_model_alias(name, CANDIDATE, str(version.version))
        set_tags(book.client, book.parent.info.run_id, {tag: str(version.version)})
    return version


def _is_news(book: Book, version: ModelVersion, stage: StageRecord, tag: str) -> bool:
    """Whether a version is neither champion nor set aside, and no run that ended after the export has registered."""
    champion = book.client.get_registered_model(version.name).aliases.get(CHAMPION)
    if str(champion) == str(version.version) or is_set_aside(version.tags):
        return False
    assert stage.finished_ms is not None, "a stage that is there has ended"
    return not runs_anywhere(book.client, f"tags.`{tag}` LIKE '%' AND attributes.end_time > {stage.finished_ms}")


def _find_version(book: Book, name: str, key: str) -> ModelVersion | None:
    found = book.client.search_model_versions(f"name = '{name}' AND tags.`{KEY}` = '{key}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _create_version(book: Book, name: str, export: Link, model: LoggedModel) -> ModelVersion:
    try:
        book.client.create_registered_model(name, description=registered_note(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    inputs = export.manifest.meta["input_keys"]
    links = [export, *made_from(book.store, {name: (needed["kind"], needed["key"]) for name, needed in inputs.items()})]
    return book.client.create_model_version(
        name,
        model.artifact_location,
        model.source_run_id,
        tags={KEY: export.key, RUN: book.record.run, **_code(book), **_lineage_tags(links)},
        description=chain_note(book, links, LONGEST_DESCRIPTION),
        model_id=model.model_id,
        await_creation_for=0,
    )


def _name_versions(book: Book, model: LoggedModel, version: ModelVersion) -> None:
    """Say on the model which versions it became: the page of a model links to them from this tag."""
    known = json.loads(model.tags.get("mlflow.modelVersions", "[]"))
    entry = {"name": version.name, "version": version.version}
    if entry not in known:
        book.client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([*known, entry])})


def _code(book: Book) -> dict[str, str]:
    return {COMMIT: book.record.commit, DIRTY: str(book.record.dirty)} if book.record.commit else {}


def _lineage_tags(links: Sequence[Link]) -> dict[str, str]:
    """The key of every artifact in the chain, by kind; and for those made of raw data, what that was."""
    tags = {f"gristmill.{link.kind}.key": link.key for link in links}
    for link in links:
        for source in link.sources:
            at = f"gristmill.{link.kind}"
            tags |= {f"{at}.digest": link.manifest.digest}
            tags |= {f"{at}.source": source["source"], f"{at}.source_digest": source["digest"]}
    return tags
