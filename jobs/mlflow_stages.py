"""What a finished stage shows in its run: summary numbers, datasets with digests, small files, models in and out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Run

from jobs.mlflow_models import find_model, mirror_model, model_ancestors, started_from
from jobs.mlflow_notes import stage_note
from jobs.mlflow_runs import Book, child_for, end, log_metrics, log_params, made_by, numbers, send_points, set_tags
from jobs.mlflow_tags import DIGEST, KEY, NOTE, SOURCES, URI, inputs_tags, params_of, sources_text
from jobs.record import StageRecord
from pipeline.ancestry import Link
from pipeline.publish import MANIFEST, Manifest

SCORES = ("test/accuracy", "test/macro_f1", "test/ece", "test/calibrated_ece", "baseline/macro_f1")
"""Of an evaluation, what is shown beside a model."""
DIGEST_CHARACTERS = 36
"""As long as MLflow lets a dataset's digest be."""


def mirror_stage(book: Book, number: int, stage: StageRecord) -> None:
    """Bring the run of one stage in line with what is on disk. A finished run is complete and left alone."""
    child = child_for(book, number, stage)
    if child is None or child.info.status == "FINISHED":
        return
    send_points(book, child, stage)
    if stage.status in ("built", "reused"):
        _show(book, child, stage)
        end(book, child, "FINISHED", stage.finished_ms)
    elif stage.status != "pending" or child.info.status == "RUNNING":
        ended = {"failed": "FAILED", "running": "RUNNING", "pending": "KILLED"}
        end(book, child, ended[stage.status], stage.finished_ms)


def _show(book: Book, child: Run, stage: StageRecord) -> None:
    assert stage.key is not None, "a stage that is there has a key"
    manifest = book.store.find(stage.kind, stage.key)
    if manifest is None:  # deleted since; its numbers were in the journal
        return
    artifact = book.store.path(stage.kind, stage.key)
    notes = manifest.meta.get("notes", {})
    link = Link(stage.kind, stage.key, manifest)
    _describe(book, child, link)
    log_metrics(book.client, child.info.run_id, _summary(artifact, notes))
    _link_datasets(book, child, notes)
    _upload_files(book, child, artifact, notes)
    _link_models(book, child, link)
    if "model" in notes:
        model = mirror_model(book, child, stage, manifest)
        if NOTE not in model.tags:
            book.client.set_logged_model_tags(model.model_id, {NOTE: stage_note(book, link)})
        _show_scores(book, child, manifest, model.model_id)


def _describe(book: Book, child: Run, link: Link) -> None:
    """Everything by which the chain can be walked later without this machine; and the same for a person."""
    meta = link.manifest.meta
    recipe = meta.get("recipe", {})
    tags = {
        **made_by(book.record),  # by the attempt that finished it
        DIGEST: link.manifest.digest,
        URI: book.store.path(link.kind, link.key).resolve().as_uri(),
        **inputs_tags({**meta.get("input_keys", {}), **_start(book, link)}),
        NOTE: stage_note(book, link),
    }
    if link.sources:
        tags[SOURCES] = sources_text(link.sources, recipe.get("sources", {}))
    log_params(book.client, child, params_of(link.kind, recipe))
    set_tags(book.client, child.info.run_id, tags)


def _start(book: Book, link: Link) -> dict[str, dict[str, str]]:
    """The registered classifier that a stage began with, as one more artifact that it used."""
    model = started_from(book, link)
    return {"init_from": {"kind": "export", "key": model.tags[KEY], "digest": model.tags[DIGEST]}} if model else {}


def _summary(artifact: Path, notes: Mapping[str, Any]) -> list[Metric]:
    """Stamped with the time of publication, which never changes, so that sending them again makes no second point."""
    published_ms = (artifact / MANIFEST).stat().st_mtime_ns // 1_000_000
    return numbers({"seconds": notes.get("seconds"), **notes.get("metrics", {})}, published_ms)


def _show_scores(book: Book, child: Run, manifest: Manifest, model_id: str) -> None:
    """The scores that a model comes with, on its own page and on that of the run that a version of it links to."""
    for needed in manifest.meta.get("input_keys", {}).values():
        evaluation = book.store.find(needed["kind"], needed["key"]) if needed["kind"] == "evaluate" else None
        if evaluation is None:
            continue
        for score in _summary(book.store.path(needed["kind"], needed["key"]), evaluation.meta.get("notes", {})):
            if score.key in SCORES:  # one by one: a batch does not reach the model
                book.client.log_metric(
                    child.info.run_id, score.key, score.value, score.timestamp, score.step, model_id=model_id
                )


def _link_datasets(book: Book, child: Run, notes: Mapping[str, Any]) -> None:
    inputs = [_dataset_input(**dataset) for dataset in notes.get("datasets", [])]
    if inputs:
        book.client.log_inputs(child.info.run_id, datasets=inputs)


def _dataset_input(name: str, source: str, digest: str, context: str) -> DatasetInput:
    scheme = urlsplit(source).scheme
    is_web = scheme in ("http", "https")
    where = {"url": source} if is_web else {"uri": source}
    dataset = Dataset(name, digest[:DIGEST_CHARACTERS], "http" if is_web else scheme or "local", json.dumps(where))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _upload_files(book: Book, child: Run, artifact: Path, notes: Mapping[str, Any]) -> None:
    for name in notes.get("files", []):
        folder = Path(name).parent.as_posix()
        book.client.log_artifact(child.info.run_id, str(artifact / name), None if folder == "." else folder)


def _link_models(book: Book, child: Run, link: Link) -> None:
    """The models this stage started from become inputs of its run."""
    inputs = book.client.get_run(child.info.run_id).inputs
    linked = {model.model_id for model in (inputs.model_inputs if inputs else [])}
    upstream = [find_model(book, key) for key in model_ancestors(book.store, link.manifest)]
    found = [*upstream, started_from(book, link)]
    new = [LoggedModelInput(model.model_id) for model in found if model and model.model_id not in linked]
    if new:
        book.client.log_inputs(child.info.run_id, models=new)
