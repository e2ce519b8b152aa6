"""Models in MLflow: a base model by reference, an exported classifier in full, each made once for its artifact key."""

import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Run
from mlflow.exceptions import MlflowException

from jobs import pyfunc_classifier
from jobs.mlflow_runs import Book
from jobs.mlflow_tags import DIGEST, KEY, STAGE, URI
from jobs.record import StageRecord
from pipeline.ancestry import Link
from pipeline.publish import Manifest
from pipeline.store import Store

REQUIREMENTS = {
    "config.json": ("mlflow", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas"),
    "model.onnx": ("mlflow", "onnxruntime", "tokenizers", "numpy", "pandas"),
}
"""By a file that only one export format has: what serving it needs. Inferring this would take MLflow a minute."""


MODEL_ID = re.compile(r"^model_id: (\S+)$", re.MULTILINE)


def is_export(manifest: Manifest) -> bool:
    """Whether an artifact is a classifier in a format that runs without this package."""
    model = manifest.meta.get("notes", {}).get("model", {})
    return model.get("role") == "classifier" and any(name in manifest.files for name in REQUIREMENTS)


def model_ancestors(store: Store, manifest: Manifest) -> list[str]:
    """Keys of the nearest artifacts upstream that are models, each once."""
    found: dict[str, None] = {}
    for needed in manifest.meta.get("input_keys", {}).values():
        upstream = store.find(needed["kind"], needed["key"])
        if upstream is None:
            continue
        is_model = "model" in upstream.meta.get("notes", {})
        found |= dict.fromkeys([needed["key"]] if is_model else model_ancestors(store, upstream))
    return list(found)


def find_model(book: Book, key: str) -> LoggedModel | None:
    """The oldest logged model of an artifact, in any experiment, since a base model serves many pipelines."""
    experiments = [experiment.experiment_id for experiment in book.client.search_experiments()]
    oldest_first: list[dict[str, Any]] = [{"field_name": "creation_timestamp", "ascending": True}]
    found = book.client.search_logged_models(
        experiments, f"tags.`{KEY}` = '{key}'", max_results=1, order_by=oldest_first
    )
    return found[0] if found else None


def started_from(book: Book, link: Link) -> LoggedModel | None:
    """The registered classifier that a stage took its weights from: where MLflow put the files, it also says whose."""
    if "model" not in link.notes:
        return None
    cards = [Path(source["source"]).parent.parent / "MLmodel" for source in link.sources]
    ids = [MODEL_ID.search(card.read_text()) for card in cards if card.is_file()]
    found = [_logged(book, told[1]) for told in ids if told]
    return next((model for model in found if model and KEY in model.tags), None)


def _logged(book: Book, model_id: str) -> LoggedModel | None:
    try:
        return book.client.get_logged_model(model_id)
    except MlflowException as error:  # deleted since, or of another server
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return None


def mirror_model(book: Book, child: Run, stage: StageRecord, manifest: Manifest) -> LoggedModel:
    """The logged model of a stage, complete and linked as an output of its run."""
    assert stage.key is not None, "a stage that is there has a key"
    model = find_model(book, stage.key) or _create(book, child, stage, manifest)
    if model.status != LoggedModelStatus.READY:
        if is_export(manifest):
            _upload_classifier(book, model, book.store.path(stage.kind, stage.key))
        model = book.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    outputs = book.client.get_run(child.info.run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        book.client.log_outputs(child.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model


def _create(book: Book, child: Run, stage: StageRecord, manifest: Manifest) -> LoggedModel:
    path = book.store.path(stage.kind, str(stage.key)).resolve()
    tags = {KEY: str(stage.key), STAGE: stage.name, DIGEST: manifest.digest, URI: path.as_uri()}
    role = manifest.meta["notes"]["model"]["role"]
    return book.client.create_logged_model(
        book.experiment.experiment_id, stage.name, child.info.run_id, tags, None, role
    )


def _upload_classifier(book: Book, model: LoggedModel, artifact: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "model"
        pack_classifier(artifact, packed, model)
        book.client.log_model_artifacts(model.model_id, str(packed))


def pack_classifier(export: Path, target: Path, model: LoggedModel | None = None) -> None:
    """Write an exported classifier as an MLflow model at `target`: its files, the code that applies them, no pickle."""
    import mlflow.pyfunc  # a second or two, so only where a model is packed
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "classifier"
        shutil.copytree(export, files, copy_function=shutil.copyfile)
        mlflow.pyfunc.save_model(
            str(target),
            python_model=pyfunc_classifier.__file__,
            artifacts={pyfunc_classifier.ARTIFACT: str(files)},
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _requirements(export)],
            mlflow_model=Model(model_id=model.model_id, run_id=model.source_run_id) if model else None,
        )


def _requirements(export: Path) -> tuple[str, ...]:
    return next(packages for name, packages in REQUIREMENTS.items() if (export / name).is_file())
